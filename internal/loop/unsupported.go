//go:build !linux

package loop

import (
	"context"
	"os"

	"github.com/layerfs/layerfs"
)

// Device is an attached loop device.
type Device struct{}

func unsupported() error {
	return &layerfs.UnsupportedError{Feature: "loop device", Reason: "only Linux has it"}
}

// Attach fails on this system.
func Attach(context.Context, string, *Options) (*Device, error) { return nil, unsupported() }

// Open fails on this system.
func Open(string, bool) (*Device, error) { return nil, unsupported() }

// Find fails on this system.
func Find(string) ([]string, error) { return nil, unsupported() }

// Path returns nothing on this system.
func (*Device) Path() string { return "" }

// File returns nil on this system.
func (*Device) File() *os.File { return nil }

// Close does nothing on this system.
func (*Device) Close() error { return nil }

// Detach fails on this system.
func (*Device) Detach() error { return unsupported() }

// Resize fails on this system.
func (*Device) Resize() error { return unsupported() }

// Size fails on this system.
func (*Device) Size() (int64, error) { return 0, unsupported() }

// DirectIO fails on this system.
func (*Device) DirectIO() (bool, error) { return false, unsupported() }
