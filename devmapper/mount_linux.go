package devmapper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
)

// Path returns where a layer is mounted.
func (m *mechanism) Path(id string) string { return filepath.Join(m.home, "mnt", id) }

// frozen reports whether nobody can write a layer any more. Then its device is
// read-only, and so is its file system. A layer that can still be written has
// one writable file system for all its mounts, whatever they allow: the kernel
// has one superblock for a device.
func (m *mechanism) frozen(rec *lifecycle.Record) (bool, error) {
	if rec.ReadOnly && rec.Sealed {
		return true, nil
	}
	return m.dir.HasChildren(rec.ID)
}

// Mount shows a layer at its path.
func (m *mechanism) Mount(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	rec := chain.Layer()
	tree, err := m.open(ctx, rec, mode.ReadOnly)
	if err != nil {
		return err
	}
	err = m.attachTree(tree, rec.ID, mode)
	if err == nil {
		return tree.Close()
	}
	if cerr := m.release(tree, rec.ID); cerr != nil {
		err = fmt.Errorf("%w (rollback: %v)", err, cerr)
	}
	return err
}

// attachTree attaches a mount at the path of a layer.
func (m *mechanism) attachTree(tree *os.File, id string, mode lifecycle.Mode) error {
	path := m.Path(id)
	if err := unix.Mkdir(path, 0o700); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	m.step("mount: attach")
	if mode.IDMap == nil {
		return mount.Attach(tree, path)
	}
	// The mount is nowhere yet, as mapping its owners needs it to be.
	ns, err := mount.UserNamespace(mode.IDMap)
	if err != nil {
		return err
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return &os.PathError{Op: "mount_setattr", Path: path, Err: err}
	}
	return mount.Attach(tree, path)
}

// release closes the tree of a layer, whose lock the caller has, and removes
// the device if the kernel is not to do it and nobody else uses it.
func (m *mechanism) release(tree *os.File, id string) error {
	err := tree.Close()
	if !m.opts.NoDeferredRemoval {
		return err
	}
	if st, serr := m.State(id); serr != nil || st.Mounted {
		return errors.Join(err, serr)
	}
	return errors.Join(err, m.dropQuietly(id))
}

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// sbMode says how a superblock is mounted.
type sbMode bool

const (
	sbReadOnly sbMode = false
	sbWritable sbMode = true
)

// open activates and mounts a layer, whose lock the caller has, nowhere: the
// mount lasts as long as the file, unless it is attached.
func (m *mechanism) open(ctx context.Context, rec *lifecycle.Record, readOnly bool) (*os.File, error) {
	d, err := m.load(rec.ID)
	if err != nil {
		return nil, err
	}
	frozen, err := m.frozen(rec)
	if err != nil {
		return nil, err
	}
	if d.State != "" {
		// Its content has a name by which others know it.
		if readOnly {
			frozen = true
		} else if !frozen {
			d.State = ""
			if err := m.save(m.devicePath(rec.ID), d); err != nil {
				return nil, err
			}
		}
	}
	name := m.deviceName(rec.ID, false)
	tree, err := m.openDevice(ctx, name, d, frozen, readOnly, rec.MountLabel)
	if err != nil || frozen {
		return tree, err
	}
	if !readOnly {
		if d.FSSize < d.Size {
			err = m.growFS(tree, rec.ID, d)
		}
		if err == nil {
			err = m.tick(ctx, d)
		}
	}
	if err != nil {
		return nil, errors.Join(err, m.release(tree, rec.ID))
	}
	return tree, nil
}

// tick waits until the clock of change times has moved on since the snapshot
// was taken. So no change of the layer has the change time that the file had
// in the parent, and equal change times say that a file is the same.
func (m *mechanism) tick(ctx context.Context, d device) error {
	for d.Since == coarse() {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// openDevice activates and mounts a device. With frozen set it is active
// read-only, unless it is active already.
func (m *mechanism) openDevice(ctx context.Context, name string, d device, frozen, readOnly bool, label string) (*os.File, error) {
	info, err := m.activate(ctx, name, d, frozen)
	if err != nil {
		return nil, err
	}
	m.step("open: active")
	tree, err := m.mountInfo(info, readOnly, label, false)
	if frozen && d.State != "" && errors.Is(err, unix.EROFS) {
		// The log is that of a file system that was frozen: everything in it
		// is in its place too. It must not be played back, for the content has
		// a name.
		tree, err = m.mountInfo(info, true, label, true)
	} else if frozen && errors.Is(err, unix.EROFS) {
		// It was not unmounted before a power failure, so its log must be
		// played back once.
		if err := m.playLog(ctx, name, d); err != nil {
			return nil, fmt.Errorf("play back the log: %w", err)
		}
		if info, err = m.activate(ctx, name, d, true); err != nil {
			return nil, err
		}
		tree, err = m.mountInfo(info, true, label, false)
	}
	if err == nil && !m.opts.NoDeferredRemoval {
		m.step("open: mounted")
		_, err = m.ctl.RemoveDeferred(name)
		if err != nil {
			err = errors.Join(err, tree.Close())
		}
	}
	if err != nil {
		if rerr := m.drop(context.WithoutCancel(ctx), name); rerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, rerr)
		}
		return nil, err
	}
	return tree, nil
}

