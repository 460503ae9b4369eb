package drivertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/layerfs/layerfs"
)

// RunBenchmarks measures a driver on data that is the same for all. The names
// have their parameters, so that benchstat can put drivers side by side:
//
//	benchstat -col /driver old.txt
//
// What was written before is still in memory: the cache is warm.
func RunBenchmarks(b *testing.B, h Harness) {
	b.Helper()
	run := func(name string, fn func(e *env, b *testing.B) error) {
		b.Run(name, func(b *testing.B) {
			e := newEnv(b, h)
			err := fn(e, b)
			b.StopTimer()
			if cerr := e.finish(); err == nil {
				err = cerr
			}
			if err != nil {
				b.Fatal(err)
			}
		})
	}
	run("Open/driver="+h.Name, benchOpen)
	run("Stat/driver="+h.Name, benchStat)
	for _, files := range []int{10, 5000} {
		run(fmt.Sprintf("Create/driver=%s/files=%d", h.Name, files), benchCreate(files))
	}
	run("GetPut/driver="+h.Name, benchGetPut)
	run("GetHeld/driver="+h.Name, benchGetHeld)
	run("Life/driver="+h.Name, benchLife)
	run("LifeParallel/driver="+h.Name, benchLifeParallel)
	for _, size := range []int{4 << 10, 1 << 20} {
		files := 5000
		if size > 4<<10 {
			files = 50
		}
		suffix := fmt.Sprintf("/driver=%s/files=%d/size=%dk", h.Name, files, size>>10)
		run("Apply"+suffix, benchApply(files, size))
		run("DiffAll"+suffix, benchDiffAll(files, size))
	}
	for _, changed := range []int{1, 500} {
		suffix := fmt.Sprintf("/driver=%s/files=5000/changed=%d", h.Name, changed)
		run("Diff"+suffix, benchDiff(changed))
		run("Changes"+suffix, benchChanges(changed))
	}
	for _, depth := range []int{1, 20, 100} {
		run(fmt.Sprintf("DeepRead/driver=%s/layers=%d", h.Name, depth), benchDeepRead(depth))
		run(fmt.Sprintf("DeepGet/driver=%s/layers=%d", h.Name, depth), benchDeepGet(depth))
	}
}

// fillFiles makes files of pseudo-random bytes, a hundred a directory.
func (e *env) fillFiles(id string, files, size int) error {
	return e.with(e.d, id, nil, func(path string) error { return writeFiles(path, files, size) })
}

