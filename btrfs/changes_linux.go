package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/safepath"
	"github.com/layerfs/layerfs/internal/tree"
)

// NativeChanges asks the kernel by a send stream without file data. Both sides
// are read-only subvolumes: a frozen layer itself, else a snapshot that lives as
// long as the iteration. Every ancestor will do as base, as the kernel compares
// any two trees; those of one line share what did not change.
func (m *mechanism) NativeChanges(ctx context.Context, chain lifecycle.Chain, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		if base == len(chain) {
			yield(layerfs.Change{}, fmt.Errorf("%w: everything is new", lifecycle.ErrDecline))
			return
		}
		p, err := m.pair(ctx, chain, base)
		if err != nil {
			yield(layerfs.Change{}, decline(err))
			return
		}
		first, stopped := true, false
		for c, err := range btrfs.Changes(ctx, p.older, p.newer) {
			if err != nil && first {
				err = decline(err)
			}
			first = false
			if !yield(c, err) || err != nil {
				stopped = true
				break
			}
		}
		if err := p.release(); err != nil && !stopped {
			yield(layerfs.Change{}, err)
		}
	}
}

// decline marks errors that a walk would not have.
func decline(err error) error {
	if declines(err) {
		return fmt.Errorf("%w: %w", lifecycle.ErrDecline, err)
	}
	return err
}

