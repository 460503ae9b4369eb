package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

func mustOpen(tb testing.TB, root string, opts *Options) *Driver {
	tb.Helper()
	o := *opts
	o.Dataset = datasetOf(root)
	d, err := New(root, &o)
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, d.Close()) })
	return d
}

// chainOf returns a layer's chain.
func chainOf(tb testing.TB, d *Driver, ids ...string) lifecycle.Chain {
	tb.Helper()
	var c lifecycle.Chain
	for _, id := range ids {
		rec, err := d.m.dir.Load(id)
		require.NoError(tb, err)
		c = append(c, rec)
	}
	return c
}

func fill(tb testing.TB, d *Driver, id string, fn func(path string)) {
	tb.Helper()
	path, err := d.Get(tb.Context(), id, nil)
	require.NoError(tb, err)
	fn(path)
	require.NoError(tb, d.Put(tb.Context(), id))
}

// oracle compares two layers by a plain double walk that knows nothing of this
// package.
func oracle(tb testing.TB, d *Driver, older, newer lifecycle.Chain) []layerfs.Change {
	tb.Helper()
	a, err := d.m.View(tb.Context(), older)
	require.NoError(tb, err)
	b, err := d.m.View(tb.Context(), newer)
	require.NoError(tb, err)
	list, err := tree.Changes(a.Path, b.Path)
	require.NoError(tb, err)
	require.NoError(tb, errors.Join(a.Release(), b.Release()))
	return list
}

func requireNative(tb testing.TB, d *Driver) {
	tb.Helper()
	if d.Features().NativeChanges {
		return
	}
	if kernelMounts() {
		tb.Fatalf("OpenZFS without zfs diff: %s", d.Features().Reasons["NativeChanges"])
	}
	tb.Skip("zfs-fuse has no zfs diff: " + d.Features().Reasons["NativeChanges"])
}

