package zfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	aside := func() []string {
		list, err := filepath.Glob(globQuote(d.m.state("views")) + "/*/" + asidePrefix + "*")
		require.NoError(t, err)
		return list
	}
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
