package dm

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// What the kernel puts behind struct dm_ioctl. Records follow each other at
// offsets the kernel gives; every one is checked against the buffer, so that
// no answer can make a reader run on or panic.

// The sizes of the fixed parts, tested against the headers in internal/sys.
const (
	specSize    = 40
	nameHead    = 12
	versionHead = 16
)

// maxRecords bounds a list, so that offsets that do not advance end.
const maxRecords = 1 << 20

func badRecord(what string) error { return fmt.Errorf("dm: malformed %s from the kernel", what) }

// encodeTargets returns the targets as DM_TABLE_LOAD takes them. Next is the
// distance from one spec to the next.
func encodeTargets(table []Target) ([]byte, error) {
	var out []byte
	for _, t := range table {
		if t.Type == "" || len(t.Type) > 15 || bytes.IndexByte([]byte(t.Type+t.Params), 0) >= 0 {
			return nil, fmt.Errorf("dm: table %q: bad target", t)
		}
		size := (specSize + len(t.Params) + 1 + 7) &^ 7
		rec := make([]byte, size)
		binary.NativeEndian.PutUint64(rec[0:], t.Start)
		binary.NativeEndian.PutUint64(rec[8:], t.Length)
		binary.NativeEndian.PutUint32(rec[20:], uint32(size))
		copy(rec[24:40], t.Type)
		copy(rec[specSize:], t.Params)
		out = append(out, rec...)
	}
	return out, nil
}

// decodeTargets reads count targets of DM_TABLE_STATUS. Next is the distance
// from the first spec.
func decodeTargets(b []byte, count uint32) ([]Target, error) {
	var out []Target
	off := 0
	for range count {
		if off < 0 || off > len(b)-specSize {
			return nil, badRecord("target")
		}
		rec := b[off:]
		next := int(binary.NativeEndian.Uint32(rec[20:]))
		params, ok := cstring(rec[specSize:])
		if !ok || next <= off {
			return nil, badRecord("target")
		}
		typ, ok := cstring(rec[24:40])
		if !ok {
			return nil, badRecord("target type")
		}
		out = append(out, Target{binary.NativeEndian.Uint64(rec), binary.NativeEndian.Uint64(rec[8:]), typ, params})
		off = next
	}
	return out, nil
}

// cstring returns what is before the first zero byte.
func cstring(b []byte) (string, bool) {
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return "", false
	}
	return string(b[:i]), true
}

// Entry is a device in a list.
type Entry struct {
	Name   string
	Device Device
}

// decodeNames reads the answer of DM_LIST_DEVICES. A record with device 0 is
// the empty list.
func decodeNames(b []byte) ([]Entry, error) {
	var out []Entry
	if len(b) == 0 { // what the kernel says of no devices at all
		return nil, nil
	}
	for range maxRecords {
		if len(b) < nameHead {
			return nil, badRecord("name list")
		}
		dev, next := binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint32(b[8:])
		if dev == 0 {
			return out, nil
		}
		name, ok := cstring(b[nameHead:])
		if !ok {
			return nil, badRecord("name list")
		}
		out = append(out, Entry{name, decodeDevice(dev)})
		if next == 0 {
			return out, nil
		}
		if next < nameHead || int64(next) > int64(len(b)) {
			return nil, badRecord("name list")
		}
		b = b[next:]
	}
	return nil, badRecord("name list")
}

// Version is a version of the ioctl interface or of a target.
type Version struct{ Major, Minor, Patch uint32 }

// String returns "4.47.0".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// TargetVersion is a target that the kernel has loaded.
type TargetVersion struct {
	Name    string
	Version Version
}

// decodeVersions reads the answer of DM_LIST_VERSIONS and
// DM_GET_TARGET_VERSION.
func decodeVersions(b []byte) ([]TargetVersion, error) {
	var out []TargetVersion
	for range maxRecords {
		if len(b) < versionHead {
			return nil, badRecord("version list")
		}
		name, ok := cstring(b[versionHead:])
		if !ok {
			return nil, badRecord("version list")
		}
		u := func(i int) uint32 { return binary.NativeEndian.Uint32(b[i:]) }
		if name != "" {
			out = append(out, TargetVersion{name, Version{u(4), u(8), u(12)}})
		}
		next := u(0)
		if next == 0 {
			return out, nil
		}
		if next < versionHead || int64(next) > int64(len(b)) {
			return nil, badRecord("version list")
		}
		b = b[next:]
	}
	return nil, badRecord("version list")
}

// decodeDeps reads the answer of DM_TABLE_DEPS.
func decodeDeps(b []byte) ([]Device, error) {
	if len(b) < 8 {
		return nil, badRecord("list of devices")
	}
	n := int64(binary.NativeEndian.Uint32(b))
	if n > int64(len(b)-8)/8 {
		return nil, badRecord("list of devices")
	}
	out := make([]Device, n)
	for i := range out {
		out[i] = decodeDevice(binary.NativeEndian.Uint64(b[8+8*i:]))
	}
	return out, nil
}
