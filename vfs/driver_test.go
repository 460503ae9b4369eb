package vfs_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/vfs"
)

func TestNewErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for name, c := range map[string]struct {
		root string
		opts *vfs.Options
		want string
	}{
		"all at once": {t.TempDir(), &vfs.Options{Durability: 9, Workers: -1, Quota: layerfs.Quota{Bytes: -1}}, "workers"},
		"durability":  {t.TempDir(), &vfs.Options{Durability: 9, Workers: -1}, "durability"},
		"root a file": {file, nil, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := vfs.New(c.root, c.opts)
			require.Nil(t, d)
			require.ErrorContains(t, err, c.want)
			le, ok := errors.AsType[*layerfs.Error](err)
			require.True(t, ok, "%T", err)
			assert.Equal(t, "open", le.Op)
			assert.Equal(t, "vfs", le.Driver)
		})
	}
}

// TestQuotaOption: a default quota that cannot be kept is refused when the
// driver is opened, not when a layer is made.
func TestQuotaOption(t *testing.T) {
	root := t.TempDir()
	plain, err := vfs.New(root, nil)
	require.NoError(t, err)
	can := plain.Features().Quota
	require.NoError(t, plain.Close())
	d, err := vfs.New(root, &vfs.Options{Quota: layerfs.Quota{Bytes: 1 << 20}})
	if !can {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	require.NoError(t, err)
	defer d.Close()
	ctx := context.Background()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	info, err := d.Stat(ctx, "a", nil)
	require.NoError(t, err)
	assert.Equal(t, int64(1<<20), info.Quota.Bytes)
}

func TestLayout(t *testing.T) {
	root := t.TempDir()
	d, err := vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
	require.NoError(t, err)
	defer d.Close()
	ctx := context.Background()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	path, err := d.Get(ctx, "a", nil)
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(root, "vfs", "dir", "a"), path, "where Docker has it")
	require.NoError(t, d.Put(ctx, "a"))
	items, err := d.Status(ctx)
	require.NoError(t, err)
	keys := make([]string, len(items))
	for i, item := range items {
		keys[i] = item.Key
	}
	assert.Equal(t, []string{"Backing Filesystem", "Root Dir", "Reflinks"}, keys)
}

// TestFind: storage that somebody has removed.
func TestFind(t *testing.T) {
	root := t.TempDir()
	d, err := vfs.New(root, nil)
	require.NoError(t, err)
	defer d.Close()
	ctx := context.Background()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	require.NoError(t, os.Remove(filepath.Join(root, "vfs", "dir", "a")))
	problems, err := d.Check(ctx)
	require.NoError(t, err)
	require.Len(t, problems, 1)
	assert.Equal(t, "a", problems[0].ID)
	_, err = d.Get(ctx, "a", nil)
	require.ErrorIs(t, err, os.ErrNotExist)
	assert.NotErrorIs(t, err, layerfs.ErrNotExist, "the layer is known")
	require.NoError(t, d.Remove(ctx, "a"))
}

// TestRecovered: what a crash left is mended, told and logged.
func TestRecovered(t *testing.T) {
	root := t.TempDir()
	d, err := vfs.New(root, nil)
	require.NoError(t, err)
	require.Empty(t, d.Recovered())
	require.NoError(t, d.Close())
	require.NoError(t, os.MkdirAll(filepath.Join(root, "vfs", "dir", "orphan", "sub"), 0o700))
	var log bytes.Buffer
	d, err = vfs.New(root, &vfs.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	defer d.Close()
	require.Len(t, d.Recovered(), 1)
	assert.Equal(t, "orphan", d.Recovered()[0].ID)
	assert.Contains(t, log.String(), "orphan")
	assert.NoDirExists(t, filepath.Join(root, "vfs", "dir", "orphan"))
}

// TestCreateCancelled: a copy that is given up leaves nothing behind.
func TestCreateCancelled(t *testing.T) {
	root := t.TempDir()
	d, err := vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone, NoReflink: true, Workers: 1})
	require.NoError(t, err)
	defer d.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	path, err := d.Get(ctx, "a", nil)
	require.NoError(t, err)
	big := make([]byte, 1<<20)
	for _, name := range []string{"1", "2", "3", "4", "5", "6", "7", "8"} {
		require.NoError(t, os.WriteFile(filepath.Join(path, name), big, 0o600))
	}
	require.NoError(t, d.Put(ctx, "a"))
	err = d.Create(ctx, "b", "a", &layerfs.CreateOptions{Progress: func(layerfs.Progress) { cancel() }})
	if err == nil {
		t.Skip("the copy was faster than the first call of Progress")
	}
	require.ErrorIs(t, err, context.Canceled)
	_, err = d.Stat(context.Background(), "b", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	for _, dir := range []string{"dir", ".layerfs/build"} {
		entries, err := os.ReadDir(filepath.Join(root, "vfs", dir))
		require.NoError(t, err)
		for _, e := range entries {
			assert.Equal(t, "a", e.Name(), "left in %s", dir)
		}
	}
}
