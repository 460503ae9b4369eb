package devmapper_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) {
	drivertest.Child(ext4(), xfs())
	os.Exit(testenv.Main(m))
}

func ext4() drivertest.Harness {
	h := harness("devmapper", devmapper.Options{Durability: layerfs.DurabilityNone, BaseSize: 256 << 20})
	h.Deviates["LargeXattrs"] = "ext4 keeps the xattrs of a file in one block unless it was made with ea_inode"
	return h
}

func xfs() drivertest.Harness {
	return harness("devmapper-xfs", devmapper.Options{
		Durability: layerfs.DurabilityFull, FS: "xfs", BaseSize: 320 << 20, NoDeferredDeletion: true,
	})
}

func harness(name string, opts devmapper.Options) drivertest.Harness {
	opts.DataSize, opts.MetadataSize = 4<<30, 32<<20
	opts.MinFreeSpace = -1 // the guest's disk is small
	return drivertest.Harness{
		Name: name,
		New:  func(root string) (layerfs.Driver, error) { return devmapper.New(root, &opts) },
		// Each change of the pool is flushed to what is below: in memory.
		Root: func(tb testing.TB) string { return testenv.Tmpfs(tb) },
		Home: func(root string) string { return filepath.Join(root, "devicemapper") },
		Deviates: map[string]string{
			"FeatureQuota": "a layer is at least as large as the base device: file systems cannot shrink",
		},
	}
}

func TestConformance(t *testing.T) {
	requireDevmapper(t)
	drivertest.Run(t, ext4())
}

func TestConformanceXFS(t *testing.T) {
	requireDevmapper(t)
	drivertest.Run(t, xfs())
}

func requireDevmapper(t testing.TB) {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := devmapper.New(t.TempDir(), &devmapper.Options{DataSize: 1 << 30, MetadataSize: 16 << 20, BaseSize: 64 << 20, MinFreeSpace: -1})
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	require.NoError(t, d.Close())
}
