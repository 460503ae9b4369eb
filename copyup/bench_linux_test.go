//go:build !layerfs_portable

package copyup

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// smallFiles makes a tree like that of an unpacked node_modules directory:
// n files of 3.5 KB on average, eleven to a directory.
func smallFiles(b *testing.B, root string, n int) {
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 16<<10)
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	for i := range n {
		dir := filepath.Join(root, fmt.Sprintf("m%d/lib/d%d", i/110, i/11))
		if i%11 == 0 {
			require.NoError(b, os.MkdirAll(dir, 0o755))
		}
		size := rng.IntN(7000)
		require.NoError(b, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d.js", i)), buf[:size], 0o644))
	}
}

// scratchDir is on tmpfs: what is measured is not the disk.
func scratchDir(b *testing.B) string {
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = "" // the default
	}
	dir, err := os.MkdirTemp(base, "copyup")
	require.NoError(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func BenchmarkTree(b *testing.B) {
	const files = 24_000
	dir := scratchDir(b)
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	smallFiles(b, src, files)
	run := func(name string, copy func() error) {
		b.Run(fmt.Sprintf("how=%s/files=%d", name, files), func(b *testing.B) {
			for b.Loop() {
				if err := copy(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				require.NoError(b, os.RemoveAll(dst))
				b.StartTimer()
			}
			b.ReportMetric(files*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
	for _, workers := range []int{1, 0} {
		run(fmt.Sprintf("copyup/workers=%d", workers), func() error {
			_, err := Tree(b.Context(), dst, src, &Options{Workers: workers})
			return err
		})
	}
	run("cp", func() error { return exec.Command("cp", "-a", "--reflink=auto", src, dst).Run() })
}

func BenchmarkFile(b *testing.B) {
	dir := scratchDir(b)
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	for _, size := range []int64{4 << 10, 100 << 20} {
		require.NoError(b, os.WriteFile(src, make([]byte, size), 0o644))
		for _, f := range []force{{}, {noClone: true, noCopyRange: true, noTmpfile: true}} {
			b.Run(fmt.Sprintf("size=%d/range=%v", size, !f.noCopyRange), func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					if err := File(b.Context(), dst, src, &Options{force: f}); err != nil {
						b.Fatal(err)
					}
					if err := os.Remove(dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
