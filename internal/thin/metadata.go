package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"sync/atomic"
)

// BlockSize is the size of a metadata block in bytes,
// THIN_METADATA_BLOCK_SIZE.
const BlockSize = 4096

// The values that are mixed into the checksums, and what starts a superblock.
const (
	superblockXOR   = 160774
	nodeXOR         = 121107
	superblockMagic = 27022010
)

// ErrCorrupt is matched by every error about metadata that is not well formed.
var ErrCorrupt = errors.New("thin metadata is corrupt")

// ErrNoDevice is matched if a device is not in the metadata.
var ErrNoDevice = errors.New("no such thin device")

func corrupt(block uint64, format string, args ...any) error {
	return fmt.Errorf("%w: block %d: %s", ErrCorrupt, block, fmt.Sprintf(format, args...))
}

// checksum is dm_bm_checksum: crc32c that starts with all ones and is not
// inverted at the end, mixed with a value for the kind of block.
func checksum(block []byte, xor uint32) uint32 {
	return ^crc32.Checksum(block[4:], crc32.MakeTable(crc32.Castagnoli)) ^ xor
}

// Metadata is the metadata of a pool at one moment. It is safe for concurrent
// use if its reader is.
type Metadata struct {
	r     io.ReaderAt
	reads atomic.Int64

	// TransactionID is the number that the pool's user has set.
	TransactionID uint64
	// Time counts snapshots that were made.
	Time uint32
	// BlockSectors is the size of a block of the pool, in sectors.
	BlockSectors uint32
	// DataBlocks is the number of blocks of the pool.
	DataBlocks uint64
	// MetadataBlocks is the number of blocks of the metadata itself.
	MetadataBlocks uint64

	mappings, details uint64 // roots
}

// Open reads a superblock: root is 0, or the held root of a metadata snapshot.
func Open(r io.ReaderAt, root uint64) (*Metadata, error) {
	m := &Metadata{r: r}
	b, err := m.block(root, superblockXOR)
	if err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
	if u64(b[32:]) != superblockMagic {
		return nil, corrupt(root, "no superblock")
	}
	if v := u32(b[40:]); v < 1 || v > 2 {
		return nil, corrupt(root, "version %d", v)
	}
	if f := u32(b[360:]); f != 0 {
		return nil, corrupt(root, "incompatible features %#x", f)
	}
	m.Time = u32(b[44:])
	m.TransactionID = u64(b[48:])
	m.DataBlocks = u64(b[64:])
	m.MetadataBlocks = u64(b[192:])
	m.mappings, m.details = u64(b[320:]), u64(b[328:])
	m.BlockSectors = u32(b[336:])
	if s := u32(b[340:]); s != BlockSize/512 && s != BlockSize {
		return nil, corrupt(root, "metadata blocks of %d", s)
	}
	return m, nil
}

// Reads returns how many metadata blocks were read, as a measure of cost.
func (m *Metadata) Reads() int64 { return m.reads.Load() }

// block reads a block whose checksum is mixed with xor.
func (m *Metadata) block(n uint64, xor uint32) ([]byte, error) {
	if n >= 1<<40 { // 4 PiB: far above the largest metadata, no overflow below
		return nil, corrupt(n, "block number out of range")
	}
	b := make([]byte, BlockSize)
	m.reads.Add(1)
	if k, err := m.r.ReadAt(b, int64(n)*BlockSize); k < BlockSize {
		if err == nil || errors.Is(err, io.EOF) {
			return nil, corrupt(n, "beyond the end of the metadata")
		}
		return nil, fmt.Errorf("metadata block %d: %w", n, err)
	}
	if got, want := checksum(b, xor), binary.LittleEndian.Uint32(b); got != want {
		return nil, corrupt(n, "checksum is %08x, not %08x", got, want)
	}
	if at := binary.LittleEndian.Uint64(b[8:]); at != n {
		return nil, corrupt(n, "says that it is block %d", at)
	}
	return b, nil
}

// Device is a thin device as the metadata describes it.
type Device struct {
	ID            uint32
	Mapped        uint64 // blocks
	TransactionID uint64 // of the pool when it was made
	Created       uint32 // the pool's Time then
	Snapshotted   uint32 // the pool's Time at its last snapshot

	root uint64
}

