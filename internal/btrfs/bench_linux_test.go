package btrfs

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkChanges has three changes in trees of several sizes: the time
// should hardly depend on the size.
func BenchmarkChanges(b *testing.B) {
	for _, files := range []int{10, 1000, 65000, 100000} {
		b.Run(fmt.Sprintf("files=%d/changes=3", files), func(b *testing.B) {
			mnt := mountBtrfs(b, 2048)
			a := filepath.Join(mnt, "a")
			check(b, Create(a))
			for i := range files {
				dir := filepath.Join(a, fmt.Sprintf("d%03d", i/256))
				if i%256 == 0 {
					check(b, os.Mkdir(dir, 0o755))
				}
				write(b, filepath.Join(dir, fmt.Sprintf("f%03d", i%256)), "content")
			}
			o, n := mnt+"/o", mnt+"/n"
			check(b, Snapshot(o, a, true))
			write(b, a+"/d000/f000", "other content")
			check(b, os.Remove(a+"/d000/f001"))
			write(b, a+"/d000/new", "new")
			check(b, Snapshot(n, a, true))
			check(b, Sync(mnt))
			for b.Loop() {
				count := 0
				for _, err := range Changes(b.Context(), o, n) {
					check(b, err)
					count++
				}
				require.Equal(b, 4, count) // and the directory
			}
		})
	}
}

// BenchmarkSnapshot is what a layer costs on top of the ioctl.
func BenchmarkSnapshot(b *testing.B) {
	mnt := mountBtrfs(b, 512)
	check(b, Create(mnt+"/a"))
	for i := 0; b.Loop(); i++ {
		p := fmt.Sprintf("%s/s%d", mnt, i)
		check(b, Snapshot(p, mnt+"/a", false))
		check(b, Destroy(p))
	}
}