// declines reports whether a walk may give what failed here. A full file
// system, or one mounted read-only, has no room for snapshots; a balance may
// keep the kernel from sending (EAGAIN before Linux 5.14).
func declines(err error) bool {
	for _, target := range []error{
		errors.ErrUnsupported, btrfs.ErrTooDeep, errNested,
		unix.EPERM, unix.EAGAIN, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.ENOTTY,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

var errNested = errors.New("it has nested subvolumes")

// pair is a layer and its base as read-only subvolumes.
type pair struct {
	older, newer string // older is empty for the empty base
	release      func() error
}

// pair returns the subvolumes to send, which must be released. The error
// matches errNested if a subvolume is nested in one of them.
func (m *mechanism) pair(ctx context.Context, chain lifecycle.Chain, base int) (_ *pair, err error) {
	if m.native != nil {
		return nil, &layerfs.UnsupportedError{Feature: "a btrfs send stream", Reason: m.native.Error()}
	}
	p := &pair{}
	for _, rec := range append(lifecycle.Chain{chain[0]}, chain[base:min(base+1, len(chain))]...) {
		nested, err := btrfs.Nested(m.Path(rec.ID))
		if err != nil {
			return nil, err
		}
		if len(nested) > 0 {
			return nil, fmt.Errorf("%s: %w", rec.ID, errNested)
		}
	}
	newer, releaseNewer, err := m.still(ctx, chain[0], false)
	if err != nil {
		return nil, err
	}
	p.newer, p.release = newer, releaseNewer
	if base == len(chain) {
		return p, nil
	}
	// The base has a child in the chain, which is pinned, so it stays frozen.
	older, releaseOlder, err := m.still(ctx, chain[base], true)
	if err != nil {
		return nil, errors.Join(err, releaseNewer())
	}
	p.older = older
	p.release = func() error { return errors.Join(releaseNewer(), releaseOlder()) }
	return p, nil
}

// empty returns an empty read-only subvolume.
func (m *mechanism) empty(ctx context.Context) (path string, release func() error, err error) {
	path, unlock, err := m.temporary("empty")
	if err != nil {
		return "", nil, err
	}
	release = func() error {
		defer unlock()
		return m.destroy(context.WithoutCancel(ctx), path)
	}
	if err = btrfs.Create(path); err == nil {
		err = btrfs.SetReadOnly(path, true)
	}
	if err != nil {
		return "", nil, errors.Join(err, release())
	}
	return path, release, nil
}

// Usage returns what a layer wrote that it still has: the sum of what differs
// from the parent's files, and their number. A file with several names counts
// once. With simple quotas the bytes are what the kernel counts.
//
// Where the kernel cannot be asked what differs, both trees are walked, and a
// file of which some differs counts whole.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (layerfs.Usage, error) {
	u, err := m.written(ctx, chain)
	if declines(err) {
		u, err = m.differing(ctx, chain)
	}
	if err != nil || m.quotas != nil {
		return u, err
	}
	return m.counted(chain.Layer().ID, u)
}

// written adds up the changes of a layer.
func (m *mechanism) written(ctx context.Context, chain lifecycle.Chain) (u layerfs.Usage, err error) {
	if len(chain) == 1 {
		return u, &layerfs.UnsupportedError{Feature: "counting the changes of a base layer"}
	}
	p, err := m.pair(ctx, chain, 1)
	if err != nil {
		return u, err
	}
	defer func() { err = errors.Join(err, p.release()) }()
	root, err := safepath.OpenRoot(p.newer, nil)
	if err != nil {
		return u, err
	}
	defer root.Close()
	files := tally{root: root}
	if err := files.each(btrfs.Changes(ctx, p.older, p.newer), func(*unix.Stat_t) { u.Inodes++ }); err != nil {
		return u, err
	}
	content := tally{root: root}
	path, first := "", false
	for r, err := range btrfs.ChangedExtents(ctx, p.older, p.newer) {
		if err != nil {
			return u, err
		}
		if r.Unmapped {
			continue
		}
		if r.Path != path {
			path = r.Path
			if _, first, err = content.add(path); err != nil {
				return u, err
			}
		}
		if first {
			u.Bytes += r.Length
		}
	}
	return u, nil
}

// differing adds up the files of a layer that differ from the parent's.
func (m *mechanism) differing(ctx context.Context, chain lifecycle.Chain) (u layerfs.Usage, err error) {
	newer, err := m.View(ctx, chain)
	if err != nil {
		return u, err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	if len(chain) == 1 {
		return tree.Usage(ctx, newer.Path)
	}
	older, err := m.View(ctx, chain[1:])
	if err != nil {
		return u, err
	}
	defer func() { err = errors.Join(err, older.Release()) }()
	root, err := safepath.OpenRoot(newer.Path, nil)
	if err != nil {
		return u, err
	}
	defer root.Close()
	files := tally{root: root}
	opts := &archive.CompareOptions{Since: m.dir.Reliable(chain.Layer().Copied)}
	err = files.each(archive.Compare(ctx, older.Path, newer.Path, opts), func(st *unix.Stat_t) {
		u.Inodes++
		u.Bytes += st.Blocks * 512 // the unit of stat(2)
	})
	return u, err
}

// tally tells the first name of a file from the others. The zero value with a
// root is ready.
type tally struct {
	root *safepath.Root
	seen map[inode]bool // of several names
}

type inode struct{ dev, ino uint64 }

// each calls f once for each file that changes add or modify.
func (t *tally) each(changes iter.Seq2[layerfs.Change, error], f func(*unix.Stat_t)) error {
	for c, err := range changes {
		if err != nil {
			return err
		}
		if c.Kind == layerfs.Deleted {
			continue
		}
		st, first, err := t.add(c.Path)
		if err != nil {
			return err
		}
		if first {
			f(&st)
		}
	}
	return nil
}

// add looks at what is at a path of [layerfs.Change], and reports whether it was
// not looked at under another name. What is gone meanwhile does not count.
func (t *tally) add(path string) (st unix.Stat_t, first bool, err error) {
	f, err := t.root.OpenExact(path, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) {
		return st, false, nil
	}
	if err != nil {
		return st, false, err
	}
	defer f.Close()
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return st, false, &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	if st.Nlink < 2 || st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return st, true, nil
	}
	i := inode{uint64(st.Dev), st.Ino}
	if t.seen[i] {
		return st, false, nil
	}
	if t.seen == nil {
		t.seen = make(map[inode]bool)
	}
	t.seen[i] = true
	return st, true, nil
}

// counted replaces the bytes by those that simple quotas count, which mean the
// same, with those of nested subvolumes. What qgroups call exclusive does not: a
// child, or a snapshot that is still being cleaned up, shares what the layer wrote.
func (m *mechanism) counted(id string, u layerfs.Usage) (layerfs.Usage, error) {
	st, err := btrfs.ReadQuotaStatus(m.home)
	if err != nil || st.Mode != btrfs.QuotaSimple {
		return u, err
	}
	path := m.Path(id)
	if err := btrfs.Sync(path); err != nil { // the numbers are those of the last commit
		return u, err
	}
	q, err := qgroupOf(path)
	if errors.Is(err, fs.ErrNotExist) {
		return u, nil
	}
	if err != nil {
		return u, err
	}
	nested, err := btrfs.Nested(path)
	if err != nil {
		return u, err
	}
	u.Bytes = q.Exclusive
	for _, n := range nested {
		q, err := btrfs.ReadQgroup(path, n.ID)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return u, err
		}
		u.Bytes += q.Exclusive
	}
	return u, nil
}

