package archive

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"strings"
	"sync/atomic"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/whiteout"
)

// WriteOptions are the options of [Write], [WriteChanges] and [WriteUpper].
type WriteOptions struct {
	layerfs.DiffOptions

	// Digest asks for WriteResult.Digest.
	Digest bool

	// Workers is the number of goroutines that read files ahead; 0 means one
	// for each processor, at most 8.
	Workers int

	portable bool // tests: the implementation of other systems
}

// WriteResult tells what was written.
type WriteResult struct {
	Size    int64  // bytes of the uncompressed stream
	Bytes   int64  // bytes of file content
	Entries int64  // whiteouts included
	Skipped int64  // sockets, which tar cannot hold
	Digest  string // of the uncompressed stream, if asked for: "sha256:…"
}

// Write writes the whole tree below dir to w, the root itself as "./" first
// and each directory before its contents, ordered as [layerfs.ComparePaths]
// does. Files that are hard links of each other are written once.
//
// Compared with its sources a stream is the same byte for byte if names,
// contents and attributes are, with the profiles OCI and Reproducible also on
// different machines. A file whose name starts with ".wh." is an error, as it
// would not come back; a file that gets shorter while it is read, too. Sockets
// are left out and counted. w is not closed. opts may be nil.
//
// Files are read ahead by several goroutines into at most some 20 MB of
// buffers. What grows is one record for each file with several links, and the
// names of the directories from the root to the present one.
func Write(ctx context.Context, w io.Writer, dir string, opts *WriteOptions) (WriteResult, error) {
	return write(ctx, w, dir, opts, plan{})
}

// WriteChanges writes a layer that makes the listed changes: an entry for each
// path that was added or modified, a whiteout for each that was deleted, and
// entries for the directories these are in. changes must be ordered as by
// [layerfs.ComparePaths]; [Compare] and [layerfs.Driver.Changes] give such
// lists. They are consumed while the stream is written.
//
// A whiteout stands where its name is in that order. If a changed file has
// links that are not in the list, dir is walked at the end to find these, and
// they are written as links, since Apply would tear them apart.
func WriteChanges(ctx context.Context, w io.Writer, dir string, changes iter.Seq2[layerfs.Change, error], opts *WriteOptions) (WriteResult, error) {
	return write(ctx, w, dir, opts, plan{changes: changes})
}

// WriteUpper writes the layer that an upper directory of overlayfs or a branch
// of AUFS holds, with whiteouts and opaque marks of that form turned into
// those of AUFS. In a directory whiteouts come first.
//
// What one directory alone does not tell, a directory that was renamed
// (overlay.redirect) or a file without data (overlay.metacopy), makes it fail
// with [errors.ErrUnsupported]; write the changes of the mounted tree then.
func WriteUpper(ctx context.Context, w io.Writer, dir string, form whiteout.Form, opts *WriteOptions) (WriteResult, error) {
	if form == Merged || form > whiteout.OverlayUserXattr {
		return WriteResult{}, fmt.Errorf("%s is not that of an upper directory", form)
	}
	return write(ctx, w, dir, opts, plan{form: form})
}

// plan says what of a tree is written.
type plan struct {
	changes iter.Seq2[layerfs.Change, error] // nil for all of it
	form    whiteout.Form                    // of the whiteouts in the tree
}

func (o *WriteOptions) validate() error {
	var errs []error
	if o.Profile > layerfs.ProfileReproducible {
		errs = append(errs, fmt.Errorf("profile %s is unknown", o.Profile))
	}
	if o.Compression != layerfs.NoCompression && o.Compression != layerfs.Gzip && o.Compression != layerfs.Zstd {
		errs = append(errs, &layerfs.UnsupportedError{Feature: "writing " + o.Compression.String()})
	}
	if o.Level < 0 || o.Compression == layerfs.Gzip && o.Level > 9 || o.Compression == layerfs.Zstd && o.Level > 22 {
		errs = append(errs, fmt.Errorf("compression level %d is out of range", o.Level))
	}
	if o.Workers < 0 {
		errs = append(errs, fmt.Errorf("%d workers", o.Workers))
	}
	return errors.Join(errs...)
}

