package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/transfer"
)

// host tells where this runs.
func (dm *demo) host(ctx context.Context) error {
	h := &dm.r.Host
	h.Kernel, h.CPUs, h.User, h.Driver, h.Durability = kernel(), runtime.NumCPU(), os.Geteuid(), dm.d.Name(), dm.a.durability
	var err error
	if h.FileSystem, err = feature.FSName(dm.temp); err != nil {
		return err
	}
	reports, err := auto.Probe(ctx, dm.temp)
	if err != nil {
		return err
	}
	dm.text.section("Host")
	dm.text.say("%s, %d CPUs, user %d, %s at %s, durability %s", h.Kernel, h.CPUs, h.User, h.FileSystem, dm.temp, dm.a.durability)
	if l, ok := load(); ok {
		h.Load = l
		dm.text.say("load %s: what else runs here shows in all times below", l)
	}
	for _, r := range reports {
		switch {
		case r.Driver == h.Driver:
			dm.text.say("%-13s is used", r.Driver)
		case r.Err != nil:
			dm.text.say("%-13s does not work: %s", r.Driver, printable(r.Err.Error()))
		default:
			dm.text.say("%-13s works, too", r.Driver)
		}
	}
	return nil
}

// importBase fills the base layer.
func (dm *demo) importBase(ctx context.Context) error {
	src, total, closeSource, err := dm.a.source(dm.from)
	if err != nil {
		return err
	}
	defer closeSource()
	if fi, err := os.Stat(dm.from); err == nil && fi.IsDir() && os.Geteuid() > 0 {
		src = writableTree(dm.from)
	}
	bar := dm.a.meter("import", total)
	defer bar.done()
	opts := dm.applyOptions()
	begin := time.Now()
	res, err := transfer.Import(ctx, dm.d, baseID, "", reading(bar, src, total, opts), nil, opts)
	bar.done()
	if err != nil {
		return err
	}
	i := &dm.r.Import
	i.From, i.Entries, i.Bytes, i.Time, i.Digest = dm.from, res.Entries, res.Bytes, time.Since(begin), res.Digest
	dm.text.section("Import %s as a base layer", printable(dm.from))
	dm.text.say("%s with %s of content in %s (%s/s)", entries(i.Entries), humanBytes(i.Bytes), humanTime(i.Time), humanBytes(int64(float64(i.Bytes)/i.Time.Seconds())))
	dm.text.say("%s", i.Digest)
	return nil
}

// writableTree is the stream of a directory in which all directories can be
// written by their owner. Go keeps toolchains that it fetches read-only, and
// without privileges nothing could be changed in a copy of such a tree.
func writableTree(dir string) transfer.Source {
	return func(ctx context.Context) (io.ReadCloser, error) {
		ctx, cancel := context.WithCancel(ctx)
		in, raw := io.Pipe()
		out, w := io.Pipe()
		var done sync.WaitGroup
		done.Go(func() {
			_, err := archive.Write(ctx, raw, dir, &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: layerfs.ProfileOCI}})
			raw.CloseWithError(err)
		})
		done.Go(func() {
			err := openDirs(w, in)
			in.CloseWithError(err)
			w.CloseWithError(err)
		})
		return &joined{out, func() { cancel(); out.Close(); done.Wait() }}, nil
	}
}

// joined waits at Close for those who make the stream.
type joined struct {
	*io.PipeReader
	stop func()
}

func (j *joined) Close() error {
	j.stop()
	return nil
}

