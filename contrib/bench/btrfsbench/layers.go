package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	cdarchive "github.com/containerd/containerd/v2/pkg/archive"
	confs "github.com/containerd/continuity/fs"
	mobyarchive "github.com/moby/go-archive"
	"github.com/moby/sys/user"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	ioctl "github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// Names of the contestants.
const (
	ours       = "layerfs"
	oursSynced = "layerfs, durability metadata"
	oursNone   = "layerfs, durability none"
	moby       = "moby"
	containerd = "containerd"
	bare       = "bare ioctls"
	bareSynced = "bare ioctls, a synced record"
)

// layers are two layers of which the second differs in three files.
type layers struct {
	d         *btrfs.Driver
	base, top string // where they are
}

func makeLayers(ctx context.Context, root string, files int) (l layers, err error) {
	if l.d, err = btrfs.New(root, &btrfs.Options{Durability: layerfs.DurabilityNone}); err != nil {
		return l, err
	}
	if l.base, err = layer(ctx, l.d, "base", "", func(dir string) error { return fill(dir, files) }); err != nil {
		return l, err
	}
	l.top, err = layer(ctx, l.d, "top", "base", func(dir string) error {
		sub := filepath.Join(dir, "d000")
		return errors.Join(
			os.WriteFile(filepath.Join(sub, "f000"), []byte("other content"), 0o644),
			os.Remove(filepath.Join(sub, "f001")),
			os.WriteFile(filepath.Join(sub, "new"), []byte("new"), 0o644))
	})
	return l, errors.Join(err, ioctl.Sync(root))
}

// layer makes one and returns its path, which stays good: a subvolume is where
// it is whether it is held or not.
func layer(ctx context.Context, d *btrfs.Driver, id, parent string, change func(dir string) error) (string, error) {
	if err := d.Create(ctx, id, parent, nil); err != nil {
		return "", err
	}
	dir, err := d.Get(ctx, id, nil)
	if err != nil {
		return "", err
	}
	return dir, errors.Join(change(dir), d.Put(ctx, id))
}

