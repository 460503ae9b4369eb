package layerfs

import (
	"fmt"
	"strings"
)

// Kind says how a path differs from the layers below.
type Kind uint8

// The kinds of change.
const (
	Modified Kind = iota + 1 // content, type or any attribute differs
	Added
	Deleted
)

// String returns the letter Docker prints: C, A or D.
func (k Kind) String() string {
	switch k {
	case Modified:
		return "C"
	case Added:
		return "A"
	case Deleted:
		return "D"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Change is one path that differs between a layer and an ancestor.
//
// The rules are those of a double walk over the two merged trees: a path that
// is in only one of them is Added or Deleted; one in both whose type, content,
// mode, owner, modification time, device number, link target or xattrs differ
// is Modified. A deleted directory is one change, its contents are not listed.
// A path whose entry was replaced by one of another type is Modified, and if
// it was a directory its former contents are not listed either. A directory
// whose only difference is its size or link count is not listed. The root
// itself is "/" and can only be Modified; against the empty tree it is not
// listed, as there is nothing to compare it with.
type Change struct {
	Path string // absolute in the layer, slash-separated, clean
	Kind Kind
}

// String returns the change as Docker prints it, such as "A /etc/hostname".
func (c Change) String() string { return c.Kind.String() + " " + c.Path }

// ComparePaths orders paths as [Driver.Changes] does: component by component,
// so that a directory is followed by all of its contents.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] == b[i] {
			continue
		}
		switch {
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		case a[i] < b[i]:
			return -1
		}
		return 1
	}
	return strings.Compare(a, b)
}
