package overlay

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/whiteout"
)

// comparison finds what a stack of layers changes against the stack without
// its upper ones. It compares the two merged trees as a double walk does, but
// where both are made of the same places there is nothing to compare: cost
// grows with what the upper layers hold.
type comparison struct {
	ctx   context.Context
	m     *merged
	base  int // the first layer of the older tree
	yield func(layerfs.Change, error) bool
}

// errStop ends a comparison whose consumer has had enough.
var errStop = errors.New("stop")

func compare(ctx context.Context, r rules, dirs []string, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		m, err := openMerged(r, dirs)
		if err != nil {
			yield(layerfs.Change{}, err)
			return
		}
		defer m.close()
		c := &comparison{ctx: ctx, m: m, base: base, yield: yield}
		if err := c.run(); err != nil && !errors.Is(err, errStop) {
			yield(layerfs.Change{}, err)
		}
	}
}

func (c *comparison) run() error {
	newer, err := c.m.root(0)
	if err != nil {
		return err
	}
	older, err := c.m.root(c.base)
	if err != nil {
		return err
	}
	if len(older.places) == 0 { // compared with the empty tree, whose root has no attributes to differ from
		return c.added("/", newer)
	}
	same, err := c.equal(newer, older)
	if err != nil {
		return err
	}
	if !same {
		if err := c.emit("/", layerfs.Modified); err != nil {
			return err
		}
	}
	return c.directories("/", newer, older)
}

func (c *comparison) emit(p string, kind layerfs.Kind) error {
	if !c.yield(layerfs.Change{Path: p, Kind: kind}, nil) {
		return errStop
	}
	return nil
}

// pair is one name in both trees; nil where it is not.
type pair struct {
	name         string
	newer, older *node
}

// directories compares the contents of a directory that is in both trees.
func (c *comparison) directories(p string, newer, older *node) error {
	if slices.Equal(newer.places, older.places) {
		return nil
	}
	pairs, err := c.pairs(newer, older)
	if err != nil {
		return err
	}
	for _, e := range pairs {
		if err := c.entry(path.Join(p, e.name), e); err != nil {
			return err
		}
	}
	return nil
}

// pairs looks up the names that can differ.
func (c *comparison) pairs(newer, older *node) ([]pair, error) {
	nd, err := c.m.dir(newer.places)
	if err != nil {
		return nil, err
	}
	defer nd.close()
	od, err := c.m.dir(older.places)
	if err != nil {
		return nil, err
	}
	defer od.close()
	// Where the older tree's places are all there too, a name that the upper
	// layers do not have is the same in both.
	above := len(c.m.roots)
	contained := len(older.places) > 0 && len(newer.places) >= len(older.places) &&
		slices.Equal(newer.places[len(newer.places)-len(older.places):], older.places)
	if contained {
		above = c.base
	}
	names, err := nd.names(above)
	if err != nil {
		return nil, err
	}
	if !contained {
		more, err := od.names(above)
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
		slices.Sort(names)
		names = slices.Compact(names)
	}
	var pairs []pair
	for _, name := range names {
		if err := context.Cause(c.ctx); err != nil {
			return nil, err
		}
		e := pair{name: name}
		if e.newer, err = nd.lookup(name); err != nil {
			return nil, err
		}
		if e.older, err = od.lookup(name); err != nil {
			return nil, err
		}
		if e.newer != nil || e.older != nil {
			pairs = append(pairs, e)
		}
	}
	return pairs, nil
}

func (c *comparison) entry(p string, e pair) error {
	switch {
	case e.newer == nil:
		return c.emit(p, layerfs.Deleted)
	case e.older == nil:
		if err := c.emit(p, layerfs.Added); err != nil {
			return err
		}
		return c.added(p, e.newer)
	}
	same, err := c.equal(e.newer, e.older)
	if err != nil {
		return err
	}
	if !same {
		if err := c.emit(p, layerfs.Modified); err != nil {
			return err
		}
	}
	switch {
	case !e.newer.isDir():
		return nil
	case !e.older.isDir():
		return c.added(p, e.newer)
	}
	return c.directories(p, e.newer, e.older)
}

