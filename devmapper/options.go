package devmapper

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	"github.com/layerfs/layerfs"
)

// Options are the options of [New]. The zero value, and nil, are the defaults:
// a pool in two sparse files.
type Options struct {
	// Durability is what is on stable storage when a call returns; default
	// [layerfs.DurabilityMetadata].
	Durability layerfs.Durability

	// Logger is told what has no other way back; default silent.
	Logger *slog.Logger

	// Prefix begins the names of all devices; default "layerfs". Letters,
	// digits, "_", "." and "-", at most 32.
	Prefix string

	// DataSize and MetadataSize are the sizes of the pool's sparse files in
	// bytes, when they are made; default 100 GiB and 2 GiB.
	DataSize, MetadataSize int64

	// DataDevice and MetadataDevice are block devices to use in place of the
	// files. Both or none. Their content is lost when the root is new.
	DataDevice, MetadataDevice string

	// ThinPoolDevice is the name of an active thin pool to use, as in
	// /dev/mapper; it must be unused and stay with this root alone.
	ThinPoolDevice string

	// BlockSize is the size of the pool's blocks in bytes, when it is made:
	// a multiple of 64 KiB up to 1 GiB. Default 64 KiB.
	BlockSize int64

	// BaseSize is the size of a layer in bytes; default 10 GiB, or what the
	// root was made with. It may grow later, for new base layers.
	BaseSize int64

	// FS is the file system of the layers, ext4 or xfs, when the root is made;
	// default ext4.
	FS string

	// MkfsArgs are further arguments of mkfs.
	MkfsArgs []string

	// MountOptions are further mount options of every layer, such as "noatime".
	MountOptions []string

	// IgnoreDiscard makes the pool ignore discards: what files free stays
	// allocated in the pool, and [Driver.Trim] fails.
	IgnoreDiscard bool

	// NoDiscardPassdown keeps discards inside the pool: freed blocks can be
	// used by other layers but are not given back to the file or device below.
	NoDiscardPassdown bool

	// BlkDiscard discards a device before it is deleted, which gives its
	// blocks back to what is below the pool: "on", "off", or "" for on where
	// the pool is in files.
	BlkDiscard string

	// NoDeferredRemoval does not let the kernel remove devices when their last
	// user goes. A Put of a layer with open files then fails with
	// [layerfs.ErrInUse], after some waiting.
	NoDeferredRemoval bool

	// NoDeferredDeletion makes Remove fail if the device is still in use,
	// instead of deleting it later. NoDeferredRemoval needs it.
	NoDeferredDeletion bool

	// MinFreeSpace is the share of the pool's data and metadata, in percent,
	// below which no layer is created: the error matches [layerfs.ErrQuota].
	// A pool in files also needs this share of what it has not allocated yet
	// free in the file system below. Default 10; negative means no guard.
	MinFreeSpace int

	// ExtendThreshold is the use of a pool in files, in percent from 50 to
	// 99, from which on its files are made larger by ExtendPercent (default
	// 20) of their size. Default 0 means never. A driver must be open.
	ExtendThreshold, ExtendPercent int

	// OnEvent is called with what happens to the pool, one call at a time, by
	// a goroutine of the driver. It must not close the driver.
	OnEvent func(Event)

	// ErrorIfNoSpace lets writes fail at once when the pool's data is full.
	// Else they wait for it to grow, a minute by default (no_space_timeout of
	// the module dm_thin_pool; 0 is for ever), and fail then.
	//
	// The error is ENOSPC, at write for O_DIRECT and else at fsync, but for
	// pages of ext4: it reports each failure to write one back as EIO. When
	// ext4 cannot write its journal either it becomes read-only, EROFS, until
	// the last Put; xfs goes on when the pool has grown. When the pool's
	// metadata is full the kernel waits for nothing, and all of this is EIO.
	ErrorIfNoSpace bool

	// XFSNoSpaceRetries is how often xfs retries to write metadata into a pool
	// that is full before it shuts down; -1 is for ever, nil the kernel's
	// default.
	XFSNoSpaceRetries *int
}

