package zfs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/layerfs/layerfs"
)

// The stream that "zfs send" writes is a list of records of one size, each of
// which may have a payload: dmu_replay_record, include/sys/zfs_ioctl.h, and
// dmu_send.c, OpenZFS 2.1. zfs-fuse writes the same with fewer kinds.

// recordSize is sizeof (dmu_replay_record_t).
const recordSize = 312

// Kinds of records.
const (
	recBegin = iota
	recObject
	recFreeObjects
	recWrite
	recFree
	recEnd
	recWriteByRef
	recSpill
	recWriteEmbedded
	recObjectRange
	recRedact
)

// streamMagic is DMU_BACKUP_MAGIC.
const streamMagic = 0x2F5bacbac

// streamHeader is the first record of a stream.
type streamHeader struct {
	order    binary.ByteOrder
	from, to uint64 // GUIDs of the snapshots; from is 0 if the stream has everything
	payload  uint32 // bytes that follow
}

// parseHeader parses the first record. A stream of several file systems, or one
// that sets properties, is refused.
func parseHeader(rec []byte) (h streamHeader, err error) {
	if len(rec) < recordSize {
		return h, fmt.Errorf("stream of %d bytes: %w", len(rec), layerfs.ErrMalformed)
	}
	for _, h.order = range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		if h.order.Uint32(rec) == recBegin && h.order.Uint64(rec[8:]) == streamMagic {
			break
		}
		h.order = nil
	}
	if h.order == nil {
		return h, fmt.Errorf("no stream of zfs send: %w", layerfs.ErrMalformed)
	}
	const (
		kindMask = 3 // DMU_GET_STREAM_HDRTYPE
		single   = 1 // DMU_SUBSTREAM
		zpl      = 2 // DMU_OST_ZFS
	)
	if h.order.Uint64(rec[16:])&kindMask != single {
		return h, fmt.Errorf("stream of several file systems or with properties (zfs send -R or -p): %w", layerfs.ErrMalformed)
	}
	if t := h.order.Uint32(rec[32:]); t != zpl {
		return h, fmt.Errorf("stream of type %d, no file system: %w", t, layerfs.ErrMalformed)
	}
	h.payload = h.order.Uint32(rec[4:])
	h.to, h.from = h.order.Uint64(rec[40:]), h.order.Uint64(rec[48:])
	return h, nil
}

// extent is a range of the content of an object that a stream sets.
type extent struct {
	object   uint64 // its inode number
	off, end int64
	freed    bool
}

// readStream calls fn for the extents of a stream, in its order. What is no
// content of a file (directories, attributes) comes too, under other objects.
func readStream(r io.Reader, fn func(extent) error) error {
	return readRecords(r, func(_ binary.ByteOrder, _, _ []byte, e extent) error {
		if e.end <= e.off {
			return nil
		}
		return fn(e)
	})
}

// readRecords calls fn for the records of a stream, each with the beginning of
// its payload and the extent it sets.
func readRecords(r io.Reader, fn func(order binary.ByteOrder, rec, payload []byte, e extent) error) error {
	br := bufio.NewReaderSize(r, 256<<10)
	rec := make([]byte, recordSize)
	if _, err := io.ReadFull(br, rec); err != nil {
		return torn(err)
	}
	h, err := parseHeader(rec)
	if err != nil {
		return err
	}
	if err := skip(br, uint64(h.payload)); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(br, rec); err != nil {
			return torn(err)
		}
		e, payload, err := parseRecord(h.order, rec)
		if err != nil {
			return err
		}
		head, err := br.Peek(int(min(payload, bonusHead)))
		if err != nil {
			return torn(err)
		}
		if err := fn(h.order, rec, head, e); err != nil {
			return err
		}
		if h.order.Uint32(rec) == recEnd {
			_, err := io.Copy(io.Discard, br) // nothing, but the writer must see its end
			return err
		}
		if err := skip(br, payload); err != nil {
			return err
		}
	}
}

// object is a file of any type, or something else that a file system keeps in
// an object: a record of the kind recObject.
type object struct {
	number uint64
	kind   uint32 // dmu_object_type_t
	order  binary.ByteOrder
	bonus  []byte // the beginning of its attributes
}

// bonusHead is how much is looked at of a payload.
const bonusHead = 256

// readObjects calls fn for the objects of a stream, which are those that changed
// and their neighbours in the same blocks. What fn gets lasts as long as the
// call.
func readObjects(r io.Reader, fn func(object)) error {
	return readRecords(r, func(order binary.ByteOrder, rec, payload []byte, _ extent) error {
		if order.Uint32(rec) == recObject {
			fn(object{number: order.Uint64(rec[8:]), kind: order.Uint32(rec[16:]), order: order, bonus: payload})
		}
		return nil
	})
}

// visible reports whether the object can have names: DMU_OT_PLAIN_FILE_CONTENTS
// is all that is no directory, DMU_OT_DIRECTORY_CONTENTS (zfs_mknode,
// module/os/linux/zfs/zfs_znode.c).
func (o object) visible() bool { return o.kind == 19 || o.kind == 20 }

