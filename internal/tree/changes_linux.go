package tree

import (
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// Changes returns what the tree newRoot changes against oldRoot, exactly as
// the doc comment of [layerfs.Change] defines it, sorted by
// [layerfs.ComparePaths]. An empty oldRoot stands for the empty tree: all but
// the root is Added then.
//
// It is the oracle of tests: a plain double walk that compares every byte.
func Changes(oldRoot, newRoot string) ([]layerfs.Change, error) {
	root, err := scan(newRoot)
	if err != nil {
		return nil, err
	}
	var changes []layerfs.Change
	if oldRoot == "" {
		err = changesBelow(&changes, "", &node{}, root)
		return changes, err
	}
	oldNode, err := scan(oldRoot)
	if err != nil {
		return nil, err
	}
	modified, err := differs(oldNode, root)
	if err != nil {
		return nil, err
	}
	if modified {
		changes = append(changes, layerfs.Change{Path: "/", Kind: layerfs.Modified})
	}
	err = changesBelow(&changes, "", oldNode, root)
	return changes, err
}

// changesBelow appends the changes of what the directories a (old) and b (new)
// at path hold. Something that is not a directory holds nothing.
func changesBelow(changes *[]layerfs.Change, path string, a, b *node) error {
	names := slices.Concat(a.children, b.children)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		child := path + "/" + name
		add := func(k layerfs.Kind) { *changes = append(*changes, layerfs.Change{Path: child, Kind: k}) }
		if !slices.Contains(b.children, name) {
			add(layerfs.Deleted)
			continue
		}
		newChild, err := scan(join(b.path, name))
		if err != nil {
			return err
		}
		oldChild := &node{}
		if slices.Contains(a.children, name) {
			if oldChild, err = scan(join(a.path, name)); err != nil {
				return err
			}
			modified, err := differs(oldChild, newChild)
			if err != nil {
				return err
			}
			if modified {
				add(layerfs.Modified)
			}
		} else {
			add(layerfs.Added)
		}
		if newChild.typ() != unix.S_IFDIR {
			continue // the former contents of a directory are not listed
		}
		if err := changesBelow(changes, child, oldChild, newChild); err != nil {
			return err
		}
	}
	return nil
}

// differs reports whether two entries at one path differ in type, content,
// mode, owner, modification time, device number, link target or xattrs.
func differs(a, b *node) (bool, error) {
	switch {
	case a.stat.Mode != b.stat.Mode,
		a.stat.Uid != b.stat.Uid,
		a.stat.Gid != b.stat.Gid,
		a.stat.Mtim != b.stat.Mtim,
		a.target != b.target,
		!maps.Equal(a.xattrs, b.xattrs):
		return true, nil
	}
	switch a.typ() {
	case unix.S_IFCHR, unix.S_IFBLK:
		return a.stat.Rdev != b.stat.Rdev, nil
	case unix.S_IFREG:
		off, err := sameContent(a.path, b.path)
		return off >= 0, err
	}
	return false, nil
}

// FormatChanges returns the changes one a line, as Docker prints them.
func FormatChanges(changes []layerfs.Change) string {
	var b strings.Builder
	for _, c := range changes {
		b.WriteString(c.String() + "\n")
	}
	return b.String()
}
