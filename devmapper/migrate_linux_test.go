package devmapper

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/tree"
)

// writer writes numbers to a file, one after another, and now and then a file
// of its own, until it is stopped.
type writer struct {
	written atomic.Uint64
	stop    func()
}

func startWriter(t testing.TB, dir string) *writer {
	t.Helper()
	f, err := os.OpenFile(dir+"/numbers", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	require.NoError(t, err)
	w, quit := new(writer), make(chan struct{})
	var done sync.WaitGroup
	var failed error
	done.Go(func() {
		for n := uint64(0); failed == nil; n++ {
			select {
			case <-quit:
				return
			default:
			}
			_, failed = f.Write(binary.LittleEndian.AppendUint64(nil, n))
			if failed == nil && n%64 == 0 {
				failed = os.WriteFile(fmt.Sprintf("%s/w%d", dir, n/64%20), bytes.Repeat([]byte{byte(n / 64)}, 100<<10), 0o644)
			}
			w.written.Store(n + 1)
			time.Sleep(200 * time.Microsecond)
		}
	})
	w.stop = sync.OnceFunc(func() {
		close(quit)
		done.Wait()
		require.NoError(t, errors.Join(failed, f.Close()))
	})
	t.Cleanup(w.stop)
	return w
}

// numbers reads what a writer has written.
func numbers(t testing.TB, dir string) uint64 {
	t.Helper()
	b, err := os.ReadFile(dir + "/numbers")
	require.NoError(t, err)
	require.Zero(t, len(b)%8)
	for i := range len(b) / 8 {
		require.Equal(t, uint64(i), binary.LittleEndian.Uint64(b[i*8:]))
	}
	return uint64(len(b) / 8)
}

// stack makes a, b on it and c on that, and returns the tree of c.
func stack(t testing.TB, d *Driver) string {
	t.Helper()
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 2<<20, 1) })
	require.NoError(t, d.Create(t.Context(), "b", "a", &layerfs.CreateOptions{ReadOnly: true, Labels: map[string]string{"k": "v"}}))
	create(t, d, "c", "b")
	path, err := d.Get(t.Context(), "c", nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Put(context.Background(), "c")) })
	write(t, path+"/g", 3<<20, 2)
	return path
}

// nothingLeft looks for snapshots and locks that a migration leaves.
func nothingLeft(t testing.TB, d *Driver) {
	t.Helper()
	files, err := filepath.Glob(d.m.devicePath("") + "/.*")
	require.NoError(t, err)
	require.Empty(t, files)
	found, err := d.Check(context.Background())
	require.NoError(t, err)
	require.Empty(t, found)
}

