package zfs

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// zeros is a stream without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// program makes a shell script.
func program(tb testing.TB, text string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "program")
	require.NoError(tb, os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700))
	return path
}

// stuck makes a zfs of which a process is left that has its files, as one does
// that waits in the kernel for a suspended pool and cannot be killed.
func stuck(tb testing.TB) string {
	pid := filepath.Join(tb.TempDir(), "pid")
	tb.Cleanup(func() {
		b, err := os.ReadFile(pid)
		require.NoError(tb, err)
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		require.NoError(tb, err)
		require.NoError(tb, unix.Kill(n, unix.SIGKILL), "what was left is to outlive the call")
	})
	return program(tb, "sleep 60 <&0 &\necho $! >"+pid+"\nwait\n")
}

// A stream ends in time though what is left of zfs has the other end of its
// pipe: when the pool is suspended in the middle of it, and when the context is
// done.
func TestStreamLeft(t *testing.T) {
	why := errors.New("why")
	suspended := program(t, "echo SUSPENDED\n")
	for name, stream := range map[string]func(m *mechanism, ctx context.Context) error{
		"send": func(m *mechanism, ctx context.Context) error {
			return m.sendSnapshot(ctx, "", "p/a@s", nil, func(r io.Reader) error {
				_, err := io.Copy(io.Discard, r)
				return err
			})
		},
		"send to a parser": func(m *mechanism, ctx context.Context) error {
			return m.sendSnapshot(ctx, "", "p/a@s", nil, func(r io.Reader) error {
				return readStream(r, func(extent) error { return nil })
			})
		},
		"receive": func(m *mechanism, ctx context.Context) error {
			return m.receiveStream(ctx, zeros{}, []string{"receive"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			t.Run("suspended", func(t *testing.T) {
				t.Parallel()
				m := &mechanism{tool: &tool{zfs: stuck(t), zpool: suspended, pool: "no such pool", patience: 300 * time.Millisecond}}
				start := time.Now()
				err := stream(m, t.Context())
				require.ErrorIs(t, err, ErrSuspended)
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
				assert.Less(t, time.Since(start), 30*time.Second)
			})
			t.Run("cancelled", func(t *testing.T) {
				t.Parallel()
				m := &mechanism{tool: &tool{zfs: stuck(t), patience: time.Hour}}
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(300*time.Millisecond, func() { cancel(why) })
				start := time.Now()
				err := stream(m, ctx)
				require.ErrorIs(t, err, why)
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
				assert.Less(t, time.Since(start), 30*time.Second)
			})
		})
	}
}
