package tree

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// CompareOptions say what [Compare] overlooks. The zero value overlooks only
// what no copy can keep: inode numbers, change times, access times, and the
// sizes and link counts of directories.
type CompareOptions struct {
	IgnoreXattr   func(name string) bool // true: as if no file had this xattr
	IgnorePath    func(path string) bool // true: as if neither tree had it, nor anything below; paths as in Difference
	IgnoreOwners  bool
	IgnoreModes   bool
	IgnoreTimes   bool // modification times of all files
	IgnoreDirTime bool // modification times of directories only
	IgnoreLinks   bool // which names are hard links of each other
	WholeSeconds  bool // times are compared without their nanoseconds
	AccessTimes   bool // compare them too
	Holes         bool // compare which parts of files are holes
	InodeFlags    bool // compare FS_IOC_GETFLAGS of regular files and directories
}

// IgnoreOverlayXattrs is a [CompareOptions.IgnoreXattr] for what overlayfs
// keeps in its layers.
func IgnoreOverlayXattrs(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// Difference is one thing in which two trees differ.
type Difference struct {
	Path string // "/" for the roots
	What string // "type", "mode", "content", "xattr user.x"
	A, B string // what the trees have; "absent" if nothing
}

// String returns, for example, `/etc/passwd: mode: 0644 != 0600`.
func (d Difference) String() string { return fmt.Sprintf("%s: %s: %s != %s", d.Path, d.What, d.A, d.B) }

const absent = "absent"

// Compare walks two trees and returns all differences in the order of the
// paths. It reads every byte of every file, follows no symlink, and is neither
// fast nor safe on trees that change meanwhile: it is the oracle of tests. For
// two names that are hard links in one tree only, the difference "link" names
// the first other name. opts may be nil.
func Compare(a, b string, opts *CompareOptions) ([]Difference, error) {
	if opts == nil {
		opts = &CompareOptions{}
	}
	c := comparer{opts: opts, linksA: map[inode]string{}, linksB: map[inode]string{}}
	err := c.compare("/", a, b)
	return c.diffs, err
}

type inode struct{ dev, ino uint64 }

type comparer struct {
	opts           *CompareOptions
	diffs          []Difference
	linksA, linksB map[inode]string // first path of each file with several names
}

func (c *comparer) add(path, what, a, b string) {
	c.diffs = append(c.diffs, Difference{path, what, a, b})
}

func (c *comparer) compare(path, pathA, pathB string) error {
	a, err := scan(pathA)
	if err != nil {
		return err
	}
	b, err := scan(pathB)
	if err != nil {
		return err
	}
	if a.typ() != b.typ() {
		c.add(path, "type", typeName(a.typ()), typeName(b.typ()))
		return nil
	}
	if err := c.compareNodes(path, a, b); err != nil {
		return err
	}
	all := slices.Concat(a.children, b.children)
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		child := strings.TrimSuffix(path, "/") + "/" + name
		if c.opts.IgnorePath != nil && c.opts.IgnorePath(child) {
			continue
		}
		switch {
		case !slices.Contains(b.children, name):
			c.add(child, "entry", c.describe(join(pathA, name)), absent)
		case !slices.Contains(a.children, name):
			c.add(child, "entry", absent, c.describe(join(pathB, name)))
		default:
			if err := c.compare(child, join(pathA, name), join(pathB, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *comparer) describe(path string) string {
	n, err := scan(path)
	if err != nil {
		return err.Error()
	}
	return typeName(n.typ())
}

func (c *comparer) compareNodes(path string, a, b *node) error {
	o := c.opts
	if ma, mb := a.stat.Mode&07777, b.stat.Mode&07777; ma != mb && !o.IgnoreModes {
		c.add(path, "mode", fmt.Sprintf("%#o", ma), fmt.Sprintf("%#o", mb))
	}
	if !o.IgnoreOwners && (a.stat.Uid != b.stat.Uid || a.stat.Gid != b.stat.Gid) {
		c.add(path, "owner", fmt.Sprintf("%d:%d", a.stat.Uid, a.stat.Gid), fmt.Sprintf("%d:%d", b.stat.Uid, b.stat.Gid))
	}
	dir := a.typ() == unix.S_IFDIR
	if !o.IgnoreTimes && !(dir && o.IgnoreDirTime) {
		c.compareTimes(path, "mtime", a.stat.Mtim, b.stat.Mtim)
	}
	if o.AccessTimes {
		c.compareTimes(path, "atime", a.stat.Atim, b.stat.Atim)
	}
	if t := a.typ(); (t == unix.S_IFCHR || t == unix.S_IFBLK) && a.stat.Rdev != b.stat.Rdev {
		c.add(path, "device", fmt.Sprintf("%#x", a.stat.Rdev), fmt.Sprintf("%#x", b.stat.Rdev))
	}
	if a.target != b.target {
		c.add(path, "target", fmt.Sprintf("%q", a.target), fmt.Sprintf("%q", b.target))
	}
	c.compareXattrs(path, a.xattrs, b.xattrs)
	if !dir && !o.IgnoreLinks {
		c.compareLinks(path, a, b)
	}
	if a.typ() == unix.S_IFREG {
		if err := c.compareContent(path, a, b); err != nil {
			return err
		}
	}
	if o.InodeFlags && (dir || a.typ() == unix.S_IFREG) {
		return c.compareFlags(path, a, b)
	}
	return nil
}

func (c *comparer) compareTimes(path, what string, a, b unix.Timespec) {
	if a.Sec != b.Sec || a.Nsec != b.Nsec && !c.opts.WholeSeconds {
		c.add(path, what, fmt.Sprintf("%d.%09d", a.Sec, a.Nsec), fmt.Sprintf("%d.%09d", b.Sec, b.Nsec))
	}
}

func (c *comparer) compareXattrs(path string, a, b map[string]string) {
	names := slices.Concat(slices.Collect(maps.Keys(a)), slices.Collect(maps.Keys(b)))
	slices.Sort(names)
	show := func(m map[string]string, name string) string {
		v, ok := m[name]
		if !ok {
			return absent
		}
		if len(v) > 80 {
			return fmt.Sprintf("%q… (%d bytes)", v[:80], len(v))
		}
		return fmt.Sprintf("%q", v)
	}
	for _, name := range slices.Compact(names) {
		if c.opts.IgnoreXattr != nil && c.opts.IgnoreXattr(name) {
			continue
		}
		va, inA := a[name]
		vb, inB := b[name]
		if va != vb || inA != inB {
			c.add(path, "xattr "+name, show(a, name), show(b, name))
		}
	}
}

// compareLinks requires that a name is a link of an earlier one in both trees
// or in none. It also compares the counts, to see names outside the tree.
func (c *comparer) compareLinks(path string, a, b *node) {
	if a.stat.Nlink == 1 && b.stat.Nlink == 1 {
		return
	}
	first := func(links map[inode]string, n *node) string {
		key := inode{n.stat.Dev, n.stat.Ino}
		if p, ok := links[key]; ok {
			return p
		}
		links[key] = path
		return path
	}
	fa, fb := first(c.linksA, a), first(c.linksB, b)
	if fa != fb {
		c.add(path, "link", fa, fb)
	} else if a.stat.Nlink != b.stat.Nlink {
		c.add(path, "link count", fmt.Sprint(a.stat.Nlink), fmt.Sprint(b.stat.Nlink))
	}
}

func (c *comparer) compareContent(path string, a, b *node) error {
	if a.stat.Size != b.stat.Size {
		c.add(path, "size", fmt.Sprint(a.stat.Size), fmt.Sprint(b.stat.Size))
		return nil
	}
	off, err := sameContent(a.path, b.path)
	if err != nil {
		return err
	}
	if off >= 0 {
		c.add(path, "content", fmt.Sprintf("differs at byte %d", off), "")
	}
	if !c.opts.Holes {
		return nil
	}
	ra, err := dataRanges(a.path)
	if err != nil {
		return err
	}
	rb, err := dataRanges(b.path)
	if err != nil {
		return err
	}
	if ra != rb {
		c.add(path, "data", ra, rb)
	}
	return nil
}

func (c *comparer) compareFlags(path string, a, b *node) error {
	fa, err := inodeFlags(a.path)
	if err != nil {
		return err
	}
	fb, err := inodeFlags(b.path)
	if err != nil {
		return err
	}
	if fa != fb {
		c.add(path, "inode flags", fmt.Sprintf("%#x", fa), fmt.Sprintf("%#x", fb))
	}
	return nil
}

func typeName(typ uint32) string {
	switch typ {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "dir"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "sock"
	}
	return fmt.Sprintf("type %#o", typ)
}