func fill(dir string, files int) error {
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprintf("d%03d", i/256))
		if i%256 == 0 {
			if err := os.Mkdir(sub, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%03d", i%256)), []byte("content"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// found checks an answer: the three files, and perhaps their directory.
type found struct{ changed, removed, added bool }

func (f *found) note(path string) {
	switch filepath.Base(path) {
	case "f000":
		f.changed = true
	case "f001":
		f.removed = true
	case "new":
		f.added = true
	}
}

func (f *found) check() error {
	if *f != (found{true, true, true}) {
		return fmt.Errorf("not all changes were found: %+v", *f)
	}
	return nil
}

func (l layers) changes() []contestant {
	return []contestant{
		{ours, func(ctx context.Context) error {
			var f found
			for c, err := range l.d.Changes(ctx, "top", "base") {
				if err != nil {
					return err
				}
				f.note(c.Path)
			}
			return f.check()
		}},
		{moby, func(context.Context) error {
			list, err := mobyarchive.ChangesDirs(l.top, l.base)
			if err != nil {
				return err
			}
			var f found
			for _, c := range list {
				f.note(c.Path)
			}
			return f.check()
		}},
		{containerd, func(ctx context.Context) error {
			var f found
			err := confs.Changes(ctx, l.base, l.top, func(_ confs.ChangeKind, path string, _ os.FileInfo, err error) error {
				f.note(path)
				return err
			})
			return errors.Join(err, f.check())
		}},
	}
}

func (l layers) diffs() []contestant {
	return []contestant{
		{ours, func(ctx context.Context) error {
			r, err := l.d.Diff(ctx, "top", "base", nil)
			return drain(r, err)
		}},
		{moby, func(context.Context) error {
			list, err := mobyarchive.ChangesDirs(l.top, l.base)
			if err != nil {
				return err
			}
			r, err := mobyarchive.ExportChanges(l.top, list, user.IdentityMapping{})
			return drain(r, err)
		}},
		{containerd, func(ctx context.Context) error {
			var n counter
			if err := cdarchive.WriteDiff(ctx, &n, l.base, l.top); err != nil {
				return err
			}
			return n.check()
		}},
	}
}

// counter counts the bytes of a stream, which cannot be less than the headers
// of three entries.
type counter int64

func (n *counter) Write(p []byte) (int, error) {
	*n += counter(len(p))
	return len(p), nil
}

func (n *counter) check() error {
	if *n < 3*512 {
		return fmt.Errorf("a diff of %d bytes", *n)
	}
	return nil
}

func drain(r io.ReadCloser, err error) error {
	if err != nil {
		return err
	}
	var n counter
	_, err = io.Copy(&n, r)
	return errors.Join(err, r.Close(), n.check())
}

// compare measures Changes and Diff beside the walks.
func (b *bench) compare(ctx context.Context) (err error) {
	dir, unmount, err := b.fileSystem(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	l, err := makeLayers(ctx, dir, b.files)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.d.Close()) }()
	for _, c := range l.changes() { // into the caches
		if err := c.do(ctx); err != nil {
			return err
		}
	}
	for _, t := range []struct {
		what    string
		prepare func() error
		list    []contestant
		least   float64
	}{
		{"Changes, warm", func() error { return nil }, l.changes(), 100},
		{"Changes, cold", dropCaches, l.changes(), 100},
		{"Diff, warm", func() error { return nil }, l.diffs(), 50},
		{"Diff, cold", dropCaches, l.diffs(), 50},
	} {
		all, err := b.measure(ctx, t.prepare, t.list)
		if err != nil {
			return fmt.Errorf("%s: %w", t.what, err)
		}
		b.table(fmt.Sprintf("btrfs: %s, 3 of %d files changed", t.what, b.files), t.list, all, 1, ours)
		b.atLeast(t.least, t.what, ours, all, moby, containerd)
	}
	return nil
}

// growth measures Changes by the number of files.
func (b *bench) growth(ctx context.Context) error {
	fmt.Fprint(b.w, "\n### btrfs: Changes by the number of files, 3 changed\n\n| files | median ms | fastest ms | CPU ms |\n|---|---|---|---|\n")
	for _, files := range []int{10, 1000, 100_000} {
		if err := b.growthOne(ctx, files); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) growthOne(ctx context.Context, files int) (err error) {
	dir, unmount, err := b.fileSystem(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	l, err := makeLayers(ctx, dir, files)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.d.Close()) }()
	mine := l.changes()[:1]
	all, err := b.measure(ctx, func() error { return nil }, mine)
	if err != nil {
		return err
	}
	costs := all[ours]
	ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
	fmt.Fprintf(b.w, "| %d | %.3f | %.3f | %.3f |\n", files, ms(median(costs)), ms(costs[0].Wall), ms(medianCPU(costs)))
	return nil
}

// lives is how many layers are made and removed in one measurement.
const lives = 50

// life measures Create and Remove.
func (b *bench) life(ctx context.Context) (err error) {
	dir, unmount, err := b.fileSystem(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	var list []contestant
	for _, mine := range []struct {
		name   string
		policy layerfs.Durability
	}{{oursNone, layerfs.DurabilityNone}, {oursSynced, layerfs.DurabilityMetadata}} {
		name, policy := mine.name, mine.policy
		root := filepath.Join(dir, policy.String())
		if err := os.Mkdir(root, 0o755); err != nil {
			return err
		}
		d, err := btrfs.New(root, &btrfs.Options{Durability: policy})
		if err != nil {
			return err
		}
		defer d.Close()
		if _, err := layer(ctx, d, "base", "", func(dir string) error { return fill(dir, 10) }); err != nil {
			return err
		}
		list = append(list, contestant{name, each(func(ctx context.Context, id string) error {
			if err := d.Create(ctx, id, "base", nil); err != nil {
				return err
			}
			return d.Remove(ctx, id)
		})})
	}
	base := filepath.Join(dir, "base")
	if err := ioctl.Create(base); err != nil {
		return err
	}
	if err := fill(base, 10); err != nil {
		return err
	}
	list = append(list, contestant{bare, each(func(_ context.Context, id string) error {
		path := filepath.Join(dir, id)
		if err := ioctl.Snapshot(path, base, false); err != nil {
			return err
		}
		return ioctl.Destroy(path)
	})})
	records := filepath.Join(dir, "records")
	if err := os.Mkdir(records, 0o755); err != nil {
		return err
	}
	list = append(list, contestant{bareSynced, each(func(_ context.Context, id string) error {
		path, record := filepath.Join(dir, id), filepath.Join(records, id)
		return errors.Join(ioctl.Snapshot(path, base, false), sys.WriteFile(record, []byte(aRecord), 0o600, true), os.Remove(record), sys.Fsync(records), ioctl.Destroy(path))
	})})
	peer, end, err := snapshotter(ctx, filepath.Join(dir, "snapshotter"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if peer != nil {
		list = append(list, contestant{containerd, each(peer)})
	}
	// The kernel cleans up the subvolumes of one: not in the time of the next.
	settle := func() error {
		for range 2 {
			if err := ioctl.Sync(dir); err != nil {
				return err
			}
			time.Sleep(300 * time.Millisecond)
		}
		return nil
	}
	all, err := b.measure(ctx, settle, list)
	if err != nil {
		return err
	}
	b.table("btrfs: Create and Remove of one layer", list, all, lives, bare)
	b.atMost(1.3, "Create and Remove, durability none", oursNone, all, bare)
	b.atMost(1.3, "Create and Remove, durability metadata", oursSynced, all, bareSynced)
	b.atLeast(3, "Create and Remove, durability none", oursNone, all, containerd)
	b.atLeast(3, "Create and Remove, durability metadata", oursSynced, all, containerd)
	return nil
}

// aRecord is what [bareSynced] writes, about as long as one of ours.
const aRecord = `{"id":"a layer","parent":"base","created":"2026-11-21T12:00:00.123456789Z"}` + "\n"

func each(f func(context.Context, string) error) func(context.Context) error {
	return func(ctx context.Context) error {
		for i := range lives {
			if err := f(ctx, fmt.Sprint("container-", i)); err != nil {
				return err
			}
		}
		return nil
	}
}
