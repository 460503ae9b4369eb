package zfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestAside(t *testing.T) {
	m := &mechanism{home: "/r/zfs"}
	for path, want := range map[string]struct {
		id    string // of the layer that is mounted there
		aside bool
	}{
		"/r/zfs/graph/b":                           {"b", false},
		"/r/zfs/graph/a.b":                         {"a.b", false},
		"/r/zfs/graph/aside1.b":                    {"aside1.b", false},
		"/r/zfs/.layerfs/stage/aside1.b":           {"aside1.b", false},
		"/r/zfs/.layerfs/views/0a/7.b":             {"b", false},
		"/r/zfs/.layerfs/views/0a/7.aside1.b":      {"aside1.b", false},
		"/r/zfs/.layerfs/views/0a/aside1.b":        {"b", true},
		"/r/zfs/.layerfs/views/0a/aside12.a.b":     {"a.b", true},
		"/r/zfs/.layerfs/views/0a/aside1.aside2.b": {"aside2.b", true},
		"/elsewhere/.layerfs/views/0a/aside1.b":    {"aside1.b", false},
		"/r/zfs/.layerfs/views/0a/below/aside1.b":  {"aside1.b", false},
	} {
		assert.Equal(t, want.id, m.layerAt(path), path)
		id, ok := asideIn(m.state("views"), path)
		assert.Equal(t, want.aside, ok, path)
		if ok {
			assert.Equal(t, want.id, id, path)
		}
	}
	for _, name := range []string{"", "aside", "aside1", "aside1.", "aside.b", "asidex.b", "aside1x.b", "aside-1.b", "Aside1.b", "1.b", "7.aside1.b"} {
		_, ok := asideOf(name)
		assert.False(t, ok, name)
	}
}

// A layer with open files is moved aside. Neither layers whose names end or begin
// alike nor another driver change that, and nothing that is written is lost.
func TestAsideOfOthers(t *testing.T) {
	requirePool(t)
	if kernelMounts() {
		t.Skip("the kernel's file system is detached")
	}
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{})
	ctx := t.Context()
	ids := []string{"a.b", "b", "aside1.b"}
	paths := make(map[string]string)
	for _, id := range ids {
		require.NoError(t, d.Create(ctx, id, "", nil))
	}
	path, err := d.Get(ctx, "aside1.b", nil)
	require.NoError(t, err)
	paths["aside1.b"] = path
	path, err = d.Get(ctx, "a.b", nil)
	require.NoError(t, err)
	f, err := os.Create(filepath.Join(path, "f"))
	require.NoError(t, err)
	require.NoError(t, d.Put(ctx, "a.b"))
	aside := func() []string { return asidesOf(t, d, "a.b") }
	require.Len(t, aside(), 1)
	_, err = f.WriteString("kept")
	require.NoError(t, errors.Join(err, f.Close()))

	// No file of it is open any more: what asks for another layer's must not end it.
	require.NoError(t, d.m.clearAsides("b"))
	write(t, d, "b", "f", "b")
	require.NoError(t, d.Remove(ctx, "b"))
	require.Len(t, aside(), 1)
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(aside()[0], &st))
	require.EqualValues(t, unix.FUSE_SUPER_MAGIC, st.Type, "it is still mounted")

	// A view of a layer whose name is like that of such a place leaves it mounted.
	require.NoError(t, os.WriteFile(filepath.Join(paths["aside1.b"], "f"), []byte("x"), 0o600))
	v, err := d.m.View(ctx, chainOf(t, d, "aside1.b"))
	require.NoError(t, err)
	require.NoError(t, v.Release())
	require.NoError(t, unix.Statfs(paths["aside1.b"], &st))
	require.EqualValues(t, unix.FUSE_SUPER_MAGIC, st.Type, "it is still mounted")
	require.NoError(t, d.Put(ctx, "aside1.b"))

	require.Equal(t, "kept", read(t, d, "a.b", "f"))
	require.Equal(t, "x", read(t, d, "aside1.b", "f"))
	require.NoError(t, errors.Join(d.Remove(ctx, "a.b"), d.Remove(ctx, "aside1.b")))
	require.Empty(t, aside(), fmt.Sprint(layersOf(t, d)))
}

func asidesOf(tb testing.TB, d *Driver, id string) []string {
	tb.Helper()
	list, err := d.m.asides(id)
	require.NoError(tb, err)
	return list
}

// Of a layer that was moved aside more than once, each Put ends all that have no
// open file any more, in whatever order they were closed.
func TestAsides(t *testing.T) {
	requirePool(t)
	if kernelMounts() {
		t.Skip("the kernel's file system is detached")
	}
	for name, c := range map[string]struct {
		closed []int // of the files that were left open at three Puts
		open   bool  // a fourth one is open at the Put
		left   int
	}{
		"none":                    {left: 3},
		"the first":               {closed: []int{0}, left: 2},
		"the last":                {closed: []int{2}, left: 2},
		"one in between":          {closed: []int{1}, left: 2},
		"all":                     {closed: []int{0, 1, 2}, left: 0},
		"all, and another opened": {closed: []int{0, 1, 2}, open: true, left: 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := mustOpen(t, newRootDir(t), &Options{})
			ctx := t.Context()
			require.NoError(t, d.Create(ctx, "a", "", nil))
			var files []*os.File
			opened := func() {
				path, err := d.Get(ctx, "a", nil)
				require.NoError(t, err)
				f, err := os.Create(filepath.Join(path, fmt.Sprint(len(files))))
				require.NoError(t, err)
				files = append(files, f)
			}
			for i := range 3 {
				opened()
				require.NoError(t, d.Put(ctx, "a"))
				require.Len(t, asidesOf(t, d, "a"), i+1)
			}
			for _, i := range c.closed {
				require.NoError(t, files[i].Close())
			}
			if c.open {
				opened()
			} else {
				_, err := d.Get(ctx, "a", nil)
				require.NoError(t, err)
			}
			require.NoError(t, d.Put(ctx, "a"))
			require.Len(t, asidesOf(t, d, "a"), c.left)
			for i, f := range files {
				_, err := f.WriteString("kept")
				if slices.Contains(c.closed, i) {
					require.ErrorIs(t, err, os.ErrClosed)
					continue
				}
				require.NoError(t, errors.Join(err, f.Close()))
			}
			for i := range files {
				want := "kept"
				if slices.Contains(c.closed, i) {
					want = ""
				}
				require.Equal(t, want, read(t, d, "a", fmt.Sprint(i)))
			}
			require.Empty(t, asidesOf(t, d, "a"))
			require.NoError(t, d.Remove(ctx, "a"))
		})
	}
}
