package dm

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// SectorSize is the unit of tables, in bytes.
const SectorSize = 512

// Target is one line of a table: sectors [Start, Start+Length) of the device
// are mapped by a target of the type. In a status, Params is the status line.
type Target struct {
	Start, Length uint64
	Type          string
	Params        string
}

// String returns the line as dmsetup prints it.
func (t Target) String() string {
	return strings.TrimRight(fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Params), " ")
}

// Device is a number of a block device.
type Device struct{ Major, Minor uint32 }

// String returns "253:4", which tables take in place of a path.
func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// ParseDevice reads what String returns.
func ParseDevice(s string) (Device, error) {
	a, b, ok := strings.Cut(s, ":")
	major, err1 := strconv.ParseUint(a, 10, 12)
	minor, err2 := strconv.ParseUint(b, 10, 20)
	if !ok || err1 != nil || err2 != nil {
		return Device{}, fmt.Errorf("device number %q: not major:minor", s)
	}
	return Device{uint32(major), uint32(minor)}, nil
}

// decodeDevice and encode are huge_decode_dev and huge_encode_dev of
// include/linux/kdev_t.h, the form of dm-ioctl.
func decodeDevice(v uint64) Device {
	return Device{uint32(v & 0xfff00 >> 8), uint32(v&0xff | v>>12&0xfff00)}
}

func (d Device) encode() uint64 {
	return uint64(d.Minor)&0xff | uint64(d.Major)<<8 | (uint64(d.Minor)&^0xff)<<12
}

// Limits of a thin pool's block size, drivers/md/dm-thin.c, in sectors.
const (
	MinBlockSectors = 128     // 64 KiB
	MaxBlockSectors = 2097152 // 1 GiB
)

// MaxThinID is the largest number of a thin device in a pool.
const MaxThinID = 1<<24 - 1

// ThinPool is the table of a thin pool.
type ThinPool struct {
	Length       uint64 // sectors of the data device that are used
	Metadata     string // device, as a path or major:minor
	Data         string // device, as a path or major:minor
	BlockSectors uint32 // a multiple of [MinBlockSectors]
	LowWater     uint64 // free blocks at which an event is sent

	SkipBlockZeroing  bool // do not zero a block before it is given out
	IgnoreDiscard     bool // no discard at all
	NoDiscardPassdown bool // discards free blocks and do not reach the data device
	ReadOnly          bool // no change of data or metadata
	ErrorIfNoSpace    bool // a write without space fails; else it waits, for a minute by default
}

// check tells everything that is wrong at once.
func (p *ThinPool) check() error {
	var errs []error
	if p.BlockSectors < MinBlockSectors || p.BlockSectors > MaxBlockSectors || p.BlockSectors%MinBlockSectors != 0 {
		errs = append(errs, fmt.Errorf("block size of %d sectors is no multiple of %d up to %d", p.BlockSectors, MinBlockSectors, MaxBlockSectors))
	}
	if p.Length == 0 {
		errs = append(errs, errors.New("no data"))
	}
	return errors.Join(append(errs, word("metadata device", p.Metadata), word("data device", p.Data))...)
}

// word refuses what would be several words of a table.
func word(what, s string) error {
	if s == "" || strings.ContainsAny(s, " \t\n\r\v\f\\\x00") {
		return fmt.Errorf("%s %q is not one word", what, s)
	}
	return nil
}

// Target returns the line of the table. The error tells of a field that no
// kernel takes.
func (p ThinPool) Target() (Target, error) {
	if err := p.check(); err != nil {
		return Target{}, fmt.Errorf("thin-pool: %w", err)
	}
	var args []string
	for _, a := range []struct {
		on   bool
		name string
	}{
		{p.SkipBlockZeroing, "skip_block_zeroing"},
		{p.IgnoreDiscard, "ignore_discard"},
		{p.NoDiscardPassdown, "no_discard_passdown"},
		{p.ReadOnly, "read_only"},
		{p.ErrorIfNoSpace, "error_if_no_space"},
	} {
		if a.on {
			args = append(args, a.name)
		}
	}
	params := fmt.Sprintf("%s %s %d %d %d", p.Metadata, p.Data, p.BlockSectors, p.LowWater, len(args))
	return Target{Length: p.Length, Type: "thin-pool", Params: strings.Join(append([]string{params}, args...), " ")}, nil
}

