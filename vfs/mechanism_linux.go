package vfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/tree"
)

const (
	canSyncDir       = true
	replacesEmptyDir = true
)

// probe tries, in a directory of its own, what the layers will need.
func (m *mechanism) probe(scratch string) {
	f := &m.features
	m.fact("IDMap", &f.IDMap, new(feature.Prober).Probe(feature.IDMap, scratch))
	dir, err := os.MkdirTemp(scratch, ".probe-")
	if err != nil {
		for name, field := range map[string]*bool{"ReadOnlyViews": &f.ReadOnlyViews, "AllXattrs": &f.AllXattrs, "DeviceNodes": &f.DeviceNodes} {
			m.fact(name, field, err)
		}
		return
	}
	defer os.RemoveAll(dir)
	m.fact("AllXattrs", &f.AllXattrs, probeXattrs(dir))
	m.fact("DeviceNodes", &f.DeviceNodes, probeDevice(filepath.Join(dir, "null")))
	m.fact("ReadOnlyViews", &f.ReadOnlyViews, probeBind(dir))
}

func probeXattrs(dir string) error {
	for _, name := range []string{"user.layerfs", "trusted.layerfs", "security.layerfs"} {
		if err := unix.Setxattr(dir, name, []byte("1"), 0); err != nil {
			return fmt.Errorf("setxattr %s: %w", name, err)
		}
	}
	return nil
}

func probeDevice(path string) error {
	return os.NewSyscallError("mknod", unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
}

func probeBind(dir string) error {
	if err := mount.Bind(dir, dir, mount.ReadOnly); err != nil {
		return err
	}
	return mount.Unmount(dir)
}

// Mount mounts a layer on itself if it must not be shown as it is.
func (m *mechanism) Mount(_ context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	path := m.Path(chain.Layer().ID)
	switch {
	case mode.IDMap != nil:
		return mountMapped(path, mode)
	case mode.ReadOnly && m.features.ReadOnlyViews:
		return mount.Bind(path, path, mount.ReadOnly)
	}
	// Nothing would be mounted here, so a layer that is gone must show now.
	_, err := os.Lstat(path)
	return err
}

func mountMapped(path string, mode lifecycle.Mode) error {
	f, err := mount.OpenTreeMapped(path, mode.IDMap)
	if err != nil {
		return err
	}
	defer f.Close()
	if mode.ReadOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(int(f.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return &os.PathError{Op: "mount_setattr", Path: path, Err: err}
		}
	}
	return mount.Attach(f, path)
}

func (m *mechanism) Unmount(_ context.Context, rec *lifecycle.Record) error {
	if !m.mounts() {
		return nil
	}
	err := mount.Unmount(m.Path(rec.ID))
	if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// mounts reports whether a layer can be mounted at all.
func (m *mechanism) mounts() bool { return m.features.ReadOnlyViews || m.features.IDMap }

func (m *mechanism) State(id string) (lifecycle.State, error) {
	if !m.mounts() {
		return lifecycle.State{}, nil
	}
	st, err := mount.Query(m.Path(id))
	if errors.Is(err, fs.ErrNotExist) || !st.MountPoint {
		return lifecycle.State{}, ignoreNotExist(err)
	}
	return lifecycle.State{Mounted: true, ReadOnly: st.ReadOnly}, err
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (m *mechanism) Mounted() ([]string, error) {
	if !m.mounts() {
		return nil, nil
	}
	list, err := mount.Under(m.dir)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(m.dir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, p := range list {
		if filepath.Dir(p.Mountpoint) == dir {
			ids = append(ids, filepath.Base(p.Mountpoint))
		}
	}
	return ids, nil
}

// usage counts allocated blocks and files; a hard link counts once.
func usage(ctx context.Context, dir string) (u layerfs.Usage, err error) {
	type inode struct{ dev, ino uint64 }
	seen := make(map[inode]bool)
	err = tree.Walk(ctx, dir, func(e *tree.Entry) error {
		if !e.IsDir() && e.Stat.Nlink > 1 {
			key := inode{uint64(e.Stat.Dev), e.Stat.Ino}
			if seen[key] {
				return nil
			}
			seen[key] = true
		}
		const block = 512 // the unit of st_blocks, stat(2)
		u.Bytes += e.Stat.Blocks * block
		u.Inodes++
		return nil
	})
	return u, err
}

// syncTree syncs the whole file system: one call, where each file would be one.
func syncTree(_ context.Context, dir string) error { return sys.Syncfs(dir) }

func relabel(ctx context.Context, dir, label string) error { return tree.Relabel(ctx, dir, label) }

func isFull(err error) bool { return errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) }
