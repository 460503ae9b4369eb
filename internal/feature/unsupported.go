//go:build !linux

package feature

import (
	"runtime"

	"github.com/layerfs/layerfs"
)

func probe(f Feature, _ string) error {
	for _, known := range features() {
		if f == known {
			return &layerfs.UnsupportedError{Feature: string(f), Reason: "this is " + runtime.GOOS}
		}
	}
	return unknown(f)
}

// FSName returns the name of the operating system: nothing is known of its
// file systems.
func FSName(string) (string, error) { return runtime.GOOS, nil }

// InUserNamespace reports false: only Linux has them.
func InUserNamespace() (bool, error) { return false, nil }
