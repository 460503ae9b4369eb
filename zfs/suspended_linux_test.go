package zfs

import (
	"bytes"
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
	for _, id := range []string{"w", "back", "gone"} {
		require.NoError(t, d.Create(ctx, id, "base", nil))
	}
	write(t, d, "back", "f", "changed")
	require.NoError(t, d.Create(ctx, "empty", "", nil))
	var sent bytes.Buffer
	require.NoError(t, d.Send(ctx, &sent, "base", "", nil))

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
	assert.Less(t, time.Since(start), 20*time.Second)
	for _, c := range []struct {
		verb string
		call func() error
	}{
		{"clone", func() error { return d.Clone(ctx, "z", "base", nil) }},
		{"rollback", func() error { return d.Rollback(ctx, "back") }},
		{"apply", func() error { _, err := d.Apply(ctx, "empty", tarOf(t, []byte("text")), nil); return err }},
		{"receive", func() error { return d.Receive(ctx, bytes.NewReader(sent.Bytes()), "z", "", nil) }},
		{"set quota", func() error { return d.SetQuota(ctx, "back", layerfs.Quota{Bytes: 1 << 20}) }},
		{"remove", func() error { return d.Remove(ctx, "gone") }},
		{"check", func() error { _, err := d.Check(ctx); return err }},
		{"repair", func() error { _, err := d.Repair(ctx); return err }},
		{"open", func() error { _, err := New(root, &Options{Dataset: datasetOf(root)}); return err }},
		{"open a new root", func() error { _, err := New(t.TempDir(), &Options{Dataset: datasetOf(root)}); return err }},
	} {
		start := time.Now()
		err := c.call()
		require.ErrorIs(t, err, ErrSuspended, c.verb)
		assert.NotErrorIs(t, err, errors.ErrUnsupported, c.verb)
		assert.ErrorContains(t, err, pool, c.verb)
		assert.Less(t, time.Since(start), 10*time.Second, c.verb)
	}
	start = time.Now()
	status, err := d.Status(ctx)
	require.NoError(t, err)
	assert.Contains(t, status, layerfs.StatusItem{Key: "Zpool", Value: pool})
	assert.Contains(t, status, layerfs.StatusItem{Key: "Zpool Health", Value: "SUSPENDED"})
	assert.Less(t, time.Since(start), time.Second)

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
	want := []string{"back", "base", "base@" + snapshotOf(t, d, "w"), "empty", "w"}
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
	assert.Equal(t, "changed", read(t, d, "back", "f"), "it was not rolled back")
	require.NoError(t, d.Rollback(ctx, "back"))
	assert.Equal(t, "kept", read(t, d, "back", "f"))
	require.NoError(t, d.Create(ctx, "x", "base", nil), "the name is free again")
	problems, err := d.Check(ctx)
	require.NoError(t, err)
	assert.Empty(t, problems)
	for _, id := range []string{"x", "w", "back", "empty", "base"} {
		require.NoError(t, d.Remove(ctx, id))
	}
	assert.Empty(t, layersOf(t, d))
}

// The programs say it, where the kernel does not tell.
func TestSaysSuspended(t *testing.T) {
	script := filepath.Join(t.TempDir(), "zfs")
	require.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\necho \"cannot open 'tank': pool $SAYS\" >&2\nexit 1\n"), 0o700))
	m := &mechanism{parent: "tank/a", tool: &tool{zfs: script, zpool: script, pool: "tank", patience: time.Minute}}
	for says, suspended := range map[string]bool{"I/O is currently suspended": true, "is broken": false} {
		t.Setenv("SAYS", says)
		status, err := m.Status(t.Context())
		_, lerr := m.Stored(t.Context())
		assert.Equal(t, suspended, errors.Is(lerr, ErrSuspended), says)
		assert.Equal(t, !suspended, errors.Is(lerr, errors.ErrUnsupported), says)
		if !suspended {
			require.Error(t, err)
			require.NotErrorIs(t, err, ErrSuspended)
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, []layerfs.StatusItem{
			{Key: "Zpool", Value: "tank"}, {Key: "Zpool Health", Value: "SUSPENDED"}, {Key: "Parent Dataset", Value: "tank/a"},
		}, status[:3])
		assert.Len(t, status, 4, "no sizes")
	}
}