// added lists all that is in a directory of the newer tree.
func (c *comparison) added(p string, n *node) error {
	if !n.isDir() {
		return nil
	}
	pairs, err := c.pairs(n, new(node))
	if err != nil {
		return err
	}
	for _, e := range pairs {
		if err := c.entry(path.Join(p, e.name), e); err != nil {
			return err
		}
	}
	return nil
}

// equal compares two files in all that a Change is about.
func (c *comparison) equal(a, b *node) (bool, error) {
	if a.places[0] == b.places[0] {
		return true, nil
	}
	kind := a.stat.Mode & unix.S_IFMT
	if a.stat.Mode != b.stat.Mode || a.stat.Uid != b.stat.Uid || a.stat.Gid != b.stat.Gid || a.stat.Mtim != b.stat.Mtim {
		return false, nil
	}
	switch kind {
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.stat.Rdev != b.stat.Rdev {
			return false, nil
		}
	case unix.S_IFREG, unix.S_IFLNK:
		if a.stat.Size != b.stat.Size {
			return false, nil
		}
	}
	af, err := c.openPath(a.places[0])
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.openPath(b.places[0])
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
		return c.equalContents(a, b)
	}
	return true, nil
}

// openPath opens a file for its attributes.
func (c *comparison) openPath(p place) (*os.File, error) {
	return c.open(p, unix.O_PATH)
}

func (c *comparison) open(p place, flags int) (*os.File, error) {
	dir, err := c.m.openDir(place{p.layer, path.Dir(p.path)})
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	name := path.Join(dir.Name(), path.Base(p.path))
	fd, err := openat(int(dir.Fd()), path.Base(p.path), flags|unix.O_NOFOLLOW)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
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

// xattrs returns the xattrs of a file as the mount shows them, sorted.
func (c *comparison) xattrs(f *os.File) ([]xattr, error) {
	names, err := listxattr(f)
	if err != nil {
		return nil, err
	}
	var list []xattr
	for _, stored := range names {
		if sys.IsStorageXattr(stored) {
			continue
		}
		shown := stored
		if strings.HasPrefix(stored, c.m.prefix) {
			name, escaped := whiteout.Unescape(stored)
			if !escaped {
				continue
			}
			shown = name
		}
		value, err := grow(f, "getxattr "+stored, func(buf []byte) (int, error) { return unix.Getxattr(procPath(f), stored, buf) })
		if err != nil {
			return nil, err
		}
		list = append(list, xattr{shown, value})
	}
	slices.SortFunc(list, func(a, b xattr) int { return cmp.Compare(a.name, b.name) })
	return list, nil
}

func listxattr(f *os.File) ([]string, error) {
	buf, err := grow(f, "listxattr", func(buf []byte) (int, error) { return unix.Listxattr(procPath(f), buf) })
	if err != nil || len(buf) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(buf), "\x00"), "\x00"), nil
}

// grow calls a function that fills a buffer, with a larger one until it fits.
func grow(f *os.File, op string, fill func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := fill(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENODATA):
			return nil, nil
		case errors.Is(err, unix.ERANGE) && size < 1<<20:
			continue
		}
		return nil, &os.PathError{Op: op, Path: f.Name(), Err: err}
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
func (c *comparison) equalContents(a, b *node) (bool, error) {
	if a.data == b.data {
		return true, nil
	}
	af, err := c.open(a.data, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.open(b.data, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer bf.Close()
	const chunk = 128 << 10
	abuf, bbuf := make([]byte, chunk), make([]byte, chunk)
	for {
		if err := context.Cause(c.ctx); err != nil {
			return false, err
		}
		an, aerr := io.ReadFull(af, abuf)
		bn, berr := io.ReadFull(bf, bbuf)
		if !bytes.Equal(abuf[:an], bbuf[:bn]) {
			return false, nil
		}
		if end(aerr) || end(berr) {
			return end(aerr) == end(berr), nil
		}
		if err := errors.Join(aerr, berr); err != nil {
			return false, err
		}
	}
}

func end(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF } //nolint:errorlint // io.ReadFull returns them bare

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