// TestNativeChanges has the changes that zfs diff tells in its own way.
func TestNativeChanges(t *testing.T) {
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{})
	requireNative(t, d)
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	fill(t, d, "base", func(path string) {
		tree.Build(t, path, "file same 1", "file dir/f 1", "file dir/sub/g 2", "file old 3", "file linked 4", "link d2/name linked",
			"file hard 5", "link hard2 hard", "file gone 6", "file type 7", "file move/in/deep 8", "file swap1/a 1", "file swap2/b 2", "file again/a 1", "file attr 9",
			"dir links/c", "file links/a/1 1", "file links/a/three 3", "link links/b/three links/a/three", "link links/c/three links/a/three",
			"file links/a/moved 1", "link links/b/moved links/a/moved", "file links/a/replaced 1", "link links/b/replaced links/a/replaced",
			"file links/a/brief 1", "symlink links/a/sym to")
		// zfs keeps the directory of the newest name, which goes.
		gone := func(name, dir string) {
			to := fmt.Sprintf("%s/links/%s/%s", path, dir, name)
			require.NoError(t, os.MkdirAll(filepath.Dir(to), 0o755))
			from := fmt.Sprintf("%s/links/a/%s", path, name)
			require.NoError(t, errors.Join(os.WriteFile(from, []byte(name), 0o644), os.Link(from, to), os.Remove(to)))
		}
		gone("lost", "b")
		gone("found", "b")
		gone("attr", "b")
		gone("orphan", "d")
		require.NoError(t, os.Remove(path+"/links/d"))
		require.NoError(t, unix.Linkat(unix.AT_FDCWD, path+"/links/a/sym", unix.AT_FDCWD, path+"/links/b/sym", 0))
	})
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	for i, step := range []struct {
		name string
		fn   func(p string) error
	}{
		{"nothing", func(string) error { return nil }},
		{"write", func(p string) error { return os.WriteFile(p+"/dir/f", []byte("new"), 0o644) }},
		{"rename", func(p string) error { return os.Rename(p+"/old", p+"/dir/renamed") }},
		{"delete", func(p string) error { return os.Remove(p + "/gone") }},
		{"rename directory", func(p string) error { return os.Rename(p+"/move", p+"/dir/moved") }},
		{"change in renamed directory", func(p string) error { return os.WriteFile(p+"/dir/moved/in/deep", []byte("x"), 0o644) }},
		{"type", func(p string) error {
			return errors.Join(os.Remove(p+"/type"), os.MkdirAll(p+"/type/new", 0o755), os.WriteFile(p+"/type/new/f", nil, 0o600))
		}},
		{"odd names", func(p string) error {
			return errors.Join(os.WriteFile(p+"/a b\t\\0\n\xff\x01é", nil, 0o644), os.Mkdir(p+"/<xattrdir>", 0o755), os.WriteFile(p+"/<xattrdir>/x", nil, 0o644))
		}},
		{"exchange", func(p string) error {
			return unix.Renameat2(unix.AT_FDCWD, p+"/swap1", unix.AT_FDCWD, p+"/swap2", unix.RENAME_EXCHANGE)
		}},
		{"directory made again", func(p string) error {
			return errors.Join(os.RemoveAll(p+"/again"), os.Mkdir(p+"/again", 0o755), os.WriteFile(p+"/again/b", nil, 0o644))
		}},
		{"chmod and back", func(p string) error { return errors.Join(os.Chmod(p+"/same", 0o600), os.Chmod(p+"/same", 0o644)) }},
		{"xattr", func(p string) error { return unix.Setxattr(p+"/attr", "user.x", []byte("1"), 0) }},
		{"large xattr", func(p string) error {
			return unix.Setxattr(p+"/attr", "user.large", bytes.Repeat([]byte("x"), 60<<10), 0)
		}},
		{"time", func(p string) error { return os.Chtimes(p+"/same", time.Unix(1, 2), time.Unix(3, 4)) }},
		{"root", func(p string) error { return os.Chmod(p, 0o700) }},
		{"link added", func(p string) error { return os.Link(p+"/dir/sub/g", p+"/dir/g2") }},
		{"link removed", func(p string) error { return os.Remove(p + "/hard2") }},
		{"file of two names written", func(p string) error { return os.WriteFile(p+"/linked", []byte("both"), 0o644) }},
		{"mode of a file of two names", func(p string) error { return os.Chmod(p+"/linked", 0o600) }},
		{"file of two names written, one of them new", func(p string) error {
			return errors.Join(os.Link(p+"/links/a/1", p+"/links/b/2"), os.WriteFile(p+"/links/a/1", []byte("new"), 0o644))
		}},
		{"one of three names removed, file written", func(p string) error {
			return errors.Join(os.Remove(p+"/links/b/three"), os.WriteFile(p+"/links/c/three", []byte("new"), 0o644))
		}},
		{"name that zfs knows moved, file written", func(p string) error {
			return errors.Join(os.Rename(p+"/links/b/moved", p+"/links/c/elsewhere"), os.WriteFile(p+"/links/a/moved", []byte("new"), 0o644))
		}},
		{"name that zfs knows replaced, file written", func(p string) error {
			return errors.Join(os.WriteFile(p+"/links/b/.tmp", []byte("tmp"), 0o644), os.Rename(p+"/links/b/.tmp", p+"/links/b/replaced"),
				os.WriteFile(p+"/links/a/replaced", []byte("new"), 0o644))
		}},
		{"file that zfs knows by no name written", func(p string) error { return os.WriteFile(p+"/links/a/lost", []byte("new"), 0o644) }},
		{"file whose known directory is gone written", func(p string) error { return os.WriteFile(p+"/links/a/orphan", []byte("new"), 0o644) }},
		{"file that zfs knows by no name linked", func(p string) error { return os.Link(p+"/links/a/found", p+"/links/c/found") }},
		{"link made and removed, file written", func(p string) error {
			return errors.Join(os.Link(p+"/links/a/brief", p+"/links/c/brief"), os.Remove(p+"/links/c/brief"), os.WriteFile(p+"/links/a/brief", []byte("new"), 0o644))
		}},
		{"xattr of a file that zfs knows by no name", func(p string) error {
			return unix.Setxattr(p+"/links/a/attr", "user.x", bytes.Repeat([]byte("x"), 60<<10), 0)
		}},
		{"symlink of two names replaced by its copy", func(p string) error {
			return errors.Join(os.Remove(p+"/links/a/sym"), os.Symlink("to", p+"/links/a/sym"))
		}},
		{"directory with changes becomes a pipe", func(p string) error {
			return errors.Join(os.RemoveAll(p+"/dir"), unix.Mkfifo(p+"/dir", 0o644))
		}},
	} {
		t.Run(fmt.Sprintf("%02d-%s", i, step.name), func(t *testing.T) {
			var err error
			fill(t, d, "top", func(p string) { err = step.fn(p) })
			if errors.Is(err, unix.EINVAL) && step.name == "exchange" {
				t.Skip("this file system cannot exchange names (OpenZFS 2.2 can)")
			}
			require.NoError(t, err)
			chain := chainOf(t, d, "top", "base")
			want := oracle(t, d, chain[1:], chain)
			got, err := d.m.nativeChanges(ctx, chain, 1)
			require.NoError(t, err)
			assert.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got))
		})
	}
}