// TestMigrate copies a layer that is written all the time.
func TestMigrate(t *testing.T) {
	for _, o := range []*Options{small(), smallXFS()} {
		t.Run("fs="+o.FS, func(t *testing.T) {
			ctx := t.Context()
			there := *o
			there.BlockSize = 128 << 10 // what is copied does not depend on it
			src, dst := mustNew(t, newRoot(t), o), mustNew(t, newRoot(t), &there)
			path := stack(t, src)
			w := startWriter(t, path)
			var frozenAt uint64
			var stopped bool
			done, err := src.Migrate(ctx, "c", dst, &MigrateOptions{
				Rounds: 3, Small: 1, Verify: true,
				Stop: func(context.Context) error { stopped = true; return nil },
				Then: func(ctx context.Context) error {
					// Whoever writes waits now, and the copy has all that
					// was written before.
					require.True(t, stopped)
					frozenAt = w.written.Load()
					time.Sleep(50 * time.Millisecond)
					require.Equal(t, frozenAt, w.written.Load())
					with(t, dst, "c", func(copied string) {
						n := numbers(t, copied)
						require.LessOrEqual(t, frozenAt, n)
						require.LessOrEqual(t, n, frozenAt+1)
					})
					return nil
				},
			})
			require.NoError(t, err)
			require.Positive(t, frozenAt)
			require.Equal(t, []string{"a", "b"}, done.Copied)
			require.Empty(t, done.There)
			require.GreaterOrEqual(t, len(done.Rounds), 3)
			require.Greater(t, done.Rounds[0].Bytes, done.Rounds[len(done.Rounds)-1].Bytes)
			require.Positive(t, done.Frozen)
			require.NotEmpty(t, done.Sum.Digest)
			require.Eventually(t, func() bool { return w.written.Load() > frozenAt+1 }, 10*time.Second, time.Millisecond, "the layer goes on")
			info, err := dst.Stat(ctx, "b", nil)
			require.NoError(t, err)
			require.True(t, info.ReadOnly)
			require.Equal(t, map[string]string{"k": "v"}, info.Labels)

			// Another one, whose ancestors are there, and nobody writes in the end.
			done, err = src.Migrate(ctx, "c", dst, &MigrateOptions{
				As: "d", Verify: true,
				Stop: func(context.Context) error { w.stop(); return nil },
			})
			require.NoError(t, err)
			require.Equal(t, []string{"a", "b"}, done.There)
			with(t, dst, "d", func(copied string) {
				diff, err := tree.Compare(path, copied, nil)
				require.NoError(t, err)
				require.Empty(t, diff)
			})
			oracle(t, dst, "d", "b")
			_, err = src.Migrate(ctx, "c", dst, nil)
			require.ErrorIs(t, err, layerfs.ErrExist)
			_, err = src.Migrate(ctx, "c", src, &MigrateOptions{As: "e"})
			require.ErrorContains(t, err, "the root of the layer")
			nothingLeft(t, src)
			nothingLeft(t, dst)
		})
	}
}

