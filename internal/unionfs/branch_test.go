//go:build linux

package unionfs

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestAccessTimes checks that a read-only branch is never asked to note access
// times, and that a writable one does what its mount does.
func TestAccessTimes(t *testing.T) {
	testenv.RequireRoot(t)
	const asked = unix.ST_NOATIME | unix.ST_RELATIME | unix.ST_RDONLY
	for name, flag := range map[string]uintptr{"noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, unix.Mount("atimes", dir, "tmpfs", flag, ""))
			defer func() { assert.NoError(t, unix.Unmount(dir, 0)) }()
			flags := func(fd int) int64 {
				var st unix.Statfs_t
				require.NoError(t, unix.Fstatfs(fd, &st))
				return int64(st.Flags) & asked
			}
			var st unix.Statfs_t
			require.NoError(t, unix.Statfs(dir, &st))
			fs, _, err := Open(&Config{Branches: []BranchSpec{{Path: dir}}})
			require.NoError(t, err)
			defer func() { require.NoError(t, fs.Close()) }()
			require.True(t, fs.stack[0].priv)
			assert.Equal(t, int64(unix.ST_NOATIME|unix.ST_RDONLY), flags(fs.stack[0].root))
			_, err = fs.Modify(dir, RW)
			require.NoError(t, err)
			assert.Equal(t, int64(st.Flags)&asked, flags(fs.stack[0].root))
			_, err = fs.Modify(dir, ROWH)
			require.NoError(t, err)
			assert.Equal(t, int64(unix.ST_NOATIME|unix.ST_RDONLY), flags(fs.stack[0].root))
		})
	}
}
