package merged

import (
	"bytes"
	"cmp"
	"errors"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/content"
	"github.com/layerfs/layerfs/internal/sys"
)

// equal compares two files in all that a Change is about.
func (c *comparison) equal(a, b *Node) (bool, error) {
	if a.Places[0] == b.Places[0] {
		return true, nil
	}
	kind := a.Stat.Mode & unix.S_IFMT
	if a.Stat.Mode != b.Stat.Mode || a.Stat.Uid != b.Stat.Uid || a.Stat.Gid != b.Stat.Gid || a.Stat.Mtim != b.Stat.Mtim {
		return false, nil
	}
	switch kind {
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Stat.Rdev != b.Stat.Rdev {
			return false, nil
		}
	case unix.S_IFREG, unix.S_IFLNK:
		if a.Stat.Size != b.Stat.Size {
			return false, nil
		}
	}
	af, err := c.tree.open(a.Places[0], unix.O_PATH)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.tree.open(b.Places[0], unix.O_PATH)
	if err != nil {
		return false, err
	}
	defer bf.Close()
	if same, err := c.equalXattrs(af, bf); err != nil || !same {
		return same, err
	}
	switch kind {
	case unix.S_IFLNK:
		return equalLinks(af, bf)
	case unix.S_IFREG:
		return c.equalContents(a.Data, b.Data)
	}
	return true, nil
}

func (c *comparison) equalXattrs(a, b *os.File) (bool, error) {
	ax, err := c.xattrs(a)
	if err != nil {
		return false, err
	}
	bx, err := c.xattrs(b)
	if err != nil {
		return false, err
	}
	return slices.EqualFunc(ax, bx, func(a, b xattr) bool { return a.name == b.name && bytes.Equal(a.value, b.value) }), nil
}

type xattr struct {
	name  string
	value []byte
}

// xattrs returns the xattrs of a file as the tree shows them, sorted.
func (c *comparison) xattrs(f *os.File) ([]xattr, error) {
	buf, err := fill(f, func(buf []byte) (int, error) { return sys.ListxattrAt(int(f.Fd()), "", buf) })
	if err != nil || len(buf) == 0 {
		return nil, err
	}
	var list []xattr
	for stored := range strings.SplitSeq(strings.TrimSuffix(string(buf), "\x00"), "\x00") {
		name, ok := c.tree.rules.Xattr(stored)
		if !ok || sys.IsStorageXattr(stored) {
			continue
		}
		value, err := fill(f, func(buf []byte) (int, error) { return sys.GetxattrAt(int(f.Fd()), "", stored, buf) })
		if err != nil {
			return nil, err
		}
		list = append(list, xattr{name, value})
	}
	slices.SortFunc(list, func(a, b xattr) int { return cmp.Compare(a.name, b.name) })
	return list, nil
}

// fill calls a function that fills a buffer, with a larger one until it fits.
// It returns nothing where there are no xattrs.
func fill(f *os.File, read func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := read(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENODATA):
			return nil, nil
		case errors.Is(err, unix.ERANGE) && size < 1<<20:
			continue
		}
		if pe := (*os.PathError)(nil); errors.As(err, &pe) {
			pe.Path = f.Name() // the call has a descriptor only
		}
		return nil, err
	}
}

func equalLinks(a, b *os.File) (bool, error) {
	at, err := readlink(a)
	if err != nil {
		return false, err
	}
	bt, err := readlink(b)
	return at == bt, err
}

func readlink(f *os.File) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(int(f.Fd()), "", buf[:])
	if err != nil {
		return "", &os.PathError{Op: "readlinkat", Path: f.Name(), Err: err}
	}
	return string(buf[:n]), nil
}

// equalContents compares two files of one size byte by byte: all their
// attributes are equal, so one is a copy-up of the other that was not changed,
// or was changed and had its time set back.
func (c *comparison) equalContents(a, b Place) (bool, error) {
	if a == b {
		return true, nil
	}
	af, err := c.tree.open(a, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.tree.open(b, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer bf.Close()
	return content.Equal(c.ctx, af, bf)
}
