package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/whiteout"
)

// Merged is the form of a directory that holds the layers below, too: a
// deletion is carried out and leaves no whiteout. For vfs, btrfs, zfs and block
// devices.
const Merged whiteout.Form = 0

// isOverlay reports whether f is one of overlayfs, whose xattrs are reserved.
func isOverlay(f whiteout.Form) bool { return f.Prefix() != "" }

// ApplyOptions are the options of [Apply]. The zero value makes a merged tree
// with everything the stream has.
type ApplyOptions struct {
	layerfs.ApplyOptions

	// Form is what the directory is, and so how a deletion is recorded in it:
	// [Merged], or that of an AUFS branch or an upper directory of overlayfs.
	Form whiteout.Form

	// Lowers are the directories of the layers below, the top one first, in
	// the same form; not for [Merged], where dir holds what is below. Paths
	// are then looked up in the union, links to files below bring a copy of
	// the file, and directories that the stream implies take the attributes
	// of the instance below. Without Lowers all that is not in dir is taken
	// for missing.
	Lowers []string

	// DropWhiteouts leaves out whiteouts of what does not exist in Lowers.
	DropWhiteouts bool

	// Holes makes holes of blocks of zeros in files. Holes that the stream
	// records as such are always made.
	Holes bool

	// NoDigest leaves ApplyResult.Digest empty and spares its computation.
	NoDigest bool

	// Workers is the number of goroutines that write files; 0 means one for
	// each processor, at most 8.
	Workers int

	// Lost is called, from one goroutine at a time, for each attribute that
	// the file system cannot store or the caller may not set: an xattr, or a
	// character device 0/0 where that is a whiteout. Apply then goes on
	// without it. If Lost is nil such an attribute makes Apply fail.
	Lost func(*EntryError)

	portable   bool // tests: the implementation of other systems
	noOpenat2  bool // tests: look up lower paths component by component
	fdCapacity int  // tests: descriptors of directories kept; 0 means a default
}

func (o *ApplyOptions) validate() error {
	var errs []error
	if o.Form > whiteout.OverlayUserXattr {
		errs = append(errs, fmt.Errorf("%s is unknown", o.Form))
	}
	if o.Form == Merged && len(o.Lowers) > 0 {
		errs = append(errs, errors.New("a merged tree has no lower layers of its own"))
	}
	if o.Devices > layerfs.DevicesRefuse {
		errs = append(errs, fmt.Errorf("device policy %d is unknown", o.Devices))
	}
	if o.Workers < 0 {
		errs = append(errs, fmt.Errorf("%d workers", o.Workers))
	}
	return errors.Join(errs...)
}

// Apply unpacks a layer into dir, which must exist.
//
// The stream may be compressed (gzip, zstd, bzip2, xz). The order of entries
// does not matter: an opaque mark or a whiteout concerns what was in dir or in
// opts.Lowers before, wherever it stands in the stream, and a hard link may
// come before its target. (Only a path that goes through a symbolic link means
// what the link is when the entry is met.) Of several entries with one name the
// last one wins; a directory keeps what is in it. Directories that the stream implies without
// having them get mode 0755 and the container's root as owner, if they are not
// there already. What follows the end mark of the archive is read, too, so
// that the digest is that of the whole stream. opts may be nil.
//
// An error about one entry is an [*EntryError]. It matches
// [layerfs.ErrMalformed] for what is not a layer, [layerfs.ErrLimit] if one of
// opts.Limits was hit, before what went over it was written. After an error
// dir holds a part of the layer and should be thrown away. Apply does not sync.
//
// If ctx ends, Apply returns its cause; a Read of r that is stuck is then left
// behind in a goroutine. The cost is that of the system calls, spread over
// opts.Workers goroutines, and of the digest beside them. Concurrent calls for
// different directories are fine.
//
// Sources: OCI image specification, layer.md, v1.1; POSIX.1-2024, pax; GNU
// tar manual, 1.35; Documentation/filesystems/overlayfs.rst, Linux 6.12.
func Apply(ctx context.Context, dir string, r io.Reader, opts *ApplyOptions) (layerfs.ApplyResult, error) {
	if opts == nil {
		opts = &ApplyOptions{}
	}
	if err := opts.validate(); err != nil {
		return layerfs.ApplyResult{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	lim := newLimits(opts.Limits)
	src := newSource(ctx, r, lim.ratio, !opts.NoDigest)
	p := &parser{ctx: ctx, src: src, lim: lim}
	stopReport := startReport(opts.Progress, "apply", func() (int64, int64) { return src.bytes.Load(), src.entries.Load() })
	res, err := extract(ctx, p, dir, opts)
	p.release()
	src.close(ctx)
	stopReport()
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	res.Size, res.Bytes, res.Entries = src.size, p.content, p.entries
	res.Digest = src.sum()
	return res, nil
}

// entryError adds the name of an entry to an error, unless it has one or is
// not about the entry at all.
func entryError(name string, err error) error {
	var e *EntryError
	if err == nil || errors.As(err, &e) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &EntryError{name, err}
}

// startReport calls f with what state returns some times a second until the
// function it returns is called, which calls f once more.
func startReport(f layerfs.ProgressFunc, phase string, state func() (bytes, entries int64)) (stop func()) {
	if f == nil {
		return func() {}
	}
	report := func() {
		b, e := state()
		f(layerfs.Progress{Phase: phase, Bytes: b, Entries: e})
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				report()
			case <-quit:
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-done
		report()
	}
}