// maxDeviceID is the largest id of a device.
const maxDeviceID = 1<<24 - 1

// Devices returns all devices, by id.
func (m *Metadata) Devices() iter.Seq2[Device, error] {
	return func(yield func(Device, error) bool) {
		roots, err := m.newCursor(m.mappings, 8)
		if err != nil {
			yield(Device{}, err)
			return
		}
		c, err := m.newCursor(m.details, detailsSize)
		if err != nil {
			yield(Device{}, err)
			return
		}
		for c.valid() {
			d, err := m.nextDevice(c, roots)
			if !yield(d, err) || err != nil {
				return
			}
		}
		if roots.valid() {
			yield(Device{}, corrupt(m.mappings, "a mapping of a device without details"))
		}
	}
}

// detailsSize is the size of struct disk_device_details.
const detailsSize = 24

// nextDevice takes one device from both trees.
func (m *Metadata) nextDevice(c, roots *cursor) (Device, error) {
	if err := errors.Join(c.toLeaf(), roots.toLeaf()); err != nil {
		return Device{}, err
	}
	id, v := c.entry()
	if id > maxDeviceID {
		return Device{}, corrupt(m.details, "device %d", id)
	}
	if !roots.valid() {
		return Device{}, corrupt(m.mappings, "device %d has no mapping", id)
	}
	rid, rv := roots.entry()
	if rid != id {
		return Device{}, corrupt(m.mappings, "device %d in one tree, %d in the other", id, rid)
	}
	d := Device{
		ID:            uint32(id),
		Mapped:        binary.LittleEndian.Uint64(v),
		TransactionID: binary.LittleEndian.Uint64(v[8:]),
		Created:       binary.LittleEndian.Uint32(v[16:]),
		Snapshotted:   binary.LittleEndian.Uint32(v[20:]),
		root:          binary.LittleEndian.Uint64(rv),
	}
	c.skip()
	roots.skip()
	return d, nil
}

// Device returns one device. The error matches [ErrNoDevice] if the metadata
// has none with the id.
func (m *Metadata) Device(id uint32) (Device, error) {
	v, err := m.lookup(m.details, detailsSize, uint64(id))
	if err != nil {
		return Device{}, fmt.Errorf("device %d: %w", id, err)
	}
	r, err := m.lookup(m.mappings, 8, uint64(id))
	if err != nil {
		return Device{}, fmt.Errorf("device %d: %w", id, err)
	}
	return Device{
		ID:            id,
		Mapped:        binary.LittleEndian.Uint64(v),
		TransactionID: binary.LittleEndian.Uint64(v[8:]),
		Created:       binary.LittleEndian.Uint32(v[16:]),
		Snapshotted:   binary.LittleEndian.Uint32(v[20:]),
		root:          binary.LittleEndian.Uint64(r),
	}, nil
}

// Mapping maps blocks [Begin, Begin+Length) of a device to blocks of the pool
// from Data on.
type Mapping struct {
	Begin, Data, Length uint64
	Time                uint32 // the pool's Time when they were mapped
}

// Mappings returns what a device has mapped, in order, as long runs as there
// are. The walk reads all of the device's tree.
func (m *Metadata) Mappings(id uint32) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		d, err := m.Device(id)
		if err != nil {
			yield(Mapping{}, err)
			return
		}
		c, err := m.newCursor(d.root, 8)
		if err != nil {
			yield(Mapping{}, err)
			return
		}
		var run Mapping
		for c.valid() {
			if err := c.toLeaf(); err != nil {
				yield(Mapping{}, err)
				return
			}
			key, v := c.entry()
			next := Mapping{key, mapped(v) >> 24, 1, uint32(mapped(v) & (1<<24 - 1))}
			c.skip()
			if run.Length > 0 && next.Begin == run.Begin+run.Length && next.Data == run.Data+run.Length && next.Time == run.Time {
				run.Length++
				continue
			}
			if run.Length > 0 && !yield(run, nil) {
				return
			}
			run = next
		}
		if run.Length > 0 {
			yield(run, nil)
		}
	}
}

// mapped returns the value of a mapping: the block of the pool above 24 bits
// of time, pack_block_time.
func mapped(v []byte) uint64 { return binary.LittleEndian.Uint64(v) }
