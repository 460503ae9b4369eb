package vfs_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/vfs"
)

// TestMountLabel: Create, Clone and Rollback give all files of a layer its label.
func TestMountLabel(t *testing.T) {
	testenv.RequireRoot(t) // without SELinux in the kernel anybody else may not
	const (
		xLabel = "system_u:object_r:x_t:s0"
		yLabel = "system_u:object_r:y_t:s0:c1,c2"
	)
	d, err := vfs.New(testenv.Tmpfs(t), nil)
	require.NoError(t, err)
	defer d.Close()
	ctx := t.Context()
	// has compares the labels of all files with how many have each.
	has := func(id string, want map[string]int) {
		t.Helper()
		info, err := d.Stat(ctx, id, nil)
		require.NoError(t, err)
		require.Equal(t, want, testenv.Labels(t, info.Path))
	}
	labelled := func(label string) *layerfs.CreateOptions { return &layerfs.CreateOptions{MountLabel: label} }
	require.NoError(t, d.Create(ctx, "base", "", labelled(xLabel)))
	has("base", map[string]int{xLabel: 1})
	path, err := d.Get(ctx, "base", nil)
	require.NoError(t, err)
	tree.Build(t, path, "dir d 0755", "file d/f 1", "symlink d/s f", "fifo p")
	require.NoError(t, d.Put(ctx, "base"))
	has("base", map[string]int{xLabel: 1, "": 4})

	require.NoError(t, d.Create(ctx, "child", "base", labelled(xLabel)))
	has("child", map[string]int{xLabel: 5})
	require.NoError(t, d.Create(ctx, "other", "base", labelled(yLabel)))
	has("other", map[string]int{yLabel: 5})
	require.NoError(t, d.Clone(ctx, "clone", "child", labelled(yLabel)))
	has("clone", map[string]int{yLabel: 5})
	has("base", map[string]int{xLabel: 1, "": 4})

	// Without a label of its own a layer has the files of its parent, or of what
	// it is a clone of, with theirs.
	require.NoError(t, d.Create(ctx, "none", "child", nil))
	has("none", map[string]int{xLabel: 5})
	require.NoError(t, d.Clone(ctx, "same", "other", nil))
	has("same", map[string]int{yLabel: 5})

	info, err := d.Stat(ctx, "clone", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(info.Path, "later"), nil, 0o600))
	has("clone", map[string]int{yLabel: 5, "": 1})
	for _, id := range []string{"other", "clone", "same"} {
		require.NoError(t, d.Rollback(ctx, id))
		has(id, map[string]int{yLabel: 5})
	}

	// What is applied gets it too, in an empty layer and in one that has files.
	stream, err := d.Diff(ctx, "base", "", nil)
	require.NoError(t, err)
	applied, err := io.ReadAll(stream)
	require.NoError(t, errors.Join(err, stream.Close()))
	require.NoError(t, d.Create(ctx, "applied", "", labelled(yLabel)))
	for range 2 {
		_, err = d.Apply(ctx, "applied", bytes.NewReader(applied), nil)
		require.NoError(t, err)
		has("applied", map[string]int{yLabel: 5})
	}
}
