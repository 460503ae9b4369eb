package zfs

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/content"
	"github.com/layerfs/layerfs/internal/sys"
)

// compareSuspects compares two trees where they may differ, by the rules and in
// the order of layerfs.Change.
func compareSuspects(ctx context.Context, older, newer string, s *suspect) ([]layerfs.Change, error) {
	c := &comparer{ctx: ctx}
	a, err := newRoot(older)
	if err != nil {
		return nil, err
	}
	defer a.close()
	b, err := newRoot(newer)
	if err != nil {
		return nil, err
	}
	defer b.close()
	differ, err := differs(ctx, a, b)
	if err != nil {
		return nil, err
	}
	if differ {
		c.add("/", layerfs.Modified)
	}
	err = c.dirs("", a, b, s, false)
	return c.list, err
}

type comparer struct {
	ctx  context.Context
	list []layerfs.Change
}

func (c *comparer) add(path string, kind layerfs.Kind) {
	c.list = append(c.list, layerfs.Change{Path: path, Kind: kind})
}

// dirs compares what two directories hold.
func (c *comparer) dirs(path string, a, b *place, s *suspect, whole bool) error {
	// Another inode at the same path is another directory, whatever zfs says.
	whole = whole || s.isWhole() || a.st.Ino != b.st.Ino
	if !whole && s == nil {
		return nil
	}
	oldDir, err := a.open()
	if err != nil {
		return err
	}
	defer oldDir.Close()
	newDir, err := b.open()
	if err != nil {
		return err
	}
	defer newDir.Close()
	names, err := c.names(oldDir, newDir, s, whole)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		if err := c.entry(path+"/"+name, name, oldDir, newDir, s.child(name), whole); err != nil {
			return err
		}
	}
	return nil
}