func write(ctx context.Context, w io.Writer, dir string, opts *WriteOptions, pl plan) (WriteResult, error) {
	if opts == nil {
		opts = &WriteOptions{}
	}
	if err := opts.validate(); err != nil {
		return WriteResult{}, err
	}
	z, err := newCompressor(w, opts.Compression, opts.Level)
	if err != nil {
		return WriteResult{}, err
	}
	s := &sink{w: z}
	if opts.Digest {
		s.hash = sha256.New()
	}
	stop := startReport(opts.Progress, "diff", func() (int64, int64) { return s.content.Load(), s.entries.Load() })
	defer stop()
	sh := newShaper(opts, pl.form)
	res, err := pack(ctx, s, dir, opts, pl, sh)
	if err != nil {
		_ = z.Close() // lets go of the encoder; the stream is broken anyhow
		return WriteResult{}, err
	}
	if err := s.write(make([]byte, endMark)); err != nil {
		return WriteResult{}, err
	}
	if err := z.Close(); err != nil {
		return WriteResult{}, err
	}
	res.Size, res.Bytes, res.Entries = s.size, s.content.Load(), s.entries.Load()
	if s.hash != nil {
		res.Digest = "sha256:" + hex.EncodeToString(s.hash.Sum(nil))
	}
	return res, nil
}

// sink is where the uncompressed stream goes.
type sink struct {
	w       io.Writer
	hash    hash.Hash
	size    int64
	content atomic.Int64
	entries atomic.Int64
}

func (s *sink) write(b []byte) error {
	if s.hash != nil {
		s.hash.Write(b)
	}
	s.size += int64(len(b))
	n, err := s.w.Write(b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

// shaper brings headers into the form of a profile.
type shaper struct {
	profile layerfs.Profile
	clamp   stamp
	ids     *layerfs.IDMap
	form    whiteout.Form
}

func newShaper(opts *WriteOptions, form whiteout.Form) *shaper {
	s := &shaper{profile: opts.Profile, ids: opts.IDMap, form: form}
	if t := opts.SourceDate; !t.IsZero() {
		s.clamp = stamp{t.Unix(), 0}
	}
	return s
}

// shape changes a header with the owners of the host and all there is into
// what the stream gets.
func (s *shaper) shape(h *header) error {
	uid, gid, ok := s.ids.ToContainer(uint32(h.uid), uint32(h.gid))
	if !ok {
		return fmt.Errorf("owner %d:%d is not mapped", h.uid, h.gid)
	}
	h.uid, h.gid = int64(uid), int64(gid)
	if s.profile == layerfs.ProfileFull {
		return nil
	}
	h.hasAtime, h.mtime.nsec = false, 0
	if s.profile == layerfs.ProfileReproducible && h.mtime.sec > s.clamp.sec {
		h.mtime = s.clamp
	}
	return nil
}

// xattr returns under which name an xattr goes into the stream, and false if
// it does not.
func (s *shaper) xattr(name string) (string, bool, error) {
	if ns := s.form.Prefix(); isOverlay(s.form) && strings.HasPrefix(name, ns) {
		switch name[len(ns):] {
		case "redirect", "metacopy":
			return "", false, &layerfs.UnsupportedError{Feature: "layer with " + name, Reason: "the upper directory alone does not tell what is there"}
		}
		inner, ok := whiteout.Unescape(name)
		if !ok {
			return "", false, nil // overlayfs's own
		}
		name = inner
	}
	if s.profile != layerfs.ProfileFull &&
		(strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "system.") || name == "security.selinux") {
		return "", false, nil
	}
	return name, true, nil
}

// whiteoutHeader describes a whiteout. Its time is fixed, so that equal
// changes give equal streams. Its name may be longer than that of a file can
// be: it is a path in a stream, and most forms make no file of that name of it.
func whiteoutHeader(dir, base string) (*header, error) {
	name := whiteout.OpaqueName
	if base != "" {
		name = whiteout.Prefix + base
		if _, ok, err := whiteout.Target(name); err != nil {
			return nil, err
		} else if !ok {
			return nil, malformed("%s is reserved for whiteouts", shorten(base))
		}
	}
	if dir != "" {
		name = dir + "/" + name
	}
	return &header{name: name, typ: typeReg}, nil
}

func stampOf(t time.Time) stamp { return stamp{t.Unix(), int64(t.Nanosecond())} }
