package devmapper

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/thin"
)

// settle writes everything of a layer to its device, if it is active and
// writable: freezing a file system also empties its log.
func (m *mechanism) settle(ctx context.Context, id string) error {
	name := m.deviceName(id, false)
	unlock, err := m.dir.Lock(ctx, ".origin-"+name)
	if err != nil {
		return err
	}
	defer unlock()
	info, err := m.ctl.Info(name)
	if errors.Is(err, unix.ENXIO) || err == nil && (info.ReadOnly || !info.Live || info.Opens == 0) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := m.ctl.Suspend(name, dm.SuspendOptions{}); err != nil {
		return ignore(err, unix.ENXIO)
	}
	_, err = m.ctl.Resume(name, dm.SuspendOptions{})
	return ignore(err, unix.ENXIO)
}

// withMetadata calls fn with the metadata of the pool as it is now.
func (m *mechanism) withMetadata(ctx context.Context, fn func(*thin.Metadata) error) (err error) {
	unlock, err := m.dir.Lock(ctx, poolLock)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = m.ctl.Message(m.pool, 0, dm.ReserveMetadataSnap())
	if errors.Is(err, unix.EBUSY) { // left by a crash: nobody else holds the lock
		if _, err = m.ctl.Message(m.pool, 0, dm.ReleaseMetadataSnap()); err == nil {
			_, err = m.ctl.Message(m.pool, 0, dm.ReserveMetadataSnap())
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		_, rerr := m.ctl.Message(m.pool, 0, dm.ReleaseMetadataSnap())
		err = errors.Join(err, rerr)
	}()
	m.step("metadata: reserved")
	st, err := m.poolStatus(true)
	if err != nil {
		return err
	}
	r, err := thin.OpenDevice(devicePath(m.metadataPath))
	if err != nil {
		return err
	}
	defer r.Close()
	md, err := thin.Open(r, st.HeldRoot)
	if err != nil {
		return err
	}
	return fn(md)
}

// ranges returns where a layer differs from an ancestor, or from the empty
// file system if base is beyond the chain and relative is set, or what it has
// mapped if relative is not set.
func (m *mechanism) ranges(ctx context.Context, chain lifecycle.Chain, base int, relative bool) ([]layerfs.BlockRange, error) {
	id := chain.Layer().ID
	if err := m.settle(ctx, id); err != nil {
		return nil, err
	}
	d, err := m.load(id)
	if err != nil {
		return nil, err
	}
	from := uint32(baseID)
	if base < len(chain) {
		o, err := m.load(chain[base].ID)
		if err != nil {
			return nil, err
		}
		from = o.ID
	} else if !relative {
		from = 0
	}
	return m.rangesOf(ctx, from, d.ID, d.Size)
}

// rangesOf returns where one device differs from another, or what it has mapped
// if from is 0.
func (m *mechanism) rangesOf(ctx context.Context, from, to uint32, size int64) ([]layerfs.BlockRange, error) {
	var out []layerfs.BlockRange
	block := m.opts.BlockSize
	add := func(begin, length uint64, unmapped bool) {
		off := int64(begin) * block
		n := min(int64(length)*block, size-off)
		if n <= 0 {
			return
		}
		if k := len(out) - 1; k >= 0 && out[k].Unmapped == unmapped && out[k].Offset+out[k].Length == off {
			out[k].Length += n
			return
		}
		out = append(out, layerfs.BlockRange{Offset: off, Length: n, Unmapped: unmapped})
	}
	err := m.withMetadata(ctx, func(md *thin.Metadata) error {
		if from == 0 {
			for r, err := range md.Mappings(to) {
				if err != nil {
					return err
				}
				add(r.Begin, r.Length, false)
			}
			return nil
		}
		for r, err := range md.Diff(from, to) {
			if err != nil {
				return err
			}
			add(r.Begin, r.Length, r.Kind == thin.LeftOnly)
		}
		return nil
	})
	return out, err
}

var _ layerfs.BlockDiffer = (*Driver)(nil)

// BlockDiff yields the ranges of a layer's device that differ from an
// ancestor's; against "" it yields what is mapped. A layer that is mounted is
// frozen for a moment first, so that everything that was written is seen.
func (d *Driver) BlockDiff(ctx context.Context, id, base string) iter.Seq2[layerfs.BlockRange, error] {
	return func(yield func(layerfs.BlockRange, error) bool) {
		ranges, err := d.blockDiff(ctx, id, base)
		if err != nil {
			yield(layerfs.BlockRange{}, &layerfs.Error{Op: "block diff", Driver: name, ID: id, Err: err})
			return
		}
		for _, r := range ranges {
			if err := context.Cause(ctx); err != nil {
				yield(layerfs.BlockRange{}, &layerfs.Error{Op: "block diff", Driver: name, ID: id, Err: err})
				return
			}
			if !yield(r, nil) {
				return
			}
		}
	}
}

func (d *Driver) blockDiff(ctx context.Context, id, base string) ([]layerfs.BlockRange, error) {
	chain, at, err := d.m.lineage(id, base)
	if err != nil {
		return nil, err
	}
	unlock, err := d.m.dir.Lock(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return d.m.ranges(ctx, chain, at, false)
}

// lineage returns the chain of a layer and the place of its base in it.
func (m *mechanism) lineage(id, base string) (lifecycle.Chain, int, error) {
	if base != "" {
		if err := layerfs.CheckID(base); err != nil {
			return nil, 0, fmt.Errorf("base: %w", err)
		}
	}
	var chain lifecycle.Chain
	for at := id; at != "" && chain.Index(at) < 0; {
		rec, err := m.dir.Load(at)
		if err != nil {
			return nil, 0, err
		}
		if rec.Incomplete != "" {
			return nil, 0, fmt.Errorf("%s: %w", at, layerfs.ErrIncomplete)
		}
		chain = append(chain, rec)
		at = rec.Parent
	}
	i := chain.Index(base)
	if i > 0 {
		return chain, i, nil
	}
	if _, err := m.dir.Load(base); err != nil {
		return nil, 0, fmt.Errorf("base %s: %w", base, err)
	}
	return nil, 0, fmt.Errorf("base %s: %w", base, layerfs.ErrNotAncestor)
}

// directReader reads a device past the page cache, which xfs writes around.
type directReader struct {
	f   *os.File
	buf []byte // aligned
}

func openDirect(d dm.Device) (*directReader, error) {
	f, err := dm.OpenDevice(d, os.O_RDONLY|unix.O_DIRECT)
	if err != nil {
		return nil, err
	}
	const size = 1 << 20
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "mmap", Path: f.Name(), Err: err}, f.Close())
	}
	return &directReader{f, buf}, nil
}

func (r *directReader) ReadAt(p []byte, off int64) (n int, err error) {
	const align = 4096
	for n < len(p) {
		at := off + int64(n)
		start := at / align * align
		skip := int(at - start)
		want := min((skip+len(p)-n+align-1)/align*align, len(r.buf))
		k, err := r.f.ReadAt(r.buf[:want], start)
		if k <= skip {
			return n, err
		}
		n += copy(p[n:], r.buf[skip:k])
		if k < want && n < len(p) {
			return n, err
		}
	}
	return n, nil
}

func (r *directReader) Close() error { return errors.Join(unix.Munmap(r.buf), r.f.Close()) }
