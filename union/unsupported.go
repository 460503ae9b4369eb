//go:build !linux

package union

import (
	"context"
	"io/fs"
	"runtime"

	"github.com/layerfs/layerfs"
)

func unsupported() error {
	return &layerfs.UnsupportedError{Feature: "union", Reason: "needs Linux, this is " + runtime.GOOS}
}

// Watcher is an inotify instance that several mounts use.
type Watcher struct{}

// NewWatcher fails: there is no inotify here.
func NewWatcher() (*Watcher, error) { return nil, unsupported() }

// Close does nothing.
func (*Watcher) Close() error { return nil }

// Handle is a mounted union, of which there is none here.
type Handle struct{}

// Mount fails with an error that matches errors.ErrUnsupported.
func Mount(context.Context, string, *Config) (*Handle, error) { return nil, unsupported() }

// FS is a merged tree, of which there is none here.
type FS struct{ fs.FS }

// NewFS fails with an error that matches errors.ErrUnsupported.
func NewFS(...Branch) (*FS, error) { return nil, unsupported() }
