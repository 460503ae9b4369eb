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
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// Create makes the directories of a layer apart and renames them into place.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, opts *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota = m.opts.Quota
	}
	return m.build(ctx, rec, parent, func(dir string) error {
		return m.makeUpper(filepath.Join(dir, "upper"), parent)
	})
}

// build makes a layer whose upper directory a function makes.
func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, upper func(dir string) error) (err error) {
	dir, err := m.dir.Build(rec.ID, os.RemoveAll)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
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
	if err := os.Mkdir(filepath.Join(dir, "merged"), 0o700); err != nil {
		return err
	}
	if len(parent) > 0 {
		if err := os.Mkdir(filepath.Join(dir, "work"), 0o700); err != nil {
			return err
		}
		if err := sys.WriteFile(filepath.Join(dir, "lower-id"), []byte(rec.Parent), 0o600, false); err != nil {
			return err
		}
	}
	if err := unix.Rename(dir, m.layer(rec.ID)); err != nil {
		return &os.LinkError{Op: "rename", Old: dir, New: m.layer(rec.ID), Err: err}
	}
	u.Push(func() error { return os.Rename(m.layer(rec.ID), dir) })
	return m.syncLayer(rec.ID)
}

// makeUpper makes an empty upper directory. It is the root of the merged tree,
// so it takes the attributes of the parent's.
func (m *mechanism) makeUpper(path string, parent lifecycle.Chain) error {
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
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
	if m.opts.Durability == layerfs.DurabilityNone || m.ordered {
		return nil
	}
	for _, dir := range []string{m.layer(id), m.home} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Sync writes the whole file system back: a layer's files cannot be told from
// others in the page cache.
func (m *mechanism) Sync(_ context.Context, rec *lifecycle.Record) error {
	f, err := os.Open(m.upper(rec.ID))
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err := unix.Syncfs(int(f.Fd()))
		switch {
		case err == nil:
			return m.settled(rec.ID)
		case errors.Is(err, unix.EINTR):
			continue
		}
		return &os.PathError{Op: "syncfs", Path: f.Name(), Err: err}
	}
}

// Delete removes a layer's directories. The usual layer is nearly empty, and
// then a few calls do; RemoveAll does the rest.
func (m *mechanism) Delete(_ context.Context, rec *lifecycle.Record) error {
	dir := m.layer(rec.ID)
	forget := m.quotas().Forget(rec, m.layer(rec.ID))
	for _, name := range []string{"/merged", "/work/work", "/work", "/upper"} {
		if err := unix.Rmdir(dir + name); errors.Is(err, unix.EBUSY) {
			return &os.PathError{Op: "rmdir", Path: dir + name, Err: err}
		}
	}
	_ = unix.Unlink(dir + "/lower-id")
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if rec.Created.IsZero() { // its creation did not finish
		return os.RemoveAll(m.dir.BuildPath(rec.ID))
	}
	return forget()
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
		if rec.Quota == (layerfs.Quota{}) {
			rec.Quota = src.Quota
		}
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
