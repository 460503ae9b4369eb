//go:build !linux

package vfs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"runtime"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

const (
	canSyncDir       = runtime.GOOS != "windows"
	replacesEmptyDir = runtime.GOOS != "windows"
)

func (m *mechanism) probe(string) {
	f := &m.features
	err := errors.New("only on Linux")
	for name, field := range map[string]*bool{
		"IDMap": &f.IDMap, "ReadOnlyViews": &f.ReadOnlyViews, "AllXattrs": &f.AllXattrs, "DeviceNodes": &f.DeviceNodes,
	} {
		m.fact(name, field, err)
	}
}

// Mount has nothing to do: layers are shown as they are.
func (m *mechanism) Mount(_ context.Context, chain lifecycle.Chain, _ lifecycle.Mode) error {
	_, err := os.Lstat(m.Path(chain.Layer().ID))
	return err
}

func (m *mechanism) Unmount(context.Context, *lifecycle.Record) error { return nil }
func (m *mechanism) State(string) (lifecycle.State, error)            { return lifecycle.State{}, nil }
func (m *mechanism) Mounted() ([]string, error)                       { return nil, nil }

// usage adds sizes up; which names are one file is not known here.
func usage(ctx context.Context, dir string) (u layerfs.Usage, err error) {
	err = walk(ctx, dir, func(_ *os.Root, _ string, e fs.DirEntry) error {
		fi, err := e.Info()
		if err == nil {
			u.Inodes++
			u.Bytes += fi.Size()
		}
		return err
	})
	return u, err
}

// syncTree syncs file by file.
func syncTree(ctx context.Context, dir string) error {
	return walk(ctx, dir, func(root *os.Root, path string, e fs.DirEntry) error {
		if !e.Type().IsRegular() {
			return nil
		}
		how := os.O_RDONLY
		if runtime.GOOS == "windows" {
			how = os.O_RDWR // FlushFileBuffers wants GENERIC_WRITE
		}
		f, err := root.OpenFile(path, how, 0)
		if errors.Is(err, fs.ErrPermission) {
			return nil // the kernel writes it back in its own time
		}
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	})
}

func walk(ctx context.Context, dir string, fn func(*os.Root, string, fs.DirEntry) error) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		return fn(root, path, e)
	})
}

func relabel(context.Context, string, string) error {
	return &layerfs.UnsupportedError{Feature: "an SELinux label", Reason: "only Linux has them"}
}

// isFull is only asked for layers with a quota, which only Linux has.
func isFull(error) bool { return false }
