package devmapper

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"

	"github.com/layerfs/layerfs"
)

// BlockSum is what a layer's device holds, as a number.
type BlockSum struct {
	// Digest is "sha256:" and the SHA-256 of all pieces of 4096 bytes that are
	// not zero, in order: of each its offset and its length without trailing
	// zeroes, 8 and 4 bytes, little-endian, and these bytes. So it is the same
	// for devices that read the same, whatever is mapped in their pools, and
	// whatever the size of the pools' blocks.
	Digest string

	Bytes int64 // that are mapped, all of which were read
}

// BlockSum reads all blocks of a layer that are mapped. The layer may be in use:
// what is read is a snapshot of this moment. The work grows with the blocks.
func (d *Driver) BlockSum(ctx context.Context, id string, progress layerfs.ProgressFunc) (BlockSum, error) {
	sum, err := d.m.blockSum(ctx, id, progress)
	return sum, d.fail("sum", id, err)
}

// BlockSum is [Driver.BlockSum] of what the last round sent: of that the
// receiver's must be the same.
func (r *Replica) BlockSum(ctx context.Context, progress layerfs.ProgressFunc) (BlockSum, error) {
	if r.last == nil {
		return BlockSum{}, r.d.fail("sum", r.id, errors.New("nothing was sent yet"))
	}
	sum, err := r.d.m.sumOf(ctx, r.last, progress)
	return sum, r.d.fail("sum", r.id, err)
}

func (m *mechanism) blockSum(ctx context.Context, id string, progress layerfs.ProgressFunc) (_ BlockSum, err error) {
	if err := layerfs.CheckID(id); err != nil {
		return BlockSum{}, err
	}
	unlock, err := m.dir.Lock(ctx, id)
	if err != nil {
		return BlockSum{}, err
	}
	var s *snap
	if _, err = m.dir.Load(id); err == nil {
		s, err = m.snap(ctx, id, m.deviceName(id, false), "")
	}
	unlock()
	if err != nil {
		return BlockSum{}, err
	}
	defer func() { err = errors.Join(err, s.close(context.WithoutCancel(ctx))) }()
	return m.sumOf(ctx, s, progress)
}

// sumOf reads a snapshot.
func (m *mechanism) sumOf(ctx context.Context, s *snap, progress layerfs.ProgressFunc) (_ BlockSum, err error) {
	ranges, err := m.rangesOf(ctx, 0, s.dev.ID, s.dev.Size)
	if err != nil {
		return BlockSum{}, err
	}
	f, err := s.open()
	if err != nil {
		return BlockSum{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	p := layerfs.Progress{Phase: "compare"}
	for _, x := range ranges {
		p.Total += x.Length
	}
	report := throttle(progress)
	h := sha256.New()
	buf := make([]byte, maxRecord)
	for _, x := range ranges {
		for off := x.Offset; off < x.Offset+x.Length; {
			if err := context.Cause(ctx); err != nil {
				return BlockSum{}, err
			}
			b := buf[:min(maxRecord, x.Offset+x.Length-off)]
			if err := readFull(f, b, off); err != nil {
				return BlockSum{}, fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
			}
			sumBlocks(h, b, off)
			off += int64(len(b))
			p.Bytes += int64(len(b))
			report(p, false)
		}
	}
	report(p, true)
	return BlockSum{"sha256:" + hex.EncodeToString(h.Sum(nil)), p.Bytes}, nil
}

// sumBlocks adds what is at an offset of a device, a multiple of the piece.
func sumBlocks(h hash.Hash, b []byte, off int64) {
	const piece = 4096
	var head [12]byte
	for len(b) > 0 {
		n := min(piece, len(b))
		data := bytes.TrimRight(b[:n], "\x00")
		if len(data) > 0 {
			binary.LittleEndian.PutUint64(head[:], uint64(off))
			binary.LittleEndian.PutUint32(head[8:], uint32(len(data)))
			h.Write(head[:])
			h.Write(data)
		}
		b, off = b[n:], off+int64(n)
	}
}
