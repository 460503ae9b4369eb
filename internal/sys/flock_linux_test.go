package sys

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestWaitUnlocked(t *testing.T) {
	path := t.TempDir()
	open := func(t *testing.T, how int) *os.File {
		t.Helper()
		f, err := os.Open(path)
		require.NoError(t, err)
		t.Cleanup(func() { f.Close() })
		if how != 0 {
			require.NoError(t, unix.Flock(int(f.Fd()), how))
		}
		return f
	}
	t.Run("free", func(t *testing.T) {
		open(t, unix.LOCK_SH)
		free, err := WaitUnlocked(t.Context(), open(t, 0), 0)
		require.NoError(t, err)
		require.True(t, free)
	})
	t.Run("later", func(t *testing.T) {
		lock, f := open(t, unix.LOCK_EX), open(t, 0)
		time.AfterFunc(30*time.Millisecond, func() { lock.Close() })
		free, err := WaitUnlocked(t.Context(), f, time.Minute)
		require.NoError(t, err)
		require.True(t, free)
		require.ErrorIs(t, unix.Flock(int(open(t, 0).Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK, "f is locked")
	})
	t.Run("not in time", func(t *testing.T) {
		open(t, unix.LOCK_EX)
		began := time.Now()
		free, err := WaitUnlocked(t.Context(), open(t, 0), 20*time.Millisecond)
		require.NoError(t, err)
		require.False(t, free)
		require.GreaterOrEqual(t, time.Since(began), 20*time.Millisecond)
	})
	t.Run("cancelled", func(t *testing.T) {
		open(t, unix.LOCK_EX)
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, enough)
		defer cancel()
		free, err := WaitUnlocked(ctx, open(t, 0), time.Minute)
		require.ErrorIs(t, err, enough)
		require.False(t, free)
	})
	t.Run("no file", func(t *testing.T) {
		f := open(t, 0)
		require.NoError(t, f.Close())
		_, err := WaitUnlocked(t.Context(), f, time.Minute)
		require.ErrorIs(t, err, unix.EBADF)
		require.ErrorContains(t, err, path)
	})
}
