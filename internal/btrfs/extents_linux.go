package btrfs

import (
	"context"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// ChangedExtents yields the ranges of regular files in which newSnap differs
// from oldSnap, by path (in the order of [layerfs.ComparePaths]) and offset,
// without overlap. Ranges are rounded up to blocks by the kernel, so they may
// be larger than what was written, never smaller, and end at the end of the
// larger of both files. Unmapped ranges are holes of the new file, or beyond
// its end.
//
// A file that is at another path than before, or that replaced another one, is
// yielded whole, as a new file is. Every name of a file with hard links that
// changed is yielded. Deleted files are not: [Changes] has them. Cost and needs
// are those of Changes, and content is not compared.
func ChangedExtents(ctx context.Context, oldSnap, newSnap string) iter.Seq2[layerfs.BlockRange, error] {
	return func(yield func(layerfs.BlockRange, error) bool) {
		err := walkPlaces(ctx, oldSnap, newSnap, true, func(d *difference) error {
			if !d.new.isType(unix.S_IFREG) {
				return nil
			}
			spans, end := d.spans, d.new.st.Size
			if d.old.isType(unix.S_IFREG) {
				end = max(end, d.old.st.Size)
			} else {
				spans = []span{{0, end}}
			}
			return mapped(d, spans, end, func(r layerfs.BlockRange) error {
				if !yield(r, nil) {
					return errStop
				}
				return nil
			})
		})
		if err != nil && err != errStop {
			yield(layerfs.BlockRange{}, err)
		}
	}
}

// mapped splits spans of the new file into data and holes.
func mapped(d *difference, spans []span, end int64, emit func(layerfs.BlockRange) error) error {
	if d.old.isType(unix.S_IFREG) && d.old.st.Size != d.new.st.Size {
		// What was cut off or added at the end differs, also where the new part
		// is a hole, of which the stream says nothing.
		spans = append(spans[:len(spans):len(spans)], span{min(d.old.st.Size, d.new.st.Size), end})
		spans = mergeSpans(spans)
	}
	if len(spans) == 0 {
		return nil
	}
	f, err := d.new.open(0)
	if err != nil {
		return err
	}
	defer f.Close()
	size := d.new.st.Size
	for _, s := range spans {
		for off, stop := s.off, min(s.end, end); off < stop; {
			data, err := seek(f, off, unix.SEEK_DATA, size)
			if err != nil {
				return err
			}
			r := layerfs.BlockRange{Path: d.path, Offset: off}
			if data > off || off >= size {
				// A hole up to the next data, or up to the end of the old file.
				next := stop
				if data < size {
					next = min(data, stop)
				}
				r.Length, r.Unmapped = next-off, true
			} else {
				hole, err := seek(f, off, unix.SEEK_HOLE, size)
				if err != nil {
					return err
				}
				r.Length = min(hole, stop) - off
			}
			if err := emit(r); err != nil {
				return err
			}
			off += r.Length
		}
	}
	return nil
}

// seek returns where data or a hole begins at or after off; size if nowhere.
func seek(f *os.File, off int64, whence int, size int64) (int64, error) {
	if off >= size {
		return size, nil
	}
	n, err := f.Seek(off, whence)
	if err != nil {
		if isErrno(err, unix.ENXIO) {
			return size, nil
		}
		return 0, err
	}
	return n, nil
}