func openDirs(w io.Writer, r io.Reader) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := in.Next()
		if err == io.EOF {
			return out.Close()
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeDir {
			h.Mode |= 0o200
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
}

func (dm *demo) applyOptions() *layerfs.ApplyOptions {
	o := new(layerfs.ApplyOptions)
	if os.Geteuid() > 0 {
		o.IgnoreOwners, o.Devices = true, layerfs.DevicesSkip
	}
	return o
}

// stack makes a second layer by Apply: a program, and a deletion in the base.
func (dm *demo) stack(ctx context.Context) error {
	path, err := dm.d.Get(ctx, baseID, &layerfs.GetOptions{ReadOnly: dm.d.Features().ReadOnlyViews})
	if err != nil {
		return err
	}
	dm.victims, err = choose(ctx, path)
	if err = errors.Join(err, dm.d.Put(context.WithoutCancel(ctx), baseID)); err != nil {
		return err
	}
	stream, err := secondLayer(dm.victims.whiteout)
	if err != nil {
		return err
	}
	begin := time.Now()
	res, err := transfer.Import(ctx, dm.d, layerID, baseID, transfer.Stream(stream), nil, dm.applyOptions())
	if err != nil {
		return err
	}
	l := &dm.r.Layer
	l.Entries, l.Time, l.Digest = res.Entries, time.Since(begin), res.Digest
	dm.text.section("Stack a second layer on it")
	dm.text.say("%s in %s: /layerfs-demo/tool is new%s", entries(l.Entries), humanTime(l.Time), without(dm.victims.whiteout))
	dm.text.say("%s", l.Digest)
	return nil
}

func without(name string) string {
	if name == "" {
		return ""
	}
	return ", " + printablePath("/"+name) + " is deleted"
}

// secondLayer is a stream as another tool would write it.
func secondLayer(whiteout string) (*bytes.Buffer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	when := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	content := bytes.Repeat([]byte("a tool of a megabyte\n"), 50_000)
	headers := []*tar.Header{
		{Name: "layerfs-demo/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when},
		{Name: "layerfs-demo/tool", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content)), ModTime: when},
	}
	if whiteout != "" {
		dir, name := filepath.Split(whiteout)
		headers = append(headers, &tar.Header{Name: filepath.ToSlash(dir) + ".wh." + name, Typeflag: tar.TypeReg, ModTime: when})
	}
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if h.Size > 0 {
			if _, err := w.Write(content); err != nil {
				return nil, err
			}
		}
	}
	return &b, w.Close()
}

// victims are what a demo changes in the tree, as paths without a leading
// slash. Empty means that the tree has nothing that fits.
type victims struct {
	whiteout  string // file that the second layer deletes
	file      string // file to be deleted
	moved     string // file to be renamed
	largest   string // file to be written to
	size      int64  // of largest
	dir       string // directory with something in it, to be deleted
	movedDir  string // directory with something in it, to be renamed
	attribute string // file whose mode is changed
}

// choose finds files and directories none of which is in another one, in the
// order of the names, so that each run changes the same.
func choose(ctx context.Context, root string) (v victims, err error) {
	var files, dirs []string
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrPermission) { // of another user
				return fs.SkipDir
			}
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err
		}
		if e.IsDir() {
			if isLeaf(path) {
				dirs = append(dirs, rel)
			}
			return nil
		}
		if !e.Type().IsRegular() {
			return nil
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if fi.Size() > v.size {
			v.largest, v.size = rel, fi.Size()
		}
		files = append(files, rel)
		return nil
	})
	if err != nil {
		return v, err
	}
	// Directories whose files are not used otherwise.
	for _, dir := range dirs {
		if filepath.Dir(v.largest) == dir {
			continue
		}
		if v.dir == "" {
			v.dir = dir
		} else {
			v.movedDir = dir
			break
		}
	}
	for _, field := range []*string{&v.whiteout, &v.file, &v.moved, &v.attribute} {
		i := slices.IndexFunc(files, func(f string) bool {
			in := filepath.Dir(f)
			return f != v.largest && in != v.dir && in != v.movedDir
		})
		if i < 0 {
			break
		}
		*field, files = files[i], files[i+1:]
	}
	return v, nil
}

// isLeaf reports whether a directory has files and nothing else.
func isLeaf(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) > 0 && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !e.Type().IsRegular() })
}

// copies brings the tree of both layers to the driver of full copies, as one
// layer, and makes one copy.
func (dm *demo) copies(ctx context.Context) error {
	whole := func(ctx context.Context) (io.ReadCloser, error) { return dm.d.Diff(ctx, layerID, "", nil) }
	if _, err := transfer.Import(ctx, dm.full, layerID, "", whole, nil, dm.applyOptions()); err != nil {
		return err
	}
	begin := time.Now()
	if err := dm.full.Create(ctx, copyID, layerID, nil); err != nil {
		return err
	}
	dm.r.FullCopy.Time = time.Since(begin)
	info, err := dm.full.Stat(ctx, copyID, &layerfs.StatOptions{Usage: true})
	if err == nil {
		dm.r.FullCopy.Bytes = info.Usage.Bytes
	}
	return err
}

