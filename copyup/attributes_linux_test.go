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

func TestStorageXattrs(t *testing.T) {
	root := testenv.XFS(t, 300)
	tree.Build(t, root, "file a x", "dir out 0755")
	acl := []byte("\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x05\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff")
	require.NoError(t, unix.Setxattr(root+"/a", "system.posix_acl_access", acl, 0))
	buf := make([]byte, 256)
	_, err := unix.Getxattr(root+"/a", "trusted.SGI_ACL_FILE", buf)
	require.NoError(t, err, "xfs shows the ACL under a second name")

	elsewhere := t.TempDir()
	require.NoError(t, File(t.Context(), elsewhere+"/a", root+"/a", nil))
	n, err := unix.Listxattr(elsewhere+"/a", buf)
	require.NoError(t, err)
	require.Equal(t, "system.posix_acl_access\x00", string(buf[:n]))
}
