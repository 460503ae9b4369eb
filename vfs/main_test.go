package vfs_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	drivertest.Child(harness())
	os.Exit(testenv.Main(m))
}

// harness opens vfs without syncing: the suite makes thousands of layers, and
// what a crash of the machine leaves is not what it tests.
func harness() drivertest.Harness {
	return drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
		Deviates: map[string]string{
			"DeleteLongNames": "package archive writes no whiteouts with names of more than 255 bytes",
		},
		Home: func(root string) string { return filepath.Join(root, "vfs") },
	}
}
