package aufs

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
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// Create makes the branch of a layer apart and renames it into place.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, opts *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota = m.opts.Quota
	}
	return m.build(ctx, rec, parent, func(dir string) error { return m.makeBranch(dir, rec, parent) })
}

// build makes a layer whose branch a function makes.
func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, branch func(dir string) error) (err error) {
	if rec.MountLabel != "" && m.engine.name() == FUSE {
		return &layerfs.UnsupportedError{Feature: "a mount label with the fuse engine", Reason: "it keeps security.selinux of the branches"}
	}
	dir, err := m.dir.Build(rec.ID, os.RemoveAll)
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return os.RemoveAll(dir) })
	if err := branch(dir); err != nil {
		return err
	}
	// A removal that a crash interrupted may have left these.
	for _, path := range []string{m.Path(rec.ID), m.ancestry(rec.ID)} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := os.Mkdir(m.Path(rec.ID), 0o700); err != nil {
		return err
	}
	u.Push(func() error { return os.Remove(m.Path(rec.ID)) })
	var ids strings.Builder
	for _, r := range parent {
		ids.WriteString(r.ID + "\n")
	}
	u.Push(func() error { return removeIfThere(m.ancestry(rec.ID)) })
	if err := sys.WriteFile(m.ancestry(rec.ID), []byte(ids.String()), 0o600, false); err != nil {
		return err
	}
	if err := unix.Rename(dir, m.branch(rec.ID)); err != nil {
		return &os.LinkError{Op: "rename", Old: dir, New: m.branch(rec.ID), Err: err}
	}
	u.Push(func() error { return os.Rename(m.branch(rec.ID), dir) })
	return m.syncLayer(rec.ID)
}

// makeBranch makes an empty branch under the layer's quota, before anything is
// in it: files inherit the project. It is the root of the merged tree, so it
// takes the attributes of the parent's.
func (m *mechanism) makeBranch(path string, rec *lifecycle.Record, parent lifecycle.Chain) error {
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	if rec.Quota != (layerfs.Quota{}) {
		if err := m.quotas().Limit(context.Background(), path, rec.Quota); err != nil {
			return err
		}
	}
	return m.rootLike(path, parent)
}

func (m *mechanism) rootLike(path string, parent lifecycle.Chain) error {
	if len(parent) == 0 {
		return os.Chmod(path, 0o755) // whatever the umask
	}
	return copyup.Attributes(path, m.branch(parent.Layer().ID), nil)
}

// syncLayer makes a layer's files durable, where the sync of its record would
// not.
func (m *mechanism) syncLayer(id string) error {
	if m.opts.Durability == layerfs.DurabilityNone || m.ordered {
		return nil
	}
	for _, path := range []string{m.branch(id), m.ancestry(id), m.home + "/diff", m.home + "/layers", m.home + "/mnt"} {
		if err := sys.Fsync(path); err != nil {
			return err
		}
	}
	return nil
}

// Sync writes the whole file system back: a layer's files cannot be told from
// others in the page cache.
func (m *mechanism) Sync(_ context.Context, rec *lifecycle.Record) error {
	return sys.Syncfs(m.branch(rec.ID))
}

// Delete removes a layer's files. The mount point goes first, by a call that
// fails if anything is mounted there.
func (m *mechanism) Delete(_ context.Context, rec *lifecycle.Record) error {
	forget := m.quotas().Forget(rec, m.branch(rec.ID))
	if err := unix.Rmdir(m.Path(rec.ID)); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: m.Path(rec.ID), Err: err}
	}
	if err := os.RemoveAll(m.branch(rec.ID)); err != nil {
		return err
	}
	if err := removeIfThere(m.ancestry(rec.ID)); err != nil {
		return err
	}
	if rec.Created.IsZero() { // its creation did not finish
		return os.RemoveAll(m.dir.BuildPath(rec.ID))
	}
	return forget()
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Stored lists the layers that have any of the three.
func (m *mechanism) Stored(context.Context) ([]string, error) {
	ids, err := m.dir.Builds()
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	for _, d := range []string{"diff", "layers", "mnt"} {
		entries, err := os.ReadDir(filepath.Join(m.home, d))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !seen[e.Name()] && layerfs.CheckID(e.Name()) == nil {
				seen[e.Name()] = true
				ids = append(ids, e.Name())
			}
		}
	}
	return ids, nil
}

// Find reports what of a layer is missing.
func (m *mechanism) Find(_ context.Context, rec *lifecycle.Record) error {
	b, err := os.ReadFile(m.ancestry(rec.ID))
	if err != nil {
		return err
	}
	parent, _, _ := strings.Cut(string(b), "\n")
	if parent != rec.Parent {
		return fmt.Errorf("layers/%s begins with %q, but the record says the parent is %q", rec.ID, parent, rec.Parent)
	}
	if err := isDir(m.branch(rec.ID)); err != nil {
		return err
	}
	// Of a mount point the parent directory tells without asking the union.
	entries, err := os.ReadDir(filepath.Join(m.home, "mnt"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == rec.ID {
			return nil
		}
	}
	return &os.PathError{Op: "readdir", Path: m.Path(rec.ID), Err: fs.ErrNotExist}
}

func isDir(path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory", path)
	}
	return nil
}

// Clone makes a layer with the content of another.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, opts *layerfs.CreateOptions) error {
		src := from.Layer()
		if err := d.m.settle(ctx, from); err != nil {
			return err
		}
		return d.m.build(ctx, rec, from[1:], func(dir string) error {
			if err := d.m.makeBranch(dir, rec, from); err != nil {
				return err
			}
			// Whiteouts are files, and mean the same in the clone, which has
			// the same parent.
			_, err := copyup.Tree(ctx, dir, d.m.branch(src.ID), &copyup.Options{Progress: opts.Progress})
			return err
		})
	})
}

// Rollback empties a layer.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	return lifecycle.Rollback(ctx, d.frame, id, func(chain lifecycle.Chain) error {
		return d.m.replace(chain.Layer(), chain[1:], func(string) error { return nil })
	})
}

// replace gives a layer another branch in one step, whose root is like that of
// the given chain and which a function fills.
func (m *mechanism) replace(rec *lifecycle.Record, like lifecycle.Chain, fill func(dir string) error) (err error) {
	dir, err := m.dir.Build(rec.ID, os.RemoveAll)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := m.quotas().Share(rec, m.branch(rec.ID), dir); err != nil {
		return err
	}
	if err := m.rootLike(dir, like); err != nil {
		return err
	}
	if err := fill(dir); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, m.branch(rec.ID), unix.RENAME_EXCHANGE); err != nil {
		return &os.LinkError{Op: "renameat2", Old: dir, New: m.branch(rec.ID), Err: err}
	}
	return nil
}
