package layerdir

import (
	"errors"
	"io/fs"
	"math/bits"
	"os"
	"slices"
	"strings"

	"github.com/layerfs/layerfs"
)

// The children of a layer are a file of its name, to which the id of each is
// appended before it is made. The records are the truth: an id stays in the file
// when its layer is removed, or was never made, until somebody looks or the file
// has grown. So the life of a child costs one short write here.
//
// The file is written by who has the lock of the layer, and only appended to or
// replaced, so that it can be read without.

// compactChildren is the size, in bytes, from which a file of children is
// relieved of those that are gone, each time it has doubled.
const compactChildren = 64 << 10

// AddChild notes that child is about to be made on parent, whose lock the
// caller holds, as it does child's. From then on parent is frozen, until child
// has no record and nobody the lock of child.
func (d *Dir) AddChild(parent, child string) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	// What a full disk left of the last id does not spoil this one.
	line := "\n" + child
	size, err := d.children.append(parent, line)
	if err != nil {
		return err
	}
	before := size - int64(len(line))
	if size < compactChildren || bits.Len64(uint64(before)) == bits.Len64(uint64(size)) {
		return nil
	}
	if err := d.compact(parent, size); errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil // the child is noted, and the next look is as good
}

// compact leaves the children in the file of a layer that are there or being
// made. One that stays large is padded, so that it is looked at again only after
// as much was appended as the look cost.
func (d *Dir) compact(parent string, size int64) error {
	ids, _, err := d.childrenOf(parent)
	if err != nil {
		return err
	}
	var text strings.Builder
	for _, id := range ids {
		is, err := d.isChild(parent, id)
		if err != nil {
			return err
		}
		if is {
			text.WriteString("\n" + id)
		}
	}
	if at := int64(text.Len()); at > size/2 {
		text.WriteString(strings.Repeat("\n", int(size-at)))
	}
	_, err = d.children.replace(parent, d.temporary(parent), []byte(text.String()), volatile)
	return err
}

// Noted lists layers that were made on id or are being made, the oldest first.
// It may name layers that do not exist or are not its children any more.
func (d *Dir) Noted(id string) ([]string, error) {
	ids, _, err := d.childrenOf(id)
	return ids, err
}

// Children lists the layers whose records name id as their parent, the oldest
// first. The lock of id need not be held; of one that does hold it,
// [Dir.HasChildren] also counts those that are being made.
func (d *Dir) Children(id string) ([]string, error) {
	noted, _, err := d.childrenOf(id)
	return slices.DeleteFunc(noted, func(child string) bool {
		rec, err := d.Load(child)
		return err != nil || rec.Parent != id
	}), err
}

// childrenOf also reports whether there is a file.
func (d *Dir) childrenOf(id string) (ids []string, ever bool, err error) {
	if err := d.use(); err != nil {
		return nil, false, err
	}
	defer d.unuse()
	if d.childrenNames.lacks(&d.children, id) {
		return nil, false, nil
	}
	b, err := d.children.read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || seen[line] || layerfs.CheckID(line) != nil { // padding, or what a power failure left
			continue
		}
		seen[line] = true
		ids = append(ids, line)
	}
	return ids, true, nil
}

// HasChildren reports whether a layer, whose lock the caller holds, has
// children or somebody is making one.
func (d *Dir) HasChildren(id string) (bool, error) {
	has, _, err := d.HadChildren(id)
	return has, err
}

// HadChildren is HasChildren that also reports whether [Dir.DropChildren] has
// anything to do once there are none.
func (d *Dir) HadChildren(id string) (has, ever bool, err error) {
	children, ever, err := d.childrenOf(id)
	if err != nil {
		return false, ever, err
	}
	for _, child := range slices.Backward(children) { // the newest is the likeliest to be there
		has, err := d.isChild(id, child)
		if has || err != nil {
			return has, ever, err
		}
	}
	if len(children) > 0 { // not to look at them again
		d.DropChildren(id)
	}
	return false, ever, nil
}

// isChild reports whether a layer is a child of id, or may become one.
func (d *Dir) isChild(id, child string) (bool, error) {
	is, there, err := d.names(child, id)
	if there || err != nil {
		return is, err
	}
	busy, err := d.busy(child)
	if busy || err != nil {
		return busy, err
	}
	// It may have got its record between the two looks.
	is, _, err = d.names(child, id)
	return is, err
}

// names reports whether the record of a layer names a parent, and whether there
// is a record.
func (d *Dir) names(child, parent string) (is, there bool, err error) {
	rec, err := d.Load(child)
	switch {
	case err == nil:
		return rec.Parent == parent, true, nil
	case errors.Is(err, layerfs.ErrNotExist):
		return false, false, nil
	case errors.Is(err, os.ErrClosed):
		return false, false, err
	}
	return true, true, nil // unreadable, but there
}

// busy reports whether somebody holds the lock of a layer. It asks and does not
// try, or two that ask at once would take each other for one who makes it.
func (d *Dir) busy(id string) (bool, error) {
	if err := d.use(); err != nil {
		return false, err
	}
	defer d.unuse()
	if d.keys.Held(id) {
		return true, nil
	}
	return d.file.probe(place(id)+int64(mutate), 1)
}

// DropChildren removes the file of the children of a layer that has none. It is
// only tidiness: what is in it are not children.
func (d *Dir) DropChildren(id string) {
	if d.use() == nil {
		defer d.unuse()
		_ = d.children.unlink(id)
	}
}