// The defaults.
const (
	defaultPrefix       = "layerfs"
	defaultDataSize     = 100 << 30
	defaultMetadataSize = 2 << 30
	defaultBlockSize    = 64 << 10
	defaultBaseSize     = 10 << 30
	defaultFS           = "ext4"
	defaultMinFree      = 10
	defaultExtend       = 20
)

// minBase is the smallest file system mkfs makes, in bytes.
func minBase(fs string) int64 {
	if fs == "xfs" {
		return 300 << 20 // xfsprogs 5.19
	}
	return 8 << 20 // with a journal
}

// withDefaults fills in what does not depend on the root.
func (o Options) withDefaults() Options {
	if o.Prefix == "" {
		o.Prefix = defaultPrefix
	}
	if o.MinFreeSpace == 0 {
		o.MinFreeSpace = defaultMinFree
	}
	if o.ExtendThreshold > 0 && o.ExtendPercent == 0 {
		o.ExtendPercent = defaultExtend
	}
	return o
}

// files reports whether the pool is in sparse files.
func (o *Options) files() bool { return o.DataDevice == "" && o.ThinPoolDevice == "" }

// discards reports whether a device is discarded before its deletion.
func (o *Options) discards() bool {
	return o.BlkDiscard == "on" || o.BlkDiscard == "" && o.files() && !o.IgnoreDiscard && !o.NoDiscardPassdown
}

// validate returns all that is wrong with the options themselves.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Durability > layerfs.DurabilityFull {
		bad("durability %v is unknown", o.Durability)
	}
	if !regexp.MustCompile(`^[A-Za-z0-9_.-]{0,32}$`).MatchString(o.Prefix) {
		bad("Prefix %q is not at most 32 letters, digits, _, . and -", o.Prefix)
	}
	for _, s := range []struct {
		name         string
		value, least int64
	}{{"DataSize", o.DataSize, 16 << 20}, {"MetadataSize", o.MetadataSize, 2 << 20}} {
		if s.value != 0 && (s.value < s.least || s.value%4096 != 0) {
			bad("%s of %d bytes is no multiple of 4096 from %d up", s.name, s.value, s.least)
		}
	}
	if b := o.BlockSize; b != 0 && (b < defaultBlockSize || b > 1<<30 || b%defaultBlockSize != 0) {
		bad("BlockSize of %d bytes is no multiple of 64 KiB up to 1 GiB", b)
	}
	if o.FS != "" && o.FS != "ext4" && o.FS != "xfs" {
		bad("FS %q is not one of ext4, xfs", o.FS)
	}
	if b := o.BaseSize; b != 0 && (b < minBase(o.FS) || b%4096 != 0) {
		bad("BaseSize of %d bytes is no multiple of 4096 from %d up", b, minBase(o.FS))
	}
	o.validatePool(bad)
	o.validateMount(bad)
	switch o.BlkDiscard {
	case "", "on", "off":
	default:
		bad("BlkDiscard %q is not one of on, off", o.BlkDiscard)
	}
	if o.IgnoreDiscard && (o.BlkDiscard == "on" || o.NoDiscardPassdown) {
		bad("IgnoreDiscard excludes BlkDiscard on and NoDiscardPassdown")
	}
	if o.NoDeferredRemoval && !o.NoDeferredDeletion {
		bad("NoDeferredRemoval needs NoDeferredDeletion")
	}
	if o.MinFreeSpace > 99 {
		bad("MinFreeSpace of %d percent is above 99", o.MinFreeSpace)
	}
	if t := o.ExtendThreshold; t != 0 && (t < 50 || t > 99) {
		bad("ExtendThreshold of %d percent is not from 50 to 99", t)
	}
	if p := o.ExtendPercent; p < 0 || p > 1000 {
		bad("ExtendPercent of %d is not from 1 to 1000", p)
	}
	if o.ExtendPercent != 0 && o.ExtendThreshold == 0 {
		bad("ExtendPercent needs ExtendThreshold")
	}
	return errors.Join(errs...)
}

