package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"time"

	"github.com/layerfs/layerfs"
)

// MaxStreamVersion is the newest send stream version that is understood.
const MaxStreamVersion = 3

const (
	streamMagic = "btrfs-stream\x00"

	headerLen = 4 + 2 + 4

	// A kernel builds a command of version 1 in a buffer of 64 KiB
	// (BTRFS_SEND_BUF_SIZE_V1), later ones in 16 KiB and the largest
	// compressed extent of 128 KiB, rounded up to a page, which may have
	// 64 KiB (BTRFS_SEND_BUF_SIZE_V2).
	maxCommandV1 = 64 << 10
	maxCommandV2 = 256 << 10

	// PATH_MAX of Linux; the kernel builds paths in a buffer of a page or more.
	maxStreamPath = 64<<10 - 1
)

// Op is the operation of a command, enum btrfs_send_cmd.
type Op uint16

// The operations.
const (
	OpSubvol       Op = 1
	OpSnapshot     Op = 2
	OpMkfile       Op = 3
	OpMkdir        Op = 4
	OpMknod        Op = 5
	OpMkfifo       Op = 6
	OpMksock       Op = 7
	OpSymlink      Op = 8
	OpRename       Op = 9
	OpLink         Op = 10
	OpUnlink       Op = 11
	OpRmdir        Op = 12
	OpSetXattr     Op = 13
	OpRemoveXattr  Op = 14
	OpWrite        Op = 15
	OpClone        Op = 16
	OpTruncate     Op = 17
	OpChmod        Op = 18
	OpChown        Op = 19
	OpUtimes       Op = 20
	OpEnd          Op = 21
	OpUpdateExtent Op = 22
	OpFallocate    Op = 23 // version 2
	OpFileattr     Op = 24
	OpEncodedWrite Op = 25
	OpEnableVerity Op = 26 // version 3
)

// AttrType names an attribute of a command, BTRFS_SEND_A_*.
type AttrType uint16

// The attributes.
const (
	AttrUUID             AttrType = 1
	AttrCtransid         AttrType = 2
	AttrIno              AttrType = 3
	AttrSize             AttrType = 4
	AttrMode             AttrType = 5
	AttrUID              AttrType = 6
	AttrGID              AttrType = 7
	AttrRdev             AttrType = 8
	AttrCtime            AttrType = 9
	AttrMtime            AttrType = 10
	AttrAtime            AttrType = 11
	AttrOtime            AttrType = 12
	AttrXattrName        AttrType = 13
	AttrXattrData        AttrType = 14
	AttrPath             AttrType = 15
	AttrPathTo           AttrType = 16
	AttrPathLink         AttrType = 17
	AttrFileOffset       AttrType = 18
	AttrData             AttrType = 19
	AttrCloneUUID        AttrType = 20
	AttrCloneCtransid    AttrType = 21
	AttrClonePath        AttrType = 22
	AttrCloneOffset      AttrType = 23
	AttrCloneLen         AttrType = 24
	AttrFallocateMode    AttrType = 25 // version 2
	AttrFileattr         AttrType = 26
	AttrUnencodedFileLen AttrType = 27
	AttrUnencodedLen     AttrType = 28
	AttrUnencodedOffset  AttrType = 29
	AttrCompression      AttrType = 30
	AttrEncryption       AttrType = 31
	AttrVerityAlgorithm  AttrType = 32 // version 3
	AttrVerityBlockSize  AttrType = 33
	AttrVeritySalt       AttrType = 34
	AttrVeritySig        AttrType = 35
)

// opSpec says what a command may hold.
type opSpec struct {
	name     string
	since    uint32
	required []AttrType
	optional []AttrType
}

