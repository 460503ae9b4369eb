package archive_test

import (
	"os"
	"testing"

	"github.com/layerfs/layerfs/archive"
)

func BenchmarkApplyFile(b *testing.B) {
	file := os.Getenv("LAYERFS_BENCH_TAR")
	if file == "" {
		b.Skip("LAYERFS_BENCH_TAR names no tar file")
	}
	st, err := os.Stat(file)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	for b.Loop() {
		dir, err := os.MkdirTemp(os.Getenv("LAYERFS_BENCH_DIR"), "apply")
		if err != nil {
			b.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := archive.Apply(b.Context(), dir, f, nil); err != nil {
			b.Fatal(err)
		}
		f.Close()
		b.StopTimer()
		os.RemoveAll(dir)
		b.StartTimer()
	}
}
