//go:build !linux

package btrfs

import (
	"runtime"

	"github.com/layerfs/layerfs"
)

// Driver does not exist on this system.
type Driver struct{ layerfs.Driver }

// New fails with an error that matches [errors.ErrUnsupported].
func New(root string, opts *Options) (*Driver, error) {
	if opts != nil {
		if err := opts.validate(); err != nil {
			return nil, &layerfs.Error{Op: "open", Driver: "btrfs", Path: root, Err: err}
		}
	}
	return nil, &layerfs.Error{Op: "open", Driver: "btrfs", Path: root, Err: &layerfs.UnsupportedError{
		Feature: "btrfs", Reason: "its driver needs Linux, and this is " + runtime.GOOS,
	}}
}
