package devmapper

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/layerfs/layerfs"
)

// A stream of blocks is
//
//	magic     8 bytes, "LFSBLK", 0, version
//	header    4 bytes length, JSON, 4 bytes CRC-32C of both
//	records   1 byte type, 8 bytes offset, 4 bytes length, the data if the
//	          type is data, 4 bytes CRC-32C of all that
//	end       a record of type end without data, whose offset is the number of
//	          records, then the SHA-256 of everything before the sum
//
// Numbers are little-endian. Records are in order and do not overlap. A stream
// without its end is incomplete, whatever came before.
const streamMagic = "LFSBLK\x00\x01"

// Limits of a stream.
const (
	maxHeader = 64 << 10
	maxRecord = 1 << 20
)

type recordType byte

const (
	recordEnd  recordType = iota
	recordData            // the range has this content
	recordHole            // the range is not mapped
)

// streamHeader says what a stream is of.
type streamHeader struct {
	FS     string `json:"fs"`
	Size   int64  `json:"size"` // of the device, in bytes
	FSSize int64  `json:"fs_size"`
	From   string `json:"from,omitempty"` // the state the ranges are relative to; empty for all of it
	To     string `json:"to"`             // the state that it makes
}

func (h *streamHeader) check() error {
	const most = 1 << 60
	if h.FS == "" || h.To == "" || h.Size <= 0 || h.Size > most || h.Size%512 != 0 || h.FSSize <= 0 || h.FSSize > h.Size {
		return malformed("header %+v", *h)
	}
	return nil
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("block stream: %s: %w", fmt.Sprintf(format, args...), layerfs.ErrMalformed)
}

// streamWriter writes a stream.
type streamWriter struct {
	w     io.Writer
	sum   hash.Hash
	count uint64
	bytes int64 // written
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func newStreamWriter(w io.Writer, h streamHeader) (*streamWriter, error) {
	s := &streamWriter{w: w, sum: sha256.New()}
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(text)))
	b = append(b, text...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli()))
	return s, s.write(append([]byte(streamMagic), b...))
}

func (s *streamWriter) write(b []byte) error {
	s.sum.Write(b)
	n, err := s.w.Write(b)
	s.bytes += int64(n)
	return err
}

// record writes a record; data has length bytes if the type is data.
func (s *streamWriter) record(t recordType, offset uint64, length uint32, data []byte) error {
	b := make([]byte, 0, 17+len(data))
	b = append(b, byte(t))
	b = binary.LittleEndian.AppendUint64(b, offset)
	b = binary.LittleEndian.AppendUint32(b, length)
	b = append(b, data...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli()))
	s.count++
	return s.write(b)
}

func (s *streamWriter) end() error {
	if err := s.record(recordEnd, s.count, 0, nil); err != nil {
		return err
	}
	return s.write(s.sum.Sum(nil))
}

// streamReader reads a stream and checks all of it.
type streamReader struct {
	r      io.Reader
	sum    hash.Hash
	header streamHeader
	count  uint64
	after  int64 // end of the last record
	buf    []byte
}

func newStreamReader(r io.Reader) (*streamReader, error) {
	s := &streamReader{r: r, sum: sha256.New(), buf: make([]byte, 17+maxRecord)}
	head := make([]byte, len(streamMagic)+4)
	if err := s.read(head); err != nil {
		return nil, err
	}
	if string(head[:6]) != streamMagic[:6] {
		return nil, malformed("it does not begin as one")
	}
	if string(head[:8]) != streamMagic {
		return nil, fmt.Errorf("block stream of version %d: %w", head[7], errors.ErrUnsupported)
	}
	n := binary.LittleEndian.Uint32(head[8:])
	if n > maxHeader {
		return nil, malformed("header of %d bytes", n)
	}
	rest := make([]byte, n+4)
	if err := s.read(rest); err != nil {
		return nil, err
	}
	sum := crc32.Update(crc32.Checksum(head[8:], castagnoli()), castagnoli(), rest[:n])
	if sum != binary.LittleEndian.Uint32(rest[n:]) {
		return nil, malformed("checksum of the header")
	}
	if err := json.Unmarshal(rest[:n], &s.header); err != nil {
		return nil, malformed("header: %v", err)
	}
	return s, s.header.check()
}

func (s *streamReader) read(b []byte) error {
	if _, err := io.ReadFull(s.r, b); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return malformed("it ends too early")
		}
		return err
	}
	s.sum.Write(b)
	return nil
}

// blockRecord is a record of a stream. Data is valid until the next one.
type blockRecord struct {
	offset, length int64
	hole           bool
	data           []byte
}

// next returns the next record, and io.EOF after the last one of a stream that
// is whole.
func (s *streamReader) next() (blockRecord, error) {
	const head = 13
	b := s.buf[:head]
	if err := s.read(b); err != nil {
		return blockRecord{}, err
	}
	t, offset, length := recordType(b[0]), binary.LittleEndian.Uint64(b[1:]), binary.LittleEndian.Uint32(b[9:])
	size := 0
	if t == recordData {
		if length > maxRecord {
			return blockRecord{}, malformed("record of %d bytes", length)
		}
		size = int(length)
	}
	rest := s.buf[head : head+size+4]
	if err := s.read(rest); err != nil {
		return blockRecord{}, err
	}
	if crc32.Checksum(s.buf[:head+size], castagnoli()) != binary.LittleEndian.Uint32(rest[size:]) {
		return blockRecord{}, malformed("checksum of record %d", s.count)
	}
	switch t {
	case recordEnd:
		return blockRecord{}, s.finish(offset)
	case recordData, recordHole:
	default:
		return blockRecord{}, malformed("record of type %d", t)
	}
	size64 := uint64(s.header.Size)
	if offset < uint64(s.after) || length == 0 || offset > size64 || uint64(length) > size64-offset || offset%512 != 0 || length%512 != 0 {
		return blockRecord{}, malformed("record of %d bytes at %d, after %d", length, offset, s.after)
	}
	s.count++
	s.after = int64(offset) + int64(length)
	return blockRecord{offset: int64(offset), length: int64(length), hole: t == recordHole, data: rest[:size]}, nil
}

func (s *streamReader) finish(count uint64) error {
	if count != s.count {
		return malformed("it has %d records, but says %d", s.count, count)
	}
	want := s.sum.Sum(nil)
	got := make([]byte, len(want))
	if err := s.read(got); err != nil {
		return err
	}
	if string(got) != string(want) {
		return malformed("checksum of the whole")
	}
	return io.EOF
}
