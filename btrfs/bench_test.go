//go:build linux

package btrfs_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/btrfs"
	ioctl "github.com/layerfs/layerfs/internal/btrfs"
)

// BenchmarkChanges and BenchmarkDiff have three changes in trees of several
// sizes, with the double walk of package archive on the same warm trees beside
// them. The temporary snapshot is in the time.
func BenchmarkChanges(b *testing.B) {
	eachTree(b, func(b *testing.B, d *btrfs.Driver, base, top string) {
		b.Run("by=driver", func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range d.Changes(b.Context(), "top", "base") {
					require.NoError(b, err)
					n++
				}
				require.Equal(b, 4, n) // and the directory
			}
		})
		b.Run("by=walk", func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range archive.Compare(b.Context(), base, top, nil) {
					require.NoError(b, err)
					n++
				}
				require.Equal(b, 4, n)
			}
		})
	})
}

func BenchmarkDiff(b *testing.B) {
	eachTree(b, func(b *testing.B, d *btrfs.Driver, base, top string) {
		b.Run("by=driver", func(b *testing.B) {
			for b.Loop() {
				r, err := d.Diff(b.Context(), "top", "base", nil)
				require.NoError(b, err)
				_, err = io.Copy(io.Discard, r)
				require.NoError(b, err)
				require.NoError(b, r.Close())
			}
		})
		b.Run("by=walk", func(b *testing.B) {
			for b.Loop() {
				_, err := archive.WriteChanges(b.Context(), io.Discard, top, archive.Compare(b.Context(), base, top, nil), nil)
				require.NoError(b, err)
			}
		})
	})
}

func eachTree(b *testing.B, run func(b *testing.B, d *btrfs.Driver, base, top string)) {
	for _, files := range []int{10, 1000, 65000, 100000} {
		b.Run(fmt.Sprintf("files=%d/changes=3", files), func(b *testing.B) {
			root := newRoot(b, 2048)
			d := mustNew(b, root, &btrfs.Options{Durability: layerfs.DurabilityNone})
			require.NoError(b, d.Create(b.Context(), "base", "", nil))
			base, err := d.Get(b.Context(), "base", nil)
			require.NoError(b, err)
			for i := range files {
				dir := filepath.Join(base, fmt.Sprintf("d%03d", i/256))
				if i%256 == 0 {
					require.NoError(b, os.Mkdir(dir, 0o755))
				}
				require.NoError(b, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%03d", i%256)), []byte("content"), 0o644))
			}
			require.NoError(b, d.Put(b.Context(), "base"))
			require.NoError(b, d.Create(b.Context(), "top", "base", nil))
			top, err := d.Get(b.Context(), "top", nil)
			require.NoError(b, err)
			require.NoError(b, os.WriteFile(top+"/d000/f000", []byte("other content"), 0o644))
			require.NoError(b, os.Remove(top+"/d000/f001"))
			require.NoError(b, os.WriteFile(top+"/d000/new", []byte("new"), 0o644))
			require.NoError(b, d.Put(b.Context(), "top"))
			require.NoError(b, ioctl.Sync(root))
			run(b, d, base, top)
		})
	}
}

// BenchmarkCreateRemove has the bare ioctls beside the driver.
func BenchmarkCreateRemove(b *testing.B) {
	for _, durability := range []layerfs.Durability{layerfs.DurabilityNone, layerfs.DurabilityMetadata} {
		b.Run("by=driver/durability="+durability.String(), func(b *testing.B) {
			d := mustNew(b, newRoot(b, 1024), &btrfs.Options{Durability: durability})
			require.NoError(b, d.Create(b.Context(), "base", "", nil))
			for b.Loop() {
				require.NoError(b, d.Create(b.Context(), "top", "base", nil))
				require.NoError(b, d.Remove(b.Context(), "top"))
			}
		})
	}
	b.Run("by=ioctl", func(b *testing.B) {
		root := newRoot(b, 1024)
		require.NoError(b, ioctl.Create(root+"/base"))
		for b.Loop() {
			require.NoError(b, ioctl.Snapshot(root+"/top", root+"/base", false))
			require.NoError(b, ioctl.Destroy(root+"/top"))
		}
	})
}
