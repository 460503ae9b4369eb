package zfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
)

// NativeChanges asks zfs what changed in each layer above the base, and
// compares just that in both trees. A step in between needs no tree of its own:
// a path that no step names, and that is in no directory that came or went, is
// the same in all of them.
func (m *mechanism) NativeChanges(ctx context.Context, chain lifecycle.Chain, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		list, err := m.nativeChanges(ctx, chain, base)
		if err != nil {
			yield(layerfs.Change{}, err)
			return
		}
		for _, c := range list {
			if !yield(c, nil) {
				return
			}
		}
	}
}

func decline(err error) error { return fmt.Errorf("%w: %w", lifecycle.ErrDecline, err) }

func (m *mechanism) nativeChanges(ctx context.Context, chain lifecycle.Chain, base int) (_ []layerfs.Change, err error) {
	switch {
	case base == len(chain):
		return nil, decline(errors.New("everything is new against the empty tree"))
	case !m.facts.Kernel:
		return m.walkAll(ctx, chain, base)
	case !m.features.NativeChanges:
		return nil, decline(errors.New(m.features.Reasons["NativeChanges"]))
	}
	if err := m.answers(); err != nil {
		return nil, err
	}
	trees := make([]string, 0, base+1)
	for i := range base + 1 {
		// zfs diff wants both file systems mounted.
		v, err := m.View(ctx, chain[i:])
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, v.Release()) }()
		trees = append(trees, v.Path)
	}
	suspects := newSuspect()
	for i := range base {
		if err := m.step(ctx, chain[i], chain[i+1].ID, trees[i], suspects); err != nil {
			return nil, err
		}
	}
	return compareSuspects(ctx, trees[base], trees[0], suspects)
}

// walkAll compares whole trees. The generic walk skips files whose change time
// is before the layer was made; zfs-fuse keeps whole seconds, so that a change
// in the first second of a layer would be missed.
func (m *mechanism) walkAll(ctx context.Context, chain lifecycle.Chain, base int) (_ []layerfs.Change, err error) {
	newer, err := m.View(ctx, chain)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	older, err := m.View(ctx, chain[base:])
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, older.Release()) }()
	return compareSuspects(ctx, older.Path, newer.Path, &suspect{named: true, whole: true})
}

