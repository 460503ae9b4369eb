package archive_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/fixture"
)

// benchDir is in memory where that is possible, so that what is measured is
// this package and the kernel and not a disk.
func benchDir(b *testing.B) string {
	b.Helper()
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "layerfs-bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// smallTree makes files of 50 bytes to 8 KB, from a fixed seed.
func smallTree(b *testing.B, dir string, files int) {
	b.Helper()
	r := rand.New(rand.NewPCG(11, 12))
	buf := make([]byte, 8192)
	for i := range buf {
		buf[i] = byte(r.Uint32())
	}
	for i := range files {
		d := filepath.Join(dir, fmt.Sprintf("d%03d/e%d", i/100, i/10%10))
		if i%10 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprintf("file%05d", i)), buf[:50+r.IntN(len(buf)-50)], 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

const benchFiles = 5000

func BenchmarkApply(b *testing.B) {
	src := benchDir(b)
	smallTree(b, src, benchFiles)
	var stream bytes.Buffer
	if _, err := archive.Write(b.Context(), &stream, src, &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: layerfs.ProfileOCI}}); err != nil {
		b.Fatal(err)
	}
	for _, digest := range []bool{true, false} {
		b.Run(fmt.Sprintf("files=%d/digest=%v", benchFiles, digest), func(b *testing.B) {
			b.SetBytes(int64(stream.Len()))
			b.ReportAllocs()
			benchApply(b, func() io.ReadCloser { return io.NopCloser(bytes.NewReader(stream.Bytes())) }, &archive.ApplyOptions{NoDigest: !digest})
			b.ReportMetric(float64(benchFiles)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
}

func benchApply(b *testing.B, open func() io.ReadCloser, opts *archive.ApplyOptions) {
	b.Helper()
	top := benchDir(b)
	for b.Loop() {
		b.StopTimer()
		dir, err := os.MkdirTemp(top, "")
		if err != nil {
			b.Fatal(err)
		}
		r := open()
		b.StartTimer()
		_, err = archive.Apply(context.Background(), dir, r, opts)
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		_ = r.Close()
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkApplyLayers applies the layers of the fixture, plain and
// compressed. Decompression alone is beside it: that is what a pipeline
// cannot beat.
func BenchmarkApplyLayers(b *testing.B) {
	if os.Getenv("LAYERFS_BENCH_LAYERS") == "" {
		b.Skip("LAYERFS_BENCH_LAYERS is not set: the layers have a gigabyte")
	}
	for _, l := range fixture.BenchLayers(b) {
		for _, f := range []struct{ name, path string }{{"none", l.Tar}, {"gzip", l.Gzip}, {"zstd", l.Zstd}} {
			data, err := os.ReadFile(f.path)
			if err != nil {
				b.Fatal(err)
			}
			open := func() io.ReadCloser { return io.NopCloser(bytes.NewReader(data)) }
			b.Run(fmt.Sprintf("layer=%s/compression=%s/do=apply", l.Name, f.name), func(b *testing.B) { benchApply(b, open, nil) })
			b.Run(fmt.Sprintf("layer=%s/compression=%s/do=decompress", l.Name, f.name), func(b *testing.B) {
				for b.Loop() {
					r, _, err := archive.Decompress(open())
					if err != nil {
						b.Fatal(err)
					}
					if _, err := io.Copy(io.Discard, r); err != nil {
						b.Fatal(err)
					}
					_ = r.Close()
				}
			})
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	src := benchDir(b)
	smallTree(b, src, benchFiles)
	for _, p := range []layerfs.Profile{layerfs.ProfileFull, layerfs.ProfileOCI} {
		b.Run(fmt.Sprintf("files=%d/profile=%s", benchFiles, p), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				res, err := archive.Write(context.Background(), io.Discard, src, &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: p}})
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(res.Size)
			}
		})
	}
}

func BenchmarkCompare(b *testing.B) {
	top := benchDir(b)
	old, now := filepath.Join(top, "old"), filepath.Join(top, "new")
	smallTree(b, old, benchFiles)
	if out, err := exec.Command("cp", "-a", old, now).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(now, "d000/e0/file00001"), []byte("changed"), 0o644); err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		opts archive.CompareOptions
	}{{"exact", archive.CompareOptions{}}, {"trust", archive.CompareOptions{Content: archive.ContentTrustTimes}}} {
		b.Run(fmt.Sprintf("files=%d/content=%s", benchFiles, c.name), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				for _, err := range archive.Compare(context.Background(), old, now, &c.opts) {
					if err != nil {
						b.Fatal(err)
					}
					n++
				}
				if n != 1 {
					b.Fatalf("%d changes", n)
				}
			}
		})
	}
}
