package vfs_test

import (
	"archive/tar"
	"bytes"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

// TestReadOnlyRoot makes layers whose root directory its owner cannot write.
func TestReadOnlyRoot(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		d, err := vfs.New(t.TempDir(), nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, d.Close()) }()
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		require.NoError(t, w.WriteHeader(&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o555}))
		require.NoError(t, w.Close())
		require.NoError(t, d.Create(t.Context(), "a", "", nil))
		_, err = d.Apply(t.Context(), "a", &b, &layerfs.ApplyOptions{IgnoreOwners: true})
		require.NoError(t, err)
		require.NoError(t, d.Create(t.Context(), "b", "a", nil))
		p, err := d.Get(t.Context(), "b", nil)
		require.NoError(t, err)
		fi, err := os.Stat(p)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o555), fi.Mode().Perm())
		require.NoError(t, d.Put(t.Context(), "b"))
		require.NoError(t, d.Remove(t.Context(), "b"))
		require.NoError(t, d.Remove(t.Context(), "a"))
	})
}
