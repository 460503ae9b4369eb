package zfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
)

// Everything that differs between the systems in mounting is in this file and
// in its counterpart for FreeBSD.

// kernelMounts reports whether the kernel has the file system. With zfs-fuse
// the daemon mounts.
func kernelMounts() bool { return kernelHas("zfs") }

// kernelHas reports whether the kernel has a file system.
func kernelHas(name string) bool {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if _, fstype, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "\t"); ok && fstype == name {
			return true
		}
	}
	return false
}

// labels returns why a layer cannot have a mount label, which nothing else would
// tell: ZFS takes the option and does nothing if SELinux has not taken it before
// (zfsvfs_parse_option, module/os/linux/zfs/zfs_vfsops.c).
func (m *mechanism) labels() error {
	why := ""
	switch {
	case !m.facts.Kernel:
		why = "the file system is served by a daemon"
	case !kernelHas("selinuxfs"): // it is there if SELinux was on at boot (init_sel_fs)
		why = "SELinux is off, and ZFS would ignore it"
	case !selinuxPolicy():
		why = "SELinux has no policy"
	default:
		return nil
	}
	return &layerfs.UnsupportedError{Feature: "a mount label", Reason: why}
}

// selinuxPolicy reports whether SELinux, which is on, has been given a policy. Until
// then each process has the initial context "kernel" (security_sid_to_context).
func selinuxPolicy() bool {
	b, err := os.ReadFile("/proc/self/attr/current")
	return err == nil && strings.Contains(string(b), ":")
}

// fullProperties are the properties with which a layer keeps everything: ACLs,
// and xattrs in the file itself, where zfs diff tells of their changes
// (zfsprops(7), xattr).
func fullProperties() map[string]string {
	return map[string]string{"acltype": "posixacl", "xattr": "sa"}
}

// withoutDiff says why Changes does not use zfs diff here even where it works: no
// reason on Linux.
func withoutDiff() string { return "" }

func isZFS(fstype string) bool { return fstype == "zfs" || fstype == "fuse.zfs" }

// datasetAt returns the dataset that is mounted at path or nearest above it.
func datasetAt(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	st, err := mount.Query(path)
	if err != nil {
		return "", err
	}
	list, err := mount.Under("/")
	if err != nil {
		return "", err
	}
	found, fstype, longest := "", "", -1
	for _, info := range list {
		at := strings.TrimSuffix(info.Mountpoint, "/") + "/"
		if !strings.HasPrefix(path+"/", at) || len(at) < longest || st.ID != 0 && st.MountPoint && uint64(info.ID) != st.ID && info.Mountpoint == path {
			continue
		}
		found, fstype, longest = info.Source, info.FSType, len(at)
	}
	if !isZFS(fstype) {
		return "", &layerfs.UnsupportedError{Feature: name, Reason: fmt.Sprintf("%s is on %s, and no dataset is given", path, fstype)}
	}
	return found, nil
}

// Mount shows a layer at its path.
func (m *mechanism) Mount(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	if !mode.ReadOnly {
		if err := m.forget(ctx, chain.Layer().ID); err != nil {
			return err
		}
	}
	return m.show(ctx, chain.Layer(), m.Path(chain.Layer().ID), mode)
}

// show mounts a layer, whose lock is held, at target.
//
// The file system itself is always writable and a mount of it is made
// read-only: all mounts of one dataset share one superblock, and the kernel
// refuses a second mount with another flag (zpl_mount_impl).
func (m *mechanism) show(ctx context.Context, rec *lifecycle.Record, target string, mode lifecycle.Mode) (err error) {
	if m.facts.Kernel && !mode.ReadOnly && mode.IDMap == nil {
		return m.mountDataset(ctx, rec, target)
	}
	source, done, err := m.source(ctx, rec)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, done())
	}()
	if mode.IDMap != nil {
		return showMapped(source, target, mode)
	}
	var flags mount.Flags
	if mode.ReadOnly {
		flags |= mount.ReadOnly
	}
	if err := mount.Bind(source, target, flags); err != nil {
		return err
	}
	if mode.ReadOnly {
		return nil
	}
	return m.makeWritable(target)
}

// makeWritable undoes the read-only flag that a mount has from its source.
func (m *mechanism) makeWritable(target string) error {
	st, err := mount.Query(target)
	if err != nil || !st.ReadOnly {
		return err
	}
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, &attr); err != nil {
		return errors.Join(&os.PathError{Op: "mount_setattr", Path: target, Err: err}, m.hide(target))
	}
	return nil
}

func showMapped(source, target string, mode lifecycle.Mode) error {
	tree, err := mount.OpenTreeMapped(source, mode.IDMap)
	if err != nil {
		return err
	}
	defer tree.Close()
	if mode.ReadOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return &os.PathError{Op: "mount_setattr", Path: tree.Name(), Err: err}
		}
	}
	return mount.Attach(tree, target)
}

