package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/copyup"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// Create makes the directories of a layer.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, opts *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota = m.opts.Quota
	}
	return m.build(ctx, rec, parent, func(dir string) error {
		if err := m.mkdir(rec.ID+"/upper", 0o755); err != nil {
			return err
		}
		return m.inherit(dir+"/upper", parent)
	})
}

// build makes a layer whose upper directory a function makes. It is made in its
// place: without a record it is no layer, however far it got.
func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, upper func(dir string) error) (err error) {
	err = m.mkdir(rec.ID, 0o711)
	if errors.Is(err, fs.ErrExist) { // without a record, so a crash left it
		if err := m.Delete(ctx, &lifecycle.Record{ID: rec.ID}); err != nil {
			return err
		}
		err = m.mkdir(rec.ID, 0o711)
	}
	if err != nil {
		return err
	}
	dir := m.layer(rec.ID)
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return os.RemoveAll(dir) })
	// Before anything is in the layer: files inherit the project.
	if rec.Quota != (layerfs.Quota{}) {
		if err := m.quotas().Limit(ctx, dir, rec.Quota); err != nil {
			return err
		}
	}
	if err := upper(dir); err != nil {
		return err
	}
	if err := m.mkdir(rec.ID+"/merged", 0o700); err != nil {
		return err
	}
	if len(parent) > 0 {
		if err := m.mkdir(rec.ID+"/work", 0o700); err != nil {
			return err
		}
		if err := m.writeLowerID(rec); err != nil {
			return err
		}
	}
	return m.syncLayer(rec.ID)
}

// The usual layer is made and removed by these calls, each of which would look
// up the whole path of the home again.

// mkdir makes a directory in the home.
func (m *mechanism) mkdir(name string, mode uint32) error {
	if err := unix.Mkdirat(m.dir.Home(), name, mode); err != nil {
		return &os.PathError{Op: "mkdirat", Path: filepath.Join(m.home, name), Err: err}
	}
	return nil
}

// rmdir tries to remove a directory in the home.
func (m *mechanism) rmdir(name string) error {
	return unix.Unlinkat(m.dir.Home(), name, unix.AT_REMOVEDIR)
}

// writeLowerID writes the parent's id where people look for it.
func (m *mechanism) writeLowerID(rec *lifecycle.Record) error {
	name := rec.ID + "/lower-id"
	fd, err := sys.Openat(m.dir.Home(), name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(rec.Parent))
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: filepath.Join(m.home, name), Err: err}
	}
	return nil
}

// makeUpper makes an empty upper directory.
func (m *mechanism) makeUpper(path string, parent lifecycle.Chain) error {
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	return m.inherit(path, parent)
}

// inherit gives a new upper directory the attributes of the parent's: it is
// the root of the merged tree.
func (m *mechanism) inherit(path string, parent lifecycle.Chain) error {
	if len(parent) == 0 {
		return os.Chmod(path, 0o755) // whatever the umask
	}
	return copyup.Attributes(path, m.upper(parent.Layer().ID), &copyup.Options{SkipXattr: m.private})
}

// private reports whether an xattr belongs to one layer's directory and not to
// the tree.
func (m *mechanism) private(xattr string) bool { return strings.HasPrefix(xattr, m.prefix()) }

// syncLayer makes a layer's directories durable, where the sync of its record
// would not.
func (m *mechanism) syncLayer(id string) error {
	if m.opts.Durability == layerfs.DurabilityNone || m.dir.Ordered() {
		return nil
	}
	for _, dir := range []string{m.layer(id), m.home} {
		if err := sys.Fsync(dir); err != nil {
			return err
		}
	}
	return nil
}

// Sync writes the whole file system back: a layer's files cannot be told from
// others in the page cache.
func (m *mechanism) Sync(_ context.Context, rec *lifecycle.Record) error {
	if err := sys.Syncfs(m.upper(rec.ID)); err != nil {
		return err
	}
	return m.settled(rec.ID)
}

// Delete removes a layer's directories. The usual layer is nearly empty, and
// then a few calls do; RemoveAll does the rest.
func (m *mechanism) Delete(ctx context.Context, rec *lifecycle.Record) error {
	forget := m.quotas().Forget(rec, m.layer(rec.ID))
	if err := m.rmdir(rec.ID + "/merged"); errors.Is(err, unix.EBUSY) { // left mounted by a process that died
		if err := m.Unmount(ctx, rec); err != nil {
			return err
		}
		_ = m.rmdir(rec.ID + "/merged") // or removeRest does, and tells why not
	}
	names := []string{"/upper"}
	if rec.Parent != "" || rec.Created.IsZero() {
		names = []string{"/work/work", "/work", "/upper"}
		_ = unix.Unlinkat(m.dir.Home(), rec.ID+"/lower-id", 0)
	}
	for _, name := range names {
		// A mount that somebody made there shows what is not the layer's.
		if err := m.rmdir(rec.ID + name); errors.Is(err, unix.EBUSY) {
			return &os.PathError{Op: "rmdir", Path: m.layer(rec.ID) + name, Err: err}
		}
	}
	if err := m.rmdir(rec.ID); err != nil && !errors.Is(err, unix.ENOENT) {
		if err := m.removeRest(m.layer(rec.ID)); err != nil {
			return err
		}
	}
	if rec.Created.IsZero() { // its creation did not finish
		return os.RemoveAll(m.dir.BuildPath(rec.ID))
	}
	return forget()
}