// spec returns the specification of op, with an empty name if there is none.
func (op Op) spec() opSpec {
	type a = []AttrType
	switch op {
	case OpSubvol:
		return opSpec{"subvol", 1, a{AttrPath, AttrUUID, AttrCtransid}, nil}
	case OpSnapshot:
		return opSpec{"snapshot", 1, a{AttrPath, AttrUUID, AttrCtransid, AttrCloneUUID, AttrCloneCtransid}, nil}
	case OpMkfile:
		return opSpec{"mkfile", 1, a{AttrPath}, a{AttrIno}}
	case OpMkdir:
		return opSpec{"mkdir", 1, a{AttrPath}, a{AttrIno}}
	case OpMknod:
		return opSpec{"mknod", 1, a{AttrPath, AttrMode, AttrRdev}, a{AttrIno}}
	case OpMkfifo:
		return opSpec{"mkfifo", 1, a{AttrPath}, a{AttrIno, AttrMode, AttrRdev}}
	case OpMksock:
		return opSpec{"mksock", 1, a{AttrPath}, a{AttrIno, AttrMode, AttrRdev}}
	case OpSymlink:
		return opSpec{"symlink", 1, a{AttrPath, AttrPathLink}, a{AttrIno}}
	case OpRename:
		return opSpec{"rename", 1, a{AttrPath, AttrPathTo}, nil}
	case OpLink:
		return opSpec{"link", 1, a{AttrPath, AttrPathLink}, nil}
	case OpUnlink:
		return opSpec{"unlink", 1, a{AttrPath}, nil}
	case OpRmdir:
		return opSpec{"rmdir", 1, a{AttrPath}, nil}
	case OpSetXattr:
		return opSpec{"set_xattr", 1, a{AttrPath, AttrXattrName, AttrXattrData}, nil}
	case OpRemoveXattr:
		return opSpec{"remove_xattr", 1, a{AttrPath, AttrXattrName}, nil}
	case OpWrite:
		return opSpec{"write", 1, a{AttrPath, AttrFileOffset, AttrData}, nil}
	case OpClone:
		return opSpec{"clone", 1, a{AttrPath, AttrFileOffset, AttrCloneLen, AttrCloneUUID, AttrCloneCtransid, AttrClonePath, AttrCloneOffset}, nil}
	case OpTruncate:
		return opSpec{"truncate", 1, a{AttrPath, AttrSize}, nil}
	case OpChmod:
		return opSpec{"chmod", 1, a{AttrPath, AttrMode}, nil}
	case OpChown:
		return opSpec{"chown", 1, a{AttrPath, AttrUID, AttrGID}, nil}
	case OpUtimes:
		return opSpec{"utimes", 1, a{AttrPath, AttrAtime, AttrMtime, AttrCtime}, a{AttrOtime}}
	case OpEnd:
		return opSpec{"end", 1, nil, nil}
	case OpUpdateExtent:
		return opSpec{"update_extent", 1, a{AttrPath, AttrFileOffset, AttrSize}, nil}
	case OpFallocate:
		return opSpec{"fallocate", 2, a{AttrPath, AttrFallocateMode, AttrFileOffset, AttrSize}, nil}
	case OpFileattr:
		return opSpec{"fileattr", 2, a{AttrPath, AttrFileattr}, nil}
	case OpEncodedWrite:
		return opSpec{
			"encoded_write", 2,
			a{AttrPath, AttrFileOffset, AttrUnencodedFileLen, AttrUnencodedLen, AttrUnencodedOffset, AttrData},
			a{AttrCompression, AttrEncryption},
		}
	case OpEnableVerity:
		return opSpec{"enable_verity", 3, a{AttrPath, AttrVerityAlgorithm, AttrVerityBlockSize}, a{AttrVeritySalt, AttrVeritySig}}
	}
	return opSpec{}
}

// String returns the name as "btrfs receive --dump" prints it.
func (op Op) String() string {
	if s := op.spec(); s.name != "" {
		return s.name
	}
	return fmt.Sprintf("Op(%d)", uint16(op))
}

