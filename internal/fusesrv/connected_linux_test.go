package fusesrv

import (
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestConnected: a device is that of a connection while that is mounted.
func TestConnected(t *testing.T) {
	if os.Geteuid() != 0 {
		lacks(t, "mounting", "not root")
	}
	dev, err := OpenDevice()
	if err != nil {
		lacks(t, "/dev/fuse", err.Error())
	}
	defer unix.Close(dev)
	assert.False(t, Connected(dev), "before")
	dir := t.TempDir()
	require.NoError(t, MountDevice(dev, &Config{Target: dir}))
	assert.True(t, Connected(dev), "while it is mounted")
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	assert.False(t, Connected(dev), "after")
	assert.False(t, Connected(1<<20), "no descriptor")
}
