package aufs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// difference is a change, and the branch that what is new lies in.
type difference struct {
	layerfs.Change
	layer int
}

// comparison finds what a stack of branches changes against the stack without
// its upper ones. It compares the two merged trees as a double walk does, but
// where both are made of the same places there is nothing to compare: cost
// grows with what the upper branches hold.
type comparison struct {
	ctx   context.Context
	m     *merged
	base  int // the first branch of the older tree
	yield func(difference, error) bool
}

// errStop ends a comparison whose consumer has had enough.
var errStop = errors.New("stop")

func compare(ctx context.Context, dirs []string, base int) iter.Seq2[difference, error] {
	return func(yield func(difference, error) bool) {
		m, err := openMerged(dirs)
		if err != nil {
			yield(difference{}, err)
			return
		}
		defer m.close()
		c := &comparison{ctx: ctx, m: m, base: base, yield: yield}
		if err := c.run(); err != nil && !errors.Is(err, errStop) {
			yield(difference{}, err)
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
	if len(older.places) == 0 { // the empty tree, whose root has no attributes to differ from
		return c.contents("/", newer, new(node))
	}
	return c.entry("/", newer, older)
}

func (c *comparison) emit(p string, kind layerfs.Kind, n *node) error {
	d := difference{Change: layerfs.Change{Path: p, Kind: kind}}
	if n != nil {
		d.layer = n.places[0].layer
	}
	if !c.yield(d, nil) {
		return errStop
	}
	return nil
}

// entry compares one path of both trees; nil where it is not.
func (c *comparison) entry(p string, newer, older *node) error {
	switch {
	case newer == nil:
		return c.emit(p, layerfs.Deleted, nil)
	case older == nil:
		if err := c.emit(p, layerfs.Added, newer); err != nil {
			return err
		}
		return c.contents(p, newer, new(node))
	}
	same, err := c.equal(newer, older)
	if err != nil {
		return err
	}
	if !same {
		if err := c.emit(p, layerfs.Modified, newer); err != nil {
			return err
		}
	}
	if !older.isDir() {
		older = new(node)
	}
	return c.contents(p, newer, older)
}

// contents compares what is in a directory; older may have no places.
func (c *comparison) contents(p string, newer, older *node) error {
	if !newer.isDir() || slices.Equal(newer.places, older.places) {
		return nil
	}
	pairs, err := c.pairs(newer, older)
	if err != nil {
		return err
	}
	for _, e := range pairs {
		if err := c.entry(path.Join(p, e.name), e.newer, e.older); err != nil {
			return err
		}
	}
	return nil
}

// pair is one name in both trees; nil where it is not.
type pair struct {
	name         string
	newer, older *node
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
	names, err := c.names(nd, od, newer, older)
	if err != nil {
		return nil, err
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

// names lists the names that can differ. Where the older directory's places are
// all in the newer one too, a name of which the upper branches say nothing is
// the same in both.
func (c *comparison) names(nd, od *directory, newer, older *node) ([]string, error) {
	n := len(newer.places) - len(older.places)
	if len(older.places) > 0 && n >= 0 && slices.Equal(newer.places[n:], older.places) {
		return nd.names(c.base)
	}
	all := len(c.m.roots)
	names, err := nd.names(all)
	if err != nil {
		return nil, err
	}
	more, err := od.names(all)
	if err != nil {
		return nil, err
	}
	names = append(names, more...)
	slices.Sort(names)
	return slices.Compact(names), nil
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
	af, err := c.open(a.places[0], unix.O_PATH)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.open(b.places[0], unix.O_PATH)
	if err != nil {
		return false, err
	}
	defer bf.Close()
	if same, err := equalXattrs(af, bf); err != nil || !same {
		return same, err
	}
	switch kind {
	case unix.S_IFLNK:
		return equalLinks(af, bf)
	case unix.S_IFREG:
		return c.equalContents(a.places[0], b.places[0])
	}
	return true, nil
}

// open opens a file without following a link.
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

func equalXattrs(a, b *os.File) (bool, error) {
	an, err := listxattr(a)
	if err != nil {
		return false, err
	}
	bn, err := listxattr(b)
	if err != nil || !slices.Equal(an, bn) {
		return false, err
	}
	for _, name := range an {
		av, err := getxattr(a, name)
		if err != nil {
			return false, err
		}
		bv, err := getxattr(b, name)
		if err != nil || !bytes.Equal(av, bv) {
			return false, err
		}
	}
	return true, nil
}

// listxattr returns the names of a file's xattrs, sorted.
func listxattr(f *os.File) ([]string, error) {
	buf, err := grow(f, "listxattr", func(buf []byte) (int, error) { return unix.Listxattr(procPath(f), buf) })
	if err != nil || len(buf) == 0 {
		return nil, err
	}
	names := strings.Split(strings.TrimSuffix(string(buf), "\x00"), "\x00")
	slices.Sort(names)
	return names, nil
}

func getxattr(f *os.File, name string) ([]byte, error) {
	return grow(f, "getxattr "+name, func(buf []byte) (int, error) { return unix.Getxattr(procPath(f), name, buf) })
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
func (c *comparison) equalContents(a, b place) (bool, error) {
	af, err := c.open(a, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer af.Close()
	bf, err := c.open(b, unix.O_RDONLY|unix.O_NONBLOCK)
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
