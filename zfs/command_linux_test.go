package zfs

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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

// Where calls take turns no two programs run at the same time, whatever they are
// run by, and one that is given up keeps its turn.
func TestTurns(t *testing.T) {
	dir := t.TempDir()
	limit := time.Minute
	turn := func(ctx context.Context) (*os.File, error) { return turnIn(ctx, dir, limit) }
	log := filepath.Join(t.TempDir(), "log")
	logged := func() string {
		b, err := os.ReadFile(log)
		require.NoError(t, err)
		return string(b)
	}
	script := program(t, "echo begin >>"+log+"\nsleep 0.02\necho end >>"+log+"\n")
	one := &tool{zfs: script, zpool: script, patience: 10 * time.Millisecond, turn: turn}
	ctx := t.Context()

	const calls = 8
	var all sync.WaitGroup
	for i := range calls {
		all.Go(func() {
			var err error
			if i%2 == 0 {
				_, err = one.run(ctx, "list")
			} else {
				err = one.pipe(ctx, nil, io.Discard, one.zpool, "get")
			}
			assert.NoError(t, err)
		})
	}
	all.Wait()
	assert.Equal(t, strings.Repeat("begin\nend\n", calls), logged(), "neither two calls, nor a look at the pool beside one")

	free := filepath.Join(t.TempDir(), "free")
	slow := *one
	slow.zfs = program(t, "until [ -e "+free+" ]; do sleep 0.02; done\n")
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, err := slow.run(short, "destroy")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, err, errLeft)
	limit = 200 * time.Millisecond
	_, err = one.run(ctx, "list")
	require.ErrorContains(t, err, "has not ended in 200ms")
	require.NotErrorIs(t, err, errLeft)
	why := errors.New("why")
	done, stop := context.WithCancelCause(ctx)
	time.AfterFunc(50*time.Millisecond, func() { stop(why) })
	limit = time.Minute
	_, err = one.run(done, "list")
	require.ErrorIs(t, err, why)
	require.NoError(t, os.WriteFile(free, nil, 0o600))
	_, err = one.run(ctx, "list")
	require.NoError(t, err)
}

// Nobody else can take the turns of a user.
func TestTurnFile(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		want string
	}{
		"none":         {func(string) error { return nil }, ""},
		"own":          {func(path string) error { return os.WriteFile(path, nil, 0o600) }, ""},
		"no directory": {func(path string) error { return os.Remove(filepath.Dir(path)) }, ""},
		"shared": {func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o644))
		}, "not a file of this user alone"},
		"fifo":      {func(path string) error { return unix.Mkfifo(path, 0o600) }, "not a file of this user alone"},
		"symlink":   {func(path string) error { return os.Symlink("/dev/null", path) }, "too many levels of symbolic links"},
		"directory": {func(path string) error { return os.Mkdir(path, 0o700) }, "is a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "zfs")
			path := filepath.Join(dir, turnLock)
			require.NoError(t, errors.Join(os.Mkdir(dir, 0o755), c.make(path)))
			f, err := turnIn(t.Context(), dir, time.Second)
			if c.want != "" {
				require.ErrorContains(t, err, c.want)
				return
			}
			require.NoError(t, err)
			if name != "no directory" {
				info, err := os.Stat(path)
				require.NoError(t, err)
				assert.Equal(t, os.FileMode(0o600), info.Mode())
			}
			require.NoError(t, f.Close())
		})
	}
}
