package zfs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"

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
		changes, err := m.step(ctx, chain[i], chain[i+1].ID)
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return nil, cause
			}
			return nil, decline(err)
		}
		if err := checkLinks(ctx, trees[i+1], trees[i], changes); err != nil {
			return nil, err
		}
		for _, c := range changes {
			suspects.note(c)
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

// step asks zfs what a layer changes against its parent.
func (m *mechanism) step(ctx context.Context, rec *lifecycle.Record, parent string) ([]change, error) {
	id, origin := rec.ID, m.dataset(parent)+"@"+backendOf(rec).Snapshot
	if backendOf(rec).Snapshot == "" {
		// A clone of another layer gets that one's origin when it goes.
		var err error
		if origin, err = m.origin(ctx, id); err != nil {
			return nil, err
		}
		if of, _, ok := splitSnapshot(origin); !ok || of != m.dataset(parent) {
			return nil, fmt.Errorf("%s was cloned from %s, not from its parent", m.dataset(id), origin)
		}
	}
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
	return m.diff(ctx, origin, m.dataset(id), places)
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

// checkLinks declines if a file with several names was modified: zfs knows it
// by one of them only. Names that came or went are found in their directories.
func checkLinks(ctx context.Context, oldTree, newTree string, changes []change) error {
	older, err := openTrees(oldTree, newTree)
	if err != nil {
		return err
	}
	defer older.close()
	for _, c := range changes {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := older.checkLink(ctx, c); err != nil {
			return err
		}
	}
	return nil
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

func (t *trees) checkLink(ctx context.Context, c change) error {
	oldPath, newPath := owner(c.path), owner(c.path)
	if c.kind == 'R' {
		newPath = owner(c.to)
	}
	var a, b *place
	var err error
	if c.kind != '+' {
		if a, err = placeOf(t.older, oldPath); err != nil {
			return decline(fmt.Errorf("%v: %w", c, err))
		}
		defer a.close()
	}
	if c.kind != '-' {
		if b, err = placeOf(t.newer, newPath); err != nil {
			return decline(fmt.Errorf("%v: %w", c, err))
		}
		defer b.close()
	}
	if a == nil || b == nil || a.isDir() && b.isDir() || a.st.Nlink < 2 && b.st.Nlink < 2 {
		return nil
	}
	differ, err := differs(ctx, a, b)
	if err != nil {
		return err
	}
	if differ {
		return decline(fmt.Errorf("%v: a file of several names was modified", c))
	}
	return nil
}

// placeOf looks a path up that is clean and absolute in the tree.
func placeOf(root *os.Root, path string) (*place, error) {
	dir, err := root.Open("." + filepath.Dir(path))
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