// names lists, sorted, what must be looked at.
func (c *comparer) names(oldDir, newDir *os.File, s *suspect, whole bool) ([]string, error) {
	want := make(map[string]bool)
	if s != nil {
		for name := range s.below {
			want[name] = true
		}
	}
	if whole || s.isNamed() {
		olds, err := inodesIn(oldDir)
		if err != nil {
			return nil, err
		}
		news, err := inodesIn(newDir)
		if err != nil {
			return nil, err
		}
		for name, ino := range olds {
			if n, ok := news[name]; whole || !ok || n != ino {
				want[name] = true
			}
		}
		for name := range news {
			if _, ok := olds[name]; whole || !ok {
				want[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(want)), nil
}

// inodesIn lists a directory. The inode numbers come with the names.
func inodesIn(dir *os.File) (map[string]uint64, error) {
	list := make(map[string]uint64)
	err := readDir(dir, make([]byte, 32<<10), func(e entry) { list[e.name] = e.ino })
	return list, err
}

// entry is a name in a directory.
type entry struct {
	name string
	ino  uint64
	kind byte // DT_DIR etc.
}

// readDir calls fn for all names in a directory but "." and "..".
func readDir(dir *os.File, buf []byte, fn func(entry)) error {
	for {
		n, err := sys.Getdents(int(dir.Fd()), buf)
		if err != nil {
			return &os.PathError{Op: "getdents64", Path: dir.Name(), Err: err}
		}
		if n == 0 {
			return nil
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return &os.PathError{Op: "getdents64", Path: dir.Name(), Err: err}
			}
			if !ok {
				break
			}
			fn(entry{string(e.Name), e.Ino, e.Type})
		}
	}
}

// entry compares what two directories have at one name.
func (c *comparer) entry(path, name string, oldDir, newDir *os.File, s *suspect, whole bool) error {
	a, err := newPlace(int(oldDir.Fd()), name)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if a != nil {
		defer a.close()
	}
	b, err := newPlace(int(newDir.Fd()), name)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if b != nil {
		defer b.close()
	}
	switch {
	case a == nil && b == nil:
		return nil
	case b == nil:
		c.add(path, layerfs.Deleted)
		return nil
	case a == nil:
		c.add(path, layerfs.Added)
		return c.added(path, b)
	case a.st.Mode&unix.S_IFMT != b.st.Mode&unix.S_IFMT:
		c.add(path, layerfs.Modified)
		return c.added(path, b)
	}
	differ, err := differs(c.ctx, a, b)
	if err != nil {
		return err
	}
	if differ {
		c.add(path, layerfs.Modified)
	}
	if b.isDir() {
		return c.dirs(path, a, b, s, whole)
	}
	return nil
}

// added lists everything below a directory that is new.
func (c *comparer) added(path string, p *place) error {
	if !p.isDir() {
		return nil
	}
	dir, err := p.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := inodesIn(dir)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		c.add(path+"/"+name, layerfs.Added)
		sub, err := newPlace(int(dir.Fd()), name)
		if err != nil {
			return err
		}
		err = c.added(path+"/"+name, sub)
		sub.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// place is a name in an open directory, and what is there.
type place struct {
	dir  int // owned
	name string
	st   unix.Stat_t
}

func newPlace(dir int, name string) (*place, error) {
	// A descriptor of its own: the caller's may be closed before.
	fd, err := sys.Openat(dir, ".", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	p := &place{dir: fd, name: name}
	for {
		err := unix.Fstatat(p.dir, name, &p.st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, unix.EINTR) {
			p.close()
			return nil, &os.PathError{Op: "fstatat", Path: name, Err: err}
		}
	}
}

// newRoot returns the place of a directory itself.
func newRoot(path string) (*place, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return newPlace(int(f.Fd()), ".")
}

func (p *place) close() { unix.Close(p.dir) }

func (p *place) isDir() bool { return p.st.Mode&unix.S_IFMT == unix.S_IFDIR }

// open opens a directory or a regular file, without touching its access time
// where that is allowed.
func (p *place) open() (*os.File, error) {
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_LARGEFILE
	if p.isDir() {
		flags |= unix.O_DIRECTORY
	}
	fd, err := sys.Openat(p.dir, p.name, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = sys.Openat(p.dir, p.name, flags, 0)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), p.name), nil
}

// differs compares two files of any type in what a layer keeps of them.
func differs(ctx context.Context, a, b *place) (bool, error) {
	s, t := &a.st, &b.st
	if s.Mode != t.Mode || s.Uid != t.Uid || s.Gid != t.Gid || s.Mtim != t.Mtim {
		return true, nil
	}
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFLNK:
		if s.Size != t.Size {
			return true, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if s.Rdev != t.Rdev {
			return true, nil
		}
	}
	x, err := a.xattrs()
	if err != nil {
		return false, err
	}
	y, err := b.xattrs()
	if err != nil || !maps.Equal(x, y) {
		return true, err
	}
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		x, err := a.readlink()
		if err != nil {
			return false, err
		}
		y, err := b.readlink()
		return x != y, err
	case unix.S_IFREG:
		if s.Size > 0 {
			return contentDiffers(ctx, a, b)
		}
	}
	return false, nil
}

func (p *place) readlink() (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, p.name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlinkat", Path: p.name, Err: err}
	}
	return string(buf[:n]), nil
}

// xattrs returns all xattrs; a file system without them has none.
func (p *place) xattrs() (map[string]string, error) {
	list, err := grow(func(buf []byte) (int, error) { return sys.ListxattrAt(p.dir, p.name, buf) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	attrs := make(map[string]string)
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list, []byte{0}), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		v, err := grow(func(buf []byte) (int, error) { return sys.GetxattrAt(p.dir, p.name, string(name), buf) })
		if errors.Is(err, unix.ENODATA) {
			continue // it went since
		}
		if err != nil {
			return nil, err
		}
		attrs[string(name)] = string(v)
	}
	return attrs, nil
}

// grow calls a function that needs a buffer of unknown size.
func grow(call func([]byte) (int, error)) ([]byte, error) {
	for size := 512; ; size *= 4 {
		buf := make([]byte, size)
		n, err := call(buf)
		if errors.Is(err, unix.ERANGE) && size < 1<<20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

func contentDiffers(ctx context.Context, a, b *place) (bool, error) {
	f, err := a.open()
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := b.open()
	if err != nil {
		return false, err
	}
	defer g.Close()
	same, err := content.Equal(ctx, f, g)
	return !same, err
}
