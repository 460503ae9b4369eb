package fusesrv

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
)

// TestAlive: a server that takes no requests says so, as soon as there are any;
// one that works, and one that has ended, do not.
func TestAlive(t *testing.T) {
	if os.Geteuid() != 0 {
		lacks(t, "mounting", "not root")
	}
	dir := t.TempDir()
	for _, d := range []string{"/branch", "/mnt"} {
		require.NoError(t, os.Mkdir(dir+d, 0o755))
	}
	require.NoError(t, os.WriteFile(dir+"/branch/f", nil, 0o644))
	fs, _, err := unionfs.Open(&unionfs.Config{Branches: []unionfs.BranchSpec{{Path: dir + "/branch", Perm: unionfs.RW}}})
	require.NoError(t, err)
	defer fs.Close()
	s := newServer(Config{FS: fs, Target: dir + "/mnt", UDBA: None, State: mustState(t)})
	dev, err := OpenDevice()
	if err != nil {
		lacks(t, "/dev/fuse", err.Error())
	}
	require.NoError(t, MountDevice(dev, &s.cfg))
	defer unix.Unmount(dir+"/mnt", unix.MNT_DETACH)
	require.NoError(t, s.connect(dev))
	require.NoError(t, s.handshake())
	for range 3 {
		require.True(t, s.Alive(), "nothing to do")
	}
	done := make(chan error)
	go func() {
		_, err := os.Lstat(dir + "/mnt/f")
		done <- err
	}()
	waits := func() bool {
		w, err := s.pending()
		require.NoError(t, err)
		return w
	}
	require.Eventually(t, waits, 10*time.Second, time.Millisecond)
	require.True(t, s.Alive(), "it has just come")
	for range 3 {
		require.False(t, s.Alive(), "nobody has taken it")
	}
	s.start()
	require.NoError(t, <-done)
	require.True(t, s.Alive())

	// A lock that is never free is no life, either.
	s.mu.Lock()
	alive := make(chan bool, 1)
	go func() { alive <- s.Alive() }()
	select {
	case <-alive:
		t.Error("it did not look at the lock")
	case <-time.After(50 * time.Millisecond):
	}
	s.mu.Unlock()
	assert.True(t, <-alive)

	require.NoError(t, s.Unmount(t.Context(), false))
	require.True(t, s.Alive())
	require.True(t, s.Alive())
}

func mustState(t *testing.T) *State {
	t.Helper()
	s, err := NewState()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}