// TestBlockSum compares with a sum that is made of the whole device.
func TestBlockSum(t *testing.T) {
	d := mustNew(t, newRoot(t), small())
	ctx := t.Context()
	create(t, d, "a", "")
	with(t, d, "a", func(path string) {
		write(t, path+"/f", 1<<20+77, 1)
		require.NoError(t, os.WriteFile(path+"/zero", make([]byte, 1<<20), 0o644))
	})
	var last layerfs.Progress
	sum, err := d.BlockSum(ctx, "a", func(p layerfs.Progress) { last = p })
	require.NoError(t, err)
	require.Equal(t, sum.Bytes, last.Bytes)
	require.Equal(t, last.Total, last.Bytes)
	h := sha256.New()
	device := image(t, d, "a")
	for i := 0; i < len(device); i += 4096 {
		if piece := device[i : i+4096]; !allZero(piece) {
			n := 4096
			for piece[n-1] == 0 {
				n--
			}
			h.Write(binary.LittleEndian.AppendUint64(nil, uint64(i)))
			h.Write(binary.LittleEndian.AppendUint32(nil, uint32(n)))
			h.Write(piece[:n])
		}
	}
	require.Equal(t, fmt.Sprintf("sha256:%x", h.Sum(nil)), sum.Digest)
	with(t, d, "a", func(path string) { write(t, path+"/one", 1, 1) })
	other, err := d.BlockSum(ctx, "a", nil)
	require.NoError(t, err)
	require.NotEqual(t, sum.Digest, other.Digest)
	_, err = d.BlockSum(ctx, "none", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	nothingLeft(t, d)
}

// TestMigrate_fails: whatever goes wrong, nothing is left and the layer goes on.
func TestMigrate_fails(t *testing.T) {
	src := mustNew(t, newRoot(t), small())
	path := stack(t, src)
	w := startWriter(t, path)
	root := newRoot(t)
	boom := errors.New("boom")
	noTest := func(string) {}
	for _, tc := range []struct {
		name  string
		opts  func(cancel context.CancelCauseFunc) *MigrateOptions
		fault func(*Driver) func(string) // of the source
		is    error
		says  string
	}{
		{"stop", func(context.CancelCauseFunc) *MigrateOptions {
			return &MigrateOptions{Stop: func(context.Context) error { return boom }}
		}, nil, boom, "stop: boom"},
		{"then", func(context.CancelCauseFunc) *MigrateOptions {
			return &MigrateOptions{Then: func(context.Context) error { return boom }}
		}, nil, boom, "then: boom"},
		{"cancel-ancestor", func(cancel context.CancelCauseFunc) *MigrateOptions {
			return &MigrateOptions{Progress: func(p MigrateProgress) {
				if p.Round == 0 {
					cancel(boom)
				}
			}}
		}, nil, boom, "ancestor a"},
		{"cancel-round", func(cancel context.CancelCauseFunc) *MigrateOptions {
			return &MigrateOptions{Progress: func(p MigrateProgress) {
				if p.Round == 1 {
					cancel(boom)
				}
			}}
		}, nil, boom, "round 1"},
		{"cancel-frozen", func(cancel context.CancelCauseFunc) *MigrateOptions {
			return &MigrateOptions{Verify: true, Progress: func(p MigrateProgress) {
				if p.Frozen && p.Phase == "compare" {
					cancel(boom)
				}
			}}
		}, nil, boom, "boom"},
		{"verify", func(context.CancelCauseFunc) *MigrateOptions { return &MigrateOptions{Verify: true} }, func(dst *Driver) func(string) {
			return func(step string) {
				if step == "migrate: last round" {
					poke(t, dst, "c")
				}
			}
		}, nil, "the copy is not the same"},
		{"rounds", func(context.CancelCauseFunc) *MigrateOptions { return &MigrateOptions{Rounds: -1} }, nil, nil, "negative"},
		{"id", func(context.CancelCauseFunc) *MigrateOptions { return &MigrateOptions{As: "../x"} }, nil, layerfs.ErrInvalidID, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dst := mustNew(t, root, small())
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			src.m.fault = noTest
			if tc.fault != nil {
				src.m.fault = tc.fault(dst)
			}
			defer func() { src.m.fault = nil }()
			_, err := src.Migrate(ctx, "c", dst, tc.opts(cancel))
			require.Error(t, err)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			require.ErrorContains(t, err, tc.says)
			list, err := dst.List(context.Background())
			require.NoError(t, err)
			require.Empty(t, list)
			nothingLeft(t, src)
			nothingLeft(t, dst)
			n := w.written.Load()
			require.Eventually(t, func() bool { return w.written.Load() > n+1 }, 10*time.Second, time.Millisecond)
		})
	}
	t.Run("no-space", func(t *testing.T) {
		o := small()
		o.DataSize, o.ErrorIfNoSpace = 16<<20, true
		write(t, path+"/big", 16<<20, 5)
		dst := mustNew(t, newRoot(t), o)
		_, err := src.Migrate(t.Context(), "c", dst, nil)
		require.ErrorIs(t, err, unix.ENOSPC)
		list, err := dst.List(t.Context())
		require.NoError(t, err)
		require.Empty(t, list)
		nothingLeft(t, src)
	})
	t.Run("other-file-system", func(t *testing.T) {
		dst := mustNew(t, newRoot(t), smallXFS())
		_, err := src.Migrate(t.Context(), "c", dst, nil)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	})
	t.Run("other-ancestor", func(t *testing.T) {
		dst := mustNew(t, newRoot(t), small())
		create(t, dst, "a", "")
		_, err := src.Migrate(t.Context(), "c", dst, nil)
		require.ErrorIs(t, err, layerfs.ErrExist)
		require.ErrorContains(t, err, "is not a copy of it")
	})
	t.Run("two-at-a-time", func(t *testing.T) {
		dst := mustNew(t, newRoot(t), small())
		_, err := src.Migrate(t.Context(), "c", dst, &MigrateOptions{Stop: func(ctx context.Context) error {
			_, err := src.Migrate(ctx, "c", dst, nil)
			require.ErrorIs(t, err, layerfs.ErrInUse)
			// What is not finished cannot be used.
			_, err = dst.Get(ctx, "c", nil)
			require.ErrorIs(t, err, layerfs.ErrIncomplete)
			return nil
		}})
		require.NoError(t, err)
	})
}

