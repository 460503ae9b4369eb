package btrfs

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// Encoder writes a send stream. A command that was read by a [Decoder] is
// written byte by byte as it was. Not for concurrent use.
type Encoder struct {
	w       io.Writer
	version uint32
	buf     []byte
}

// NewEncoder writes the header of a stream of version 1 to 3.
func NewEncoder(w io.Writer, version int) (*Encoder, error) {
	if version < 1 || version > MaxStreamVersion {
		return nil, fmt.Errorf("send stream version %d is not one of 1 to %d", version, MaxStreamVersion)
	}
	h := binary.LittleEndian.AppendUint32([]byte(streamMagic), uint32(version))
	if _, err := w.Write(h); err != nil {
		return nil, err
	}
	return &Encoder{w: w, version: uint32(version)}, nil
}

// Encode writes one command. It refuses what a [Decoder] would refuse.
func (e *Encoder) Encode(c *Command) error {
	spec := c.Op.spec()
	if spec.name == "" || spec.since > e.version {
		return fmt.Errorf("no command %v in version %d", c.Op, e.version)
	}
	if err := c.check(spec); err != nil {
		return fmt.Errorf("%v: %w", c.Op, err)
	}
	b := append(e.buf[:0], make([]byte, headerLen)...)
	for i, a := range c.Attrs {
		b = binary.LittleEndian.AppendUint16(b, uint16(a.Type))
		switch {
		case a.Type == AttrData && e.version > 1:
			if i != len(c.Attrs)-1 {
				return fmt.Errorf("%v: data is not the last attribute", c.Op)
			}
		case len(a.Data) > 1<<16-1:
			return fmt.Errorf("%v: attribute %d has %d bytes", c.Op, a.Type, len(a.Data))
		default:
			b = binary.LittleEndian.AppendUint16(b, uint16(len(a.Data)))
		}
		b = append(b, a.Data...)
	}
	e.buf = b
	limit := maxCommandV1
	if e.version > 1 {
		limit = maxCommandV2
	}
	if len(b)-headerLen > limit {
		return fmt.Errorf("%v: %d bytes are more than %d", c.Op, len(b)-headerLen, limit)
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)-headerLen))
	binary.LittleEndian.PutUint16(b[4:], uint16(c.Op))
	binary.LittleEndian.PutUint32(b[6:], checksum(b))
	_, err := e.w.Write(b)
	return err
}

// NewCommand builds a command from pairs of an [AttrType] and a value: string,
// []byte, [UUID], uint64 (written in the width of the attribute) or time.Time.
func NewCommand(op Op, pairs ...any) (*Command, error) {
	c := &Command{Op: op}
	if len(pairs)%2 != 0 {
		return nil, fmt.Errorf("%v: odd number of arguments", op)
	}
	for i := 0; i < len(pairs); i += 2 {
		t, ok := pairs[i].(AttrType)
		if !ok {
			return nil, fmt.Errorf("%v: argument %d is a %T, not an attribute", op, i, pairs[i])
		}
		a := Attr{Type: t}
		switch v := pairs[i+1].(type) {
		case string:
			a.Data = []byte(v)
		case []byte:
			a.Data = v
		case UUID:
			a.Data = v[:]
		case uint64:
			a.Data = binary.LittleEndian.AppendUint64(nil, v)
			if n := t.size(); n == 1 || n == 4 {
				if v>>(8*n) != 0 {
					return nil, fmt.Errorf("%v: %d does not fit in %d bytes", op, v, n)
				}
				a.Data = a.Data[:n]
			}
		case time.Time:
			a.Data = binary.LittleEndian.AppendUint64(nil, uint64(v.Unix()))
			a.Data = binary.LittleEndian.AppendUint32(a.Data, uint32(v.Nanosecond()))
		default:
			return nil, fmt.Errorf("%v: attribute %d has a value of type %T", op, t, v)
		}
		c.Attrs = append(c.Attrs, a)
	}
	return c, nil
}
