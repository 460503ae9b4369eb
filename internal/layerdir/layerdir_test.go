package layerdir

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func mustOpen(t *testing.T, home string) *Dir {
	t.Helper()
	return openWith(t, home, layerfs.DurabilityMetadata)
}

func openWith(t *testing.T, home string, policy layerfs.Durability) *Dir {
	t.Helper()
	d, err := Open(home, policy)
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestRecord(t *testing.T) {
	home := t.TempDir()
	a, b := mustOpen(t, home), mustOpen(t, home)
	rec := &Record{ID: "x", Parent: "p", Created: time.Now().UTC().Round(0), Labels: map[string]string{"k": "v"}, Quota: layerfs.Quota{Bytes: 5}}

	_, err := a.Load("x")
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	require.NoError(t, a.Save(rec))
	got, err := b.Load("x")
	require.NoError(t, err)
	require.Equal(t, rec, got)
	time.Sleep(settled) // else another of the same time might have come
	got, err = b.Load("x")
	require.NoError(t, err)
	again, err := b.Load("x")
	require.NoError(t, err)
	require.Same(t, got, again, "an unchanged record must not be read twice")

	changed := rec.Clone()
	changed.Incomplete = "test"
	require.NoError(t, a.Save(changed))
	got, err = b.Load("x")
	require.NoError(t, err)
	require.Equal(t, "test", got.Incomplete, "a record of another process must be seen")

	require.NoError(t, a.AddChild("p", "x"))
	require.NoError(t, a.Drop(changed, true))
	_, err = b.Load("x")
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	removed, err := b.Removed()
	require.NoError(t, err)
	require.Equal(t, []string{"x"}, removed)
	has, err := b.HasChildren("p")
	require.NoError(t, err)
	require.False(t, has)
	require.NoError(t, b.Forget("x"))
	require.NoError(t, b.Forget("x"), "two processes may finish one removal")
}

func TestRecordDamaged(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	for name, content := range map[string]string{
		"empty": "", "cut": `{"id": "cut`, "renamed": `{"id": "other"}`, "parent": `{"id": "parent", "parent": "../x"}`,
	} {
		require.NoError(t, os.WriteFile(d.path("records", name), []byte(content), 0o600))
		_, err := d.Load(name)
		require.Error(t, err, name)
		require.NotErrorIs(t, err, layerfs.ErrNotExist, name)
		require.ErrorContains(t, err, "record of "+name)
	}
	_, err := d.Load("../records/cut")
	require.ErrorIs(t, err, layerfs.ErrInvalidID)
}

func TestFormat(t *testing.T) {
	home := t.TempDir()
	mustOpen(t, home)
	require.NoError(t, os.WriteFile(filepath.Join(home, ".layerfs/format"), []byte("layerfs 2\n"), 0o600))
	_, err := Open(home, layerfs.DurabilityNone)
	var u *layerfs.UnsupportedError
	require.ErrorAs(t, err, &u)
}

func TestHasChildren(t *testing.T) {
	home := t.TempDir()
	d, other := mustOpen(t, home), mustOpen(t, home)
	has := func() bool {
		got, err := d.HasChildren("p")
		require.NoError(t, err)
		return got
	}
	require.False(t, has())

	require.NoError(t, d.AddChild("p", "c"))
	unlock, ok, err := other.TryLock("c")
	require.NoError(t, err)
	require.True(t, ok)
	require.True(t, has(), "a child that is being made counts")
	unlock()
	require.False(t, has(), "what a crashed Create left does not")

	require.NoError(t, d.AddChild("p", "c"))
	require.NoError(t, d.Save(&Record{ID: "c", Parent: "p"}))
	require.True(t, has())
	require.NoError(t, d.Save(&Record{ID: "c", Parent: "q"}))
	require.False(t, has(), "another layer of that name does not count")
}

// TestChildrenFile: what a full disk or a power failure may leave, and a file
// that grew with children that came and went.
func TestChildrenFile(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	path := d.path("children", "p")
	require.NoError(t, os.WriteFile(path, []byte("\x00\x00\x00\nc1\n../x\ncut-o"), 0o600))
	require.NoError(t, d.AddChild("p", "c2"))
	require.NoError(t, d.AddChild("p", "c1"))
	ids, err := d.Noted("p")
	require.NoError(t, err)
	require.Equal(t, []string{"c1", "cut-o", "c2"}, ids)

	require.NoError(t, d.Add(&Record{ID: "stays", Parent: "p"}))
	require.NoError(t, d.AddChild("p", "stays"))
	largest := int64(0)
	for i := range 3 * compactChildren / 10 {
		require.NoError(t, d.AddChild("p", fmt.Sprintf("c%08d", i)))
		fi, err := os.Stat(path)
		require.NoError(t, err)
		largest = max(largest, fi.Size())
	}
	require.Less(t, largest, int64(2*compactChildren))
	has, err := d.HasChildren("p")
	require.NoError(t, err)
	require.True(t, has)
	require.NoError(t, d.Drop(&Record{ID: "stays"}, false))
	has, err = d.HasChildren("p")
	require.NoError(t, err)
	require.False(t, has)
	require.NoFileExists(t, path, "nothing is left to look at")
}

// TestChildrenMany: children that are all there are not looked at again and
// again.
func TestChildrenMany(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	live := func(n int) string { return fmt.Sprintf("a-child-with-a-long-name-%030d", n) }
	const many = compactChildren / 60
	for i := range many {
		require.NoError(t, d.Add(&Record{ID: live(i), Parent: "p"}))
		require.NoError(t, d.AddChild("p", live(i)))
	}
	replaced, last := 0, os.FileInfo(nil)
	for i := range 4000 {
		require.NoError(t, d.AddChild("p", fmt.Sprint("gone-", i)))
		fi, err := os.Stat(d.path("children", "p"))
		require.NoError(t, err)
		if last == nil || !os.SameFile(fi, last) {
			replaced++
		}
		last = fi
	}
	require.LessOrEqual(t, replaced, 3)
	ids, err := d.Noted("p")
	require.NoError(t, err)
	require.Subset(t, ids, []string{live(0), live(many - 1)})
}

// TestAdd: a record that a crash kept from being written is none; one that lost
// its content later is damage.
// TestCutOff: a record that is damaged is told, on every system.
func TestCutOff(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	require.NoError(t, os.WriteFile(d.path("records", "x"), []byte(`{"id":"x","par`), 0o600))
	rec, err := d.Load("x")
	require.ErrorContains(t, err, "empty or cut off")
	require.Nil(t, rec)
}

// TestOwnRecord: what another process wrote in the same tick of the clock, of the
// same size and with the same inode, is not hidden for ever by what was ours.
func TestOwnRecord(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	require.NoError(t, d.Save(&Record{ID: "x", Parent: "a"}))
	path := d.path("records", "x")
	fi, err := os.Stat(path)
	require.NoError(t, err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, bytes.Replace(b, []byte(`"a"`), []byte(`"b"`), 1), 0o600)) // the same inode
	require.NoError(t, os.Chtimes(path, time.Time{}, fi.ModTime()))
	require.Eventually(t, func() bool {
		rec, err := d.Load("x")
		return assert.NoError(t, err) && rec.Parent == "b"
	}, 20*time.Second, 10*time.Millisecond)
}

