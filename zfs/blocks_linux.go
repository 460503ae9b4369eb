package zfs

import (
	"context"
	"errors"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

var _ layerfs.BlockDiffer = (*Driver)(nil)

// BlockDiff yields the ranges of regular files that differ from an ancestor's,
// in whole records of the dataset; an empty base yields everything. A file at
// another path than before, or that replaced another, is yielded whole, and so
// is every changed file of a layer made by Clone.
//
// The ranges are those of "zfs send -i", so the cost grows with the bytes that
// were changed. Which files those are is found as by Changes. While the layer is
// written, what is yielded is undefined but harmless.
func (d *Driver) BlockDiff(ctx context.Context, id, base string) iter.Seq2[layerfs.BlockRange, error] {
	return func(yield func(layerfs.BlockRange, error) bool) {
		stopped := false
		err := lifecycle.Between(ctx, d.frame, "block diff", id, base, func(chain lifecycle.Chain, at int) error {
			files, err := d.changedFiles(ctx, chain, at)
			if err != nil {
				return err
			}
			if from := d.m.since(chain, at); from != "" {
				err := d.m.fillSpans(ctx, chain.Layer(), from, files)
				if err != nil {
					return err
				}
			}
			for _, f := range files {
				for _, r := range f.ranges() {
					if !yield(r, nil) {
						stopped = true
						return nil
					}
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(layerfs.BlockRange{}, err)
		}
	}
}

// changedFile is a regular file that differs.
type changedFile struct {
	path             string
	ino              uint64
	oldSize, newSize int64
	same             bool   // it is the file that was there before
	spans            *spans // nil if unknown; names of one file share them
}

func (f *changedFile) ranges() []layerfs.BlockRange {
	s := f.spans
	if !f.same || s == nil {
		s = &spans{data: []span{{0, f.newSize}}}
	}
	return s.ranges(f.path, f.oldSize, f.newSize)
}

// changedFiles lists the regular files that differ, by path.
func (d *Driver) changedFiles(ctx context.Context, chain lifecycle.Chain, base int) (files []*changedFile, err error) {
	newer, err := d.m.View(ctx, chain)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	older, id := lifecycle.View{Path: newer.Path}, ""
	if base < len(chain) {
		id = chain[base].ID
		if older, err = d.m.View(ctx, chain[base:]); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, older.Release()) }()
	}
	t, err := openTrees(older.Path, newer.Path)
	if err != nil {
		return nil, err
	}
	defer t.close()
	for c, err := range d.Changes(ctx, chain.Layer().ID, id) {
		if err != nil {
			return nil, err
		}
		if c.Kind == layerfs.Deleted {
			continue
		}
		f, err := t.changed(c, id != "")
		if err != nil {
			return nil, err
		}
		if f != nil {
			files = append(files, f)
		}
	}
	return files, nil
}

// changed looks a changed path up in both trees; it returns nil for what is no
// regular file.
func (t *trees) changed(c layerfs.Change, hasOld bool) (*changedFile, error) {
	b, err := placeOf(t.newer, c.Path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // the layer is being written
	}
	if err != nil {
		return nil, err
	}
	defer b.close()
	if b.st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil
	}
	f := &changedFile{path: c.Path, ino: b.st.Ino, newSize: b.st.Size}
	if c.Kind == layerfs.Added || !hasOld {
		return f, nil
	}
	a, err := placeOf(t.older, c.Path)
	if err != nil {
		return nil, err
	}
	defer a.close()
	if a.st.Mode&unix.S_IFMT != unix.S_IFREG {
		return f, nil
	}
	f.oldSize = a.st.Size
	// The number of a removed file is used again.
	x, xok := a.born()
	y, yok := b.born()
	f.same = a.st.Ino == b.st.Ino && xok && yok && x == y
	return f, nil
}

// born returns when a file was made, if the file system knows.
func (p *place) born() (unix.StatxTimestamp, bool) {
	var st unix.Statx_t
	for {
		err := unix.Statx(p.dir, p.name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &st)
		if !errors.Is(err, unix.EINTR) {
			return st.Btime, err == nil && st.Mask&unix.STATX_BTIME != 0
		}
	}
}

// fillSpans asks zfs which ranges of files differ from a snapshot.
func (m *mechanism) fillSpans(ctx context.Context, rec *lifecycle.Record, from string, files []*changedFile) error {
	want := make(map[uint64]*spans)
	for _, f := range files {
		if !f.same {
			continue
		}
		if want[f.ino] == nil {
			want[f.ino] = new(spans)
		}
		f.spans = want[f.ino]
	}
	if len(want) == 0 {
		return nil
	}
	return m.sending(ctx, rec, from, nil, func(r io.Reader) error {
		return readStream(r, func(e extent) error {
			if s := want[e.object]; s != nil {
				s.add(e)
			}
			return nil
		})
	})
}
