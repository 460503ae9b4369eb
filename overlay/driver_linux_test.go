package overlay

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

func mustNew(t testing.TB, root string, opts *Options) *Driver {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := New(root, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

// mustGet mounts a layer until the test ends.
func mustGet(t testing.TB, d *Driver, id string) string {
	t.Helper()
	path, err := d.Get(t.Context(), id, nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		err := d.Put(contextOf(t), id)
		if err != nil && !errors.Is(err, layerfs.ErrNotExist) {
			require.ErrorIs(t, err, layerfs.ErrNotHeld)
		}
	})
	return path
}

func changes(t testing.TB, d *Driver, id, base string) []layerfs.Change {
	t.Helper()
	var list []layerfs.Change
	for c, err := range d.Changes(t.Context(), id, base) {
		require.NoError(t, err)
		list = append(list, c)
	}
	require.True(t, slices.IsSortedFunc(list, func(a, b layerfs.Change) int { return layerfs.ComparePaths(a.Path, b.Path) }))
	return list
}

func TestLifeCycle(t *testing.T) {
	d := mustNew(t, t.TempDir(), nil)
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	base := mustGet(t, d, "base")
	tree.Build(t, base, "dir etc 0755", "file etc/a one", "file etc/b two", "dir gone 0700", "file gone/x y")
	require.NoError(t, d.Put(ctx, "base"))
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	top := mustGet(t, d, "top")
	require.NoError(t, os.WriteFile(top+"/etc/a", []byte("three"), 0o644))
	require.NoError(t, os.Remove(top+"/etc/b"))
	require.NoError(t, os.RemoveAll(top+"/gone"))
	require.NoError(t, os.Mkdir(top+"/new", 0o755))

	r, err := d.Diff(ctx, "top", "base", nil)
	require.NoError(t, err)
	require.NoError(t, d.Create(ctx, "copy", "base", nil))
	_, err = d.Apply(ctx, "copy", r, nil)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	diffs, err := tree.Compare(top, mustGet(t, d, "copy"), nil)
	require.NoError(t, err)
	require.Empty(t, diffs)
	require.Equal(t, changes(t, d, "top", "base"), changes(t, d, "copy", "base"))
	require.NotEmpty(t, changes(t, d, "top", "base"))

	require.ErrorIs(t, d.Remove(ctx, "base"), layerfs.ErrInUse)
	require.ErrorIs(t, d.Remove(ctx, "top"), layerfs.ErrInUse)
	infos, err := d.List(ctx)
	require.NoError(t, err)
	require.Len(t, infos, 3)
	require.True(t, infos[0].Frozen())
	for _, id := range []string{"copy", "top"} {
		require.NoError(t, d.Put(ctx, id))
		require.NoError(t, d.Remove(ctx, id))
	}
	require.NoError(t, d.Remove(ctx, "base"))
	problems, err := d.Check(ctx)
	require.NoError(t, err)
	require.Empty(t, problems)
	left, err := os.ReadDir(d.m.home)
	require.NoError(t, err)
	require.Len(t, left, 1, "only .layerfs may be left")
}

// oracle compares native changes with a double walk of the mounted trees.
func oracle(t testing.TB, d *Driver, id, base string) {
	t.Helper()
	chain, at, unpin, err := pinned(d, id, base)
	require.NoError(t, err)
	defer unpin()
	newer, err := d.m.View(t.Context(), chain)
	require.NoError(t, err)
	defer newer.Release()
	older := t.TempDir()
	if at < len(chain) {
		v, err := d.m.View(t.Context(), chain[at:])
		require.NoError(t, err)
		defer v.Release()
		older = v.Path
	}
	want, err := tree.Changes(older, newer.Path)
	require.NoError(t, err)
	if at == len(chain) && want[0].Path == "/" {
		want = want[1:] // of the directory that stands for the empty tree
	}
	var got []layerfs.Change
	for c, err := range d.m.NativeChanges(t.Context(), chain, at) {
		require.NoError(t, err)
		got = append(got, c)
	}
	require.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got), "%s against %q", id, base)
}

