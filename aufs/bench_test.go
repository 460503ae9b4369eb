//go:build linux

package aufs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/overlay"
)

// helper is the command that makes this test program the helper.
var helper = []string{"/proc/self/exe"}

// BenchmarkLifeCycle is a container's: create, get, put, remove, beside that of
// the kernel's overlayfs.
func BenchmarkLifeCycle(b *testing.B) {
	testenv.RequireRoot(b)
	for name, open := range map[string]func(root string) (layerfs.Driver, error){
		"aufs": func(root string) (layerfs.Driver, error) {
			return New(root, &Options{Engine: FUSE, Helper: helper, Durability: layerfs.DurabilityNone})
		},
		"aufs-inprocess": func(root string) (layerfs.Driver, error) {
			return New(root, &Options{Engine: FUSE, InProcess: true, Durability: layerfs.DurabilityNone})
		},
		"aufs-live": func(root string) (layerfs.Driver, error) {
			return New(root, &Options{Engine: FUSE, Helper: helper, Durability: layerfs.DurabilityNone, LiveBase: true})
		},
		"overlay": func(root string) (layerfs.Driver, error) {
			return overlay.New(root, &overlay.Options{Durability: layerfs.DurabilityNone})
		},
	} {
		b.Run("driver="+name, func(b *testing.B) {
			root, err := os.MkdirTemp("/dev/shm", "aufs-bench-")
			require.NoError(b, err)
			b.Cleanup(func() { require.NoError(b, os.RemoveAll(root)) })
			d, err := open(root)
			testenv.SkipUnsupported(b, err, name)
			require.NoError(b, err)
			b.Cleanup(func() { require.NoError(b, d.Close()) })
			require.NoError(b, d.Create(b.Context(), "base", "", nil))
			for b.Loop() {
				require.NoError(b, d.Create(b.Context(), "c", "base", nil))
				path, err := d.Get(b.Context(), "c", nil)
				require.NoError(b, err)
				require.Equal(b, "c", lastOf(path))
				require.NoError(b, d.Put(b.Context(), "c"))
				require.NoError(b, d.Remove(b.Context(), "c"))
			}
		})
	}
}

// lastOf returns the element of a path that names the layer.
func lastOf(path string) string {
	if filepath.Base(path) == "merged" { // overlay's layout
		path = filepath.Dir(path)
	}
	return filepath.Base(path)
}
