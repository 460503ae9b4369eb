package merged

import (
	"errors"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Rules are how the layers of a format hide what is below them.
type Rules interface {
	// Opaque reports whether a layer's root hides the layers below.
	Opaque(dir *os.File) (bool, error)

	// Lookup finds a name in a merged directory; nil if it is not there.
	Lookup(d *Directory, name string) (*Node, error)

	// Name returns the name that an entry of a layer's directory tells of: its
	// own, or that which it hides as a whiteout. ok is false for what is no
	// part of the tree.
	Name(entry string) (name string, ok bool)

	// Xattr returns the name under which the tree shows an xattr of a file in
	// a layer. ok is false for what it does not show.
	Xattr(stored string) (name string, ok bool)
}

// Tree is an open stack of layers. It may be used by one goroutine at a time.
type Tree struct {
	roots []*os.File // of the layers, the top one first
	rules Rules
}

// Place is a file or directory in one layer.
type Place struct {
	Layer int    // index of the layer, 0 for the top one
	Path  string // from the layer's root, "." for the root itself
}

// Node is what the merged tree has under one name.
type Node struct {
	Stat   unix.Stat_t
	Places []Place // of a directory: all that are merged, the top one first; else one
	Data   Place   // of a regular file: where its content is
}

// IsDir reports whether a node is a directory.
func (n *Node) IsDir() bool { return n.Stat.Mode&unix.S_IFMT == unix.S_IFDIR }

// Open opens the roots of layers, the top one first. Close releases them.
func Open(r Rules, dirs []string) (_ *Tree, err error) {
	t := &Tree{rules: r}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	for _, d := range dirs {
		f, err := os.OpenFile(d, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		t.roots = append(t.roots, f)
	}
	return t, nil
}

// Close releases the layers.
func (t *Tree) Close() {
	for _, f := range t.roots {
		f.Close()
	}
}

// Root returns the root of the tree that the layers from the given one make. It
// has no places if there are none.
func (t *Tree) Root(from int) (*Node, error) {
	n := new(Node)
	for i := from; i < len(t.roots); i++ {
		n.Places = append(n.Places, Place{i, "."})
		opaque, err := t.rules.Opaque(t.roots[i])
		if err != nil {
			return nil, err
		}
		if opaque {
			break
		}
	}
	if len(n.Places) == 0 {
		return n, nil
	}
	if err := unix.Fstat(int(t.roots[from].Fd()), &n.Stat); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: t.roots[from].Name(), Err: err}
	}
	return n, nil
}

// Directory is a merged directory that is open.
type Directory struct {
	Places []OpenPlace // the top one first
	tree   *Tree
}

// OpenPlace is a directory of one layer that is open.
type OpenPlace struct {
	Place
	File *os.File
}

// Dir opens all places of a merged directory. Only one directory of a tree
// should be open at a time: with hundreds of layers each is hundreds of
// descriptors.
func (t *Tree) Dir(places []Place) (*Directory, error) {
	d := &Directory{tree: t}
	for _, p := range places {
		f, err := t.openDir(p)
		if err != nil {
			d.Close()
			return nil, err
		}
		d.Places = append(d.Places, OpenPlace{p, f})
	}
	return d, nil
}

// Roots returns the open layers of the stack, the top one first.
func (d *Directory) Roots() []*os.File { return d.tree.roots }

// Close closes all places.
func (d *Directory) Close() {
	for _, o := range d.Places {
		o.File.Close()
	}
}

// Lookup finds a name in a merged directory; nil if it is not there.
func (d *Directory) Lookup(name string) (*Node, error) { return d.tree.rules.Lookup(d, name) }

// names lists the names that those places of a directory tell of which are in
// layers above the given one, hidden ones included, sorted.
func (d *Directory) names(above int) ([]string, error) {
	var all []string
	for _, o := range d.Places {
		if o.Layer >= above {
			break
		}
		// A second descriptor: reading moves the position of the first.
		f, err := OpenAt(o.File, ".", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		entries, err := f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if name, ok := d.tree.rules.Name(e); ok {
				all = append(all, name)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// openDir opens a directory component by component, so that a name that was
// made a link meanwhile is an error.
func (t *Tree) openDir(p Place) (*os.File, error) {
	root := t.roots[p.Layer]
	at, last := root, (*os.File)(nil)
	for part := range strings.SplitSeq(p.Path, "/") {
		f, err := OpenAt(at, part, unix.O_RDONLY|unix.O_DIRECTORY)
		if last != nil {
			last.Close()
		}
		if err != nil {
			return nil, err
		}
		at, last = f, f
	}
	return last, nil
}

// open opens a file without following a link.
func (t *Tree) open(p Place, flags int) (*os.File, error) {
	dir, err := t.openDir(Place{p.Layer, path.Dir(p.Path)})
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return OpenAt(dir, path.Base(p.Path), flags)
}

// OpenAt opens an entry of an open directory, close-on-exec and without
// following a link. Reading it leaves its access time alone where the caller
// owns it. The file and the error have its whole path.
func OpenAt(dir *os.File, name string, flags int) (*os.File, error) {
	full := path.Join(dir.Name(), name)
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NOATIME
	}
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, flags, 0)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), full), nil
		case errors.Is(err, unix.EPERM) && flags&unix.O_NOATIME != 0:
			flags &^= unix.O_NOATIME
		case !errors.Is(err, unix.EINTR):
			return nil, &os.PathError{Op: "openat", Path: full, Err: err}
		}
	}
}
