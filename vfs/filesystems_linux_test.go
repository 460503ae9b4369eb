package vfs_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

// on lets a harness work below a directory.
func on(t *testing.T, h drivertest.Harness, fs string) drivertest.Harness {
	t.Helper()
	n := 0
	h.Root = func(tb testing.TB) string {
		tb.Helper()
		n++
		dir := filepath.Join(fs, strconv.Itoa(n))
		if err := os.Mkdir(dir, 0o755); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				tb.Error(err)
			}
		})
		return dir
	}
	return h
}

func TestConformanceExt4(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.Ext4(t, 1024)))
}

func TestConformanceXFS(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.XFS(t, 1024, "-m reflink=1")))
}

// The kernel of a developer may lack quotas; the guests of the test run have
// them.
func TestConformanceExt4Quota(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.Ext4(t, 1024, "-O quota,project -E quotatype=prjquota", "prjquota")))
}

func TestConformanceXFSQuota(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.XFS(t, 1024, "-m reflink=1", "prjquota")))
}

func TestConformanceBtrfs(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.Btrfs(t, 1024)))
}

func TestConformanceTmpfs(t *testing.T) {
	drivertest.Run(t, on(t, harness(), testenv.Tmpfs(t, "size=1g")))
}

func TestConformanceUnprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) { drivertest.Run(t, harness()) })
}

// TestConformanceNoReflink runs the suite where blocks could be shared and are
// not.
func TestConformanceNoReflink(t *testing.T) {
	drivertest.Run(t, on(t, noReflink(), testenv.Btrfs(t, 1024)))
}

// TestConformanceDurable runs the suite with everything synced.
func TestConformanceDurable(t *testing.T) {
	if testing.Short() {
		t.Skip("syncs thousands of times")
	}
	drivertest.Run(t, on(t, durable(), testenv.Tmpfs(t, "size=1g")))
}

// TestWholeSeconds: change times without a fraction, as ext4 with small inodes
// keeps them, are no earlier than the copy was.
func TestWholeSeconds(t *testing.T) {
	d, err := vfs.New(testenv.Ext4(t, 64, "-I 128"), nil)
	require.NoError(t, err)
	defer d.Close()
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	path, err := d.Get(ctx, "base", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(path, "f"), []byte("old"), 0o644))
	require.NoError(t, d.Put(ctx, "base"))
	for _, id := range []string{"a", "b", "c"} {
		require.NoError(t, d.Create(ctx, id, "base", nil))
		path, err := d.Get(ctx, id, nil)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(path, "f"), []byte("new"), 0o644))
		require.NoError(t, d.Put(ctx, id))
		var got []string
		for c, err := range d.Changes(ctx, id, "base") {
			require.NoError(t, err)
			got = append(got, c.Path)
		}
		require.Contains(t, got, "/f", id)
	}
}
