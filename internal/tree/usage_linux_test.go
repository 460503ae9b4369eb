package tree

import (
	"context"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUsage(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.WriteFile(root+"/a", make([]byte, 100<<10), 0o644))
	before, err := Usage(t.Context(), root)
	require.NoError(t, err)
	require.EqualValues(t, 2, before.Inodes)
	require.GreaterOrEqual(t, before.Bytes, int64(100<<10))

	require.NoError(t, os.Link(root+"/a", root+"/b"))
	require.NoError(t, os.Symlink("/etc", root+"/out"))
	require.NoError(t, os.Truncate(root+"/a", 1<<40))
	after, err := Usage(t.Context(), root)
	require.NoError(t, err)
	require.EqualValues(t, 3, after.Inodes, "a second name is no second file, a link is not followed")
	require.Less(t, after.Bytes, before.Bytes+64<<10, "a hole takes no space")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Usage(ctx, root)
	require.ErrorIs(t, err, context.Canceled)
}