// mountInfo mounts an active device. Whether its file system is writable is
// decided by the device. noLog leaves the log of a read-only one alone.
func (m *mechanism) mountInfo(info dm.Info, readOnly bool, label string, noLog bool) (*os.File, error) {
	path, err := m.nodes.Path(info.Device)
	if err != nil {
		return nil, err
	}
	flags, _ := mount.ParseOptions(m.opts.MountOptions...)
	attr := attributes(flags)
	if readOnly || info.ReadOnly {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	tree, err := m.mountDevice(path, sbMode(!info.ReadOnly), attr, label, noLog)
	if err != nil {
		return nil, err
	}
	if err := m.limitRetries(info.Device); err != nil {
		return nil, errors.Join(err, tree.Close())
	}
	return tree, nil
}

// attributes are the mount attributes of flags.
func attributes(f mount.Flags) int {
	attr := 0
	for _, a := range []struct {
		flag mount.Flags
		attr int
	}{
		{mount.NoSuid, unix.MOUNT_ATTR_NOSUID},
		{mount.NoDev, unix.MOUNT_ATTR_NODEV},
		{mount.NoExec, unix.MOUNT_ATTR_NOEXEC},
		{mount.NoAtime, unix.MOUNT_ATTR_NOATIME},
		{mount.NoDirAtime, unix.MOUNT_ATTR_NODIRATIME},
		{mount.StrictAtime, unix.MOUNT_ATTR_STRICTATIME},
		{mount.NoSymFollow, 0x200000}, // MOUNT_ATTR_NOSYMFOLLOW
	} {
		if f&a.flag != 0 {
			attr |= a.attr
		}
	}
	return attr
}

// mountDevice mounts a device nowhere.
func (m *mechanism) mountDevice(path string, mode sbMode, attr int, label string, noLog bool) (_ *os.File, err error) {
	fd, err := unix.Fsopen(m.opts.FS, unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENODEV) {
			return nil, &layerfs.UnsupportedError{Feature: "file system " + m.opts.FS, Reason: "not in this kernel"}
		}
		return nil, &os.PathError{Op: "fsopen", Path: m.opts.FS, Err: err}
	}
	defer unix.Close(fd)
	set := func(key, value string, flag bool) {
		if err != nil {
			return
		}
		if flag {
			err = unix.FsconfigSetFlag(fd, key)
		} else {
			err = unix.FsconfigSetString(fd, key, value)
		}
		err = m.explain(fd, "fsconfig "+key, path, err)
	}
	set("source", path, false)
	if mode == sbReadOnly {
		set("ro", "", true)
	}
	switch m.opts.FS {
	case "xfs":
		set("nouuid", "", true)
		if noLog {
			set("norecovery", "", true)
		}
	case "ext4":
		set("noinit_itable", "", true)
		if noLog {
			set("noload", "", true)
		}
	}
	_, rest := mount.ParseOptions(m.opts.MountOptions...)
	for _, o := range rest {
		key, value, isValue := strings.Cut(o, "=")
		set(key, value, !isValue)
	}
	if label != "" {
		set("context", label, false)
	}
	if err == nil {
		err = m.explain(fd, "mount", path, unix.FsconfigCreate(fd))
	}
	if err != nil {
		return nil, err
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return nil, m.explain(fd, "fsmount", path, err)
	}
	return os.NewFile(uintptr(mnt), path), nil
}

