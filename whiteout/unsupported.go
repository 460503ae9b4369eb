//go:build !linux

package whiteout

import (
	"context"
	"os"
	"runtime"

	"github.com/layerfs/layerfs"
)

func unsupported() error {
	return &layerfs.UnsupportedError{Feature: "whiteouts in a tree", Reason: "not on " + runtime.GOOS}
}

// Read needs Linux; the error matches [errors.ErrUnsupported].
func Read(*os.File, string, Form) (Entry, error) { return Entry{}, unsupported() }

// IsOpaqueDir needs Linux; the error matches [errors.ErrUnsupported].
func IsOpaqueDir(*os.File, Form) (bool, error) { return false, unsupported() }

// Make needs Linux; the error matches [errors.ErrUnsupported].
func Make(*os.File, string, Form) error { return unsupported() }

// Remove needs Linux; the error matches [errors.ErrUnsupported].
func Remove(*os.File, string, Form) error { return unsupported() }

// SetOpaque needs Linux; the error matches [errors.ErrUnsupported].
func SetOpaque(*os.File, Form) error { return unsupported() }

// ClearOpaque needs Linux; the error matches [errors.ErrUnsupported].
func ClearOpaque(*os.File, Form) error { return unsupported() }

// MarkRoot needs Linux; the error matches [errors.ErrUnsupported].
func MarkRoot(*os.File, Form) error { return unsupported() }

// Convert needs Linux; the error matches [errors.ErrUnsupported].
func Convert(context.Context, string, Form, Form) (Stats, error) { return Stats{}, unsupported() }
