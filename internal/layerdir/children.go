package layerdir

import (
	"errors"
	"io/fs"

	"github.com/layerfs/layerfs"
)

// AddChild notes that child is about to be made on parent, whose lock the
// caller holds. From then on parent is frozen.
func (d *Dir) AddChild(parent, child string) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	err := d.children.create(parent + "/" + child)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := d.children.mkdir(parent); err != nil {
		return err
	}
	return d.children.create(parent + "/" + child)
}

// RemoveChild takes AddChild back.
func (d *Dir) RemoveChild(parent, child string) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	return d.children.unlink(parent + "/" + child)
}

// Children lists the layers that were made on id or are being made. After a
// crash it may name layers that do not exist: see [Dir.HasChildren].
func (d *Dir) Children(id string) ([]string, error) {
	ids, _, err := d.childrenOf(id)
	return ids, err
}

// childrenOf also reports whether the layer ever had any.
func (d *Dir) childrenOf(id string) (ids []string, ever bool, err error) {
	if err := d.use(); err != nil {
		return nil, false, err
	}
	defer d.unuse()
	if d.childrenNames.lacks(&d.children, id) {
		return nil, false, nil
	}
	ids, err = d.ids(&d.children, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return ids, true, err
}

// HasChildren reports whether a layer, whose lock the caller holds, has
// children or somebody is making one. What a crashed Create left is removed.
func (d *Dir) HasChildren(id string) (bool, error) {
	has, _, err := d.HadChildren(id)
	return has, err
}

// HadChildren is HasChildren that also reports whether [Dir.DropChildren] has
// anything to do once there are none.
func (d *Dir) HadChildren(id string) (has, ever bool, err error) {
	children, ever, err := d.childrenOf(id)
	if err != nil || len(children) == 0 {
		return false, ever, err
	}
	has, err = d.anyChild(id, children)
	return has, ever, err
}

func (d *Dir) anyChild(id string, children []string) (bool, error) {
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
	if d.use() == nil {
		defer d.unuse()
		d.children.rmdir(id)
	}
}
