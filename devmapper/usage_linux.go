package devmapper

import (
	"context"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/thin"
)

// BlockUsage is how much of the pool a layer's device takes, in bytes.
type BlockUsage struct {
	Mapped    int64 // all of it, with what it shares
	Exclusive int64 // what no other device has, which is what Remove frees
}

// BlockUsage looks at the pool's metadata. Other devices are those of all layers,
// of the empty file system that base layers begin as, and of the snapshots that
// Send reads. The layer may be in use; what is only in memory is written first.
//
// It reads metadata alone, but of every device that shares something with the
// layer. The Usage of Stat, which compares with the parent, costs less.
func (d *Driver) BlockUsage(ctx context.Context, id string) (BlockUsage, error) {
	u, err := d.m.blockUsage(ctx, id)
	return u, d.fail("usage", id, err)
}

func (m *mechanism) blockUsage(ctx context.Context, id string) (u BlockUsage, err error) {
	if err := layerfs.CheckID(id); err != nil {
		return u, err
	}
	unlock, err := m.dir.Lock(ctx, id)
	if err != nil {
		return u, err
	}
	defer unlock()
	if _, err := m.dir.Load(id); err != nil {
		return u, err
	}
	if err := m.settle(ctx, id); err != nil {
		return u, err
	}
	dev, err := m.load(id)
	if err != nil {
		return u, err
	}
	err = m.withMetadata(ctx, func(md *thin.Metadata) error {
		info, err := md.Device(dev.ID)
		if err != nil {
			return err
		}
		u.Mapped = int64(info.Mapped) * m.opts.BlockSize
		blocks, err := exclusive(ctx, md, dev.ID)
		u.Exclusive = int64(blocks) * m.opts.BlockSize
		return err
	})
	return u, err
}

// blockRange is blocks [begin, end) of a device.
type blockRange struct{ begin, end uint64 }

// exclusive counts the blocks that a device shares with no other. Sharing comes
// from snapshots, so a shared block is at the same place in both devices, and
// it is exclusive if it is in the difference to each of the others.
func exclusive(ctx context.Context, md *thin.Metadata, id uint32) (n uint64, err error) {
	var own []blockRange
	for r, err := range md.Mappings(id) {
		if err != nil {
			return 0, err
		}
		own = append(own, blockRange{r.Begin, r.Begin + r.Length})
	}
	for other, err := range md.Devices() {
		if err != nil {
			return 0, err
		}
		if err := context.Cause(ctx); err != nil {
			return 0, err
		}
		if other.ID == id || other.Mapped == 0 {
			continue
		}
		if len(own) == 0 {
			break
		}
		var differs []blockRange
		for r, err := range md.Diff(other.ID, id) {
			if err != nil {
				return 0, err
			}
			if r.Kind != thin.LeftOnly {
				differs = append(differs, blockRange{r.Begin, r.Begin + r.Length})
			}
		}
		own = intersect(own, differs)
	}
	for _, r := range own {
		n += r.end - r.begin
	}
	return n, nil
}

// intersect returns what is in both of two lists, which are in order.
func intersect(a, b []blockRange) (out []blockRange) {
	for len(a) > 0 && len(b) > 0 {
		begin, end := max(a[0].begin, b[0].begin), min(a[0].end, b[0].end)
		if begin < end {
			out = append(out, blockRange{begin, end})
		}
		if a[0].end < b[0].end {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}
