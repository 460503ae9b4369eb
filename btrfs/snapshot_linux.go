package btrfs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/undo"
)

// snapshotTree makes dst a writable snapshot of src with all subvolumes that
// are nested in it, which a plain snapshot replaces by empty directories. src
// must not be written meanwhile.
func (m *mechanism) snapshotTree(ctx context.Context, dst, src string) (err error) {
	nested, err := btrfs.Nested(src)
	if err != nil {
		return err
	}
	if err := btrfs.Snapshot(dst, src, false); err != nil || len(nested) == 0 {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.destroy(context.WithoutCancel(ctx), dst) })
	for _, n := range slices.Backward(nested) { // the holder before what it holds
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := snapshotNested(filepath.Join(dst, n.Path), filepath.Join(src, n.Path)); err != nil {
			return err
		}
	}
	for _, n := range nested {
		ro, err := btrfs.IsReadOnly(filepath.Join(src, n.Path))
		if err == nil && ro {
			err = btrfs.SetReadOnly(filepath.Join(dst, n.Path), true)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// snapshotNested puts a snapshot of src in the place of the empty directory at
// dst, and gives the directory above the times it had.
func snapshotNested(dst, src string) error {
	var st unix.Stat_t
	above := filepath.Dir(dst)
	if err := unix.Lstat(above, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: above, Err: err}
	}
	if err := unix.Rmdir(dst); err != nil {
		return &os.PathError{Op: "rmdir", Path: dst, Err: err}
	}
	if err := btrfs.Snapshot(dst, src, false); err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, above, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: above, Err: err}
	}
	return nil
}

// destroy removes the tree at path, with nested subvolumes.
// Nothing there is no error.
func (m *mechanism) destroy(ctx context.Context, path string) error {
	if m.plainRemoval() {
		err := btrfs.Destroy(path)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	is, err := btrfs.IsSubvolume(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !is {
		return os.RemoveAll(path)
	}
	var note func([]uint64) error
	if m.quotas == nil {
		note = func(ids []uint64) error {
			// A full disk must not keep anybody from removing something.
			if err := m.noteQgroups(ctx, ids); err != nil {
				m.log.Warn("qgroups of a removed subvolume are not noted", "driver", name, "path", path, "error", err)
			}
			return nil
		}
	}
	_, err = btrfs.DestroyAll(ctx, path, note)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EROFS) {
		err = emptyAndRemove(path)
	}
	if m.quotas == nil {
		m.removedOne()
	}
	return err
}

// plainRemoval reports whether one call usually removes a subvolume: unless some
// are nested in it, as there are no qgroups.
func (m *mechanism) plainRemoval() bool { return m.quotas != nil && m.removal == nil }

// emptyAndRemove removes a subvolume by removing its files, which is what a
// user may do without user_subvol_rm_allowed: rmdir(2) takes an empty one.
func emptyAndRemove(path string) error {
	nested, err := btrfs.Nested(path)
	if err != nil {
		return err
	}
	for _, n := range append(nested, btrfs.NestedSubvolume{}) {
		if err := setReadOnly(filepath.Join(path, n.Path), false); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(path); err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// Directories that their owner may not enter.
	err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			return os.Chmod(p, 0o700)
		}
		return nil // what fails shows when the tree is removed
	})
	return errors.Join(err, os.RemoveAll(path))
}

// setReadOnly sets or clears the flag. It costs a commit if it changes.
func setReadOnly(path string, on bool) error {
	err := btrfs.SetReadOnly(path, on)
	if errors.Is(err, unix.EPERM) && !on {
		return fmt.Errorf("%s: a send stream of it is being made, or it is another user's: %w", path, err)
	}
	return err
}

// temporary returns a new path in the directory of snapshots. Whoever uses it
// holds its lock; a path whose lock is free is what a crash left.
func (m *mechanism) temporary(id string) (path string, unlock func(), err error) {
	name := id + "." + rand.Text()
	unlock, err = m.dir.Lock(context.Background(), snapshotLock(name))
	if err != nil {
		return "", nil, err
	}
	return filepath.Join(m.snapshots(), name), unlock, nil
}

// snapshotLock is the name under which a snapshot is locked; no layer can have
// it, as ids do not begin with a dot.
func snapshotLock(name string) string { return ".snapshot." + name }

// sweep removes the snapshots of processes that died, and what they were about
// to put in the place of layers.
func (m *mechanism) sweep() error {
	entries, err := os.ReadDir(m.snapshots())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := m.sweepOne(snapshotLock(e.Name()), filepath.Join(m.snapshots(), e.Name())); err != nil {
			return err
		}
	}
	builds, err := m.dir.Builds()
	if err != nil {
		return err
	}
	for _, id := range builds {
		if err := m.sweepOne(id, m.dir.BuildPath(id)); err != nil {
			return err
		}
	}
	return nil
}

// sweepOne removes a subvolume unless somebody has its lock.
func (m *mechanism) sweepOne(lock, path string) error {
	unlock, ok, err := m.dir.TryLock(lock)
	if err != nil || !ok {
		return err
	}
	defer unlock()
	if err := m.destroy(context.Background(), path); err != nil {
		return err
	}
	m.log.Info("recovered", "driver", name, "path", path, "reason", "its process died", "repair", "delete it")
	return nil
}

// snapshot takes a read-only snapshot of a layer, without what is nested.
func (m *mechanism) snapshot(ctx context.Context, id string) (path string, release func() error, err error) {
	path, unlock, err := m.temporary(id)
	if err != nil {
		return "", nil, err
	}
	if err := btrfs.Snapshot(path, m.Path(id), true); err != nil {
		unlock()
		return "", nil, err
	}
	m.at("changes: snapshot taken")
	return path, func() error {
		defer unlock()
		return m.destroy(context.WithoutCancel(ctx), path)
	}, nil
}

// still returns a read-only subvolume with the content of a layer: itself if
// it stays read-only while it is pinned, else a snapshot.
func (m *mechanism) still(ctx context.Context, rec *lifecycle.Record, hasChild bool) (path string, release func() error, err error) {
	path = m.Path(rec.ID)
	if hasChild || rec.ReadOnly && rec.Sealed {
		ro, err := btrfs.IsReadOnly(path)
		if err != nil {
			return "", nil, err
		}
		// A mount on it shows other owners than it has.
		mounted, err := mount.IsMountPoint(path)
		if err != nil {
			return "", nil, err
		}
		if ro && !mounted {
			return path, func() error { return nil }, nil
		}
	}
	return m.snapshot(ctx, rec.ID)
}
