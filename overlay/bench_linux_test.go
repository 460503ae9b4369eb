package overlay

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
)

// BenchmarkLifeCycle is a container's: create, get, put, remove. The bare
// system calls that any driver has to make stand beside it.
func BenchmarkLifeCycle(b *testing.B) {
	b.Run("driver=overlay", func(b *testing.B) {
		d := mustNew(b, scratch(b), &Options{Durability: layerfs.DurabilityNone})
		require.NoError(b, d.Create(b.Context(), "base", "", nil))
		for b.Loop() {
			require.NoError(b, d.Create(b.Context(), "c", "base", nil))
			_, err := d.Get(b.Context(), "c", nil)
			require.NoError(b, err)
			require.NoError(b, d.Put(b.Context(), "c"))
			require.NoError(b, d.Remove(b.Context(), "c"))
		}
	})
	b.Run("driver=bare", func(b *testing.B) {
		root := scratch(b)
		require.NoError(b, os.Mkdir(root+"/base", 0o755))
		for b.Loop() {
			c := root + "/c"
			for _, dir := range []string{"", "/upper", "/work", "/merged"} {
				require.NoError(b, os.Mkdir(c+dir, 0o755))
			}
			require.NoError(b, os.WriteFile(c+"/lower-id", []byte("base"), 0o600))
			o := mount.Overlay{Lowers: []string{root + "/base"}, Upper: c + "/upper", Work: c + "/work", Index: "off", Metacopy: "off", RedirectDir: "off"}
			require.NoError(b, o.Mount(c+"/merged"))
			require.NoError(b, mount.Unmount(c+"/merged"))
			for _, dir := range []string{"/merged", "/work/work", "/work", "/upper"} {
				require.NoError(b, os.Remove(c+dir))
			}
			require.NoError(b, os.Remove(c+"/lower-id"))
			require.NoError(b, os.Remove(c))
		}
	})
}

func scratch(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "overlay-bench-")
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, os.RemoveAll(dir)) })
	return dir
}