// poke changes one byte in the middle of a layer's device.
func poke(t testing.TB, d *Driver, id string) {
	dev, err := d.m.load(id)
	require.NoError(t, err)
	name := d.m.deviceName("+poke", false)
	info, err := d.m.activateThin(name, "", dev.ID, dev.Size, false)
	require.NoError(t, err)
	f, err := dm.OpenDevice(info.Device, os.O_RDWR)
	require.NoError(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 1024+0x38) // the magic of ext4's superblock
	require.NoError(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b, 1024+0x38)
	require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
	require.NoError(t, d.m.removeDevice(context.Background(), name))
}

// TestMigrateKilled kills a process that copies a layer in use, at steps all
// along its way, and looks at both roots each time. Each process begins with
// what the one before left.
func TestMigrateKilled(t *testing.T) {
	ctx := t.Context()
	from, to := newRoot(t), newRoot(t)
	src := mustNew(t, from, small())
	path := stack(t, src)
	w := startWriter(t, path)
	require.NoError(t, mustNew(t, to, small()).Close())
	for _, step := range []string{
		"metadata: reserved", "reserve: write", "snapshot: suspended", "snapshot: done", "delete: renamed",
		"migrate: round", "apply: filled", "apply: swapped", "freeze: suspended", "migrate: last round",
	} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestMigrateKilledChild$")
		cmd.Env = append(os.Environ(), strings.Join([]string{"LAYERFS_MIGRATE=" + step, from, to}, "|"))
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit, "%s: %s", step, out)
		require.Equal(t, unix.SIGKILL, exit.Sys().(interface{ Signal() unix.Signal }).Signal(), "%s: %s", step, out)

		// Opening the roots is what mends them.
		again, err := New(from, small())
		require.NoError(t, err, step)
		n := w.written.Load()
		require.Eventually(t, func() bool { return w.written.Load() > n+1 }, 30*time.Second, time.Millisecond, "%s: %s", step, out)
		nothingLeft(t, again)
		require.NoError(t, again.Close())
		dst, err := New(to, small())
		require.NoError(t, err, step)
		infos, err := dst.List(ctx)
		require.NoError(t, err)
		for _, i := range infos {
			if i.ID == "c" {
				require.Equal(t, unfinished, i.Incomplete, step)
				_, err := dst.Get(ctx, "c", nil)
				require.ErrorIs(t, err, layerfs.ErrIncomplete)
				continue
			}
			require.Empty(t, i.Incomplete, step)
		}
		require.NoError(t, dst.Close())
	}
	dst := mustNew(t, to, small())
	infos, err := dst.List(ctx)
	require.NoError(t, err)
	require.Len(t, infos, 3, "the last one was killed with its copy all but finished")
	_, err = src.Migrate(ctx, "c", dst, &MigrateOptions{Verify: true, Stop: func(context.Context) error { w.stop(); return nil }})
	require.NoError(t, err)
	nothingLeft(t, src)
	nothingLeft(t, dst)
	with(t, dst, "c", func(copied string) {
		diff, err := tree.Compare(path, copied, nil)
		require.NoError(t, err)
		require.Empty(t, diff)
	})
}

// TestMigrateKilledChild is the process that is killed.
func TestMigrateKilledChild(t *testing.T) {
	args := strings.Split(os.Getenv("LAYERFS_MIGRATE"), "|")
	if len(args) != 3 {
		t.Skip("for TestMigrateKilled")
	}
	var armed atomic.Bool // not while the roots are opened
	fault := func(step string) {
		if armed.Load() && step == args[0] {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	src, err := open(args[1], small(), fault)
	require.NoError(t, err)
	dst, err := open(args[2], small(), fault)
	require.NoError(t, err)
	armed.Store(true)
	_, err = src.Migrate(context.Background(), "c", dst, &MigrateOptions{Verify: true})
	t.Fatalf("it came to its end: %v", err)
}