// start starts the containers.
func (dm *demo) start(ctx context.Context) error {
	c := &dm.r.Containers
	var durations []time.Duration
	for n := range c.Count {
		id := fmt.Sprintf("container-%d", n+1)
		begin := time.Now()
		if err := dm.d.Create(ctx, id, layerID, nil); err != nil {
			return err
		}
		path, err := dm.d.Get(ctx, id, nil)
		if err != nil {
			return err
		}
		durations = append(durations, time.Since(begin))
		dm.ids, dm.paths = append(dm.ids, id), append(dm.paths, path)
	}
	c.Median, c.Min, c.Max = spread(durations)
	for _, id := range dm.ids {
		info, err := dm.d.Stat(ctx, id, &layerfs.StatOptions{Usage: true})
		if err != nil {
			return err
		}
		c.Bytes += info.Usage.Bytes
	}
	full := dm.r.FullCopy
	each := c.Bytes / int64(c.Count)
	dm.text.section("Start %d containers on it", c.Count)
	dm.text.say("to create and mount one: %s (median; %s to %s)", humanTime(c.Median), humanTime(c.Min), humanTime(c.Max))
	dm.text.say("a full copy instead:     %s (one, from a warm cache), %s times as long", humanTime(full.Time), times(full.Time.Seconds(), c.Median.Seconds()))
	dm.text.say("each holds for itself:   %s on disk, and a full copy %s, %s times as much", humanBytes(each), humanBytes(full.Bytes), times(float64(full.Bytes), float64(each)))
	dm.text.say("all %d hold together:   %s, and as full copies they would hold %s", c.Count, humanBytes(c.Bytes), humanBytes(full.Bytes*int64(c.Count)))
	return nil
}

// change changes one container, lists the changes and compares the list with
// what a walk of both trees finds.
func (dm *demo) change(ctx context.Context) error {
	ch := &dm.r.Changes
	ch.Steps = []demoStep{}
	dm.text.section("Write, delete and rename in the first container")
	h := &hands{root: dm.paths[0], done: func(s demoStep) {
		ch.Steps = append(ch.Steps, s)
		dm.text.say("%-9s %s  %s", humanTime(s.Time), s.What, printablePath(s.Path))
	}}
	if err := h.work(dm.victims); err != nil {
		return err
	}
	begin := time.Now()
	var list []layerfs.Change
	for c, err := range dm.d.Changes(ctx, dm.ids[0], layerID) {
		if err != nil {
			return err
		}
		list = append(list, c)
	}
	ch.Time = time.Since(begin)
	ch.List = []changeJSON{}
	for _, c := range list {
		ch.List = append(ch.List, newChangeJSON(c))
	}
	walked, err := dm.walk(ctx, dm.ids[0])
	if err != nil {
		return err
	}
	ch.Oracle = slices.Equal(list, walked)
	dm.text.section("Changes, found in %s", humanTime(ch.Time))
	const most = 20
	for i, c := range list {
		if i == most {
			dm.text.say("and %d more", len(list)-most)
			break
		}
		dm.text.say("%s %s", c.Kind, printablePath(c.Path))
	}
	if !ch.Oracle {
		return fmt.Errorf("the changes are not those that a walk of both trees finds: %v", walked)
	}
	dm.text.say("a walk that compares both trees file by file finds the same %d", len(walked))
	return nil
}

// walk compares a container with the layer below by walking through both.
func (dm *demo) walk(ctx context.Context, id string) (list []layerfs.Change, err error) {
	below, err := dm.d.Get(ctx, layerID, &layerfs.GetOptions{ReadOnly: dm.d.Features().ReadOnlyViews})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dm.d.Put(context.WithoutCancel(ctx), layerID)) }()
	for c, err := range archive.Compare(ctx, below, dm.paths[slices.Index(dm.ids, id)], nil) {
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// elsewhere writes what was changed, applies it with another driver and
// compares the trees.
func (dm *demo) elsewhere(ctx context.Context) (err error) {
	df := &dm.r.Diff
	file := filepath.Join(dm.temp, "changes.tar.zst")
	begin := time.Now()
	r, err := dm.d.Diff(ctx, dm.ids[0], layerID, &layerfs.DiffOptions{Compression: layerfs.Zstd})
	if err != nil {
		return err
	}
	err = writeWhole(file, func(w io.Writer) (err error) {
		df.Bytes, err = io.Copy(w, r)
		return err
	})
	if err = errors.Join(err, r.Close()); err != nil {
		return err
	}
	df.Time = time.Since(begin)
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	begin = time.Now()
	if _, err := dm.full.Apply(ctx, copyID, f, dm.applyOptions()); err != nil {
		return err
	}
	df.ApplyTime = time.Since(begin)
	there, err := dm.full.Get(ctx, copyID, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dm.full.Put(context.WithoutCancel(ctx), copyID)) }()
	var differ []layerfs.Change
	for c, err := range archive.Compare(ctx, dm.paths[0], there, nil) {
		if err != nil {
			return err
		}
		differ = append(differ, c)
	}
	df.Differences = len(differ)
	dm.text.section("Write the changes as a layer and apply it elsewhere")
	dm.text.say("written in %s: %s with zstd", humanTime(df.Time), humanBytes(df.Bytes))
	dm.text.say("applied with driver %s on a copy of both layers in %s", dm.full.Name(), humanTime(df.ApplyTime))
	if df.Differences > 0 {
		return fmt.Errorf("the two trees differ in %d places: %v", len(differ), differ)
	}
	dm.text.say("the two trees are the same in content, types, modes, owners, times and xattrs")
	return nil
}