func writeFiles(path string, files, size int) error {
	data := make([]byte, size)
	for i := range files {
		dir := filepath.Join(path, fmt.Sprintf("d%03d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		for k := 0; k < size; k += 64 {
			data[k] = byte(i + k)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%05d", i)), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func benchOpen(e *env, b *testing.B) error {
	for i := range 100 {
		if err := e.create(fmt.Sprintf("l%d", i), ""); err != nil {
			return err
		}
	}
	for b.Loop() {
		d, err := e.h.New(e.root)
		if err != nil {
			return err
		}
		if err := d.Close(); err != nil {
			return err
		}
	}
	return nil
}

func benchStat(e *env, b *testing.B) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	for b.Loop() {
		if _, err := e.d.Stat(e.ctx, "a", nil); err != nil {
			return err
		}
	}
	return nil
}

func benchCreate(files int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		if err := e.create("base", ""); err != nil {
			return err
		}
		if err := e.fillFiles("base", files, 4096); err != nil {
			return err
		}
		n := 0
		for b.Loop() {
			n++
			id := fmt.Sprintf("c%d", n)
			if err := e.d.Create(e.ctx, id, "base", nil); err != nil {
				return err
			}
			b.StopTimer()
			if err := e.d.Remove(e.ctx, id); err != nil {
				return err
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		return nil
	}
}

func benchGetPut(e *env, b *testing.B) error {
	for _, c := range [][2]string{{"base", ""}, {"a", "base"}} {
		if err := e.create(c[0], c[1], "file f"+c[0]+" 1"); err != nil {
			return err
		}
	}
	for b.Loop() {
		if _, err := e.d.Get(e.ctx, "a", nil); err != nil {
			return err
		}
		if err := e.d.Put(e.ctx, "a"); err != nil {
			return err
		}
	}
	return nil
}

// benchGetHeld is a Get of a layer that is there already.
func benchGetHeld(e *env, b *testing.B) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	if _, err := e.d.Get(e.ctx, "a", nil); err != nil {
		return err
	}
	return benchGetPutLoop(e, b)
}

func benchGetPutLoop(e *env, b *testing.B) error {
	for b.Loop() {
		if _, err := e.d.Get(e.ctx, "a", nil); err != nil {
			return err
		}
		if err := e.d.Put(e.ctx, "a"); err != nil {
			return err
		}
	}
	return nil
}

// life is what a container costs: a layer is made, got, put and removed.
func life(ctx context.Context, d layerfs.Driver, id string) error {
	if err := d.Create(ctx, id, "base", nil); err != nil {
		return err
	}
	if _, err := d.Get(ctx, id, nil); err != nil {
		return err
	}
	if err := d.Put(ctx, id); err != nil {
		return err
	}
	return d.Remove(ctx, id)
}

func benchLife(e *env, b *testing.B) error {
	if err := e.create("base", "", "file f 1"); err != nil {
		return err
	}
	for b.Loop() {
		if err := life(e.ctx, e.d.Driver, "a"); err != nil {
			return err
		}
	}
	return nil
}

func benchLifeParallel(e *env, b *testing.B) error {
	if err := e.create("base", "", "file f 1"); err != nil {
		return err
	}
	ids := make(chan string, 1024)
	for i := range cap(ids) {
		ids <- fmt.Sprintf("p%d", i)
	}
	b.RunParallel(func(pb *testing.PB) {
		id := <-ids
		for pb.Next() {
			if err := life(e.ctx, e.d.Driver, id); err != nil {
				b.Error(err)
				return
			}
		}
	})
	return nil
}

func benchApply(files, size int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		if err := e.create("src", ""); err != nil {
			return err
		}
		if err := e.fillFiles("src", files, size); err != nil {
			return err
		}
		stream, err := readDiff(e, e.d, "src", "", nil)
		if err != nil {
			return err
		}
		b.SetBytes(int64(len(stream)))
		n := 0
		for b.Loop() {
			n++
			id := fmt.Sprintf("c%d", n)
			if err := e.d.Create(e.ctx, id, "", nil); err != nil {
				return err
			}
			if _, err := e.d.Apply(e.ctx, id, bytes.NewReader(stream), nil); err != nil {
				return err
			}
			b.StopTimer()
			if err := e.d.Remove(e.ctx, id); err != nil {
				return err
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		return nil
	}
}

func benchDiffAll(files, size int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		if err := e.create("a", ""); err != nil {
			return err
		}
		if err := e.fillFiles("a", files, size); err != nil {
			return err
		}
		return loopDiff(e, b, "a", "")
	}
}

func loopDiff(e *env, b *testing.B, id, base string) error {
	var n int64
	for b.Loop() {
		r, err := e.d.Diff(e.ctx, id, base, nil)
		if err != nil {
			return err
		}
		if n, err = io.Copy(io.Discard, r); err != nil {
			return err
		}
		if err := r.Close(); err != nil {
			return err
		}
	}
	b.SetBytes(n)
	return nil
}

// changedLayer makes a layer that changes some files of 5000.
func (e *env) changedLayer(changed int) error {
	const files = 5000
	if err := e.create("base", ""); err != nil {
		return err
	}
	if err := e.fillFiles("base", files, 4096); err != nil {
		return err
	}
	if err := e.create("a", "base"); err != nil {
		return err
	}
	return e.with(e.d, "a", nil, func(path string) error {
		left := changed
		return filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || left == 0 {
				return err
			}
			left--
			return os.WriteFile(p, []byte("changed"), 0o644)
		})
	})
}

func benchDiff(changed int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		if err := e.changedLayer(changed); err != nil {
			return err
		}
		return loopDiff(e, b, "a", "base")
	}
}

func benchChanges(changed int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		if err := e.changedLayer(changed); err != nil {
			return err
		}
		for b.Loop() {
			list, err := collect(e.d, e, "a", "base")
			if err != nil {
				return err
			}
			if len(list) != changed {
				return fmt.Errorf("%d changes, want %d", len(list), changed)
			}
		}
		return nil
	}
}

// deep makes a stack with one file in each layer.
func (e *env) deep(depth int) (string, error) {
	parent := ""
	for i := range depth {
		id := fmt.Sprintf("l%d", i)
		if err := e.create(id, parent, fmt.Sprintf("file d/f%03d %d", i, i)); err != nil {
			return "", err
		}
		parent = id
	}
	return parent, nil
}

// benchDeepRead reads a file of each layer through the top.
func benchDeepRead(depth int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		top, err := e.deep(depth)
		if err != nil {
			return err
		}
		path, err := e.d.Get(e.ctx, top, nil)
		if err != nil {
			return err
		}
		for b.Loop() {
			for i := range depth {
				if _, err := os.ReadFile(filepath.Join(path, "d", fmt.Sprintf("f%03d", i))); err != nil {
					return err
				}
			}
		}
		b.ReportMetric(float64(depth)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		return nil
	}
}

func benchDeepGet(depth int) func(*env, *testing.B) error {
	return func(e *env, b *testing.B) error {
		top, err := e.deep(depth)
		if err != nil {
			return err
		}
		for b.Loop() {
			if _, err := e.d.Get(e.ctx, top, nil); err != nil {
				return err
			}
			if err := e.d.Put(e.ctx, top); err != nil {
				return err
			}
		}
		return nil
	}
}
