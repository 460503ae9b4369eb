package loop

import (
	"errors"
	"fmt"
)

// Options of [Attach]. Nil means the default of each field.
type Options struct {
	// ReadOnly makes a device that cannot be written; the file is opened for
	// reading only.
	ReadOnly bool

	// AutoClear detaches the device when nobody has it open any more. The
	// [Device] counts as a user until it is closed.
	AutoClear bool

	// DirectIO lets the device bypass the page cache of the file system below,
	// so that data is not cached twice. Where that file system cannot, Attach
	// fails, unless DirectIOIfPossible is set instead.
	DirectIO           bool
	DirectIOIfPossible bool

	// SectorSize is the logical block size in bytes: a power of two from 512
	// to the size of a page. Zero means 512.
	SectorSize int

	// Offset is where in the file the device begins, and Size how long it is,
	// both in bytes; zero Size means up to the end.
	Offset, Size int64

	// NoConfigure makes Attach use LOOP_SET_FD as before Linux 5.8. It is
	// for tests.
	NoConfigure bool
}

func (o *Options) validate() error {
	var errs []error
	if s := o.SectorSize; s != 0 && (s < 512 || s > 65536 || s&(s-1) != 0) {
		errs = append(errs, fmt.Errorf("loop: sector size %d is not a power of two from 512 to the page size", s))
	}
	if o.Offset < 0 || o.Size < 0 {
		errs = append(errs, fmt.Errorf("loop: negative offset %d or size %d", o.Offset, o.Size))
	}
	return errors.Join(errs...)
}
