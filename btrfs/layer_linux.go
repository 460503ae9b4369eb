package btrfs

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/internal/undo"
)

// Create makes the subvolume in its place at once: the ioctl is one step, and
// without a record it is no layer.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, _ *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota.Bytes = m.opts.Size
	}
	if rec.MountLabel == "" {
		rec.MountLabel = m.opts.MountLabel
	}
	if len(parent) == 0 {
		return m.build(ctx, rec, makeEmpty)
	}
	src := parent.Layer().ID
	return m.build(ctx, rec, func(path string) error {
		nested, err := m.subvolumes.FreezeAndSnapshot(rec.ID, src)
		if err != nil || !nested {
			return err
		}
		return m.snapshotTree(ctx, path, m.Path(src))
	})
}

// makeEmpty makes the tree of a base layer.
func makeEmpty(path string) error {
	if err := btrfs.Create(path); err != nil {
		return err
	}
	return os.Chmod(path, 0o755) // whatever the umask
}

// build makes the subvolume of a new layer by a function and finishes it.
func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, fill func(path string) error) (err error) {
	if err := m.checkQuota(rec.Quota); err != nil {
		return err
	}
	path := m.Path(rec.ID)
	m.at("create: nothing but the note with the parent")
	err = fill(path)
	if errors.Is(err, fs.ErrExist) { // without a record, so a crash left it
		if err := m.destroy(ctx, path); err != nil {
			return err
		}
		err = fill(path)
	}
	if err != nil {
		return quotaError(err)
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.destroy(context.WithoutCancel(ctx), path) })
	m.at("create: subvolume, no record")
	if err := relabel(ctx, path, rec); err != nil {
		return err
	}
	if err := m.limit(ctx, path, rec, rec.Quota); err != nil {
		return err
	}
	if rec.ReadOnly {
		return setReadOnly(path, true)
	}
	if rec.Parent == "" && m.opts.Durability != layerfs.DurabilityNone {
		// A snapshot is durable when it is made, an empty subvolume is not, and
		// the log of the record's fsync would not hold it.
		return btrfs.Commit(path)
	}
	return nil
}

// relabel gives everything at path the label of a layer, if that has one, also
// what is in read-only subvolumes.
func relabel(ctx context.Context, path string, rec *lifecycle.Record) (failed error) {
	if rec.MountLabel == "" {
		return nil
	}
	nested, err := btrfs.Nested(path)
	if err != nil {
		return err
	}
	for _, n := range nested {
		at := filepath.Join(path, n.Path)
		ro, err := btrfs.IsReadOnly(at)
		if err == nil && ro {
			err = setReadOnly(at, false)
		}
		if err != nil {
			return err
		}
		if ro {
			defer func() { failed = errors.Join(failed, setReadOnly(at, true)) }()
		}
	}
	return quotaError(tree.Relabel(ctx, path, rec.MountLabel))
}

// DeletesByID reports that all of a layer is found by its id; the kernel knows
// the qgroup.
func (m *mechanism) DeletesByID(*lifecycle.Record) bool { return true }

// Delete removes the subvolumes of a layer.
func (m *mechanism) Delete(ctx context.Context, rec *lifecycle.Record) error {
	m.at("remove: no record, subvolume")
	// Left by a process that died; the mount would go with the subvolume.
	st, err := m.State(rec.ID)
	if err == nil && st.Mounted {
		err = m.Unmount(ctx, rec)
	}
	if err != nil {
		return err
	}
	if !m.plainRemoval() || m.subvolumes.Destroy(rec.ID) != nil {
		err = m.destroy(ctx, m.Path(rec.ID))
	}
	m.at("remove: neither")
	if m.dir.NoBuild(rec.ID) {
		return err
	}
	return errors.Join(err, m.destroy(ctx, m.dir.BuildPath(rec.ID)))
}

// Stored lists what is in the directories.
func (m *mechanism) Stored(context.Context) ([]string, error) {
	entries, err := os.ReadDir(m.layers())
	if err != nil {
		return nil, err
	}
	ids, err := m.dir.Builds()
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids, err
}

// Find tells whether the subvolume of a layer is there.
func (m *mechanism) Find(_ context.Context, rec *lifecycle.Record) error {
	is, err := btrfs.IsSubvolume(m.Path(rec.ID))
	if err == nil && !is {
		err = &fs.PathError{Op: "find layer", Path: m.Path(rec.ID), Err: errors.New("no subvolume")}
	}
	return err
}