// ParseThinPool reads a line of the table of a thin pool, as [Control.Table]
// returns it.
func ParseThinPool(t Target) (ThinPool, error) {
	bad := func(why string) (ThinPool, error) {
		return ThinPool{}, fmt.Errorf("table %q: %s", t, why)
	}
	f := strings.Fields(t.Params)
	if t.Type != "thin-pool" || t.Start != 0 || len(f) < 4 {
		return bad("not a thin pool")
	}
	block, err1 := strconv.ParseUint(f[2], 10, 32)
	low, err2 := strconv.ParseUint(f[3], 10, 64)
	if err1 != nil || err2 != nil {
		return bad("block size and low water mark are not numbers")
	}
	p := ThinPool{Length: t.Length, Metadata: f[0], Data: f[1], BlockSectors: uint32(block), LowWater: low}
	args := f[4:]
	if len(args) > 0 {
		if n, err := strconv.ParseUint(args[0], 10, 16); err != nil || int(n) != len(args)-1 {
			return bad("wrong number of features")
		}
		args = args[1:]
	}
	for _, a := range args {
		switch a {
		case "skip_block_zeroing":
			p.SkipBlockZeroing = true
		case "ignore_discard":
			p.IgnoreDiscard = true
		case "no_discard_passdown":
			p.NoDiscardPassdown = true
		case "read_only":
			p.ReadOnly = true
		case "error_if_no_space":
			p.ErrorIfNoSpace = true
		default:
			return bad("unknown feature " + a)
		}
	}
	if err := p.check(); err != nil {
		return bad(err.Error())
	}
	return p, nil
}

// Thin is the table of a thin device.
type Thin struct {
	Length uint64 // sectors
	Pool   string // device, as a path or major:minor
	ID     uint32 // number in the pool, up to [MaxThinID]
	Origin string // external origin for what is not mapped, if any
}

// Target returns the line of the table.
func (d Thin) Target() (Target, error) {
	err := word("pool", d.Pool)
	if d.Origin != "" {
		err = errors.Join(err, word("origin", d.Origin))
	}
	if d.ID > MaxThinID {
		err = errors.Join(err, fmt.Errorf("id %d is above %d", d.ID, MaxThinID))
	}
	if d.Length == 0 {
		err = errors.Join(err, errors.New("no sectors"))
	}
	if err != nil {
		return Target{}, fmt.Errorf("thin: %w", err)
	}
	params := fmt.Sprintf("%s %d", d.Pool, d.ID)
	if d.Origin != "" {
		params += " " + d.Origin
	}
	return Target{Length: d.Length, Type: "thin", Params: params}, nil
}

// ParseThin reads a line of the table of a thin device.
func ParseThin(t Target) (Thin, error) {
	f := strings.Fields(t.Params)
	if t.Type != "thin" || t.Start != 0 || t.Length == 0 || len(f) < 2 || len(f) > 3 {
		return Thin{}, fmt.Errorf("table %q: not a thin device", t)
	}
	id, err := strconv.ParseUint(f[1], 10, 24)
	if err != nil {
		return Thin{}, fmt.Errorf("table %q: %w", t, err)
	}
	d := Thin{Length: t.Length, Pool: f[0], ID: uint32(id)}
	if len(f) == 3 {
		d.Origin = f[2]
	}
	if _, err := d.Target(); err != nil {
		return Thin{}, fmt.Errorf("table %q: %w", t, err)
	}
	return d, nil
}

// Linear maps sectors to a part of another device.
type Linear struct {
	Start, Length uint64
	Device        string // as a path or major:minor
	Offset        uint64 // sectors
}

// Target returns the line of the table.
func (l Linear) Target() (Target, error) {
	if err := word("device", l.Device); err != nil {
		return Target{}, fmt.Errorf("linear: %w", err)
	}
	return Target{l.Start, l.Length, "linear", fmt.Sprintf("%s %d", l.Device, l.Offset)}, nil
}

// ParseLinear reads a line of the table of a linear mapping.
func ParseLinear(t Target) (Linear, error) {
	f := strings.Fields(t.Params)
	if t.Type != "linear" || len(f) != 2 {
		return Linear{}, fmt.Errorf("table %q: not linear", t)
	}
	off, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return Linear{}, fmt.Errorf("table %q: %w", t, err)
	}
	l := Linear{t.Start, t.Length, f[0], off}
	_, err = l.Target()
	return l, err
}

// ErrorTarget returns the line of a table that fails all I/O to the sectors.
func ErrorTarget(start, length uint64) Target { return Target{start, length, "error", ""} }

// The messages of a thin pool, for [Control.Message] with sector 0.
//
// Source: Documentation/admin-guide/device-mapper/thin-provisioning.rst.

// CreateThin makes an empty thin device. It fails with EEXIST if the id is
// taken.
func CreateThin(id uint32) string { return fmt.Sprintf("create_thin %d", id) }

// CreateSnap makes a snapshot of a thin device. If the origin is active it
// must be suspended meanwhile, or the snapshot may be torn.
func CreateSnap(id, origin uint32) string { return fmt.Sprintf("create_snap %d %d", id, origin) }

// DeleteThin deletes a thin device, which must not be active. It cannot be
// undone.
func DeleteThin(id uint32) string { return fmt.Sprintf("delete %d", id) }

// SetTransactionID sets the pool's transaction id if it is the old one, else
// fails with EINVAL.
func SetTransactionID(old, id uint64) string {
	return fmt.Sprintf("set_transaction_id %d %d", old, id)
}

// ReserveMetadataSnap keeps a copy of the metadata as it is now, whose root is
// then in [PoolStatus].HeldRoot. It fails with EBUSY if there is one.
func ReserveMetadataSnap() string { return "reserve_metadata_snap" }

// ReleaseMetadataSnap gives the copy up. It fails with EINVAL if there is none.
func ReleaseMetadataSnap() string { return "release_metadata_snap" }
