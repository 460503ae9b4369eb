package archive_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

// FuzzApply: whatever a stream says, nothing beside the target changes.
func FuzzApply(f *testing.F) {
	seed := func(entries ...entry) { f.Add(makeTar(f, entries...), byte(0)); f.Add(makeTar(f, entries...), byte(2)) }
	seed(symlinkEntry("l", "../.."), fileEntry("l/victim", "x"))
	seed(symlinkEntry("l", "/"), linkEntry("m", "l/victim/hello"), fileEntry("m", "x"))
	seed(fileEntry("../.wh.victim", ""), fileEntry("a/.wh..wh..opq", ""), dirEntry("a", 0o755))
	seed(dirEntry("a", 0o755), fileEntry("a/b", "1"), fileEntry("a/.wh.b", ""), fileEntry("a", "2"), dirEntry("a/c", 0o700))
	seed(linkEntry("x", "y"), linkEntry("y", "z"), fileEntry("z", "1"), fileEntry(".wh.z", ""))
	for _, c := range layerCases() {
		f.Add(makeTar(f, c.layer...), byte(0))
		f.Add(makeTar(f, c.layer...), byte(2))
		f.Add(makeTar(f, c.layer...), byte(1))
	}
	top, err := os.MkdirTemp("/dev/shm", "layerfs-fuzz")
	if err != nil {
		f.Skip(err)
	}
	f.Cleanup(func() { _ = os.RemoveAll(top) })
	f.Fuzz(func(t *testing.T, data []byte, form byte) {
		dir, err := os.MkdirTemp(top, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		beside := []string{"file victim/hello untouched", "dir lower", "file lower/d/a 1", "file lower/d/s/x 3", "symlink lower/l d", "file lower/keep k"}
		tree.Build(t, dir, append(beside, "dir root")...)
		root := filepath.Join(dir, "root")
		want, err := tree.Changes("", dir)
		if err != nil {
			t.Fatal(err)
		}
		opts := &archive.ApplyOptions{Form: whiteout.Form(form % 6), Lost: func(*archive.EntryError) {}}
		opts.Devices = layerfs.DevicesSkip
		opts.Limits = layerfs.Limits{Bytes: 1 << 20, Entries: 200}
		if opts.Form != archive.Merged {
			opts.Lowers = []string{filepath.Join(dir, "lower")}
		} else {
			tree.Build(t, root, "file d/a 1", "file d/s/x 3", "symlink l d", "file keep k", "symlink up ../..")
		}
		if archive.Detect(data) == layerfs.NoCompression {
			data = archive.FixChecksums(data)
		}
		_, err = archive.Apply(context.Background(), root, bytes.NewReader(data), opts)
		if err == nil && opts.Form == archive.Merged {
			var b bytes.Buffer
			if _, err := archive.Write(context.Background(), &b, root, nil); err != nil && !bytes.Contains(data, []byte(".wh.")) {
				t.Errorf("what was applied cannot be written: %v", err)
			}
		}
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		got, err := tree.Changes("", dir)
		if err != nil {
			t.Fatal(err)
		}
		if tree.FormatChanges(got) != tree.FormatChanges(want) {
			t.Errorf("beside the target there is now\n%s", tree.FormatChanges(got))
		}
		if b, err := os.ReadFile(filepath.Join(dir, "victim/hello")); err != nil || string(b) != "untouched" {
			t.Errorf("the victim is %q, %v", b, err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "lower/d/a")); err != nil || string(b) != "1" {
			t.Errorf("the lower layer is %q, %v", b, err)
		}
	})
}
