package vfs_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	drivertest.Child(harness(), noReflink(), durable())
	os.Exit(testenv.Main(m))
}

// harness opens vfs without syncing: the suite makes thousands of layers, and
// what a crash of the machine leaves is not what it tests.
func harness() drivertest.Harness {
	return withOptions("vfs", &vfs.Options{Durability: layerfs.DurabilityNone})
}

func noReflink() drivertest.Harness {
	return withOptions("vfs-no-reflink", &vfs.Options{Durability: layerfs.DurabilityNone, NoReflink: true, Workers: 1})
}

func durable() drivertest.Harness {
	return withOptions("vfs-full", &vfs.Options{Durability: layerfs.DurabilityFull})
}

func withOptions(name string, opts *vfs.Options) drivertest.Harness {
	return drivertest.Harness{
		Name: name,
		New:  func(root string) (layerfs.Driver, error) { return vfs.New(root, opts) },
		Home: func(root string) string { return filepath.Join(root, "vfs") },
		Small: func(tb testing.TB, bytes int64) string {
			tb.Helper()
			return testenv.Tmpfs(tb, "size="+strconv.FormatInt(bytes, 10))
		},
	}
}