// removeRest removes a directory with what is in it. It stays off a mount that
// could not be removed: that shows other layers' files.
func (m *mechanism) removeRest(dir string) error {
	mounted, err := mount.IsMountPoint(dir + "/merged")
	if err != nil {
		return err
	}
	if mounted {
		return &os.PathError{Op: "rmdir", Path: dir + "/merged", Err: unix.EBUSY}
	}
	return os.RemoveAll(dir)
}

// DeletesByID reports that nothing but the directory tells of a layer, and of a
// quota the id of the project. What is served must be released before.
func (m *mechanism) DeletesByID(rec *lifecycle.Record) bool {
	return rec.Quota == (layerfs.Quota{}) && !m.opts.union()
}

// Stored lists the layers that have a directory.
func (m *mechanism) Stored(context.Context) ([]string, error) {
	ids, err := m.dir.Builds()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(m.home)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if layerfs.CheckID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// Find reports what of a layer is missing.
func (m *mechanism) Find(_ context.Context, rec *lifecycle.Record) error {
	need := []string{"upper", "merged"}
	if rec.Parent != "" {
		need = append(need, "work")
	}
	for _, n := range need {
		fi, err := os.Lstat(filepath.Join(m.layer(rec.ID), n))
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			return fmt.Errorf("%s is not a directory", n)
		}
	}
	b, err := os.ReadFile(filepath.Join(m.layer(rec.ID), "lower-id"))
	if err != nil && (rec.Parent != "" || !errors.Is(err, fs.ErrNotExist)) {
		return err
	}
	if string(b) != rec.Parent {
		return fmt.Errorf("lower-id is %q, but the record says %q", b, rec.Parent)
	}
	return nil
}

// Clone makes a layer with the content of another.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, opts *layerfs.CreateOptions) error {
		src := from.Layer()
		return d.m.build(ctx, rec, from[1:], func(dir string) error {
			upper := filepath.Join(dir, "upper")
			// The marks are copied with the files: they mean the same in the
			// clone, which has the same parent.
			_, err := copyup.Tree(ctx, upper, d.m.upper(src.ID), &copyup.Options{Progress: opts.Progress})
			return err
		})
	})
}

// Rollback empties a layer.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	return lifecycle.Rollback(ctx, d.frame, id, func(chain lifecycle.Chain) error {
		rec := chain.Layer()
		if err := d.m.empty(rec, chain[1:]); err != nil {
			return err
		}
		return errors.Join(d.m.clearWork(rec), d.m.settled(id))
	})
}

// empty gives a layer a new upper directory in one step.
func (m *mechanism) empty(rec *lifecycle.Record, parent lifecycle.Chain) (err error) {
	dir, err := m.dir.Build(rec.ID, os.RemoveAll)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := m.quotas().Share(rec, m.layer(rec.ID), dir); err != nil {
		return err
	}
	fresh := filepath.Join(dir, "upper")
	if err := m.makeUpper(fresh, parent); err != nil {
		return err
	}
	return replace(fresh, m.upper(rec.ID))
}

// clearWork removes what overlayfs left in the work directory.
func (m *mechanism) clearWork(rec *lifecycle.Record) error {
	if rec.Parent == "" {
		return nil
	}
	if err := os.RemoveAll(m.work(rec.ID)); err != nil {
		return err
	}
	return os.Mkdir(m.work(rec.ID), 0o700)
}

// replace puts a directory in the place of another one, which takes its place.
func replace(fresh, old string) error {
	var st unix.Stat_t
	if err := unix.Lstat(fresh, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: fresh, Err: err}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, old, unix.RENAME_EXCHANGE); err != nil {
		return &os.LinkError{Op: "renameat2", Old: fresh, New: old, Err: err}
	}
	// xfs changes the time of a directory that gets another parent this way
	// (xfs_cross_rename, fs/xfs/xfs_inode.c).
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, old, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: old, Err: err}
	}
	return nil
}

// Volatile layers: a mark with the boot in which a layer was mounted volatile
// stays until what it holds was synced.

func (m *mechanism) volatilePath(id string) string { return filepath.Join(m.layer(id), "volatile") }

// settled removes the mark: the layer is on stable storage, or empty.
func (m *mechanism) settled(id string) error {
	if !m.conf.Volatile {
		return nil
	}
	if err := os.Remove(m.volatilePath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// recoverVolatile marks the layers incomplete that an earlier boot wrote
// without ever syncing them.
func (m *mechanism) recoverVolatile() error {
	if !m.conf.Volatile {
		return nil
	}
	ids, err := m.dir.IDs()
	if err != nil {
		return err
	}
	for _, id := range ids {
		boot, err := os.ReadFile(m.volatilePath(id))
		if errors.Is(err, fs.ErrNotExist) || string(boot) == layerdir.BootID() {
			continue
		}
		if err != nil {
			return err
		}
		unlock, ok, err := m.dir.TryLock(id)
		if err != nil {
			return err
		}
		if !ok {
			continue // another process is at it
		}
		err = m.markVolatile(id)
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *mechanism) markVolatile(id string) error {
	rec, err := m.dir.Load(id)
	if err != nil || rec.Incomplete != "" {
		return nil // Check reports it
	}
	mark := rec.Clone()
	mark.Incomplete = "it was mounted volatile and not synced before a reboot"
	return m.dir.Save(mark)
}
