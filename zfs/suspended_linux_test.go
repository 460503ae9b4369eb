package zfs

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// A pool whose device fails answers no call until it is cleared. That is an
// error in time, and nothing is lost or left when it is.
func TestSuspended(t *testing.T) {
	requireOpenZFS(t, "zfs-fuse hangs when a device of the pool fails")
	disk := testenv.Tmpfs(t, "size=96m")
	pool, root := newPool(t, disk, 256<<20)
	d := mustOpen(t, root, &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "kept")
	require.NoError(t, d.Create(ctx, "w", "base", nil))

	// The device fails because its own disk is full.
	filler := filepath.Join(disk, "filler")
	f, err := os.Create(filler)
	require.NoError(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	require.ErrorIs(t, err, unix.ENOSPC)
	require.NoError(t, f.Close())
	path, err := d.Get(ctx, "w", nil)
	require.NoError(t, err)
	data := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	written := make(chan error, 1)
	go func() { // it may wait for the pool
		err := os.WriteFile(path+"/data", data, 0o644)
		_, serr := command("zpool", "sync", pool)
		written <- errors.Join(err, serr)
	}()
	d.m.tool.patience = 300 * time.Millisecond
	require.Eventually(t, d.m.tool.suspended, time.Minute, 100*time.Millisecond)

	for id, parent := range map[string]string{"x": "base", "y": ""} {
		start := time.Now()
		err := d.Create(ctx, id, parent, nil)
		require.ErrorIs(t, err, ErrSuspended)
		assert.Less(t, time.Since(start), 40*time.Second)
		assert.ErrorContains(t, err, pool)
	}
	start := time.Now()
	for _, err := range d.Changes(ctx, "w", "base") {
		require.ErrorIs(t, err, ErrSuspended)
	}
	require.ErrorIs(t, d.Send(ctx, io.Discard, "w", "", nil), ErrSuspended)
	for _, err := range d.BlockDiff(ctx, "w", "base") {
		require.ErrorIs(t, err, ErrSuspended)
	}
	for _, base := range []string{"base", ""} {
		stream, err := d.Diff(ctx, "w", base, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, stream)
			_ = stream.Close() // it may say the same again
		}
		require.ErrorIs(t, err, ErrSuspended)
	}
	_, err = d.Get(ctx, "base", nil)
	require.ErrorIs(t, err, ErrSuspended)
	_, err = d.Stat(ctx, "w", &layerfs.StatOptions{Usage: true})
	require.ErrorIs(t, err, ErrSuspended)
	require.ErrorIs(t, d.Clone(ctx, "z", "base", nil), ErrSuspended)
	assert.Less(t, time.Since(start), 20*time.Second)

	require.NoError(t, os.Remove(filler))
	mustCommand(t, "zpool", "clear", pool)
	select {
	case err := <-written:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		t.Fatal("the pool does not live again")
	}
	require.NoError(t, d.Put(ctx, "w"))
	// The calls that were left behind end now, and New undoes them.
	want := []string{"base", "base@" + snapshotOf(t, d, "w"), "w"}
	for end := time.Now().Add(time.Minute); ; time.Sleep(500 * time.Millisecond) {
		again, err := New(root, &Options{Dataset: datasetOf(root)})
		require.NoError(t, err)
		require.NoError(t, again.Close())
		got := layersOf(t, d)
		if slices.Equal(got, want) {
			break
		}
		require.True(t, time.Now().Before(end), "there is %q, want %q", got, want)
	}
	assert.Equal(t, string(data), read(t, d, "w", "data"))
	assert.Equal(t, "kept", read(t, d, "w", "f"))
	require.NoError(t, d.Create(ctx, "x", "base", nil), "the name is free again")
	require.NoError(t, errors.Join(d.Remove(ctx, "x"), d.Remove(ctx, "w"), d.Remove(ctx, "base")))
	assert.Empty(t, layersOf(t, d))
}