// TestGuard: nothing is opened, and nothing made, where layers are that have no
// records here.
func TestGuard(t *testing.T) {
	for _, tc := range []struct {
		name   string
		make   []string // files, or directories with a slash at the end
		refuse string   // what the error names; "" if it is opened
	}{
		{"empty", nil, ""},
		{"empty directories", []string{"diff/", "mnt/"}, ""},
		{"probe", []string{".probe-1/f", ".view"}, ""},
		{"crash before the format", []string{".layerfs/records/", ".layerfs/zfs.json", "subvolumes/"}, ""},
		{"btrfs of Docker", []string{"subvolumes/0a1b/etc/passwd"}, "subvolumes"},
		{"its empty layer", []string{"subvolumes/0a1b/"}, "subvolumes"},
		{"overlay of Podman", []string{"0a1b/diff/etc/passwd", "l/ABC"}, "0a1b"},
		{"aufs of Docker", []string{"diff/0a1b/", "layers/0a1b", "mnt/"}, "diff"},
		{"device mapper of Docker", []string{"devicemapper/data"}, "devicemapper"},
		{"a file", []string{"f"}, "f"},
		{"lost records", []string{".layerfs/format", "dir/x/f"}, ".layerfs/records"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			home := t.TempDir()
			for _, name := range tc.make {
				path := filepath.Join(home, name)
				require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
				if strings.HasSuffix(name, "/") {
					require.NoError(t, os.MkdirAll(path, 0o700))
				} else {
					require.NoError(t, os.WriteFile(path, []byte(format), 0o600))
				}
			}
			list := func() (names []string) {
				require.NoError(t, filepath.WalkDir(home, func(path string, _ fs.DirEntry, err error) error {
					names = append(names, path)
					return err
				}))
				return names
			}
			before := list()
			d, err := Open(home, layerfs.DurabilityNone)
			if tc.refuse == "" {
				require.NoError(t, err)
				require.NoError(t, d.Close())
				return
			}
			require.ErrorContains(t, err, filepath.Join(home, tc.refuse))
			require.Equal(t, before, list())
		})
	}
}

