package zfs

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

// record makes a record as the C structure has it: values at offsets of their
// own, behind the kind and the length of a payload.
func record(order binary.ByteOrder, kind uint32, fields map[int]any, payload int) []byte {
	rec := make([]byte, recordSize+payload)
	order.PutUint32(rec, kind)
	for at, v := range fields {
		switch v := v.(type) {
		case uint64:
			order.PutUint64(rec[8+at:], v)
		case uint32:
			order.PutUint32(rec[8+at:], v)
		case byte:
			rec[8+at] = v
		}
	}
	return rec
}

func begin(order binary.ByteOrder, from uint64) []byte {
	rec := record(order, recBegin, map[int]any{0: uint64(streamMagic), 8: uint64(1), 24: uint32(2), 32: uint64(77), 40: from}, 16)
	order.PutUint32(rec[4:], 16)
	return rec
}

// stream has all kinds of records, with payloads of their own sizes.
func stream(order binary.ByteOrder) []byte {
	r := func(kind uint32, payload int, fields map[int]any) []byte { return record(order, kind, fields, payload) }
	return bytes.Join([][]byte{
		begin(order, 5),
		r(recFreeObjects, 0, map[int]any{0: uint64(9), 8: uint64(4)}),
		r(recObject, 176, map[int]any{0: uint64(7), 20: uint32(169)}),
		r(recObject, 512, map[int]any{0: uint64(7), 20: uint32(169), 28: uint32(512)}),
		r(recWrite, 4096, map[int]any{0: uint64(7), 8: uint32(19), 16: uint64(8192), 24: uint64(4096)}),
		r(recWrite, 1000, map[int]any{0: uint64(7), 16: uint64(131072), 24: uint64(131072), 42: byte(15), 88: uint64(1000)}),
		r(recFree, 0, map[int]any{0: uint64(7), 8: uint64(262144), 16: uint64(math.MaxUint64)}),
		r(recWriteByRef, 0, map[int]any{0: uint64(8), 8: uint64(0), 16: uint64(512)}),
		r(recSpill, 600, map[int]any{0: uint64(8), 8: uint64(600)}),
		r(recSpill, 100, map[int]any{0: uint64(8), 8: uint64(600), 32: uint64(100)}),
		r(recWriteEmbedded, 48, map[int]any{0: uint64(8), 8: uint64(512), 16: uint64(512), 40: uint32(512), 44: uint32(41)}),
		r(recObjectRange, 0, nil),
		r(recEnd, 0, nil),
	}, nil)
}

func TestReadStream(t *testing.T) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		var got []extent
		err := readStream(bytes.NewReader(stream(order)), func(e extent) error {
			got = append(got, e)
			return nil
		})
		require.NoError(t, err)
		assert.Equal(t, []extent{
			{7, 8192, 12288, false},
			{7, 131072, 262144, false},
			{7, 262144, math.MaxInt64, true},
			{8, 0, 512, false},
			{8, 512, 1024, false},
		}, got)
		h, err := parseHeader(stream(order))
		require.NoError(t, err)
		assert.Equal(t, streamHeader{order, 5, 77, 16}, h)
	}
}

func TestReadStreamRefuses(t *testing.T) {
	none := func(extent) error { return nil }
	whole := stream(binary.LittleEndian)
	for n := range len(whole) {
		if n%97 == 0 || len(whole)-n < 3 {
			require.ErrorIs(t, readStream(bytes.NewReader(whole[:n]), none), layerfs.ErrMalformed, "%d bytes", n)
		}
	}
	change := func(at int, b byte) []byte {
		c := bytes.Clone(whole)
		c[at] = b
		return c
	}
	for name, data := range map[string][]byte{
		"magic":    change(8, 0),
		"compound": change(16, 2),
		"volume":   change(32, 3),
		"kind":     change(recordSize+16, 99),
		"payload":  append(begin(binary.LittleEndian, 0), record(binary.LittleEndian, recWrite, map[int]any{24: uint64(math.MaxUint64)}, 0)...),
		"redacted": append(begin(binary.LittleEndian, 0), record(binary.LittleEndian, recRedact, nil, 0)...),
	} {
		require.Error(t, readStream(bytes.NewReader(data), none), name)
	}
	require.ErrorIs(t, readStream(bytes.NewReader(whole), func(extent) error { return io.ErrClosedPipe }), io.ErrClosedPipe)
}

// bonus is the attributes of a file as zfs_mknode sets them, with values that
// tell where they are, and the change time.
func bonus(order binary.ByteOrder, magic uint32, header int, sec, nsec uint64) []byte {
	b := make([]byte, header+16*8)
	order.PutUint32(b, magic)
	order.PutUint16(b[4:], uint16(header>>3<<10|2))
	for i := range 16 {
		order.PutUint64(b[header+i*8:], uint64(1000+i))
	}
	order.PutUint64(b[header+11*8:], sec)
	order.PutUint64(b[header+12*8:], nsec)
	return b
}