// step notes what may differ between a layer, which is mounted at tree, and its
// parent.
//
// zfs diff names what changed by one path, the one that leads from an object to
// its parent, and that is not always enough. A file of several names has only
// one parent, the directory where it was linked last; if that name went, it has
// none, even if one other name is left, and zfs diff then says nothing of it or
// something half (zfs_obj_to_pobj, module/os/linux/zfs/zfs_znode.c). The stream
// of zfs send has all that changed, by inode number. What zfs diff does not
// explain of that is looked for by reading the directories of the tree: a name
// that came or went is in a directory that changed, which always has a path.
func (m *mechanism) step(ctx context.Context, rec *lifecycle.Record, parent, tree string, suspects *suspect) error {
	origin, err := m.originOfStep(ctx, rec, parent)
	if err != nil {
		return declineUnlessDone(ctx, err)
	}
	var (
		lines   []change
		objects map[uint64]bool
		diffErr error
	)
	err = m.still(ctx, rec, func(full string) error {
		done := make(chan struct{})
		go func() {
			defer close(done)
			lines, diffErr = m.stepDiff(ctx, rec.ID, origin, full)
		}()
		var err error
		objects, err = m.objectsChanged(ctx, rec, origin, full)
		<-done
		if says(diffErr, textMissing) {
			return errors.Join(err, diffErr)
		}
		return err
	})
	if err != nil {
		return declineUnlessDone(ctx, err)
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if diffErr != nil {
		m.log.Debug("zfs diff is of no use", "layer", rec.ID, "reason", diffErr)
	}
	for _, c := range lines {
		suspects.note(c)
	}
	if err := explain(tree, lines, objects); err != nil {
		return err
	}
	return findObjects(ctx, tree, objects, func(path string) { suspects.note(change{kind: 'M', path: path}) })
}

// declineUnlessDone is for calls of zfs that fail before anything was compared:
// a walk may do, but not in a pool that does not answer.
func declineUnlessDone(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.Is(err, ErrSuspended) {
		return err
	}
	return decline(err)
}

// originOfStep returns the snapshot of the parent that a layer was cloned from.
func (m *mechanism) originOfStep(ctx context.Context, rec *lifecycle.Record, parent string) (string, error) {
	if name := backendOf(rec).Snapshot; name != "" {
		return m.dataset(parent) + "@" + name, nil
	}
	// A clone of another layer gets that one's origin when it goes.
	origin, err := m.origin(ctx, rec.ID)
	if err != nil {
		return "", err
	}
	if of, _, ok := splitSnapshot(origin); !ok || of != m.dataset(parent) {
		return "", fmt.Errorf("%s was cloned from %s, not from its parent", m.dataset(rec.ID), origin)
	}
	return origin, nil
}

// stepDiff runs zfs diff for two snapshots.
func (m *mechanism) stepDiff(ctx context.Context, id, from, to string) ([]change, error) {
	list, err := mount.Under("/")
	if err != nil {
		return nil, err
	}
	// zfs takes one of the mounts in the list, whoever made it.
	seen := make(map[string]bool)
	var places []string
	for _, info := range list {
		if isZFS(info.FSType) && info.Source == m.dataset(id) && !seen[info.Mountpoint] {
			seen[info.Mountpoint] = true
			places = append(places, info.Mountpoint)
		}
	}
	return m.diff(ctx, from, to, places)
}

// objectsChanged returns the inode numbers of what changed between two
// snapshots of a layer. They come in blocks, with neighbours that did not change:
// these are left out if their change time tells.
func (m *mechanism) objectsChanged(ctx context.Context, rec *lifecycle.Record, from, to string) (map[uint64]bool, error) {
	const slack = time.Second // costs no more than a neighbour that is looked at
	since := m.dir.Reliable(rec.Copied)
	if !since.IsZero() {
		since = since.Add(-slack)
	}
	objects := make(map[uint64]bool)
	// As the blocks are stored: nobody reads them.
	err := m.sendSnapshot(ctx, from, to, []string{"-c", "-L", "-e"}, func(r io.Reader) error {
		return readObjects(r, func(o object) {
			if at, ok := o.changed(); o.visible() && !(ok && at.Before(since)) {
				objects[o.number] = true
			}
		})
	})
	return objects, err
}

// explain takes those objects out of which zfs diff names all paths in the tree:
// directories, and files of one name.
func explain(tree string, lines []change, objects map[uint64]bool) error {
	if len(lines) == 0 {
		return nil
	}
	root, err := os.OpenRoot(tree)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, c := range lines {
		path := owner(c.path)
		if c.kind == 'R' {
			path = owner(c.to)
		}
		p, err := placeOf(root, path)
		if err != nil {
			continue // deleted, or what zfs diff tells of the path is wrong
		}
		if p.isDir() || p.st.Nlink == 1 {
			delete(objects, p.st.Ino)
		}
		p.close()
	}
	return nil
}

// origin returns the snapshot that a layer's dataset is a clone of, or "-".
func (m *mechanism) origin(ctx context.Context, id string) (string, error) {
	rows, err := m.tool.rows(ctx, 1, "get", "-H", "-o", "value", "origin", m.dataset(id))
	if err != nil {
		return "", err
	}
	if len(rows) != 1 {
		return "", fmt.Errorf("zfs printed %d origins", len(rows))
	}
	return rows[0][0], nil
}

// trees are two directories between which nothing escapes.
type trees struct{ older, newer *os.Root }

func openTrees(older, newer string) (*trees, error) {
	a, err := os.OpenRoot(older)
	if err != nil {
		return nil, err
	}
	b, err := os.OpenRoot(newer)
	if err != nil {
		a.Close()
		return nil, err
	}
	return &trees{a, b}, nil
}

func (t *trees) close() {
	t.older.Close()
	t.newer.Close()
}

// placeOf looks a path up that is clean and absolute in the tree.
func placeOf(root *os.Root, path string) (*place, error) {
	// What is a directory in one tree is anything in the other: a pipe would keep
	// its opener waiting.
	dir, err := root.OpenFile("."+filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	name := filepath.Base(path)
	if path == "/" {
		name = "."
	}
	return newPlace(int(dir.Fd()), name)
}
