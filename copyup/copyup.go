package copyup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"github.com/layerfs/layerfs"
)

// Options are the options of all functions of this package. The zero value
// keeps everything and fails on what cannot be kept.
type Options struct {
	// SkipXattr leaves out the xattrs for which it returns true. It is called
	// from several goroutines.
	SkipXattr func(name string) bool

	// XattrError decides about an xattr that could not be read or set: if it
	// returns nil the copy goes on without. If it is nil, every failure ends
	// the copy. It is called from several goroutines.
	XattrError func(path, name string, err error) error

	// IgnoreOwners makes everything belong to the caller, for users with a
	// single id.
	IgnoreOwners bool

	// Devices says what to do with device nodes; sockets and fifos need no
	// privilege and are always made.
	Devices layerfs.DevicePolicy

	// InodeFlags copies the settable flags of chattr(1): immutable, append
	// only, no dump, no atime, sync, dirsync and no copy-on-write.
	InodeFlags bool

	// NoReflink copies the data also where it could be shared.
	NoReflink bool

	// Size, if not nil, is the number of bytes to copy at most of a regular
	// file (File and Up): a file that is opened to be truncated needs none.
	Size *int64

	// Workers is the number of goroutines of Tree; 0 means GOMAXPROCS.
	Workers int

	// Progress is called during Tree, with phase "copy".
	Progress layerfs.ProgressFunc

	force force
}

// force switches mechanisms off, to test what they fall back to.
type force struct {
	noClone, noCopyRange, noSeek, noTmpfile bool
}

// Stats tells what was copied.
type Stats struct {
	Entries int64 // names made, the root included
	Bytes   int64 // of file content, without holes where they are seen
	Shared  int64 // part of Bytes that shares its blocks with the source
	Links   int64 // names that became hard links of an earlier one
	Skipped int64 // device nodes left out
}

// File copies one entry that is not a directory to dst, which must not exist;
// its directory must. A symlink is copied, not followed.
//
// dst appears complete, or not at all: the copy is made in a nameless file
// (O_TMPFILE), or under a temporary name in the directory of dst that starts
// with ".wh..wh.copyup." and is left only by a crash. On systems other than
// Linux the temporary name is always used.
//
// The error matches [fs.ErrExist] if dst exists.
func File(ctx context.Context, dst, src string, opts *Options) error {
	if opts == nil {
		opts = &Options{}
	}
	if err := copyFile(ctx, dst, src, opts); err != nil {
		return fmt.Errorf("copy %s to %s: %w", src, dst, err)
	}
	return nil
}

// Tree copies the tree below srcDir, and the attributes of srcDir itself, to
// dstDir, which is made, or must be an empty directory; its parent must exist.
//
// The copy is seen while it is made, but dstDir has mode 0700 until it is
// complete. After a failure dstDir is gone, or empty if it existed. dstDir
// must not be changed by others meanwhile. Mounts inside srcDir are crossed.
// Names that are hard links of each other stay so.
//
// The cost is some ten system calls a file, on Options.Workers threads; memory
// grows with the number of files that have several names, and open files with
// the depth of the tree.
//
// The error matches [fs.ErrExist] if dstDir is not empty.
func Tree(ctx context.Context, dstDir, srcDir string, opts *Options) (Stats, error) {
	if opts == nil {
		opts = &Options{}
	}
	st, err := copyTree(ctx, dstDir, srcDir, opts)
	if err != nil {
		return st, fmt.Errorf("copy %s to %s: %w", srcDir, dstDir, err)
	}
	return st, nil
}

// Up makes path writable in a union: it copies the entry that the lowers have
// there to the same place below upper, with ancestors that upper lacks. The
// lowers are searched in the given order, the topmost first, for each
// component of path; whoever calls knows of whiteouts and gives only those
// lowers that are visible at path. A directory is copied without its contents.
//
// path is slash-separated and relative to all roots; no component of it may be
// a symlink but the last. Nothing happens if upper has the entry already, or
// gets it meanwhile. Each new entry appears complete, as with [File], and the
// times of directories that upper had before are kept.
//
// Hard links are broken: the copy has one name.
//
// The error matches [fs.ErrNotExist] if no lower has the entry and
// [fs.ErrInvalid] for a path that is absolute, empty or not clean.
func Up(ctx context.Context, upper string, lowers []string, path string, opts *Options) error {
	if opts == nil {
		opts = &Options{}
	}
	if !fs.ValidPath(path) || path == "." {
		return fmt.Errorf("copy up %q: %w", path, fs.ErrInvalid)
	}
	if err := copyUp(ctx, upper, lowers, path, opts); err != nil {
		return fmt.Errorf("copy up %s: %w", path, err)
	}
	return nil
}

// tempPrefix starts the temporary names. It is one that AUFS keeps for itself,
// so that a union ignores what a crash leaves; see package whiteout.
const tempPrefix = ".wh..wh.copyup."

func tempName() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return tempPrefix + hex.EncodeToString(b[:])
}

// counters are what the workers of one copy add up.
type counters struct {
	entries, bytes, shared, links, skipped atomic.Int64

	progress layerfs.ProgressFunc
	mu       sync.Mutex
	last     time.Time // of the last call of progress; guarded by mu
}

func (c *counters) stats() Stats {
	return Stats{
		Entries: c.entries.Load(), Bytes: c.bytes.Load(), Shared: c.shared.Load(),
		Links: c.links.Load(), Skipped: c.skipped.Load(),
	}
}

// tick reports progress if a tenth of a second has passed since the last time.
func (c *counters) tick() {
	if c.progress == nil || !c.mu.TryLock() {
		return
	}
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.last) >= 100*time.Millisecond {
		c.last = now
		c.report()
	}
}

// finish reports the last state.
func (c *counters) finish() {
	if c.progress == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report()
}

func (c *counters) report() {
	c.progress(layerfs.Progress{Phase: "copy", Bytes: c.bytes.Load(), Entries: c.entries.Load()})
}
