//go:build !linux && !freebsd

package zfs

import (
	"runtime"

	"github.com/layerfs/layerfs"
)

// Driver does not exist on this system.
type Driver struct{ layerfs.Driver }

// New fails with an error that matches [errors.ErrUnsupported].
func New(root string, opts *Options) (*Driver, error) {
	return nil, &layerfs.Error{Op: "open", Driver: "zfs", Path: root, Err: &layerfs.UnsupportedError{
		Feature: "zfs", Reason: "this package knows it on Linux and FreeBSD, and this is " + runtime.GOOS,
	}}
}