// Mount sets the flag that fits, and mounts only to map owners.
func (m *mechanism) Mount(_ context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	path := m.Path(chain.Layer().ID)
	if err := setReadOnly(path, mode.ReadOnly); err != nil {
		return err
	}
	if mode.IDMap == nil {
		return nil
	}
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

// Unmount takes the mount of mapped owners away. The flag stays: the layer may
// be frozen, and the next Mount sets it right.
func (m *mechanism) Unmount(_ context.Context, rec *lifecycle.Record) error {
	if !m.features.IDMap {
		return nil
	}
	err := mount.Unmount(m.Path(rec.ID))
	if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// State looks at a layer's path.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	if !m.features.IDMap {
		return lifecycle.State{}, nil
	}
	mounted, err := mount.IsMountPoint(m.Path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return lifecycle.State{}, nil
	}
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	st, err := mount.Query(m.Path(id))
	return lifecycle.State{Mounted: st.MountPoint, ReadOnly: st.ReadOnly}, err
}

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	if !m.features.IDMap {
		return nil, nil
	}
	list, err := mount.Under(m.layers())
	if err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(m.layers())
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

// Mounts holds a layer and returns the bind mount that shows it.
func (d *Driver) Mounts(ctx context.Context, id string, opts *layerfs.GetOptions) ([]layerfs.Mount, error) {
	var mounts []layerfs.Mount
	err := lifecycle.Plan(ctx, d.frame, id, opts, func(_ context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
		if mode.IDMap != nil {
			return &layerfs.UnsupportedError{Feature: "mapping of owners without mounting", Reason: "mount(2) has no option for it"}
		}
		rw := "rw"
		if mode.ReadOnly {
			rw = "ro"
		}
		mounts = []layerfs.Mount{{Type: "bind", Source: d.m.Path(id), Options: []string{"rbind", rw}}}
		return setReadOnly(d.m.Path(id), mode.ReadOnly)
	})
	return mounts, err
}

// View is the tree itself, or where its owners are mapped a snapshot.
func (m *mechanism) View(ctx context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	id := chain.Layer().ID
	st, err := m.State(id)
	if err != nil {
		return lifecycle.View{}, err
	}
	if !st.Mounted {
		return lifecycle.View{Path: m.Path(id), Release: func() error { return nil }}, nil
	}
	path, unlock, err := m.temporary(id)
	if err != nil {
		return lifecycle.View{}, err
	}
	if err := m.snapshotTree(ctx, path, m.Path(id)); err != nil {
		unlock()
		return lifecycle.View{}, err
	}
	return lifecycle.View{Path: path, Release: func() error {
		defer unlock()
		return m.destroy(context.WithoutCancel(ctx), path)
	}}, nil
}

// Sync writes the file system back: btrfs commits all subvolumes at once.
func (m *mechanism) Sync(_ context.Context, rec *lifecycle.Record) error {
	return btrfs.Sync(m.Path(rec.ID))
}

// Apply fills a snapshot, which then takes the place of the layer: if it fails,
// the layer is what it was.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (res layerfs.ApplyResult, err error) {
	rec := chain.Layer()
	var u undo.Stack
	defer u.Run(&err)
	build, err := m.aside(ctx, rec, &u, func(path string) error {
		return m.snapshotTree(ctx, path, m.Path(rec.ID))
	})
	if err != nil {
		return res, err
	}
	if res, err = archive.Apply(ctx, build, r, &archive.ApplyOptions{ApplyOptions: *opts, Form: archive.Merged}); err != nil {
		if errors.Is(err, unix.ENOSPC) {
			m.reclaim(ctx, build)
		}
		return res, quotaError(err)
	}
	// A file of the stream has the label the stream gives it, or what the kernel
	// takes from its directory.
	if err := relabel(ctx, build, rec); err != nil {
		return res, err
	}
	if m.opts.Durability == layerfs.DurabilityFull {
		if err := btrfs.Sync(build); err != nil {
			return res, err
		}
	}
	return res, m.replace(ctx, rec, build, touch)
}

// reclaim removes a subvolume that has filled the file system, and waits until
// its space is free: else not even a record could be written until the kernel
// gets round to it.
func (m *mechanism) reclaim(ctx context.Context, path string) {
	const patience = 20 * time.Second // a gigabyte takes about one
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	info, err := btrfs.Info(path)
	if err == nil {
		err = m.destroy(ctx, path)
	}
	if err == nil {
		err = btrfs.WaitCleaned(ctx, m.home, info.ID)
	}
	if err == nil {
		err = m.awaitSpace(ctx)
	}
	if err != nil {
		m.log.Warn("space of a failed apply is not free yet", "driver", name, "error", err)
	}
}

