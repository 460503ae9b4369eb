package union_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// herd mounts n unions with one lower branch.
func herd(t testing.TB, n int, udba union.UDBA, specs ...string) (lower string, all []*stage) {
	t.Helper()
	base := prepare(t, 1, specs...)
	w, err := union.NewWatcher()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.Close()) })
	for range n {
		s := prepare(t, 0)
		s.mount(t, union.Config{UDBA: udba, Watcher: w, Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: base.lower(0, "")}}})
		all = append(all, s)
	}
	return base.lower(0, ""), all
}

// A liveChange changes the lower branch; seen says whether a union shows it.
type liveChange struct {
	name string
	do   func(lower string) error
	seen func(mnt string) bool
}

func liveChanges(i int) []liveChange {
	p := func(root, s string) string { return filepath.Join(root, "d", fmt.Sprint(s, i)) }
	size := func(path string, n int64) bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Size() == n
	}
	return []liveChange{
		{"create", func(l string) error { return os.WriteFile(p(l, "f"), []byte("one"), 0o644) }, func(m string) bool { return size(p(m, "f"), 3) }},
		{"write", func(l string) error { return os.WriteFile(p(l, "f"), []byte("longer"), 0o644) }, func(m string) bool { return size(p(m, "f"), 6) }},
		{"chmod", func(l string) error { return os.Chmod(p(l, "f"), 0o600) }, func(m string) bool {
			fi, err := os.Stat(p(m, "f"))
			return err == nil && fi.Mode() == 0o600
		}},
		{"rename", func(l string) error { return os.Rename(p(l, "f"), p(l, "g")) }, func(m string) bool { return missing(p(m, "f")) && size(p(m, "g"), 6) }},
		{"unlink", func(l string) error { return os.Remove(p(l, "g")) }, func(m string) bool { return missing(p(m, "g")) }},
		{"mkdir", func(l string) error { return os.Mkdir(p(l, "h"), 0o755) }, func(m string) bool {
			fi, err := os.Stat(p(m, "h"))
			return err == nil && fi.IsDir()
		}},
		{"rmdir", func(l string) error { return os.Remove(p(l, "h")) }, func(m string) bool {
			es, err := os.ReadDir(filepath.Join(m, "d"))
			return err == nil && missing(p(m, "h")) && !slices.ContainsFunc(es, func(e os.DirEntry) bool { return e.Name() == filepath.Base(p(m, "h")) })
		}},
	}
}