// BlockDiff yields the ranges of regular files that differ from an ancestor's;
// an empty base yields everything. A file at another path than before is
// yielded whole, and each name of a file with several. It needs CAP_SYS_ADMIN
// and costs what was changed. The error matches [errors.ErrUnsupported] for a
// layer with nested subvolumes.
func (d *Driver) BlockDiff(ctx context.Context, id, base string) iter.Seq2[layerfs.BlockRange, error] {
	return func(yield func(layerfs.BlockRange, error) bool) {
		stopped := false
		err := lifecycle.Between(ctx, d.frame, "block diff", id, base, func(chain lifecycle.Chain, at int) (err error) {
			p, err := d.m.pair(ctx, chain, at)
			if err != nil {
				return nestedUnsupported("a block diff", err)
			}
			defer func() { err = errors.Join(err, p.release()) }()
			older := p.older
			if older == "" {
				path, release, err := d.m.empty(ctx)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, release()) }()
				older = path
			}
			for r, err := range btrfs.ChangedExtents(ctx, older, p.newer) {
				if err != nil {
					return err
				}
				if !yield(r, nil) {
					stopped = true
					return nil
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(layerfs.BlockRange{}, err)
		}
	}
}

// nestedUnsupported says that nested subvolumes are not in a stream.
func nestedUnsupported(what string, err error) error {
	if errors.Is(err, errNested) {
		return &layerfs.UnsupportedError{Feature: what + " of such a layer", Reason: err.Error()}
	}
	return err
}

// SendOptions are the options of [Driver.Send]. The zero value, and nil, are
// the defaults.
type SendOptions struct {
	// Compressed passes extents that are stored compressed on as they are; it
	// needs version 2.
	Compressed bool

	// Version is that of the stream, 1 to 3; 0 means the newest that the
	// kernel and this package know.
	Version int
}

// Send writes a layer as a stream of btrfs's own format, as "btrfs send" does:
// the whole layer, or with a base, which must be an ancestor, what differs from
// it. [Driver.Receive] and "btrfs receive" read it.
//
// A stream names its subvolume and its base by their UUIDs. Only a layer that
// was frozen when it was sent (by a child or by being read-only) keeps the name,
// so that a later stream can build on it. It needs CAP_SYS_ADMIN. The error
// matches [errors.ErrUnsupported] for a layer with nested subvolumes, which a
// stream cannot hold.
func (d *Driver) Send(ctx context.Context, w io.Writer, id, base string, opts *SendOptions) error {
	if opts == nil {
		opts = new(SendOptions)
	}
	return lifecycle.Between(ctx, d.frame, "send", id, base, func(chain lifecycle.Chain, at int) (err error) {
		p, err := d.m.sendable(ctx, chain, at)
		if err != nil {
			return nestedUnsupported("a send stream", err)
		}
		defer func() { err = errors.Join(err, p.release()) }()
		return btrfs.Send(ctx, w, p.newer, &btrfs.SendOptions{Parent: p.older, Compressed: opts.Compressed, Version: opts.Version})
	})
}

// sendable is pair, but sends a layer that has children itself. If it loses the
// last one meanwhile, a writable Get fails until the stream ends.
func (m *mechanism) sendable(ctx context.Context, chain lifecycle.Chain, base int) (*pair, error) {
	p, err := m.pair(ctx, chain, base)
	if err != nil {
		return nil, err
	}
	id := chain.Layer().ID
	ro, err := btrfs.IsReadOnly(m.Path(id))
	if err != nil {
		return nil, errors.Join(err, p.release())
	}
	if !ro {
		return p, nil
	}
	children, err := m.dir.Children(id)
	if err != nil {
		return nil, errors.Join(err, p.release())
	}
	if len(children) > 0 {
		p.newer = m.Path(id)
	}
	return p, nil
}

// Receive makes a layer of a stream that [Driver.Send] or "btrfs send" wrote.
// An incremental stream builds on parent or one of its ancestors, which must
// have been received from what the stream builds on and not written since; a
// full stream may have a parent too, which then only counts for Changes.
//
// The stream may come from an enemy; nothing outside of the new layer is
// reached. It is all or nothing, and needs CAP_SYS_ADMIN. The error matches
// [layerfs.ErrMalformed] if the stream is at fault. Streams that are to build
// on this one need it to stay as it is: the first writable Get makes it
// forget where it came from.
func (d *Driver) Receive(ctx context.Context, r io.Reader, id, parent string, opts *layerfs.CreateOptions) error {
	return lifecycle.Import(ctx, d.frame, "receive", id, parent, opts, func(rec *lifecycle.Record, chain lifecycle.Chain) error {
		if rec.Quota == (layerfs.Quota{}) {
			rec.Quota.Bytes = d.m.opts.Size
		}
		if rec.MountLabel != "" {
			return &layerfs.UnsupportedError{Feature: "a label for a received layer", Reason: "a stream brings its own"}
		}
		rec.Sealed = rec.ReadOnly
		// What a crash left; the stream can only be read once.
		if err := d.m.destroy(ctx, d.m.Path(id)); err != nil {
			return err
		}
		sources := make([]string, len(chain))
		for i, a := range chain {
			sources[i] = d.m.Path(a.ID)
			if err := setReadOnly(sources[i], true); err != nil {
				return err
			}
		}
		return d.m.build(ctx, rec, func(string) error {
			_, err := btrfs.Receive(ctx, r, d.m.layers(), &btrfs.ReceiveOptions{Name: rec.ID, Sources: sources})
			return err
		})
	})
}
