package auto_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	aufs.Main() // this program is the helper of the tests
	os.Exit(testenv.Main(m))
}

func open(t *testing.T, root string, opts *auto.Options) layerfs.Driver {
	t.Helper()
	d, err := auto.Open(root, opts)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, d.Close()) })
	return d
}

func TestOpen(t *testing.T) {
	root := filepath.Join(t.TempDir(), "new", "root")
	d := open(t, root, nil)
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	have, err := auto.Prior(root)
	require.NoError(t, err)
	assert.Equal(t, []string{d.Name()}, have)
	require.NoError(t, d.Remove(t.Context(), "base"))
	have, err = auto.Prior(root)
	require.NoError(t, err)
	assert.Empty(t, have, "a root whose layers are all removed is free again")
}

func TestOpen_priorWins(t *testing.T) {
	root := t.TempDir()
	d := open(t, root, &auto.Options{Driver: "vfs"})
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	again := open(t, root, nil)
	assert.Equal(t, "vfs", again.Name())
	list, err := again.List(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	assert.Equal(t, "base", list[0].ID)
}

func TestOpen_several(t *testing.T) {
	testenv.RequireRoot(t)
	root := t.TempDir()
	for _, name := range []string{"overlay", "vfs"} {
		d, err := auto.Open(root, &auto.Options{Driver: name})
		testenv.SkipUnsupported(t, err, name)
		require.NoError(t, err)
		require.NoError(t, d.Create(t.Context(), "base", "", nil))
		require.NoError(t, d.Close())
	}
	_, err := auto.Open(root, nil)
	assert.ErrorContains(t, err, "overlay, vfs")
	assert.Equal(t, "vfs", open(t, root, &auto.Options{Driver: "vfs"}).Name())
}

// The options of a backend get there, and those of all backends fill in what
// it leaves open.
func TestOpen_options(t *testing.T) {
	_, err := auto.Open(t.TempDir(), &auto.Options{Driver: "vfs", VFS: &vfs.Options{Workers: -1}})
	assert.ErrorContains(t, err, "-1 workers")
	_, err = auto.Open(t.TempDir(), &auto.Options{Driver: "vfs", Durability: 77})
	assert.ErrorContains(t, err, "durability")
	given := &vfs.Options{Durability: layerfs.DurabilityNone}
	open(t, t.TempDir(), &auto.Options{Driver: "vfs", Durability: 77, VFS: given})
	assert.Equal(t, &vfs.Options{Durability: layerfs.DurabilityNone}, given, "the caller's options are not changed")
	_, err = auto.Open(t.TempDir(), &auto.Options{Driver: "overlay", Overlay: &overlay.Options{XIno: "perhaps"}})
	if !errors.Is(err, errors.ErrUnsupported) { // not Linux
		assert.ErrorContains(t, err, "perhaps")
	}
}

// A live base is what aufs is for, if it has a helper.
func TestOpen_liveBase(t *testing.T) {
	testenv.RequireRoot(t)
	helper := &aufs.Options{Helper: []string{"/proc/self/exe"}}
	probe, err := aufs.New(t.TempDir(), helper)
	testenv.SkipUnsupported(t, err, "aufs")
	require.NoError(t, err)
	require.NoError(t, probe.Close())
	d := open(t, t.TempDir(), &auto.Options{LiveBase: true, AUFS: helper})
	require.Equal(t, "aufs", d.Name())
	assert.True(t, d.Features().LiveBase)
	assert.False(t, helper.LiveBase, "the caller's options are not changed")

	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	require.NoError(t, d.Create(ctx, "c", "base", nil))
	path, err := d.Get(ctx, "c", nil)
	require.NoError(t, err)
	base, err := d.Get(ctx, "base", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(base+"/new", nil, 0o644))
	assert.Eventually(t, func() bool { _, err := os.Stat(path + "/new"); return err == nil }, 5*time.Second, time.Millisecond)
	require.NoError(t, d.Put(ctx, "base"))
	require.NoError(t, d.Put(ctx, "c"))

	t.Setenv("PATH", t.TempDir())
	root := t.TempDir()
	d = open(t, root, &auto.Options{LiveBase: true})
	assert.NotEqual(t, "aufs", d.Name(), "without a helper")
	assert.NoDirExists(t, root+"/aufs")
}

func TestOpen_unprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		root := t.TempDir()
		d := open(t, root, nil)
		assert.Equal(t, "vfs", d.Name())
		assert.NoDirExists(t, filepath.Join(root, "overlay"))
		_, err := auto.Open(root, &auto.Options{Driver: "overlay"})
		assert.ErrorIs(t, err, errors.ErrUnsupported)
	})
}