// awaitSpace waits until what writes a record succeeds again. The freed space is
// pinned until a commit, and what others wrote reserves more than it needs;
// with qgroups a cleaned subvolume's is removed after it, in another transaction
// (btrfs_qgroup_cleanup_dropped_subvolume), and meanwhile the kernel may refuse.
func (m *mechanism) awaitSpace(ctx context.Context) error {
	const longest = time.Second // between two commits
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, longest) {
		if err := btrfs.Sync(m.home); err != nil && !errors.Is(err, unix.ENOSPC) {
			return err
		}
		err := m.tryRecord()
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// tryRecord makes, syncs, renames and removes a file of the size of a record.
func (m *mechanism) tryRecord() error {
	path, unlock, err := m.temporary("space")
	if err != nil {
		return err
	}
	defer unlock()
	err = sys.WriteFile(path, make([]byte, 1024), 0o600, true)
	renamed := path + "."
	if err == nil {
		err = os.Rename(path, renamed)
	}
	for _, p := range []string{path, renamed} {
		if rerr := os.Remove(p); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = rerr
		}
	}
	return err
}

// aside makes a subvolume in the build directory, under the layer's quota.
func (m *mechanism) aside(ctx context.Context, rec *lifecycle.Record, u *undo.Stack, fill func(path string) error) (string, error) {
	discard := func(path string) error { return m.destroy(context.WithoutCancel(ctx), path) }
	build, err := m.dir.Build(rec.ID, discard)
	if err != nil {
		return "", err
	}
	if err := fill(build); err != nil {
		return "", quotaError(err)
	}
	u.Push(func() error { return discard(build) })
	m.at("aside: made")
	return build, m.limit(ctx, build, rec, rec.Quota)
}

// replace puts the subvolume at build in the place of a layer's.
func (m *mechanism) replace(ctx context.Context, rec *lifecycle.Record, build string, touch func() error) error {
	path := m.Path(rec.ID)
	is, err := btrfs.IsSubvolume(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	m.at("replace: the new one is whole")
	if is {
		// A read-only directory cannot be moved to another one.
		if err := setReadOnly(path, false); err != nil {
			return err
		}
	}
	err = m.exchange(build, path)
	switch {
	case err == nil:
		m.at("replace: exchanged")
		if derr := m.destroy(context.WithoutCancel(ctx), build); derr != nil {
			// It is what the next Apply or New removes.
			m.log.Warn("the former subvolume is not removed", "driver", name, "layer", rec.ID, "error", derr)
		}
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ENOENT):
		// The kernel cannot exchange subvolumes, or there is none to exchange.
		if err := touch(); err != nil {
			return err
		}
		if err := m.destroy(context.WithoutCancel(ctx), path); err != nil {
			return err
		}
		m.at("replace: the old one is gone")
		if err := os.Rename(build, path); err != nil {
			return err
		}
	default:
		return err
	}
	m.at("replace: done, no record")
	if rec.ReadOnly {
		return setReadOnly(path, true)
	}
	return nil
}

func (m *mechanism) exchange(a, b string) error {
	err := error(unix.EINVAL)
	if !m.noExchange {
		err = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return &os.LinkError{Op: "renameat2", Old: a, New: b, Err: err}
	}
	return nil
}

// Clone makes a layer with the content of another.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, _ *layerfs.CreateOptions) error {
		src := from.Layer()
		return d.m.build(ctx, rec, func(path string) error { return d.m.snapshotTree(ctx, path, d.m.Path(src.ID)) })
	})
}

// Rollback takes a new snapshot of the parent.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	return lifecycle.Rollback(ctx, d.frame, id, func(chain lifecycle.Chain) (err error) {
		rec := chain.Layer()
		var u undo.Stack
		defer u.Run(&err)
		build, err := d.m.aside(ctx, rec, &u, func(path string) error {
			if rec.Parent == "" {
				return makeEmpty(path)
			}
			return d.m.snapshotTree(ctx, path, d.m.Path(rec.Parent))
		})
		if err != nil {
			return err
		}
		if err := relabel(ctx, build, rec); err != nil {
			return err
		}
		return d.m.replace(ctx, rec, build, func() error { return nil }) // it is marked already
	})
}