// source returns a place where a layer is mounted. A dataset can be mounted
// once by the zfs-fuse daemon, so a mount that is there is used; those of this
// package come and go with the layer's lock held.
func (m *mechanism) source(ctx context.Context, rec *lifecycle.Record) (path string, done func() error, err error) {
	stage := m.stage(rec.ID)
	if !m.facts.Kernel {
		at, err := m.mountedAt(m.dataset(rec.ID))
		if err != nil {
			return "", nil, err
		}
		for _, path := range at {
			if path != stage {
				return path, func() error { return nil }, nil
			}
		}
		if len(at) > 0 { // a crash's
			return stage, func() error { return m.unstage(stage) }, nil
		}
	}
	if err := os.MkdirAll(stage, 0o700); err != nil {
		return "", nil, err
	}
	if m.facts.Kernel {
		err = m.mountDataset(ctx, rec, stage)
	} else {
		err = m.mountByDaemon(ctx, rec.ID)
	}
	if err != nil {
		return "", nil, errors.Join(err, m.unstage(stage))
	}
	return stage, func() error { return m.unstage(stage) }, nil
}

func (m *mechanism) unstage(stage string) error {
	if err := m.hide(stage); err != nil {
		return err
	}
	return removeDir(stage)
}

// mountDataset has the kernel mount a dataset. Right after its last unmount it
// may still be busy.
func (m *mechanism) mountDataset(ctx context.Context, rec *lifecycle.Record, target string) error {
	if err := m.answers(); err != nil {
		return err
	}
	return m.patiently(ctx, func() error {
		return mount.Mount("zfs", m.dataset(rec.ID), target, 0, mountOptions(rec))
	})
}

// mountOptions are those of a layer's dataset.
func mountOptions(rec *lifecycle.Record) []string {
	if rec.MountLabel == "" {
		return nil
	}
	return []string{"context=" + rec.MountLabel}
}

// mountedAt returns the places of this package where a dataset is mounted,
// oldest first.
func (m *mechanism) mountedAt(ds string) ([]string, error) {
	list, err := mount.Under(m.home)
	if err != nil {
		return nil, err
	}
	var at []string
	for _, info := range list {
		if isZFS(info.FSType) && info.Source == ds && info.Root == "/" {
			at = append(at, info.Mountpoint)
		}
	}
	return at, nil
}

// hide unmounts what is mounted at path: at once, so that the dataset is free,
// or detached where somebody still works in it.
func (m *mechanism) hide(path string) error {
	var err error
	if m.facts.Kernel {
		err = mount.UnmountNow(path)
		if errors.Is(err, unix.EBUSY) {
			err = mount.Unmount(path)
		}
	} else {
		err = m.hideFromDaemon(path)
	}
	if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Unmount undoes Mount.
func (m *mechanism) Unmount(_ context.Context, rec *lifecycle.Record) error {
	return m.hide(m.Path(rec.ID))
}

// State looks at a layer's path.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	mounted, err := mount.IsMountPoint(m.Path(id))
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	st, err := mount.Query(m.Path(id))
	if errors.Is(err, unix.ENOTCONN) { // the daemon died
		return lifecycle.State{Mounted: true}, nil
	}
	return lifecycle.State{Mounted: st.MountPoint, ReadOnly: st.ReadOnly}, err
}

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	graph, err := filepath.EvalSymlinks(m.graph())
	if err != nil {
		return nil, err
	}
	list, err := mount.Under(graph)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, info := range list {
		if filepath.Dir(info.Mountpoint) == graph {
			ids = append(ids, filepath.Base(info.Mountpoint))
		}
	}
	return ids, nil
}

// probeMount tries what the file system mounted at path can hold.
func probeMount(path string) (xattrs, devices, idmap string) {
	value := make([]byte, 64)
	for _, name := range []string{"user.layerfs", "trusted.layerfs", "security.layerfs"} {
		if err := unix.Setxattr(path, name, value, 0); err != nil {
			xattrs = fmt.Sprintf("setxattr %s: %v", name, err)
			break
		}
		if n, err := unix.Getxattr(path, name, value[:16]); !errors.Is(err, unix.ERANGE) {
			xattrs = fmt.Sprintf("getxattr %s into a short buffer: %d bytes, %v", name, n, err)
			break
		}
		_ = unix.Removexattr(path, name) // the file system is destroyed in a moment
	}
	node := filepath.Join(path, "null")
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		devices = fmt.Sprintf("mknod: %v", err)
	} else if err := os.Remove(node); err != nil {
		devices = err.Error()
	}
	idmap = reason(new(feature.Prober).Probe(feature.IDMap, path))
	return xattrs, devices, idmap
}

// filesIn counts the objects of the file system that is mounted at path.
func filesIn(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Files - st.Ffree), nil
}

// syncMount writes what the kernel still has of a layer that is mounted at
// path.
func syncMount(path string) error {
	mounted, err := mount.IsMountPoint(path)
	if err != nil || !mounted {
		return err
	}
	return sys.Syncfs(path)
}
