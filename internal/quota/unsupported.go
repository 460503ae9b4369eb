//go:build !linux

package quota

import "github.com/layerfs/layerfs"

// Options of [Open].
type Options struct {
	First       uint32
	BlockDevice bool
}

// Projects are the projects of one file system.
type Projects struct{}

func unsupported() error {
	return &layerfs.UnsupportedError{Feature: "project quota", Reason: "only Linux has it"}
}

// Supported fails on this system.
func Supported(string) error { return unsupported() }

// Open fails on this system.
func Open(string, *Options) (*Projects, error) { return nil, unsupported() }

// Close does nothing.
func (*Projects) Close() error { return nil }

// ID fails on this system.
func (*Projects) ID(string) (uint32, error) { return 0, unsupported() }

// Assign fails on this system.
func (*Projects) Assign(uint32, ...string) error { return unsupported() }

// AssignTree fails on this system.
func (*Projects) AssignTree(uint32, string) error { return unsupported() }

// Allocate fails on this system.
func (*Projects) Allocate(...string) (uint32, error) { return 0, unsupported() }

// SetLimits fails on this system.
func (*Projects) SetLimits(uint32, layerfs.Quota) error { return unsupported() }

// Clear fails on this system.
func (*Projects) Clear(uint32) error { return unsupported() }

// Report fails on this system.
func (*Projects) Report(uint32) (Report, error) { return Report{}, unsupported() }
