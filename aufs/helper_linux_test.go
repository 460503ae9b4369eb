package aufs_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/unionhost"
)

// helped is a mounted layer that a helper serves.
type helped struct {
	root, path string
	command    []string // of the helper
	d          *aufs.Driver
	client     *unionhost.Client
}

func newHelped(t *testing.T) *helped {
	t.Helper()
	return newHelpedBy(t, helper)
}

func newHelpedBy(t *testing.T, command []string) *helped {
	t.Helper()
	requireEngine(t, harness())
	h := &helped{root: t.TempDir(), command: command}
	t.Cleanup(func() {
		// What the helper has to say of itself is seen nowhere else.
		log, err := os.ReadFile(h.root + "/aufs/serve/log")
		require.NoError(t, err)
		for _, bad := range []string{"DATA RACE", "panic", "[bug]", "level=ERROR"} {
			require.NotContains(t, string(log), bad)
		}
	})
	h.d = h.open(t)
	require.NoError(t, h.d.Create(t.Context(), "base", "", nil))
	base, err := h.d.Get(t.Context(), "base", nil)
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(base+"/dir", 0o755))
	for i := range 300 {
		require.NoError(t, os.WriteFile(fmt.Sprintf("%s/dir/%03d", base, i), []byte("low"), 0o644))
	}
	require.NoError(t, h.d.Put(t.Context(), "base"))
	require.NoError(t, h.d.Create(t.Context(), "top", "base", nil))
	h.path, err = h.d.Get(t.Context(), "top", nil)
	require.NoError(t, err)
	h.client = &unionhost.Client{Dir: h.root + "/aufs/serve"}
	return h
}

func (h *helped) open(t *testing.T) *aufs.Driver {
	t.Helper()
	d, err := aufs.New(h.root, &aufs.Options{Engine: aufs.FUSE, Helper: h.command})
	require.NoError(t, err)
	t.Cleanup(func() {
		if err := d.Close(); !errors.Is(err, layerfs.ErrClosed) {
			require.NoError(t, err)
		}
	})
	return d
}

// worker is one of the two processes.
func (h *helped) worker(t *testing.T) int {
	t.Helper()
	info, err := h.client.Info(t.Context())
	require.NoError(t, err)
	return info.PID
}

func requireResend(t *testing.T) {
	t.Helper()
	testenv.RequireKernel(t, "6.9", "requests that come again (FUSE_NOTIFY_RESEND)")
}

// keeper is the other one.
func (h *helped) keeper(t *testing.T) int {
	t.Helper()
	info, err := h.client.Info(t.Context())
	require.NoError(t, err)
	return info.Keeper
}

// killBoth kills both so that the worker has no time to start another keeper.
func (h *helped) killBoth(t *testing.T) {
	t.Helper()
	info, err := h.client.Info(t.Context())
	require.NoError(t, err)
	require.NoError(t, unix.Kill(info.PID, unix.SIGSTOP))
	require.NoError(t, unix.Kill(info.Keeper, unix.SIGKILL))
	require.NoError(t, unix.Kill(info.PID, unix.SIGKILL))
}

// kill kills the worker, which another one follows and goes on.
func (h *helped) kill(t *testing.T) {
	t.Helper()
	requireResend(t)
	pid := h.worker(t)
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.NotEqual(t, pid, h.worker(t))
}

// TestHelperOutlivesProgram: a mount goes on when the program that made it is
// killed, and ends with the last Put of another.
func TestHelperOutlivesProgram(t *testing.T) {
	requireEngine(t, harness())
	root := t.TempDir()
	d, err := aufs.New(root, &aufs.Options{Engine: aufs.FUSE, Helper: helper})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	s := newServerOf(t, "aufs", root)
	s.do(t, "get top")
	path := root + "/aufs/mnt/top"
	f, err := os.Create(path + "/f")
	require.NoError(t, err)
	defer f.Close()
	s.kill()
	_, err = f.WriteString("after its end")
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	again, err := d.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.Equal(t, path, again)
	b, err := os.ReadFile(path + "/f")
	require.NoError(t, err)
	require.Equal(t, "after its end", string(b))
	require.NoError(t, f.Close())
	require.NoError(t, d.Put(ctx, "top"))
	require.NoFileExists(t, path+"/f")
}

