//go:build !linux

package aufs

import (
	"runtime"

	"github.com/layerfs/layerfs"
)

// Driver does not exist on this system.
type Driver struct{ layerfs.Driver }

// Main does nothing on this system.
func Main() []string { return nil }

// New fails with an error that matches [errors.ErrUnsupported].
func New(root string, opts *Options) (*Driver, error) {
	return nil, &layerfs.Error{Op: "open", Driver: "aufs", Path: root, Err: &layerfs.UnsupportedError{
		Feature: "aufs", Reason: "it needs Linux, and this is " + runtime.GOOS,
	}}
}