// changed returns the change time of a file; ok is false if the attributes are
// not of the form that is known.
//
// They are a header, whose size is the upper six bits of a word (SA_HDR_SIZE,
// include/sys/sa_impl.h), and values in the order in which zfs_mknode sets
// them: mode, size, gen, uid, gid, parent, flags, and four times of sixteen bytes,
// of which the change time is the third. What is added later comes behind.
func (o object) changed() (at time.Time, ok bool) {
	const magic, minHeader, where = 0x2F505A, 8, 7*8 + 2*16
	if len(o.bonus) < minHeader || o.order.Uint32(o.bonus) != magic {
		return at, false
	}
	header := int(o.order.Uint16(o.bonus[4:])>>10) << 3
	if header < minHeader || len(o.bonus) < header+where+16 {
		return at, false
	}
	sec, nsec := o.order.Uint64(o.bonus[header+where:]), o.order.Uint64(o.bonus[header+where+8:])
	if sec > math.MaxInt32<<8 || nsec >= 1e9 {
		return at, false
	}
	return time.Unix(int64(sec), int64(nsec)), true
}

func torn(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("stream ends early: %w", layerfs.ErrMalformed)
	}
	return err
}

// skip passes over a payload.
func skip(r *bufio.Reader, n uint64) error {
	const most = 1 << 30 // a block has at most 16 MiB (SPA_MAXBLOCKSIZE)
	if n > most {
		return fmt.Errorf("payload of %d bytes: %w", n, layerfs.ErrMalformed)
	}
	_, err := r.Discard(int(n))
	return torn(err)
}

// parseRecord returns the extent that a record sets, which is empty if it sets
// none, and the bytes that follow it.
func parseRecord(order binary.ByteOrder, rec []byte) (e extent, payload uint64, err error) {
	body := rec[8:]
	u32 := func(at int) uint64 { return uint64(order.Uint32(body[at:])) }
	u64 := func(at int) uint64 { return order.Uint64(body[at:]) }
	set := func(at int, freed bool) { // object, offset and length
		off, n := u64(at), u64(at+8)
		e = extent{object: u64(0), off: clamp(off), end: math.MaxInt64, freed: freed}
		if off+n >= off { // DMU_OBJECT_END is all bits
			e.end = clamp(off + n)
		}
	}
	round8 := func(n uint64) uint64 { return (n + 7) &^ 7 }
	switch kind := order.Uint32(rec); kind {
	case recObject:
		payload = round8(u32(20))
		if raw := u32(28); raw != 0 {
			payload = raw
		}
	case recFreeObjects, recEnd, recObjectRange:
	case recWrite:
		// The type and its padding are between object and offset.
		set(16, false)
		payload = u64(24)
		if body[42] != 0 { // drr_compressiontype
			payload = u64(88)
		}
	case recFree:
		set(8, true)
	case recWriteByRef:
		set(8, false)
	case recSpill:
		payload = u64(8)
		if n := u64(32); n != 0 {
			payload = n
		}
	case recWriteEmbedded:
		set(8, false)
		payload = round8(u32(44))
	case recRedact:
		return e, 0, &layerfs.UnsupportedError{Feature: "a redacted stream", Reason: "its content is not all there"}
	default:
		return e, 0, fmt.Errorf("record of kind %d: %w", kind, layerfs.ErrMalformed)
	}
	return e, payload, nil
}

func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// span is a range of a file.
type span struct{ off, end int64 }

// spans are what a stream does to one file.
type spans struct{ data, freed []span }

func (s *spans) add(e extent) {
	list := &s.data
	if e.freed {
		list = &s.freed
	}
	if n := len(*list); n > 0 && (*list)[n-1].end == e.off {
		(*list)[n-1].end = e.end
		return
	}
	*list = append(*list, span{e.off, e.end})
}

// ranges returns what of a file that had oldSize bytes and has newSize bytes
// differs, sorted and without overlap. What was cut off or added at its end
// differs, also where the stream says nothing because it is a hole. A range that
// is both written and freed is taken for written.
func (s *spans) ranges(path string, oldSize, newSize int64) []layerfs.BlockRange {
	end := max(oldSize, newSize)
	data := merge(s.data, newSize)
	freed := merge(append(slices.Clone(s.freed), span{min(oldSize, newSize), end}), end)
	var list []layerfs.BlockRange
	emit := func(p span, unmapped bool) {
		if p.off < p.end {
			list = append(list, layerfs.BlockRange{Path: path, Offset: p.off, Length: p.end - p.off, Unmapped: unmapped})
		}
	}
	for len(data) > 0 || len(freed) > 0 {
		switch {
		case len(freed) == 0, len(data) > 0 && data[0].off <= freed[0].off:
			d := data[0]
			data = data[1:]
			emit(d, false)
			for len(freed) > 0 && freed[0].off < d.end {
				if freed[0].end > d.end {
					freed[0].off = d.end
					break
				}
				freed = freed[1:]
			}
		default:
			f := freed[0]
			if len(data) > 0 && data[0].off < f.end {
				f.end = data[0].off
				freed[0].off = f.end
			} else {
				freed = freed[1:]
			}
			emit(f, true)
		}
	}
	return list
}

// merge sorts spans, joins those that touch, and cuts them off at end.
func merge(list []span, end int64) []span {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b span) int {
		switch {
		case a.off < b.off:
			return -1
		case a.off > b.off:
			return 1
		}
		return 0
	})
	var out []span
	for _, s := range list {
		s.end = min(s.end, end)
		switch n := len(out); {
		case s.off >= s.end:
		case n > 0 && s.off <= out[n-1].end:
			out[n-1].end = max(out[n-1].end, s.end)
		default:
			out = append(out, s)
		}
	}
	return out
}