// TestPersist: a Get that persists outlives its driver.
func TestPersist(t *testing.T) {
	requireResend(t)
	h := newHelped(t)
	ctx := t.Context()
	require.NoError(t, h.d.Put(ctx, "top"))
	d := h.open(t)
	path, err := d.Get(ctx, "top", &layerfs.GetOptions{Persist: true})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path+"/f", []byte("x"), 0o644))
	require.NoError(t, d.Close())
	h.kill(t)
	require.FileExists(t, path+"/f")
	require.NoError(t, h.d.Put(ctx, "top"))
	require.NoFileExists(t, path+"/f")
	require.ErrorIs(t, h.d.Put(ctx, "top"), layerfs.ErrNotHeld)
}

// TestWorkerKilled: what is open when the worker is killed goes on.
func TestWorkerKilled(t *testing.T) {
	requireResend(t)
	h := newHelped(t)
	p := func(name string) string { return filepath.Join(h.path, name) }

	read, err := os.Open(p("dir/001"))
	require.NoError(t, err)
	defer read.Close()
	old, err := os.Open(p("dir/002")) // copied up behind its back
	require.NoError(t, err)
	defer old.Close()
	up, err := os.OpenFile(p("dir/002"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer up.Close()
	_, err = up.WriteAt([]byte("UP"), 0)
	require.NoError(t, err)
	moved, err := os.Create(p("new"))
	require.NoError(t, err)
	defer moved.Close()
	require.NoError(t, os.Rename(p("new"), p("dir/moved")))
	gone, err := os.Create(p("gone"))
	require.NoError(t, err)
	defer gone.Close()
	_, err = gone.WriteString("content")
	require.NoError(t, err)
	require.NoError(t, os.Remove(p("gone")))
	require.NoError(t, os.WriteFile(p("gone"), []byte("another"), 0o644))
	covered, err := os.OpenFile(p("dir/003"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer covered.Close()
	require.NoError(t, os.Rename(p("dir/004"), p("dir/003")))
	lowGone, err := os.Open(p("dir/005"))
	require.NoError(t, err)
	defer lowGone.Close()
	require.NoError(t, os.Remove(p("dir/005")))
	tmp, err := unix.Open(h.path, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	require.NoError(t, err)
	nameless := os.NewFile(uintptr(tmp), "nameless")
	defer nameless.Close()
	_, err = nameless.WriteString("no name")
	require.NoError(t, err)
	require.NoError(t, os.Link(p("gone"), p("link")))
	linked, err := os.Open(p("gone"))
	require.NoError(t, err)
	defer linked.Close()
	require.NoError(t, os.Remove(p("gone"))) // it has its other name
	dir, err := os.Open(p("dir"))
	require.NoError(t, err)
	defer dir.Close()
	first, err := dir.Readdirnames(20)
	require.NoError(t, err)
	before := inodes(t, h.path)

	for range 3 {
		h.kill(t)

		content := func(f *os.File, want string) {
			t.Helper()
			b, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
			assert.NoError(t, err, f.Name())
			assert.Equal(t, want, string(b), f.Name())
			fi, err := f.Stat()
			if assert.NoError(t, err, f.Name()) {
				assert.EqualValues(t, len(want), fi.Size(), f.Name())
			}
		}
		content(read, "low")
		b := make([]byte, 3)
		_, err = old.ReadAt(b, 0)
		assert.NoError(t, err)
		assert.Equal(t, "low", string(b))
		content(up, "UPw")
		content(gone, "content")
		content(nameless, "no name")
		content(covered, "low")
		content(lowGone, "low")
		content(linked, "another")
		for _, f := range []*os.File{up, moved, gone, covered, nameless} {
			assert.NoError(t, f.Sync(), f.Name())
			assert.NoError(t, f.Truncate(40), f.Name())
			fi, err := f.Stat()
			if assert.NoError(t, err, f.Name()) {
				assert.EqualValues(t, 40, fi.Size(), f.Name())
			}
		}
		assert.NoError(t, up.Truncate(3))
		assert.NoError(t, gone.Truncate(7))
		assert.NoError(t, covered.Truncate(3))
		assert.NoError(t, nameless.Truncate(7))
		assert.Equal(t, before, inodes(t, h.path), "st_ino")
		fd, err := unix.Openat(int(dir.Fd()), "moved", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if assert.NoError(t, err) {
			var a, b unix.Stat_t
			assert.NoError(t, unix.Fstat(fd, &a))
			assert.NoError(t, unix.Fstat(int(moved.Fd()), &b))
			assert.Equal(t, a.Ino, b.Ino)
			unix.Close(fd)
		}
		require.NoError(t, os.WriteFile(p("dir/later"), []byte("later"), 0o644))
		require.NoError(t, os.Remove(p("dir/later")))
	}
	rest, err := dir.Readdirnames(-1)
	require.NoError(t, err)
	all := append(first, rest...)
	slices.Sort(all)
	want, err := os.ReadDir(p("dir"))
	require.NoError(t, err)
	var names []string
	for _, e := range want {
		names = append(names, e.Name())
	}
	require.Equal(t, names, all, "a listing that goes on")

	for _, f := range []*os.File{read, old, up, moved, gone, covered, lowGone, nameless, linked, dir} {
		require.NoError(t, f.Close())
	}
	require.NoError(t, h.d.Put(t.Context(), "top"))
}

// inodes returns the numbers of all files of a tree.
func inodes(t *testing.T, dir string) map[string]uint64 {
	t.Helper()
	m := map[string]uint64{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		m[p] = st.Ino
		return nil
	}))
	return m
}

// TestWorkerKilledCleanly: a kernel that does not send requests again gives
// ENOTCONN when the worker is killed, and the next New and Get mount again.
func TestWorkerKilledCleanly(t *testing.T) {
	if sys.KernelAtLeast(6, 9) {
		t.Skip("the kernel sends requests again: TestWorkerKilled")
	}
	h := newHelped(t)
	ctx := t.Context()
	require.NoError(t, os.WriteFile(h.path+"/f", []byte("x"), 0o644))
	require.NoError(t, unix.Kill(h.worker(t), unix.SIGKILL))
	_, err := os.Stat(h.path + "/dir/001")
	if !errors.Is(err, unix.ECONNABORTED) { // what waited while the connection was ended
		require.ErrorIs(t, err, unix.ENOTCONN)
	}
	_, err = os.Stat(h.path + "/dir/002")
	require.ErrorIs(t, err, unix.ENOTCONN)
	d := h.open(t)
	path, err := d.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.FileExists(t, path+"/f")
	require.NoError(t, d.Put(ctx, "top"))
	require.NoError(t, h.d.Put(ctx, "top"))
}

// TestKeeperKilled: a worker whose keeper was killed starts another, without a
// call, and gives it all there is: then it can be killed like any other, and
// files without a name go on, too.
func TestKeeperKilled(t *testing.T) {
	requireResend(t)
	h := newHelped(t)
	ctx := t.Context()
	up, err := os.OpenFile(h.path+"/dir/001", os.O_RDWR, 0)
	require.NoError(t, err)
	defer up.Close()
	gone, err := os.Create(h.path + "/gone")
	require.NoError(t, err)
	defer gone.Close()
	require.NoError(t, os.Remove(h.path+"/gone"))
	for round := range 4 {
		before, err := h.client.Info(ctx)
		require.NoError(t, err)
		require.NoError(t, unix.Kill(before.Keeper, unix.SIGKILL))
		// What begins without a keeper.
		require.NoError(t, h.d.Create(ctx, fmt.Sprint("other", round), "base", nil))
		path, err := h.d.Get(ctx, fmt.Sprint("other", round), nil)
		require.NoError(t, err)
		tmp, err := unix.Open(h.path, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		require.NoError(t, err)
		nameless := os.NewFile(uintptr(tmp), "nameless")
		_, err = nameless.WriteString("no name")
		require.NoError(t, err)
		if round%2 == 0 {
			require.NoError(t, h.d.ReplaceHelper(ctx)) // when the keeper has all
		} else {
			require.Eventually(t, func() bool { return h.keeper(t) != 0 && h.keeper(t) != before.Keeper }, 10*time.Second, time.Millisecond)
			time.Sleep(100 * time.Millisecond) // until it has all
			h.kill(t)
		}
		after, err := h.client.Info(ctx)
		require.NoError(t, err)
		require.NotEqual(t, before.PID, after.PID)
		require.NotEqual(t, before.Keeper, after.Keeper)
		require.NoError(t, os.WriteFile(path+"/f", nil, 0o644))
		for _, f := range []*os.File{up, gone, nameless} {
			_, err := f.WriteString("on")
			require.NoError(t, err, "%s in round %d", f.Name(), round)
			require.NoError(t, f.Sync())
		}
		b := make([]byte, 9)
		_, err = nameless.ReadAt(b, 0)
		require.NoError(t, err)
		require.Equal(t, "no nameon", string(b))
		require.NoError(t, nameless.Close())
	}
	for round := range 4 {
		require.NoError(t, h.d.Put(ctx, fmt.Sprint("other", round)))
	}
	for _, f := range []*os.File{up, gone} {
		require.NoError(t, f.Close())
	}
	require.NoError(t, h.d.Put(ctx, "top"))
}

// TestKeeperKilledByTwo kills keepers while two drivers open and use the root:
// there is one helper, and no call fails.
func TestKeeperKilledByTwo(t *testing.T) {
	h := newHelped(t)
	ctx := t.Context()
	var stop atomic.Bool
	var users sync.WaitGroup
	for n := range 2 {
		users.Go(func() {
			id := fmt.Sprint("of", n)
			for round := 0; !stop.Load() && !t.Failed(); round++ {
				d, err := aufs.New(h.root, &aufs.Options{Engine: aufs.FUSE, Helper: h.command})
				if !assert.NoError(t, err) {
					return
				}
				assert.NoError(t, d.Create(ctx, id, "base", nil))
				path, err := d.Get(ctx, id, nil)
				assert.NoError(t, err)
				assert.NoError(t, os.WriteFile(path+"/f", nil, 0o644))
				assert.NoError(t, d.Put(ctx, id))
				assert.NoError(t, d.Remove(ctx, id))
				assert.NoError(t, d.Close())
			}
		})
	}
	pid := h.worker(t)
	last := 0
	for range 15 {
		var keeper int
		require.Eventually(t, func() bool {
			keeper = h.keeper(t)
			return keeper != 0 && keeper != last
		}, 10*time.Second, time.Millisecond)
		last = keeper
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
		require.NoError(t, unix.Kill(keeper, unix.SIGKILL))
	}
	stop.Store(true)
	users.Wait()
	require.Equal(t, pid, h.worker(t))
	require.NoError(t, h.d.Put(ctx, "top"))
}

// TestHelperKilled: when both are killed, users get ENOTCONN, and the next New
// detaches the mount, so that a Get mounts again.
func TestHelperKilled(t *testing.T) {
	h := newHelped(t)
	ctx := t.Context()
	require.NoError(t, os.WriteFile(h.path+"/f", []byte("x"), 0o644))
	h.killBoth(t)
	require.Eventually(t, func() bool {
		_, err := os.Stat(h.path + "/f")
		return assert.ObjectsAreEqual(unix.ENOTCONN, unwrapped(err))
	}, 10*time.Second, 5*time.Millisecond)
	d := h.open(t)
	path, err := d.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.FileExists(t, path+"/f")
	require.NoError(t, d.Put(ctx, "top"))
	require.FileExists(t, path+"/f", "held by the first driver")
	require.NoError(t, h.d.Put(ctx, "top"))
}

func unwrapped(err error) error {
	if p, ok := err.(*os.PathError); ok {
		return p.Err
	}
	return err
}

// TestReplaceHelper: another program takes over what is mounted, also if that is
// the one that asks for it.
func TestReplaceHelper(t *testing.T) {
	requireResend(t)
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	exe := t.TempDir() + "/other" // the same program under another name
	require.NoError(t, os.WriteFile(exe, self, 0o755))
	own, err := os.Readlink("/proc/self/exe")
	require.NoError(t, err)
	other := []string{exe}
	for name, tc := range map[string]struct {
		from, to []string
		want     string
	}{
		"other": {aufs.Main(), other, exe},
		"self":  {other, aufs.Main(), own},
	} {
		t.Run(name, func(t *testing.T) { testReplace(t, tc.from, tc.to, tc.want) })
	}
}

func testReplace(t *testing.T, from, to []string, want string) {
	h := newHelpedBy(t, from)
	f, err := os.Create(h.path + "/f")
	require.NoError(t, err)
	defer f.Close()
	d, err := aufs.New(h.root, &aufs.Options{Engine: aufs.FUSE, Helper: to})
	require.NoError(t, err)
	defer d.Close()
	pid := h.worker(t)
	require.NoError(t, d.ReplaceHelper(t.Context()))
	require.Eventually(t, func() bool { return h.worker(t) != pid }, 20*time.Second, 10*time.Millisecond)
	target, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", h.worker(t)))
	require.NoError(t, err)
	require.Equal(t, want, target)
	_, err = f.WriteString("x")
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
	require.NoError(t, h.d.Put(t.Context(), "top"))
}

// rounds is how often the tests under load kill.
func rounds(t *testing.T) int {
	t.Helper()
	s := os.Getenv("LAYERFS_KILL_ROUNDS")
	if s == "" {
		return 10
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// killApart kills first the keeper and after some time the worker, and reports
// whether the mount lives on.
func (h *helped) killApart(t *testing.T, between time.Duration) bool {
	t.Helper()
	info, err := h.client.Info(t.Context())
	require.NoError(t, err)
	require.NoError(t, unix.Kill(info.Keeper, unix.SIGKILL))
	time.Sleep(between)
	require.NoError(t, unix.Kill(info.PID, unix.SIGKILL))
	var st unix.Statfs_t // which the kernel never knows by itself
	err = unix.Statfs(h.path, &st)
	if err == nil {
		return true
	}
	if !errors.Is(err, unix.ECONNABORTED) {
		require.ErrorIs(t, err, unix.ENOTCONN)
	}
	return false
}

// TestKillAll kills keeper and worker at random moments under load. Operations
// then fail, and none hangs; after the next New and Get what was synced before
// is there, what was removed is not, and every name that is listed can be
// looked up.
func TestKillAll(t *testing.T) {
	h := newHelped(t)
	ctx := t.Context()
	const workers = 3
	type file struct {
		text  string
		known bool // an operation on it did not fail
	}
	files := make([]map[string]file, workers)
	for w := range files {
		files[w] = map[string]file{}
		require.NoError(t, os.Mkdir(fmt.Sprintf("%s/w%d", h.path, w), 0o755))
	}
	r := rand.New(rand.NewPCG(9, 9))
	steps, survived := 0, 0
	for range rounds(t) {
		var wg sync.WaitGroup
		var count atomic.Int64
		for w := range workers {
			seed := r.Uint64()
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, uint64(w)))
				for n := 0; ; n++ {
					name := fmt.Sprintf("w%d/%d", w, r.IntN(15))
					if r.IntN(3) == 0 {
						name = fmt.Sprintf("dir/%03d", w*100+r.IntN(100))
					}
					p := h.path + "/" + name
					files[w][name] = file{} // whatever happens now
					if r.IntN(4) == 0 {
						if err := os.Remove(p); err != nil && !os.IsNotExist(err) {
							return
						}
						files[w][name] = file{known: true}
					} else {
						text := fmt.Sprint(w, n, r.Uint32())
						f, err := os.Create(p)
						if err != nil {
							return
						}
						_, err = f.WriteString(text)
						if err == nil {
							err = f.Sync()
						}
						if cerr := f.Close(); err == nil {
							err = cerr
						}
						if err != nil {
							return
						}
						files[w][name] = file{text, true}
					}
					count.Add(1)
				}
			})
		}
		time.Sleep(time.Duration(20+r.IntN(40)) * time.Millisecond)
		if r.IntN(2) == 0 {
			h.killBoth(t)
		} else if h.killApart(t, time.Duration(r.IntN(30))*time.Millisecond) {
			// All goes on, as long as nothing else happens.
			survived++
			h.killBoth(t)
		}
		wg.Wait()
		steps += int(count.Load())

		d := h.open(t)
		_, err := d.Get(ctx, "top", nil)
		require.NoError(t, err)
		for _, list := range files {
			for name, f := range list {
				if !f.known {
					continue
				}
				b, err := os.ReadFile(h.path + "/" + name)
				if f.text == "" {
					require.ErrorIs(t, err, os.ErrNotExist, name)
					continue
				}
				require.NoError(t, err)
				require.Equal(t, f.text, string(b), name)
			}
		}
		inodes(t, h.path)
		require.NoError(t, d.Put(ctx, "top"))
		require.NoError(t, d.Close())
	}
	require.NoError(t, h.d.Put(ctx, "top"))
	t.Logf("%d kills of both, %d survived at first, %d steps", rounds(t), survived, steps)
}

// TestKillRounds kills the worker at random moments under load. No operation
// fails, no data that was synced is lost, and files that are open go on. The
// number of kills is LAYERFS_KILL_ROUNDS, or 10.
func TestKillRounds(t *testing.T) {
	requireResend(t)
	rounds := rounds(t)
	h := newHelped(t)
	var stop atomic.Bool
	var wg sync.WaitGroup
	var ops, longest atomic.Int64
	const workers = 3
	final := make([]map[string]string, workers)
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(7, uint64(w)))
			dir := fmt.Sprintf("%s/w%d", h.path, w)
			want := map[string]string{}
			final[w] = want
			check := func(op string, err error) {
				if err != nil {
					t.Errorf("worker %d: %s: %v", w, op, err)
				}
			}
			check("mkdir", os.Mkdir(dir, 0o755))
			open, err := os.OpenFile(dir+"/open", os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
			check("open", err)
			defer open.Close()
			lines := ""
			for n := 0; !stop.Load() && !t.Failed(); n++ {
				began := time.Now()
				name := fmt.Sprintf("f%02d", r.IntN(20))
				p := dir + "/" + name
				_, there := want[name]
				switch r.IntN(8) {
				case 0:
					if there {
						check("remove", os.Remove(p))
						delete(want, name)
					}
				case 1:
					to := fmt.Sprintf("f%02d", r.IntN(20))
					if there && to != name {
						check("rename", os.Rename(p, dir+"/"+to))
						want[to] = want[name]
						delete(want, name)
					}
				case 2:
					check("mkdir", os.Mkdir(p+".d", 0o755))
					check("rmdir", os.Remove(p+".d"))
				case 3:
					check("symlink", os.Symlink("target", p+".l"))
					check("link", os.Link(p+".l", p+".m"))
					check("remove", os.Remove(p+".l"))
					check("remove", os.Remove(p+".m"))
				case 4: // a file of the base
					low := fmt.Sprintf("%s/dir/%03d", h.path, w*100+r.IntN(100))
					b, err := os.ReadFile(low)
					check("read", err)
					if err == nil && !strings.HasPrefix(string(b), "low") {
						t.Errorf("worker %d: %s has %q", w, low, b)
					}
					f, err := os.OpenFile(low, os.O_WRONLY|os.O_APPEND, 0)
					check("open", err)
					if err == nil {
						_, err = f.WriteString("+")
						check("append", err)
						check("close", f.Close())
					}
				case 5: // the file that stays open
					line := fmt.Sprintf("%d\n", n)
					_, err := open.WriteString(line)
					check("append", err)
					check("fsync", open.Sync())
					lines += line
					fi, err := open.Stat()
					check("fstat", err)
					if err == nil && fi.Size() != int64(len(lines)) {
						t.Errorf("worker %d: %d bytes in the open file, %d written", w, fi.Size(), len(lines))
					}
				default:
					text := fmt.Sprint(w, n)
					f, err := os.Create(p)
					check("create", err)
					if err == nil {
						_, err = f.WriteString(text)
						check("write", err)
						check("fsync", f.Sync())
						check("close", f.Close())
						want[name] = text
					}
				}
				ops.Add(1)
				if d := int64(time.Since(began)); d > longest.Load() {
					longest.Store(d)
				}
			}
			want["open"] = lines
		})
	}
	r := rand.New(rand.NewPCG(5, 5))
	for range rounds {
		time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
		if t.Failed() {
			break
		}
		h.kill(t)
	}
	stop.Store(true)
	wg.Wait()
	if t.Failed() {
		log, _ := os.ReadFile(h.root + "/aufs/serve/log")
		t.Logf("%s", log)
	}
	checkAll := func() {
		for w, want := range final {
			dir := fmt.Sprintf("%s/w%d", h.path, w)
			for name, text := range want {
				b, err := os.ReadFile(dir + "/" + name)
				assert.NoError(t, err)
				assert.Equal(t, text, string(b), name)
			}
			entries, err := os.ReadDir(dir)
			assert.NoError(t, err)
			assert.Len(t, entries, len(want))
		}
	}
	checkAll()
	require.NoError(t, h.d.Put(t.Context(), "top"))
	_, err := h.d.Get(t.Context(), "top", nil)
	require.NoError(t, err)
	checkAll() // also what is on the branch
	require.NoError(t, h.d.Put(t.Context(), "top"))
	t.Logf("%d kills, %d steps, longest %v", rounds, ops.Load(), time.Duration(longest.Load()).Round(time.Millisecond))
}