func TestAdd(t *testing.T) {
	home := t.TempDir()
	d := mustOpen(t, home)
	if !d.direct {
		t.Skip("records are renamed into place here")
	}
	path := d.path("records", "x")
	for _, left := range []string{"", `{"id":"x","par`} {
		require.NoError(t, os.WriteFile(path, []byte(left), making))
		require.NoError(t, os.Chmod(path, making))
		_, err := d.Load("x")
		require.Equal(t, layerfs.ErrNotExist, err)
		require.NoError(t, d.Add(&Record{ID: "x"}))
		rec, err := mustOpen(t, home).Load("x")
		require.NoError(t, err)
		require.Equal(t, "x", rec.ID)
		fi, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), fi.Mode())

		require.NoError(t, os.WriteFile(path, []byte(left), 0o600))
		_, err = d.Load("x")
		require.ErrorContains(t, err, "empty or cut off")
		require.NoError(t, d.ClearTemporary())
		require.FileExists(t, path)

		require.NoError(t, os.Chmod(path, making))
		unlock, err := d.Lock(t.Context(), "x")
		require.NoError(t, err)
		require.NoError(t, d.ClearTemporary())
		require.FileExists(t, path, "somebody is writing it")
		unlock()
		require.NoError(t, d.ClearTemporary())
		require.NoFileExists(t, path)
	}
	// Killed after the content and before the mark was gone: it was added.
	require.NoError(t, os.WriteFile(path, []byte("{\"id\":\"x\"}\n"), making))
	require.NoError(t, d.ClearTemporary())
	_, err := d.Load("x")
	require.NoError(t, err)
}

func TestLock(t *testing.T) {
	home := t.TempDir()
	dirs := []*Dir{mustOpen(t, home), mustOpen(t, home), mustOpen(t, home)}
	var wg sync.WaitGroup
	var n, inside atomic.Int32 // atomic: the race detector does not know the kernel's locks
	for _, d := range dirs {
		for range 4 {
			wg.Go(func() {
				for range 50 {
					unlock, err := d.Lock(t.Context(), "b", "a")
					if err != nil {
						t.Error(err)
						return
					}
					if inside.Add(1) != 1 {
						t.Error("two have the lock")
					}
					n.Add(1)
					inside.Add(-1)
					unlock()
				}
			})
		}
	}
	wg.Wait()
	require.EqualValues(t, 600, n.Load())

	unlock, err := dirs[0].Lock(t.Context(), "a")
	require.NoError(t, err)
	defer unlock()
	for _, d := range dirs {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err = d.Lock(ctx, "b", "a")
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, ok, err := d.TryLock("a")
		require.NoError(t, err)
		require.False(t, ok)
		free, ok, err := d.TryLock("b")
		require.NoError(t, err)
		require.True(t, ok, "a Lock that gave up must leave nothing locked")
		free()
	}
}

func TestHold(t *testing.T) {
	home := t.TempDir()
	a, b, c := mustOpen(t, home), mustOpen(t, home), mustOpen(t, home)
	others := func(d *Dir) Others {
		o, err := d.Others("x")
		require.NoError(t, err)
		return o
	}
	require.False(t, others(a).Any())
	require.NoError(t, a.Hold("x", HeldReadOnly))
	require.False(t, others(a).Any(), "one's own hold is no other's")
	require.Equal(t, Others{ReadOnly: true}, others(b))
	require.NoError(t, b.Hold("x", HeldReadOnly))
	require.NoError(t, b.Hold("x", HeldPinned))
	require.Equal(t, Others{ReadOnly: true, Pinned: true}, others(a))
	require.Equal(t, Others{ReadOnly: true}, others(b))
	b.Release("x", HeldReadOnly)
	require.Equal(t, Others{Pinned: true}, others(a))

	require.NoError(t, a.Close())
	require.Equal(t, Others{ReadOnly: true, Pinned: true}, others(c), "a hold outlives Close")
	a.Release("x", HeldReadOnly)
	b.Release("x", HeldPinned)
	require.False(t, others(c).Any())
}

func TestPersistent(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	p, err := d.Persistent("x")
	require.NoError(t, err)
	require.Zero(t, p)
	require.NoError(t, d.SetPersistent("x", Persistent{Count: 2, ReadOnly: true}))
	p, err = d.Persistent("x")
	require.NoError(t, err)
	require.Equal(t, 2, p.Count)
	require.NoError(t, os.WriteFile(d.path("persist", "x"), []byte(`{"boot":"an earlier one","count":2}`), 0o600))
	p, err = d.Persistent("x")
	require.NoError(t, err)
	require.Zero(t, p.Count)
	require.NoError(t, d.SetPersistent("x", Persistent{}))
	ids, err := d.PersistentIDs()
	require.NoError(t, err)
	require.Empty(t, ids)
}

func TestClearTemporary(t *testing.T) {
	home := t.TempDir()
	d, other := mustOpen(t, home), mustOpen(t, home)
	for _, n := range []string{".dead.layer.123.4", ".live.123.4"} {
		require.NoError(t, os.WriteFile(d.path("records", n), nil, 0o600))
	}
	unlock, _, err := other.TryLock("live")
	require.NoError(t, err)
	defer unlock()
	require.NoError(t, d.ClearTemporary())
	require.NoFileExists(t, d.path("records", ".dead.layer.123.4"))
	require.FileExists(t, d.path("records", ".live.123.4"))
	ids, err := d.IDs()
	require.NoError(t, err)
	require.Empty(t, ids)
}
