package layerdir

import (
	"errors"
	"io/fs"
	"os"

	"github.com/layerfs/layerfs"
)

// AddChild notes that child is about to be made on parent, whose lock the
// caller holds. From then on parent is frozen.
func (d *Dir) AddChild(parent, child string) error {
	path := d.path("children", parent, child)
	err := create(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Mkdir(d.path("children", parent), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return create(path)
}

// RemoveChild takes AddChild back.
func (d *Dir) RemoveChild(parent, child string) error {
	return unlink(d.path("children", parent, child))
}

// Children lists the layers that were made on id or are being made. After a
// crash it may name layers that do not exist: see [Dir.HasChildren].
func (d *Dir) Children(id string) ([]string, error) {
	ids, err := d.ids("children/" + id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ids, err
}

// HasChildren reports whether a layer, whose lock the caller holds, has
// children or somebody is making one. What a crashed Create left is removed.
func (d *Dir) HasChildren(id string) (bool, error) {
	children, err := d.Children(id)
	if err != nil {
		return false, err
	}
	for _, child := range children {
		rec, err := d.Load(child)
		if err == nil && rec.Parent == id {
			return true, nil
		}
		if err != nil && !errors.Is(err, layerfs.ErrNotExist) {
			return true, nil // unreadable, but there
		}
		busy, err := d.busy(child)
		if err != nil || busy {
			return busy, err
		}
		if err := d.RemoveChild(id, child); err != nil {
			return false, err
		}
	}
	return false, nil
}

// busy reports whether somebody holds the lock of a layer.
func (d *Dir) busy(id string) (bool, error) {
	unlock, ok, err := d.TryLock(id)
	if err != nil || !ok {
		return !ok, err
	}
	unlock()
	return false, nil
}

// DropChildren removes the directory of a removed layer's children, which is
// empty by then. It is only tidiness: an empty directory means no children.
func (d *Dir) DropChildren(id string) {
	rmdir(d.path("children", id))
}