func TestNativeChanges(t *testing.T) {
	lower := []string{
		"dir a 0755", "file a/one 1", "file a/two 2", "dir a/sub 0755", "file a/sub/x x", "dir a/sub/deep 0755", "file a/sub/deep/y y",
		"dir b 0755", "file b/one 1", "file b/big 100", "symlink b/link target", "dir empty 0700", "file top t",
	}
	for name, tc := range map[string]struct {
		opts Options
		run  func(t *testing.T, top string)
	}{
		"nothing": {run: func(*testing.T, string) {}},
		"content": {run: func(t *testing.T, top string) {
			require.NoError(t, os.WriteFile(top+"/a/one", []byte("changed"), 0o644))
		}},
		"copy-up-only": {run: func(t *testing.T, top string) {
			f, err := os.OpenFile(top+"/a/one", os.O_RDWR, 0)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}},
		"whiteouts": {run: func(t *testing.T, top string) {
			require.NoError(t, os.Remove(top+"/a/one"))
			require.NoError(t, os.RemoveAll(top+"/b"))
			require.NoError(t, os.Remove(top+"/empty"))
		}},
		"opaque": {run: func(t *testing.T, top string) {
			require.NoError(t, os.RemoveAll(top+"/a"))
			require.NoError(t, os.Mkdir(top+"/a", 0o755))
			require.NoError(t, os.WriteFile(top+"/a/two", []byte("2"), 0o644))
			require.NoError(t, os.Mkdir(top+"/a/sub", 0o755))
		}},
		"types": {run: func(t *testing.T, top string) {
			require.NoError(t, os.RemoveAll(top+"/a"))
			require.NoError(t, os.WriteFile(top+"/a", nil, 0o644))
			require.NoError(t, os.Remove(top+"/top"))
			require.NoError(t, os.Mkdir(top+"/top", 0o755))
			require.NoError(t, os.WriteFile(top+"/top/in", nil, 0o644))
		}},
		"redirect": {opts: Options{RedirectDir: "on"}, run: func(t *testing.T, top string) {
			require.NoError(t, os.Rename(top+"/a", top+"/moved"))
			require.NoError(t, os.Rename(top+"/moved/sub", top+"/sub"))
			require.NoError(t, os.Rename(top+"/sub/deep", top+"/sub/renamed"))
			require.NoError(t, os.WriteFile(top+"/sub/new", nil, 0o644))
			require.NoError(t, os.Remove(top+"/moved/one"))
		}},
		"redirect-back": {opts: Options{RedirectDir: "on"}, run: func(t *testing.T, top string) {
			require.NoError(t, os.Rename(top+"/a", top+"/c"))
			require.NoError(t, os.Rename(top+"/b", top+"/a"))
			require.NoError(t, os.Rename(top+"/c", top+"/b"))
		}},
		"metacopy": {opts: Options{RedirectDir: "on", Metacopy: "on"}, run: func(t *testing.T, top string) {
			require.NoError(t, os.Chmod(top+"/a/one", 0o600))
			require.NoError(t, os.Rename(top+"/b/big", top+"/a/large"))
			require.NoError(t, os.Chmod(top+"/b/one", 0o600))
			require.NoError(t, os.Chmod(top+"/b/one", 0o644))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			d := mustNew(t, t.TempDir(), &tc.opts)
			ctx := t.Context()
			require.NoError(t, d.Create(ctx, "base", "", nil))
			tree.Build(t, mustGet(t, d, "base"), lower...)
			require.NoError(t, d.Put(ctx, "base"))
			require.NoError(t, d.Create(ctx, "mid", "base", nil))
			tree.Build(t, mustGet(t, d, "mid"), "dir m 0755", "file m/f 1", "file a/three 3")
			require.NoError(t, d.Put(ctx, "mid"))
			require.NoError(t, d.Create(ctx, "top", "mid", nil))
			tc.run(t, mustGet(t, d, "top"))
			require.NoError(t, d.Put(ctx, "top"))
			oracle(t, d, "top", "mid")
			oracle(t, d, "top", "base")
			oracle(t, d, "top", "")
			// A second layer on top sees the marks of the first from above.
			require.NoError(t, d.Create(ctx, "last", "top", nil))
			last := mustGet(t, d, "last")
			require.NoError(t, os.RemoveAll(last+"/m"))
			require.NoError(t, os.WriteFile(last+"/four", nil, 0o644))
			if fi, err := os.Lstat(last + "/a"); err == nil && fi.IsDir() {
				require.NoError(t, os.WriteFile(last+"/a/four", nil, 0o644))
			}
			require.NoError(t, d.Put(ctx, "last"))
			for _, base := range []string{"top", "mid", "base", ""} {
				oracle(t, d, "last", base)
			}
		})
	}
}

