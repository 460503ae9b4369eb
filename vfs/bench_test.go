package vfs_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/vfs"
)

func BenchmarkDriver(b *testing.B) { drivertest.RunBenchmarks(b, harness()) }

// BenchmarkCreate measures Create on a tree with many files beside
// `cp -a --reflink=auto` of the same tree. The program is started each time,
// which takes about a millisecond. Set LAYERFS_BENCH_TREE to copy a real tree.
func BenchmarkCreate(b *testing.B) {
	for _, how := range []string{"vfs", "cp"} {
		b.Run("with="+how, func(b *testing.B) {
			root := b.TempDir()
			d, err := vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			ctx := context.Background()
			if err := d.Create(ctx, "base", "", nil); err != nil {
				b.Fatal(err)
			}
			path, err := d.Get(ctx, "base", nil)
			if err != nil {
				b.Fatal(err)
			}
			fillTree(b, path)
			if err := d.Put(ctx, "base"); err != nil {
				b.Fatal(err)
			}
			out := filepath.Join(root, "copy")
			for b.Loop() {
				if how == "cp" {
					if msg, err := exec.Command("cp", "-a", "--reflink=auto", path, out).CombinedOutput(); err != nil {
						b.Fatalf("%v: %s", err, msg)
					}
				} else if err := d.Create(ctx, "copy", "base", nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if how == "cp" {
					err = os.RemoveAll(out)
				} else {
					err = d.Remove(ctx, "copy")
				}
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

func fillTree(b *testing.B, path string) {
	b.Helper()
	if tree := os.Getenv("LAYERFS_BENCH_TREE"); tree != "" {
		if msg, err := exec.Command("cp", "-a", tree+"/.", path).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, msg)
		}
		return
	}
	data := make([]byte, 8<<10)
	for i := range 5000 {
		dir := filepath.Join(path, fmt.Sprintf("d%02d", i/100))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%04d", i)), data[:i%len(data)], 0o644); err != nil {
			b.Fatal(err)
		}
	}
}