// size returns how many bytes an attribute has; -1 means any number, -2 a path.
func (t AttrType) size() int {
	switch t {
	case AttrCtransid, AttrIno, AttrSize, AttrMode, AttrUID, AttrGID, AttrRdev, AttrFileOffset,
		AttrCloneCtransid, AttrCloneOffset, AttrCloneLen, AttrFileattr,
		AttrUnencodedFileLen, AttrUnencodedLen, AttrUnencodedOffset:
		return 8
	case AttrFallocateMode, AttrCompression, AttrEncryption, AttrVerityBlockSize:
		return 4
	case AttrVerityAlgorithm:
		return 1
	case AttrCtime, AttrMtime, AttrAtime, AttrOtime:
		return 12
	case AttrUUID, AttrCloneUUID:
		return 16
	case AttrPath, AttrPathTo, AttrClonePath:
		return -2
	}
	return -1
}

// Attr is one attribute of a command.
type Attr struct {
	Type AttrType
	Data []byte
}

// Command is one step of a send stream. Commands from a [Decoder] have every
// attribute their operation requires, none twice, and each of the right size.
type Command struct {
	Op    Op
	Attrs []Attr // in the order of the stream
}

// Get returns the bytes of an attribute, and false if the command lacks it.
func (c *Command) Get(t AttrType) ([]byte, bool) {
	for i := range c.Attrs {
		if c.Attrs[i].Type == t {
			return c.Attrs[i].Data, true
		}
	}
	return nil, false
}

// Str returns an attribute as a string; empty if it is missing.
func (c *Command) Str(t AttrType) string {
	b, _ := c.Get(t)
	return string(b)
}

// Bytes returns an attribute; nil if it is missing.
func (c *Command) Bytes(t AttrType) []byte {
	b, _ := c.Get(t)
	return b
}

// Uint returns a numeric attribute of any width; zero if it is missing.
func (c *Command) Uint(t AttrType) uint64 {
	b, _ := c.Get(t)
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	case 8:
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// Time returns a time attribute; the zero time if it is missing.
func (c *Command) Time(t AttrType) time.Time {
	b, _ := c.Get(t)
	if len(b) != 12 {
		return time.Time{}
	}
	return time.Unix(int64(binary.LittleEndian.Uint64(b)), int64(binary.LittleEndian.Uint32(b[8:])))
}

// UUID returns a UUID attribute.
func (c *Command) UUID(t AttrType) (u UUID) {
	b, _ := c.Get(t)
	copy(u[:], b)
	return u
}

// UUID identifies a subvolume; the zero value means none.
type UUID [16]byte

// String returns the usual form with hyphens.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// IsZero reports whether u means no subvolume.
func (u UUID) IsZero() bool { return u == UUID{} }

// StreamError says what is wrong with a send stream. It matches
// [layerfs.ErrMalformed].
type StreamError struct {
	Offset int64  // of the command in the stream
	Op     Op     // zero for the stream header
	Reason string // what was found
	Err    error  // cause, such as io.ErrUnexpectedEOF, if any
}

// Error returns, for example,
// "send stream, rename at byte 120: path contains ..".
func (e *StreamError) Error() string {
	what := "header"
	if e.Op != 0 {
		what = e.Op.String()
	}
	s := fmt.Sprintf("send stream, %s at byte %d: %s", what, e.Offset, e.Reason)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *StreamError) Unwrap() error { return e.Err }

// Is reports whether target is [layerfs.ErrMalformed].
func (e *StreamError) Is(target error) bool { return target == layerfs.ErrMalformed }

// Decoder reads the commands of one send stream, versions 1 to 3.
//
// It takes exactly the bytes of the stream from its reader, in small reads:
// give it a buffered one. It holds one command at a time, at most 256 KiB.
// Everything is checked that can be checked without a file system: lengths,
// checksums, which attributes a command has, and that paths are relative,
// clean and without "..". Not for concurrent use.
type Decoder struct {
	r       io.Reader
	version uint32
	offset  int64
	buf     []byte
	cmd     Command
	done    error
}

// NewDecoder reads the header of a stream. The error is a [*StreamError], or
// an [*layerfs.UnsupportedError] for a newer version.
func NewDecoder(r io.Reader) (*Decoder, error) {
	var h [len(streamMagic) + 4]byte
	n, err := io.ReadFull(r, h[:])
	if err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil, &StreamError{Reason: fmt.Sprintf("%d bytes", n), Err: io.ErrUnexpectedEOF}
		}
		return nil, err
	}
	if string(h[:len(streamMagic)]) != streamMagic {
		return nil, &StreamError{Reason: fmt.Sprintf("starts with %q", h[:len(streamMagic)])}
	}
	d := &Decoder{r: r, version: binary.LittleEndian.Uint32(h[len(streamMagic):]), offset: int64(len(h))}
	switch {
	case d.version == 0:
		return nil, &StreamError{Reason: "version 0"}
	case d.version > MaxStreamVersion:
		return nil, &layerfs.UnsupportedError{
			Feature: fmt.Sprintf("btrfs send stream version %d", d.version),
			Reason:  fmt.Sprintf("the newest known is %d", MaxStreamVersion),
		}
	}
	return d, nil
}

