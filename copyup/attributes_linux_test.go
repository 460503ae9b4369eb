//go:build !layerfs_portable

package copyup

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

func TestAttributes(t *testing.T) {
	testenv.RequireRoot(t)
	root := t.TempDir()
	tree.Build(t, root, "dir src 3711 7:8", "dir dst 0755 0:0")
	src, dst := root+"/src", root+"/dst"
	require.NoError(t, unix.Setxattr(src, "trusted.keep", []byte("k"), 0))
	require.NoError(t, unix.Setxattr(src, "trusted.skip", []byte("s"), 0))
	require.NoError(t, unix.UtimesNano(src, []unix.Timespec{{Sec: 5, Nsec: 7}, {Sec: 9, Nsec: 11}}))
	require.NoError(t, Attributes(dst, src, &Options{SkipXattr: func(n string) bool { return n == "trusted.skip" }}))
	require.NoError(t, unix.Removexattr(src, "trusted.skip"))
	diffs, err := tree.Compare(src, dst, nil)
	require.NoError(t, err)
	require.Empty(t, diffs)

	require.NoError(t, os.Symlink("dst", root+"/link"))
	require.ErrorIs(t, Attributes(root+"/link", src, nil), unix.ENOTDIR)
	require.ErrorIs(t, Attributes(dst, root+"/none", nil), os.ErrNotExist)
}