// TestLiveLower checks rule 11 B3: a change made directly on a lower branch
// shows in every union, within a second by the rule. By our own goal most do
// within 5 ms, which is checked of half of them: the rest may have waited for
// a processor that other tests had.
func TestLiveLower(t *testing.T) {
	for _, udba := range []union.UDBA{union.Notify, union.Strict} {
		t.Run("B3/"+string(udba), func(t *testing.T) {
			lower, all := herd(t, 4, udba, "l0/d/keep x")
			var lat []time.Duration
			for i := range 40 {
				for _, c := range liveChanges(i) {
					for _, s := range all {
						c.seen(s.mnt) // the kernel knows the state before
					}
					require.NoError(t, c.do(lower))
					start := time.Now()
					for _, s := range all {
						for !c.seen(s.mnt) {
							if time.Since(start) > time.Second {
								t.Fatalf("%s %d is not seen within a second", c.name, i)
							}
							if udba == union.Strict {
								t.Fatalf("%s %d is not seen at once", c.name, i)
							}
							time.Sleep(20 * time.Microsecond)
						}
						lat = append(lat, time.Since(start))
					}
				}
			}
			slices.Sort(lat)
			assert.Less(t, lat[len(lat)/2], 5*time.Millisecond)
			t.Logf("seen after p50 %v, p99 %v, max %v of %d", lat[len(lat)/2], lat[len(lat)*99/100], lat[len(lat)-1], len(lat))
		})
	}
	t.Run("sync", func(t *testing.T) {
		lower, all := herd(t, 3, union.Notify, "l0/d/keep x")
		for i := range 30 {
			for _, c := range liveChanges(i) {
				for _, s := range all {
					c.seen(s.mnt)
				}
				require.NoError(t, c.do(lower))
				for _, s := range all {
					require.NoError(t, s.Sync(bg))
					require.True(t, c.seen(s.mnt), "%s %d after Sync", c.name, i)
				}
			}
		}
	})
	t.Run("refresh-shows-changes-of-every-branch", func(t *testing.T) {
		for _, udba := range []union.UDBA{union.Notify, union.None} {
			s := prepare(t, 1, "l0/low x", "l0/d/e/f x", "rw/up x").mount(t, union.Config{UDBA: udba})
			for i := range 3 {
				names(t, s.mnt)
				names(t, s.path("d/e"))
				up, low, over := fmt.Sprint("up", i), fmt.Sprint("low", i), fmt.Sprint("d/e/over", i)
				for _, n := range []string{up, low, over} {
					assert.True(t, missing(s.path(n)))
				}
				build(t, s.dir, "rw/"+up+" x", "l0/"+low+" x", "rw/"+over+" x")
				require.NoError(t, s.Refresh(bg))
				for _, n := range []string{up, low, over} {
					assert.Equal(t, "x", s.read(t, n), "%s %s", udba, n)
				}
				require.NoError(t, os.Remove(s.rw(up)))
				require.NoError(t, s.Refresh(bg))
				assert.True(t, missing(s.path(up)))
			}
		}
	})
	t.Run("upper-wins", func(t *testing.T) {
		lower, all := herd(t, 1, union.Notify, "l0/a x", "l0/w x")
		s := all[0]
		s.write(t, "a", "mine")
		require.NoError(t, os.Remove(s.path("w")))
		require.NoError(t, os.WriteFile(lower+"/a", []byte("theirs"), 0o644))
		require.NoError(t, os.WriteFile(lower+"/w", []byte("theirs"), 0o644))
		require.NoError(t, s.Sync(bg))
		assert.Equal(t, "mine", s.read(t, "a"))
		assert.True(t, missing(s.path("w")))
	})
	t.Run("open-files-keep-their-inode", func(t *testing.T) {
		lower, all := herd(t, 1, union.Notify, "l0/a old")
		f, err := os.Open(all[0].path("a"))
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, os.Rename(lower+"/a", lower+"/b"))
		require.NoError(t, os.WriteFile(lower+"/a", []byte("new!"), 0o644))
		require.NoError(t, all[0].Sync(bg))
		b := make([]byte, 8)
		n, _ := f.ReadAt(b, 0)
		assert.Equal(t, "old", string(b[:n]))
		_, err = f.Stat()
		require.NoError(t, err)
		assert.Equal(t, "new!", all[0].read(t, "a"))
		assert.Equal(t, "old", all[0].read(t, "b"))
	})
	t.Run("a-directory-appears-below-one-in-use", func(t *testing.T) {
		lower, all := herd(t, 1, union.Notify, "l0/x x")
		s := all[0]
		require.NoError(t, os.Mkdir(s.path("d"), 0o755))
		d, err := os.Open(s.path("d"))
		require.NoError(t, err)
		defer d.Close()
		assert.Empty(t, names(t, s.path("d")))
		require.NoError(t, os.Mkdir(lower+"/d", 0o755))
		require.NoError(t, os.WriteFile(lower+"/d/f", []byte("y"), 0o644))
		require.NoError(t, s.Sync(bg))
		assert.Equal(t, []string{"f"}, names(t, s.path("d")))
		assert.Equal(t, "y", s.read(t, "d/f"))
		var st unix.Stat_t
		require.NoError(t, unix.Fstatat(int(d.Fd()), "f", &st, 0))
	})
	t.Run("a-directory-first-appears-on-a-middle-branch", func(t *testing.T) {
		s := prepare(t, 2, "l1/d/sub/low x", "l1/d/f low", "l0/other/").mount(t, union.Config{})
		low := func(p string) string { return s.lower(0, p) }
		for range 3 {
			// The kernel knows listings, files, and names that are not there.
			assert.Equal(t, []string{"f", "sub"}, names(t, s.path("d")))
			assert.Equal(t, []string{"low"}, names(t, s.path("d/sub")))
			assert.Equal(t, "low", s.read(t, "d/f"))
			for _, n := range []string{"d/new", "d/sub/new"} {
				assert.True(t, missing(s.path(n)))
			}
			d, err := os.Open(s.path("d/sub")) // in use, too
			require.NoError(t, err)
			build(t, low(""), "d/sub/new middle", "d/new middle", "d/f middle")
			require.NoError(t, s.Sync(bg))
			assert.Equal(t, []string{"f", "new", "sub"}, names(t, s.path("d")))
			assert.Equal(t, []string{"low", "new"}, names(t, s.path("d/sub")))
			for _, n := range []string{"d/f", "d/new", "d/sub/new"} {
				assert.Equal(t, "middle", s.read(t, n))
			}
			var st unix.Stat_t
			require.NoError(t, unix.Fstatat(int(d.Fd()), "new", &st, 0))
			require.NoError(t, d.Close())
			require.NoError(t, os.RemoveAll(low("d")))
			require.NoError(t, s.Sync(bg))
		}
	})
	t.Run("whiteouts-come-and-go-on-a-middle-branch", func(t *testing.T) {
		s := prepare(t, 3, "l2/a low", "l2/d/f low", "l2/d/sub/g low", "l1/d/mid mid", "l0/d/")
		s.mount(t, union.Config{Branches: []union.Branch{
			{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.ROWH}, {Path: s.lower(1, ""), Perm: union.ROWH}, {Path: s.lower(2, "")},
		}})
		for range 3 {
			for _, c := range []struct {
				mark         string
				gone, listed []string
			}{
				{"l0/.wh.a ", []string{"a"}, []string{"f", "mid", "sub"}},
				{"l0/d/.wh.f ", []string{"d/f"}, []string{"mid", "sub"}},
				{"l1/d/.wh.sub ", []string{"d/sub", "d/sub/g"}, []string{"f", "mid"}},
				{"l1/d/.wh..wh..opq ", []string{"d/f", "d/sub/g"}, []string{"mid"}},
				{"l0/d/.wh..wh..opq ", []string{"d/f", "d/mid"}, []string{}},
			} {
				for _, p := range []string{"a", "d/f", "d/sub/g"} {
					assert.Equal(t, "low", s.read(t, p), "before %s", c.mark)
				}
				assert.Equal(t, []string{"f", "mid", "sub"}, names(t, s.path("d")))
				build(t, s.dir, c.mark)
				require.NoError(t, s.Sync(bg))
				for _, p := range c.gone {
					assert.True(t, missing(s.path(p)), "%s after %s", p, c.mark)
				}
				assert.Equal(t, c.listed, names(t, s.path("d")), c.mark)
				require.NoError(t, os.Remove(strings.TrimSpace(s.dir+"/"+c.mark)))
				require.NoError(t, s.Sync(bg))
			}
		}
	})
	t.Run("hidden-links-are-counted-again", func(t *testing.T) {
		s := prepare(t, 2, "l1/a text", "l1/b = a", "l1/c = a").mount(t, union.Config{})
		require.NoError(t, os.Remove(s.path("b")))
		assert.EqualValues(t, 2, lstat(t, s.path("a")).Nlink)
		require.NoError(t, os.Remove(s.lower(1, "b")))
		require.NoError(t, s.Sync(bg))
		links := func(want uint64) {
			t.Helper()
			assert.Eventually(t, func() bool { return uint64(lstat(t, s.path("a")).Nlink) == want }, 5*time.Second, time.Millisecond)
		}
		links(2)
		build(t, s.dir, "l0/c other")
		require.NoError(t, s.Sync(bg))
		links(1)
	})
	t.Run("overflow", func(t *testing.T) {
		lower, all := herd(t, 1, union.Notify, "l0/d/keep x")
		s := all[0]
		names(t, s.path("d"))
		var wg sync.WaitGroup
		for k := range 2 {
			wg.Go(func() {
				for i := range 12000 {
					os.WriteFile(fmt.Sprintf("%s/d/%d-%d", lower, k, i), nil, 0o600)
				}
			})
		}
		wg.Wait()
		require.NoError(t, s.Sync(bg))
		assert.Len(t, names(t, s.path("d")), 24001)
		t.Logf("%+v", s.Stats())
	})
}