// Version returns the version the header of the stream names.
func (d *Decoder) Version() int { return int(d.version) }

// Offset returns the number of bytes read so far.
func (d *Decoder) Offset() int64 { return d.offset }

// Next returns the next command, which is valid until the next call. After
// the end command, which is returned as well, the error is io.EOF. A stream
// that stops before it gives a [*StreamError] that wraps io.ErrUnexpectedEOF.
// All errors are final.
func (d *Decoder) Next() (*Command, error) {
	if d.done != nil {
		return nil, d.done
	}
	c, err := d.next()
	switch {
	case err != nil:
		d.done = err
		return nil, err
	case c.Op == OpEnd:
		d.done = io.EOF
	}
	return c, nil
}

func (d *Decoder) next() (*Command, error) {
	start := d.offset
	fail := func(op Op, err error, format string, a ...any) (*Command, error) {
		return nil, &StreamError{Offset: start, Op: op, Reason: fmt.Sprintf(format, a...), Err: err}
	}
	if d.buf == nil {
		d.buf = make([]byte, 4096)
	}
	if n, err := io.ReadFull(d.r, d.buf[:headerLen]); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return fail(0, io.ErrUnexpectedEOF, "%d bytes of a command, no end command", n)
		}
		return nil, err
	}
	size := int(binary.LittleEndian.Uint32(d.buf))
	op := Op(binary.LittleEndian.Uint16(d.buf[4:]))
	sum := binary.LittleEndian.Uint32(d.buf[6:])
	spec := op.spec()
	if spec.name == "" || spec.since > d.version {
		return fail(op, nil, "no such command in version %d", d.version)
	}
	limit := maxCommandV1
	if d.version > 1 {
		limit = maxCommandV2
	}
	if size < 0 || size > limit {
		return fail(op, nil, "length %d is more than %d", uint32(size), limit)
	}
	if need := headerLen + size; need > len(d.buf) {
		d.buf = append(d.buf[:headerLen], make([]byte, need-headerLen)...)
	}
	b := d.buf[:headerLen+size]
	if n, err := io.ReadFull(d.r, b[headerLen:]); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return fail(op, io.ErrUnexpectedEOF, "%d of %d bytes", n, size)
		}
		return nil, err
	}
	d.offset += int64(len(b))
	// The checksum covers the header with a zero in its own place.
	clear(b[6:headerLen])
	if got := checksum(b); got != sum {
		return fail(op, nil, "checksum %#08x, want %#08x", got, sum)
	}
	d.cmd.Op = op
	d.cmd.Attrs = d.cmd.Attrs[:0]
	for rest := b[headerLen:]; len(rest) > 0; {
		if len(rest) < 2 {
			return fail(op, nil, "%d stray bytes", len(rest))
		}
		a := Attr{Type: AttrType(binary.LittleEndian.Uint16(rest))}
		rest = rest[2:]
		if a.Type == AttrData && d.version > 1 {
			// From version 2 on data has no length: it is what remains.
			a.Data, rest = rest, nil
		} else {
			if len(rest) < 2 {
				return fail(op, nil, "attribute %d has no length", a.Type)
			}
			n := int(binary.LittleEndian.Uint16(rest))
			rest = rest[2:]
			if n > len(rest) {
				return fail(op, nil, "attribute %d: length %d, %d bytes left", a.Type, n, len(rest))
			}
			a.Data, rest = rest[:n:n], rest[n:]
		}
		d.cmd.Attrs = append(d.cmd.Attrs, a)
		if len(d.cmd.Attrs) > len(spec.required)+len(spec.optional) {
			return fail(op, nil, "too many attributes")
		}
	}
	if err := d.cmd.check(spec); err != nil {
		return fail(op, nil, "%v", err)
	}
	return &d.cmd, nil
}