// memory tells whether containers share the page cache.
func (dm *demo) memory(ctx context.Context) error {
	dm.text.section("Memory")
	if len(dm.paths) < 2 {
		dm.text.say("not measured: it takes two containers")
		return nil
	}
	// Not the first one if there are more, as it has files of its own by now.
	reader, other := 0, 1
	if len(dm.paths) > 2 {
		reader, other = 1, min(len(dm.paths)-1, 4)
	}
	m := new(demoMemory)
	err := m.measure(ctx, dm.paths[reader], dm.paths[other])
	if errors.Is(err, errors.ErrUnsupported) {
		dm.text.say("not measured: %v", err)
		return nil
	}
	if err != nil {
		return err
	}
	if err := dm.copyMemory(ctx, m); err != nil {
		return err
	}
	dm.r.Memory = m
	dm.text.say("container %d reads all %s from disk in %s", reader+1, humanBytes(m.Bytes), humanTime(m.Cold))
	dm.text.say("container %d, which has read nothing, finds in the page cache (mincore(2)):", other+1)
	dm.text.say("    %s before, %s after (%.0f %%)", humanBytes(m.Before), humanBytes(m.After), percent(m.After, m.Bytes))
	dm.text.say("    and reads it all in %s", humanTime(m.Warm))
	dm.text.say("between two full copies:  %s before, %s after (%.0f %%)", humanBytes(m.CopyBefore), humanBytes(m.CopyAfter), percent(m.CopyAfter, m.Bytes))
	if percent(m.After, m.Bytes) > 90 {
		dm.text.say("so containers share one copy in memory of the data below them")
	} else {
		dm.text.say("so with this driver each container has a copy in memory of what it reads")
	}
	return nil
}

func percent(part, all int64) float64 {
	if all == 0 {
		return 0
	}
	return 100 * float64(part) / float64(all)
}

// copyMemory measures the same between two full copies.
func (dm *demo) copyMemory(ctx context.Context, m *demoMemory) (err error) {
	if !dm.d.Features().ConstantCreate { // its containers are full copies
		m.CopyBefore, m.CopyAfter = m.Before, m.After
		return nil
	}
	var paths []string
	for _, id := range []string{layerID, copyID} {
		path, err := dm.full.Get(ctx, id, nil)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dm.full.Put(context.WithoutCancel(ctx), id)) }()
		paths = append(paths, path)
	}
	var c demoMemory
	if err := c.measure(ctx, paths[0], paths[1]); err != nil {
		return err
	}
	m.CopyBefore, m.CopyAfter = c.Before, c.After
	return nil
}

// stop stops the containers.
func (dm *demo) stop(ctx context.Context) error {
	var durations []time.Duration
	for _, id := range dm.ids {
		begin := time.Now()
		if err := dm.d.Put(ctx, id); err != nil {
			return err
		}
		if err := dm.d.Remove(ctx, id); err != nil {
			return err
		}
		durations = append(durations, time.Since(begin))
	}
	median, least, most := spread(durations)
	dm.r.Containers.Stop = median
	dm.text.section("Stop")
	dm.text.say("to unmount and remove one: %s (median; %s to %s)", humanTime(median), humanTime(least), humanTime(most))
	dm.ids, dm.paths = nil, nil
	return nil
}