// TestConcurrent works on one mount from many goroutines while the lower
// branch changes and branches come and go; each worker checks what only it
// changes.
func TestConcurrent(t *testing.T) {
	s := prepare(t, 1, "l0/shared/a x", "l0/shared/b y", "extra/e/f x")
	for w := range 6 {
		for i := range 20 {
			build(t, s.dir, fmt.Sprintf("l0/w%d/f%d low%d", w, i, i))
		}
	}
	s.mount(t, union.Config{})
	ctx, cancel := context.WithTimeout(bg, 3*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	fail := make(chan error, 100)
	for w := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 7))
			dir := s.path(fmt.Sprint("w", w))
			have := map[string]string{}
			for i := range 20 {
				have[fmt.Sprint("f", i)] = fmt.Sprint("low", i)
			}
			for n := 0; ctx.Err() == nil; n++ {
				k := fmt.Sprint("f", r.IntN(25))
				p := filepath.Join(dir, k)
				old, ok := have[k]
				var err error
				switch r.IntN(5) {
				case 0:
					v := fmt.Sprint("v", n)
					if err = os.WriteFile(p, []byte(v), 0o644); err == nil {
						have[k] = v
					}
				case 1:
					if err = os.Remove(p); ok && err == nil {
						delete(have, k)
					} else if !ok && os.IsNotExist(err) {
						err = nil
					}
				case 2:
					to := fmt.Sprint("f", r.IntN(25))
					if err = os.Rename(p, filepath.Join(dir, to)); ok && err == nil {
						if to != k {
							delete(have, k)
						}
						have[to] = old
					} else if !ok && os.IsNotExist(err) {
						err = nil
					}
				default:
					var b []byte
					b, err = os.ReadFile(p)
					if !ok && os.IsNotExist(err) {
						err = nil
					} else if err == nil && (!ok || string(b) != old) {
						err = fmt.Errorf("%s holds %q, want %q", p, b, old)
					}
				}
				if err != nil {
					fail <- fmt.Errorf("worker %d step %d: %w", w, n, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			p := filepath.Join(s.lower(0, "shared"), fmt.Sprint(i%10))
			os.WriteFile(p, []byte("x"), 0o644)
			os.Remove(p)
			os.ReadDir(s.path("shared"))
		}
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := s.Append(bg, union.Branch{Path: s.dir + "/extra"}); err != nil {
				fail <- err
				return
			}
			if b, err := os.ReadFile(s.path("e/f")); err != nil || string(b) != "x" {
				fail <- fmt.Errorf("e/f: %q %w", b, err)
			}
			for {
				err := s.Delete(bg, s.dir+"/extra")
				if err == nil {
					break
				}
				if !strings.Contains(err.Error(), "busy") {
					fail <- err
					return
				}
				time.Sleep(time.Millisecond)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	wg.Wait()
	close(fail)
	for err := range fail {
		t.Error(err)
	}
}

// TestManyMounts checks that a mount costs no thread and little memory.
func TestManyMounts(t *testing.T) {
	n := 200
	if testing.Short() {
		n = 20
	}
	before := procField(t, "self/status", "Threads")
	mem := procField(t, "self/status", "VmRSS")
	_, all := herd(t, n, union.Notify, "l0/d/f text")
	for _, s := range all {
		assert.Equal(t, "text", s.read(t, "d/f"))
	}
	threads, kib := procField(t, "self/status", "Threads")-before, (procField(t, "self/status", "VmRSS")-mem)/n
	t.Logf("%d mounts: %d more threads, %d KiB each", n, threads, kib)
	assert.Less(t, threads, n/2+10)
	assert.Less(t, kib, 512)
}
