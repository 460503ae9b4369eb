package zfs

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/tree"
)

func TestFindObjects(t *testing.T) {
	dir := t.TempDir()
	tree.Build(t, dir, "file a/b/f 1", "link a/g a/b/f", "file other 2", "symlink a/link b", "dir empty", "fifo a/p")
	ino := func(path string) uint64 {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(dir+path, &st))
		return st.Ino
	}
	find := func(ctx context.Context, paths ...string) (found []string, err error) {
		objects := make(map[uint64]bool)
		for _, p := range paths {
			objects[ino(p)] = true
		}
		err = findObjects(ctx, dir, objects, func(path string) { found = append(found, path) })
		slices.Sort(found)
		return found, err
	}
	for _, c := range []struct{ of, want []string }{
		{nil, nil},
		{[]string{"/"}, []string{"/"}},
		{[]string{"/a/g"}, []string{"/a/b/f", "/a/g"}},
		{[]string{"/a/link", "/empty", "/a/p"}, []string{"/a/link", "/a/p", "/empty"}},
	} {
		got, err := find(t.Context(), c.of...)
		require.NoError(t, err)
		assert.Equal(t, c.want, got)
	}
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	_, err := find(ctx, "/other")
	require.ErrorIs(t, err, stop)

	require.ErrorIs(t, findObjects(t.Context(), dir+"/none", map[uint64]bool{1: true}, nil), os.ErrNotExist)
}