// check returns what is wrong with the attributes of c.
func (c *Command) check(spec opSpec) error {
	var seen uint64
	for _, a := range c.Attrs {
		if !contains(spec.required, a.Type) && !contains(spec.optional, a.Type) {
			return fmt.Errorf("unexpected attribute %d", a.Type)
		}
		if seen&(1<<a.Type) != 0 {
			return fmt.Errorf("attribute %d twice", a.Type)
		}
		seen |= 1 << a.Type
		switch want := a.Type.size(); {
		case want == -2:
			if err := checkStreamPath(a.Data); err != nil {
				return err
			}
		case want >= 0 && len(a.Data) != want:
			return fmt.Errorf("attribute %d has %d bytes, want %d", a.Type, len(a.Data), want)
		case a.Type == AttrPathLink:
			if err := c.checkPathLink(a.Data); err != nil {
				return err
			}
		case a.Type == AttrXattrName:
			if len(a.Data) == 0 || len(a.Data) > 255 || bytes.IndexByte(a.Data, 0) >= 0 {
				return fmt.Errorf("xattr name %.300q", a.Data)
			}
		}
		if len(a.Data) == 12 && a.Type.size() == 12 {
			if ns := binary.LittleEndian.Uint32(a.Data[8:]); ns >= 1e9 {
				return fmt.Errorf("%d nanoseconds", ns)
			}
		}
	}
	for _, t := range spec.required {
		if seen&(1<<t) == 0 {
			return fmt.Errorf("attribute %d is missing", t)
		}
	}
	return c.checkRange()
}

// checkPathLink checks the old name of a hard link, or the target of a
// symbolic link, which may be anything but empty.
func (c *Command) checkPathLink(b []byte) error {
	if c.Op == OpLink {
		return checkStreamPath(b)
	}
	if len(b) == 0 || bytes.IndexByte(b, 0) >= 0 {
		return fmt.Errorf("link target %.80q", b)
	}
	return nil
}

// checkRange checks that offsets and lengths stay inside what a file can hold.
func (c *Command) checkRange() error {
	const top = 1<<63 - 1
	var length uint64
	switch c.Op {
	case OpClone:
		length = c.Uint(AttrCloneLen)
	case OpTruncate, OpUpdateExtent, OpFallocate:
		length = c.Uint(AttrSize)
	case OpWrite:
		length = uint64(len(c.Bytes(AttrData)))
	case OpEncodedWrite:
		length = c.Uint(AttrUnencodedFileLen)
	}
	for _, t := range []AttrType{AttrFileOffset, AttrCloneOffset} {
		if off := c.Uint(t); off > top || length > top-off {
			return fmt.Errorf("range %d+%d", off, length)
		}
	}
	return nil
}

func contains(s []AttrType, t AttrType) bool {
	for _, x := range s {
		if x == t {
			return true
		}
	}
	return false
}

var errPath = errors.New("bad path")

// checkStreamPath accepts paths below the root of a subvolume, and the empty
// path, which is the root itself.
func checkStreamPath(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if len(b) > maxStreamPath {
		return fmt.Errorf("%w of %d bytes", errPath, len(b))
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return fmt.Errorf("%w: %.80q has a zero byte", errPath, b)
	}
	for rest, more := string(b), true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." || len(name) > 255 {
			return fmt.Errorf("%w: component %.300q in %.300q", errPath, name, b)
		}
	}
	return nil
}

// checksum is the CRC-32C of the kernel: it starts with zero, and the result
// is not inverted.
func checksum(b []byte) uint32 {
	return ^crc32.Update(^uint32(0), crc32.MakeTable(crc32.Castagnoli), b)
}