// explain adds the kernel's messages to an error. Each read gives one, after
// a letter and a space.
func (m *mechanism) explain(fd int, op, path string, err error) error {
	if err == nil {
		return nil
	}
	var lines []string
	buf := make([]byte, 4096)
	for range 16 {
		n, rerr := unix.Read(fd, buf)
		if rerr != nil || n < 3 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[2:n])))
	}
	if len(lines) > 0 {
		err = fmt.Errorf("%s: %w", strings.Join(lines, "; "), err)
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

// activate makes a layer's device active, or takes the one that is.
func (m *mechanism) activate(ctx context.Context, name string, d device, frozen bool) (dm.Info, error) {
	for try := 0; ; try++ {
		info, err := m.ctl.Info(name)
		switch {
		case errors.Is(err, unix.ENXIO):
			info, err := m.activateThin(name, m.thinUUID(d.ID), d.ID, d.Size, frozen)
			if errors.Is(err, unix.ENODATA) {
				err = fmt.Errorf("device %d of the layer is not in the pool: %w", d.ID, err)
			}
			return info, err
		case err != nil:
			return info, err
		}
		again, err := m.reuse(ctx, &info, name, d, frozen)
		if err != nil || !again {
			return info, err
		}
		if try == 100 { // each time something has gone away
			return info, fmt.Errorf("device %s keeps changing: %w", name, unix.EBUSY)
		}
	}
}

// reuse looks whether an active device will do. again says that it is gone.
func (m *mechanism) reuse(ctx context.Context, info *dm.Info, name string, d device, frozen bool) (again bool, err error) {
	if info.UUID != m.thinUUID(d.ID) {
		return true, m.makeWay(ctx, *info, name, d)
	}
	if !info.Live || info.Opens == 0 && info.ReadOnly != frozen {
		return true, m.removeDevice(ctx, name)
	}
	if info.ReadOnly && !frozen {
		return false, fmt.Errorf("a reader still has the layer from when it was frozen: %w", layerfs.ErrInUse)
	}
	if info.DeferredRemove {
		if err := m.ctl.CancelDeferred(name); err != nil {
			return errors.Is(err, unix.ENXIO), ignore(err, unix.ENXIO)
		}
	}
	if info.Suspended {
		if err := m.resumeLeft(name); err != nil {
			return false, err
		}
	}
	return false, m.stretch(name, d, info.ReadOnly)
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

// makeWay handles a device that has the name but is another: what the layer had
// before Apply or Rollback and open files keep, or somebody else's.
func (m *mechanism) makeWay(ctx context.Context, info dm.Info, name string, d device) error {
	if !strings.HasPrefix(info.UUID, m.uuidOf("")) {
		return fmt.Errorf("a device %s exists that is not of this root (uuid %q)", name, info.UUID)
	}
	if info.Opens == 0 {
		return m.removeDevice(ctx, name)
	}
	number := strings.TrimPrefix(info.UUID, m.uuidOf(""))
	return ignore(m.ctl.Rename(name, m.deviceName("+old-"+number, false)), unix.ENXIO)
}

// stretch gives an active device the size its layer has by now.
func (m *mechanism) stretch(name string, d device, readOnly bool) error {
	ts, err := m.ctl.Table(name, false)
	if err != nil {
		return err
	}
	if len(ts) == 1 && int64(ts[0].Length)*dm.SectorSize >= d.Size {
		return nil
	}
	t, err := dm.Thin{Length: uint64(d.Size) / dm.SectorSize, Pool: m.poolDev.String(), ID: d.ID}.Target()
	if err != nil {
		return err
	}
	if _, err := m.ctl.Load(name, []dm.Target{t}, readOnly); err != nil {
		return err
	}
	m.step("grow: loaded")
	_, err = m.ctl.Resume(name, dm.SuspendOptions{})
	return err
}

// playLog mounts a device for writing and unmounts it.
func (m *mechanism) playLog(ctx context.Context, name string, d device) error {
	if err := m.removeDevice(ctx, name); err != nil {
		return err
	}
	info, err := m.activateThin(name, m.thinUUID(d.ID), d.ID, d.Size, false)
	if err != nil {
		return err
	}
	tree, err := m.mountInfo(info, true, "", false)
	if err == nil {
		err = tree.Close()
	}
	return errors.Join(err, m.removeDevice(ctx, name))
}

// limitRetries sets how often xfs retries when the pool is full.
//
// Source: Documentation/admin-guide/xfs.rst, error handling.
func (m *mechanism) limitRetries(d dm.Device) error {
	if m.opts.XFSNoSpaceRetries == nil {
		return nil
	}
	dir := "/sys/fs/xfs/dm-" + strconv.FormatUint(uint64(d.Minor), 10) + "/error/metadata/ENOSPC"
	return os.WriteFile(dir+"/max_retries", []byte(strconv.Itoa(*m.opts.XFSNoSpaceRetries)), 0)
}

// Unmount undoes Mount.
func (m *mechanism) Unmount(ctx context.Context, rec *lifecycle.Record) error {
	err := mount.Unmount(m.Path(rec.ID))
	if err != nil && !errors.Is(err, mount.ErrNotMounted) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	m.step("unmount: detached")
	return m.drop(ctx, m.deviceName(rec.ID, false))
}

// State looks at a layer's path.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	mounted, err := mount.IsMountPoint(m.Path(id))
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	st, err := mount.Query(m.Path(id))
	return lifecycle.State{Mounted: st.MountPoint, ReadOnly: st.ReadOnly}, err
}

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	dir := m.Path("")
	infos, err := mount.Under(dir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, info := range infos {
		if parent, id := filepath.Split(info.Mountpoint); filepath.Clean(parent) == dir {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// View mounts a layer nowhere. It takes the lock of the layer for the moment.
func (m *mechanism) View(ctx context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	rec := chain.Layer()
	unlock, err := m.dir.Lock(ctx, rec.ID)
	if err != nil {
		return lifecycle.View{}, err
	}
	defer unlock()
	tree, err := m.open(ctx, rec, true)
	if err != nil {
		return lifecycle.View{}, err
	}
	release := tree.Close
	if m.opts.NoDeferredRemoval {
		release = func() error {
			unlock, err := m.dir.Lock(context.Background(), rec.ID)
			if err != nil {
				return err
			}
			defer unlock()
			return m.release(tree, rec.ID)
		}
	}
	// The dot makes it a directory to those who do not follow links.
	return lifecycle.View{Path: procPath(tree) + "/.", Release: release}, nil
}

// dropQuietly removes a device unless another reader has it.
func (m *mechanism) dropQuietly(id string) error {
	return ignore(m.drop(context.Background(), m.deviceName(id, false)), layerfs.ErrInUse)
}