// TestNativeSpeed: three changes in a tree of 20,000 files or more are found 20
// times faster than by a walk, and in a smaller one still much faster.
func TestNativeSpeed(t *testing.T) {
	testenv.RequireIdle(t)
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{})
	requireNative(t, d)
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	// zfs diff costs the same whatever the number of files, which is therefore
	// what decides: LAYERFS_FILES.
	files := 8000
	if n, err := strconv.Atoi(os.Getenv("LAYERFS_FILES")); err == nil {
		files = n
	}
	const each = 200
	dirs := max(files/each, 4)
	least := float64(min(dirs*each/2000, 20))
	if dirs*each >= 20000 {
		least = 20
	}
	fill(t, d, "base", func(p string) {
		for i := range dirs {
			dir := fmt.Sprintf("%s/%d", p, i)
			require.NoError(t, os.Mkdir(dir, 0o755))
			for j := range each {
				require.NoError(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, j), []byte("content"), 0o644))
			}
		}
	})
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	fill(t, d, "top", func(p string) {
		require.NoError(t, errors.Join(os.WriteFile(p+"/1/1", []byte("x"), 0o644), os.Remove(p+"/2/2"), os.WriteFile(p+"/3/new", nil, 0o644)))
	})
	chain := chainOf(t, d, "top", "base")
	// The walk is that of archive.Compare, which moby's and containerd's are
	// slower than.
	walkChanges := func() (list []layerfs.Change) {
		a, err := d.m.View(ctx, chain[1:])
		require.NoError(t, err)
		b, err := d.m.View(ctx, chain)
		require.NoError(t, err)
		for c, err := range archive.Compare(ctx, a.Path, b.Path, nil) {
			require.NoError(t, err)
			list = append(list, c)
		}
		require.NoError(t, errors.Join(a.Release(), b.Release()))
		return list
	}
	best := func(fn func()) time.Duration {
		shortest := time.Hour
		for range 3 {
			start := time.Now()
			fn()
			shortest = min(shortest, time.Since(start))
		}
		return shortest
	}
	var want, got []layerfs.Change
	walk := best(func() { want = walkChanges() })
	native := best(func() {
		var err error
		got, err = d.m.nativeChanges(context.WithoutCancel(ctx), chain, 1)
		require.NoError(t, err)
	})
	assert.True(t, slices.Equal(want, got), "%v, %v", want, got)
	ratio := float64(walk) / float64(native)
	if !goal(fmt.Sprintf("Changes, 3 of %d files", dirs*each), native, "the walk of archive.Compare", walk, ratio, fmt.Sprintf("≥ %.0f", least), ratio >= least) {
		t.Errorf("the walk takes %v, zfs diff %v", walk, native)
	}
}
