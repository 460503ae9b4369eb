package overlay_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/overlay"
)

// TestHomeIsLink: an administrator moves the driver's directory to another disk
// and leaves a link.
func TestHomeIsLink(t *testing.T) {
	testenv.RequireRoot(t)
	root, disk := testenv.Tmpfs(t), testenv.Tmpfs(t)
	require.NoError(t, os.Symlink(disk, filepath.Join(root, "overlay")))
	d, err := overlay.New(root, &overlay.Options{Durability: layerfs.DurabilityFull})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "layer", "", nil))
	path, err := d.Get(ctx, "layer", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(path, "file"), nil, 0o644))
	require.NoError(t, d.Put(ctx, "layer"))
	require.FileExists(t, filepath.Join(disk, "layer", "upper", "file"))
	require.NoError(t, d.Remove(ctx, "layer"))
}