func TestReadObjects(t *testing.T) {
	const magic = 0x2F505A
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		obj := func(number uint64, kind uint32, b []byte) []byte {
			return append(record(order, recObject, map[int]any{0: number, 8: kind, 20: uint32(len(b))}, 0), b...)
		}
		data := bytes.Join([][]byte{
			begin(order, 5),
			obj(1, 21, nil), // DMU_OT_MASTER_NODE
			obj(34, 20, bonus(order, magic, 8, 1700000000, 5)),
			record(order, recWrite, map[int]any{0: uint64(34), 24: uint64(4096)}, 4096),
			obj(35, 19, bonus(order, magic, 16, 1700000001, 999999999)),
			obj(36, 19, bonus(order, magic+1, 8, 1700000001, 0)),
			obj(37, 19, bonus(order, magic, 8, 1700000001, 1e9)),
			obj(38, 19, bonus(order, magic, 8, math.MaxUint64, 0)),
			obj(39, 19, bonus(order, magic, 8, 1, 1)[:104]),
			obj(40, 19, bonus(order, magic, 504, 1, 1)),
			record(order, recEnd, nil, 0),
		}, nil)
		type seen struct {
			number  uint64
			visible bool
			at      time.Time
		}
		var got []seen
		require.NoError(t, readObjects(bytes.NewReader(data), func(o object) {
			at, ok := o.changed()
			assert.Equal(t, ok, !at.IsZero())
			got = append(got, seen{o.number, o.visible(), at})
		}))
		assert.Equal(t, []seen{
			{1, false, time.Time{}},
			{34, true, time.Unix(1700000000, 5)},
			{35, true, time.Unix(1700000001, 999999999)},
			{36, true, time.Time{}},
			{37, true, time.Time{}},
			{38, true, time.Time{}},
			{39, true, time.Time{}},
			{40, true, time.Time{}},
		}, got)
	}
}

// TestGoldenStream reads what zfs-fuse 0.7 wrote: see testdata/README.
func TestGoldenStream(t *testing.T) {
	f, err := os.Open("testdata/zfs-fuse-0.7.stream")
	require.NoError(t, err)
	defer f.Close()
	bytesOf := map[uint64]int64{}
	require.NoError(t, readStream(f, func(e extent) error {
		if !e.freed {
			bytesOf[e.object] += e.end - e.off
		}
		return nil
	}))
	var sizes []int64
	for _, n := range bytesOf {
		sizes = append(sizes, n)
	}
	assert.Contains(t, sizes, int64(2048), "the file of 1,600 bytes takes four blocks of 512")

	_, err = f.Seek(0, io.SeekStart)
	require.NoError(t, err)
	require.NoError(t, readObjects(f, func(o object) {
		if o.visible() {
			delete(bytesOf, o.number)
		}
	}))
	sizes = sizes[:0]
	for _, n := range bytesOf {
		sizes = append(sizes, n)
	}
	assert.NotContains(t, sizes, int64(2048), "the file is no visible object")
}

func TestRanges(t *testing.T) {
	for _, c := range []struct {
		name     string
		s        spans
		old, new int64
		want     []layerfs.BlockRange
	}{
		{"none", spans{}, 10, 10, nil},
		{"grown by a hole", spans{}, 10, 30, []layerfs.BlockRange{{Offset: 10, Length: 20, Unmapped: true}}},
		{"cut off", spans{freed: []span{{16, math.MaxInt64}}}, 30, 16, []layerfs.BlockRange{{Offset: 16, Length: 14, Unmapped: true}}},
		{"cut off within a block", spans{data: []span{{0, 16}}}, 30, 10, []layerfs.BlockRange{{Offset: 0, Length: 10}, {Offset: 10, Length: 20, Unmapped: true}}},
		{"appended", spans{data: []span{{16, 32}, {32, 48}}}, 20, 40, []layerfs.BlockRange{{Offset: 16, Length: 24}}},
		{"written and freed", spans{data: []span{{32, 48}, {8, 16}}, freed: []span{{0, 64}}}, 64, 64, []layerfs.BlockRange{
			{Offset: 0, Length: 8, Unmapped: true}, {Offset: 8, Length: 8},
			{Offset: 16, Length: 16, Unmapped: true}, {Offset: 32, Length: 16},
			{Offset: 48, Length: 16, Unmapped: true}}},
		{"overlap", spans{data: []span{{0, 20}, {10, 30}}, freed: []span{{5, 40}, {35, 50}}}, 60, 60, []layerfs.BlockRange{
			{Offset: 0, Length: 30}, {Offset: 30, Length: 20, Unmapped: true}}},
		{"new", spans{data: []span{{0, 7}}}, 0, 7, []layerfs.BlockRange{{Offset: 0, Length: 7}}},
	} {
		t.Run(c.name, func(t *testing.T) { assert.Equal(t, c.want, c.s.ranges("", c.old, c.new)) })
	}
}

// FuzzReadStream makes sure that nothing panics and that extents make sense.
func FuzzReadStream(f *testing.F) {
	f.Add(stream(binary.LittleEndian))
	f.Add(stream(binary.BigEndian))
	f.Fuzz(func(t *testing.T, data []byte) {
		of := map[uint64]*spans{}
		_ = readStream(bytes.NewReader(data), func(e extent) error {
			if e.off < 0 || e.end <= e.off {
				t.Errorf("extent %+v", e)
			}
			if of[e.object] == nil {
				of[e.object] = new(spans)
			}
			of[e.object].add(e)
			return nil
		})
		_ = readObjects(bytes.NewReader(data), func(o object) { o.changed() })
		for _, s := range of {
			at := int64(0)
			for _, r := range s.ranges("", 1<<20, 1<<19) {
				if r.Offset < at || r.Length <= 0 || r.Offset+r.Length > 1<<20 {
					t.Fatalf("range %+v after %d", r, at)
				}
				at = r.Offset + r.Length
			}
		}
	})
}