func TestOpen_unwritableRoot(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		_, err := auto.Open("/proc/layerfs", nil)
		require.Error(t, err)
		assert.NotErrorIs(t, err, errors.ErrUnsupported)
		assert.ErrorContains(t, err, "/proc/layerfs")
	})
}

func TestProbe(t *testing.T) {
	root := t.TempDir()
	before := tree(t, root)
	reports, err := auto.Probe(t.Context(), root)
	require.NoError(t, err)
	assert.Equal(t, before, tree(t, root))
	var names []string
	for _, r := range reports {
		names = append(names, r.Driver)
		assert.NotContains(t, fmt.Sprint(r), ".layerfs-probe-", "the directory of the trial is gone")
		for _, a := range r.Abilities() {
			assert.Equal(t, a.Have, a.Reason == "", "%s %+v", r.Driver, a)
		}
		d, err := auto.Open(t.TempDir(), &auto.Options{Driver: r.Driver})
		if r.Err != nil {
			assert.Error(t, err)
			continue
		}
		require.NoError(t, err)
		// Reasons may name the root.
		f, g := d.Features(), r.Features
		assert.Equal(t, slices.Sorted(maps.Keys(f.Reasons)), slices.Sorted(maps.Keys(g.Reasons)))
		f.Reasons, g.Reasons = nil, nil
		assert.Equal(t, f, g)
		assert.NoError(t, d.Close())
	}
	assert.Equal(t, auto.Drivers(), names)
}

func TestLookup(t *testing.T) {
	for _, name := range auto.Drivers() {
		got, err := auto.Lookup(name)
		assert.NoError(t, err)
		assert.Equal(t, name, got)
	}
	_, err := auto.Lookup("zip")
	assert.ErrorContains(t, err, `"zip" is not one of overlay, `)
}

// On btrfs, overlay still comes first, and btrfs works and leaves no subvolume.
func TestProbe_btrfs(t *testing.T) {
	testenv.RequireRoot(t)
	root := testenv.Btrfs(t, 128)
	reports, err := auto.Probe(t.Context(), root)
	require.NoError(t, err)
	entries, err := os.ReadDir(root)
	require.NoError(t, err)
	assert.Empty(t, entries)
	for _, r := range reports {
		if r.Driver == "btrfs" {
			assert.NoError(t, r.Err)
		}
	}
	d := open(t, root, &auto.Options{Priority: []string{"btrfs"}})
	assert.Equal(t, "btrfs", d.Name())
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	assert.Equal(t, "btrfs", open(t, root, nil).Name(), "its layers are there")
	require.NoError(t, d.Remove(t.Context(), "base"))
}

func TestOpen_btrfsElsewhere(t *testing.T) {
	root := t.TempDir()
	_, err := auto.Open(root, &auto.Options{Driver: "btrfs"})
	if errors.Is(err, errors.ErrUnsupported) {
		d := open(t, root, &auto.Options{Priority: []string{"btrfs", "vfs"}})
		assert.Equal(t, "vfs", d.Name())
		return
	}
	require.NoError(t, err, "unless the tests run on btrfs")
}

func tree(t *testing.T, root string) (paths []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	}))
	return paths
}
