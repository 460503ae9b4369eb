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
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	drivertest.Child(ext4(), xfs())
	os.Exit(testenv.Main(m))
}

func ext4() drivertest.Harness {
	h := harness("devmapper", devmapper.Options{Durability: layerfs.DurabilityNone, BaseSize: 256 << 20}, 0)
	h.Deviates["LargeXattrs"] = "ext4 keeps the xattrs of a file in one block unless it was made with ea_inode"
	return h
}

func xfs() drivertest.Harness {
	retries := 0 // it would try for ever to write into a pool that is full
	return harness("devmapper-xfs", devmapper.Options{
		Durability: layerfs.DurabilityFull, FS: "xfs", BaseSize: 320 << 20, NoDeferredDeletion: true,
		XFSNoSpaceRetries: &retries,
	}, 64<<20)
}

// smallSize is the one size that the suite asks Harness.Small for.
const smallSize = 64 << 20

// harness tests with some options. mkfs writes a log of some bytes.
func harness(name string, opts devmapper.Options, log int64) drivertest.Harness {
	opts.DataSize, opts.MetadataSize = 4<<30, 32<<20
	opts.MinFreeSpace = -1 // the guest's memory is small
	opts.ErrorIfNoSpace = true
	template := &devmapper.Template{Options: opts}
	const small = "small" // name of a root that has a small pool
	return drivertest.Harness{
		Name: name,
		New: func(root string) (layerfs.Driver, error) {
			o := opts
			if filepath.Base(root) == small {
				// Layers have more room than the pool; mkfs.xfs does not
				// make them as small.
				const overhead = 24 << 20 // what an empty layer writes
				o.DataSize = smallSize + log + overhead
				if o.FS == "" {
					o.BaseSize = 2 * smallSize
				}
			}
			return devmapper.New(root, &o)
		},
		Root: template.Root,
		Small: func(tb testing.TB, bytes int64) string {
			tb.Helper()
			require.EqualValues(tb, smallSize, bytes)
			root := filepath.Join(testenv.Tmpfs(tb), small)
			require.NoError(tb, os.Mkdir(root, 0o755))
			return root
		},
		Home: func(root string) string { return filepath.Join(root, "devicemapper") },
		Deviates: map[string]string{
			"FeatureQuota": "a layer is at least as large as the base device: file systems cannot shrink",
		},
	}
}

func TestConformance(t *testing.T) {
	requireDevmapper(t)
	t.Parallel()
	drivertest.Run(t, ext4())
}

func TestConformanceXFS(t *testing.T) {
	requireDevmapper(t)
	t.Parallel()
	drivertest.Run(t, xfs())
}

func TestCross(t *testing.T) {
	requireDevmapper(t)
	t.Parallel()
	drivertest.Cross(t, ext4(), drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	})
}

func requireDevmapper(t testing.TB) {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := devmapper.New(t.TempDir(), &devmapper.Options{DataSize: 1 << 30, MetadataSize: 16 << 20, BaseSize: 64 << 20, MinFreeSpace: -1})
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	require.NoError(t, d.Close())
}