func TestPathsWithSpecialBytes(t *testing.T) {
	for _, name := range []string{`co:lon`, `com,ma`, `back\slash`, "new\nline", `qu"ote`, "spa ce", `a\:b,c`} {
		t.Run(name, func(t *testing.T) {
			methods := []mount.Method{mount.Auto, mount.Classic, mount.Descriptors}
			if new(feature.Prober).Has(feature.LowerAppend, "") {
				methods = append(methods, mount.NewAPI)
			}
			for _, method := range methods {
				root := filepath.Join(t.TempDir(), name)
				require.NoError(t, os.Mkdir(root, 0o755))
				testenv.RequireRoot(t)
				d, err := open(root, nil, new(feature.Prober), method)
				require.NoError(t, err)
				require.NoError(t, d.Create(t.Context(), "a", "", nil))
				require.NoError(t, d.Create(t.Context(), "b", "a", nil))
				require.NoError(t, d.Create(t.Context(), "c", "b", nil))
				p, err := d.Get(t.Context(), "c", nil)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(p+"/f", []byte("x"), 0o644))
				require.NoError(t, d.Put(t.Context(), "c"))
				require.FileExists(t, root+"/overlay/c/upper/f")
				require.NoError(t, d.Close())
			}
		})
	}
}

func TestDepth(t *testing.T) {
	d := mustNew(t, t.TempDir(), &Options{Durability: layerfs.DurabilityNone})
	ctx := t.Context()
	parent := ""
	for i := range mount.MaxLowers {
		id := "layer" + string(rune('a'+i/26%26)) + string(rune('a'+i%26)) + string(rune('a'+i/676))
		require.NoError(t, d.Create(ctx, id, parent, nil))
		require.NoError(t, os.WriteFile(d.m.upper(id)+"/"+id, []byte(id), 0o644))
		parent = id
	}
	err := d.Create(ctx, "toomany", parent, nil)
	require.ErrorContains(t, err, "more than 500 layers")
	path := mustGet(t, d, parent)
	entries, err := os.ReadDir(path)
	require.NoError(t, err)
	require.Len(t, entries, mount.MaxLowers)
	require.NoError(t, d.Put(ctx, parent))
	r, err := d.Diff(ctx, parent, "", nil)
	require.NoError(t, err)
	n, err := io.Copy(io.Discard, r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.Greater(t, n, int64(mount.MaxLowers*1024))
}

// TestRemoveForeignMount: what somebody mounted in a layer is not deleted with
// it.
func TestRemoveForeignMount(t *testing.T) {
	testenv.RequireRoot(t)
	root := t.TempDir()
	d, err := New(root, nil)
	require.NoError(t, err)
	defer d.Close()
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	for _, place := range []string{"upper", "work"} {
		id := "on-" + place
		require.NoError(t, d.Create(t.Context(), id, "base", nil))
		foreign := t.TempDir()
		require.NoError(t, os.WriteFile(foreign+"/data", []byte("x"), 0o600))
		target := filepath.Join(root, "overlay", id, place)
		require.NoError(t, unix.Mount(foreign, target, "", unix.MS_BIND, ""))
		assert.ErrorIs(t, d.Remove(t.Context(), id), unix.EBUSY)
		assert.FileExists(t, foreign+"/data")
		require.NoError(t, unix.Unmount(target, 0))
		assert.NoError(t, d.Remove(t.Context(), id), "a second time")
	}
	require.NoError(t, d.Remove(t.Context(), "base"))
}
