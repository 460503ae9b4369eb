//go:build !linux

package main

import (
	"context"
	"runtime"

	"github.com/layerfs/layerfs"
)

// crossDevice is false: there are no unions on these systems.
func crossDevice(error) bool { return false }

func kernel() string { return runtime.GOOS + " " + runtime.GOARCH }

// load is not known.
func load() (string, bool) { return "", false }

// measure is not possible: nothing tells what is in the page cache.
func (*demoMemory) measure(context.Context, string, string) error {
	return &layerfs.UnsupportedError{Feature: "measuring the page cache", Reason: "only on Linux"}
}