// validatePool looks at what the pool is made of.
func (o *Options) validatePool(bad func(string, ...any)) {
	if (o.DataDevice == "") != (o.MetadataDevice == "") {
		bad("DataDevice and MetadataDevice need each other")
	}
	for _, p := range []struct{ name, path string }{{"DataDevice", o.DataDevice}, {"MetadataDevice", o.MetadataDevice}} {
		if p.path != "" && (!strings.HasPrefix(p.path, "/") || strings.ContainsAny(p.path, " \t\n\\\x00")) {
			bad("%s %q is not an absolute path without spaces", p.name, p.path)
		}
	}
	if o.DataDevice != "" && o.DataDevice == o.MetadataDevice {
		bad("DataDevice and MetadataDevice are the same")
	}
	given := o.DataDevice != "" || o.MetadataDevice != ""
	if o.ThinPoolDevice != "" {
		if strings.ContainsAny(o.ThinPoolDevice, "/ \t\n\\\x00") || len(o.ThinPoolDevice) > 127 {
			bad("ThinPoolDevice %q is not the name of a device", o.ThinPoolDevice)
		}
		if given {
			bad("ThinPoolDevice excludes DataDevice and MetadataDevice")
		}
		if o.BlockSize != 0 || o.ErrorIfNoSpace || o.IgnoreDiscard || o.NoDiscardPassdown {
			bad("ThinPoolDevice excludes BlockSize, ErrorIfNoSpace, IgnoreDiscard and NoDiscardPassdown, which are the pool's")
		}
	}
	if (given || o.ThinPoolDevice != "") && (o.DataSize != 0 || o.MetadataSize != 0) {
		bad("DataSize and MetadataSize are for a pool in files")
	}
	if (given || o.ThinPoolDevice != "") && o.ExtendThreshold != 0 {
		bad("ExtendThreshold is for a pool in files")
	}
}

// validateMount looks at the file system's options.
func (o *Options) validateMount(bad func(string, ...any)) {
	for _, list := range o.MountOptions {
		for opt := range strings.SplitSeq(list, ",") {
			key, _, _ := strings.Cut(opt, "=")
			switch key {
			case "":
				bad("mount option %q has no name", list)
			case "ro", "rw", "nouuid", "noload", "norecovery", "noinit_itable", "init_itable", "source", "context":
				bad("mount option %q is the driver's own", opt)
			}
			if strings.ContainsRune(opt, 0) {
				bad("mount option %q has a NUL byte", opt)
			}
		}
	}
	for _, a := range o.MkfsArgs {
		if a == "" || strings.ContainsRune(a, 0) {
			bad("argument of mkfs %q is empty or has a NUL byte", a)
		}
	}
	if n := o.XFSNoSpaceRetries; n != nil {
		if o.FS != "xfs" {
			bad("XFSNoSpaceRetries needs FS xfs")
		}
		if *n < -1 {
			bad("XFSNoSpaceRetries %d is below -1", *n)
		}
	}
}

// EventKind says what an [Event] is about.
type EventKind uint8

// The kinds of events. Each is told once when it comes to be so. LowSpace comes
// before a PoolFailed that it led to.
const (
	ExtendBegin  EventKind = iota + 1 // the pool's files are about to be made larger; if New did so, both events come after it
	ExtendDone                        // they are larger, or Err says why not; after an error it is tried again every few seconds
	LowSpace                          // less than MinFreeSpace is free
	PoolFailed                        // the pool is out of space, read-only or failed; see Mode
	PoolRestored                      // it is usable again
)

// String returns the name of the kind, such as "extend-begin".
func (k EventKind) String() string {
	names := [...]string{"", "extend-begin", "extend-done", "low-space", "pool-failed", "pool-restored"}
	if k == 0 || int(k) >= len(names) {
		return fmt.Sprintf("EventKind(%d)", uint8(k))
	}
	return names[k]
}

// Event is something that happened to the pool.
type Event struct {
	Kind EventKind
	Mode string // of the pool, as the kernel says it: rw, ro, out_of_data_space, Fail

	// Used and Total are of the pool's data, in bytes, MetadataUsed and
	// MetadataTotal of its metadata.
	Used, Total, MetadataUsed, MetadataTotal int64

	Err error // of ExtendDone
}
