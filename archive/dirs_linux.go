package archive

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/safepath"
	"github.com/layerfs/layerfs/whiteout"
)

// dirFD is an open directory, shared by the cache and the tasks in it.
type dirFD struct {
	fd   int
	refs atomic.Int32
}

func (d *dirFD) retain() *dirFD { d.refs.Add(1); return d }

func (d *dirFD) release() {
	if d.refs.Add(-1) == 0 {
		_ = unix.Close(d.fd)
	}
}

// made says what this Apply put at a name, apart from directories.
type made uint8

const (
	madeFile made = iota + 1
	madeWhiteout
)

// lowerRef is the instance of a directory in one lower layer.
type lowerRef struct {
	layer int
	path  string // below that layer's root
}

// node is a directory of the target, or of the union where only lower layers
// have it. Nodes are used by the parser's goroutine alone.
type node struct {
	parent   *node // nil for the root
	name     string
	depth    int
	upper    bool // exists in the target directory
	old      bool // existed before this Apply
	entry    bool // its attributes come from the stream
	kept     bool // has, or is on the way to, something of the stream
	hidden   bool // nothing of the lower layers shows in it
	dead     bool // was removed or replaced
	opaqueX  bool // carries the opaque mark
	marked   bool // carries the mark that it has xattr whiteouts
	special  bool // files made in it do not simply get the mode and owner asked for
	defACL   bool // has a default ACL
	touched  bool // its modification time was changed
	queued   bool // is in extractor.finish
	locked   bool // had a mode, lockedMode, that kept its owner out
	lowersOK bool // lowers is known

	lockedMode uint32

	children map[string]*node
	made     map[string]made
	lowers   []lowerRef

	final finalAttrs

	fd         *dirFD
	prev, next *node // in the list of open nodes, most recent first
}

// finalAttrs are what a directory gets after all else is done.
type finalAttrs struct {
	chmod        bool
	mode         uint32
	times        bool
	atime, mtime unix.Timespec
	acl          string // default ACL
	hasACL       bool
}

func (n *node) child(name string) *node {
	return n.children[name]
}

func (n *node) add(c *node) *node {
	if n.children == nil {
		n.children = make(map[string]*node)
	}
	n.children[c.name] = c
	c.parent, c.depth = n, n.depth+1
	return c
}

func (n *node) setMade(name string, m made) {
	if n.made == nil {
		n.made = make(map[string]made)
	}
	n.made[name] = m
}

// keep says that something of the stream is in n.
func (n *node) keep() {
	for ; n != nil && !n.kept; n = n.parent {
		n.kept = true
	}
}

// path returns where n is, without a leading slash; empty for the root.
func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	return path.Join(n.parent.path(), n.name)
}

// dirs is the tree of known directories, with a limited number of them open.
type dirs struct {
	root  *node
	limit int
	open  int
	lru   node // head of the ring
}

func (d *dirs) init(fd int, limit int) {
	if limit < 2 {
		limit = 2
	}
	d.limit = limit
	d.lru.prev, d.lru.next = &d.lru, &d.lru
	d.root = &node{upper: true}
	d.root.fd = &dirFD{fd: fd}
	d.root.fd.refs.Store(1)
}

// get returns the open directory of n, which must exist in the target. The
// result is valid until the next call of get unless retained.
func (d *dirs) get(n *node) (*dirFD, error) {
	if n.fd != nil {
		if n.parent != nil && d.lru.next != n {
			n.unlink()
			d.pushFront(n)
		}
		return n.fd, nil
	}
	p, err := d.get(n.parent)
	if err != nil {
		return nil, err
	}
	fd, err := openDir(p.fd, n.name)
	if err != nil {
		return nil, pathError("openat", n.path(), err)
	}
	d.attach(n, fd)
	return n.fd, nil
}

// attach makes fd the open directory of n.
func (d *dirs) attach(n *node, fd int) {
	n.fd = &dirFD{fd: fd}
	n.fd.refs.Store(1)
	d.pushFront(n)
	if d.open++; d.open > d.limit {
		d.closeNode(d.lru.prev)
	}
}

func (d *dirs) pushFront(n *node) {
	n.prev, n.next = &d.lru, d.lru.next
	n.prev.next, n.next.prev = n, n
}

func (n *node) unlink() {
	n.prev.next, n.next.prev = n.next, n.prev
	n.prev, n.next = nil, nil
}

func (d *dirs) closeNode(n *node) {
	if n.fd == nil || n.parent == nil {
		return
	}
	n.unlink()
	n.fd.release()
	n.fd = nil
	d.open--
}

// kill forgets a directory that is being removed, and all below it.
func (d *dirs) kill(n *node) {
	n.dead = true
	d.closeNode(n)
	if n.parent != nil {
		delete(n.parent.children, n.name)
	}
	for _, c := range n.children {
		d.kill(c)
	}
}

func (d *dirs) closeAll() {
	for d.lru.next != &d.lru {
		d.closeNode(d.lru.next)
	}
	d.root.fd.release()
}

// openDir opens a directory for reading, or if that is not permitted just as
// a place for the *at family.
func openDir(at int, name string) (int, error) {
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(at, name, flags|unix.O_RDONLY, 0) })
	if err == unix.EACCES {
		fd, err = ignoringEINTR(func() (int, error) { return unix.Openat(at, name, flags|unix.O_PATH, 0) })
	}
	return fd, err
}

func ignoringEINTR[T any](f func() (T, error)) (T, error) {
	for {
		if v, err := f(); err != unix.EINTR {
			return v, err
		}
	}
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// lowerLayer is one directory of ApplyOptions.Lowers.
type lowerLayer struct {
	root *safepath.Root
}

// lowerEntry is what a lower layer has at a name.
type lowerEntry struct {
	ref  lowerRef
	st   unix.Stat_t
	f    *os.File // O_PATH
	kind byte     // 'd', 'w' for a whiteout, 'l', or 'f' for anything else
}

// lowersOf returns the instances of n in the lower layers, top first. The
// first is what shows if the target has none.
func (x *extractor) lowersOf(n *node) ([]lowerRef, error) {
	if n.hidden || len(x.lowers) == 0 {
		return nil, nil
	}
	if n.lowersOK {
		return n.lowers, nil
	}
	if n.parent == nil {
		for i := range x.lowers {
			n.lowers = append(n.lowers, lowerRef{i, ""})
		}
		n.lowersOK = true
		return n.lowers, nil
	}
	_, refs, err := x.lookupLower(n.parent, n.name)
	if err != nil {
		return nil, err
	}
	n.lowers, n.lowersOK = refs, true
	return refs, nil
}

// lookupLower finds name in the lower instances of n. first is the topmost
// entry, nil if there is none or it is hidden; its file must be closed. If it
// is a directory, refs are all the instances that are merged.
func (x *extractor) lookupLower(n *node, name string) (first *lowerEntry, refs []lowerRef, err error) {
	parents, err := x.lowersOf(n)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil && first != nil {
			_ = first.f.Close()
			first = nil
		}
	}()
	// A directory that was renamed with redirect_dir continues elsewhere.
	next, absolute := name, ""
	for i := 0; i < len(parents); i++ {
		ref := parents[i]
		at := path.Join(ref.path, next)
		if absolute != "" {
			at = absolute
		}
		e, err := x.lowerLstat(lowerRef{ref.layer, at})
		if err != nil {
			return first, nil, err
		}
		if e == nil {
			if x.form == whiteout.AUFS {
				if gone, err := x.lowerHasAUFS(ref, next); err != nil || gone {
					return first, refs, err
				}
			}
			continue
		}
		if first == nil && e.kind != 'w' {
			first = e
		}
		stop := e.kind != 'd'
		redirect := ""
		if e.kind == 'd' {
			refs = append(refs, e.ref)
			stop, redirect, err = x.lowerOpaque(e)
		}
		if e != first {
			_ = e.f.Close()
		}
		if err != nil {
			return first, nil, err
		}
		if stop {
			break
		}
		switch {
		case strings.HasPrefix(redirect, "/"):
			// From the root of the layers below on: parents no longer matter.
			absolute = strings.Trim(path.Clean(redirect), "/")
			parents = parents[:i+1]
			for l := ref.layer + 1; l < len(x.lowers); l++ {
				parents = append(parents, lowerRef{l, ""})
			}
		case redirect != "" && absolute != "":
			absolute = path.Join(path.Dir(absolute), redirect)
		case redirect != "":
			next = redirect
		}
	}
	return first, refs, nil
}

// lowerLstat returns nil if there is nothing.
func (x *extractor) lowerLstat(ref lowerRef) (*lowerEntry, error) {
	f, err := x.lowers[ref.layer].root.OpenExact(ref.path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		switch pathErrno(err) {
		case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG:
			return nil, nil
		}
		return nil, fmt.Errorf("lower %s: %w", x.lowers[ref.layer].root.Name(), err)
	}
	e := &lowerEntry{ref: ref, f: f, kind: 'f'}
	if err := unix.Fstat(int(f.Fd()), &e.st); err != nil {
		_ = f.Close()
		return nil, pathError("fstat", ref.path, err)
	}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.kind = 'd'
	case unix.S_IFLNK:
		e.kind = 'l'
	case unix.S_IFCHR:
		if isOverlay(x.form) && e.st.Rdev == 0 {
			e.kind = 'w'
		}
	case unix.S_IFREG:
		if isOverlay(x.form) && e.st.Size == 0 {
			if _, ok, err := getXattr(int(f.Fd()), x.form.Prefix()+"whiteout"); err == nil && ok {
				e.kind = 'w'
			}
		}
	}
	return e, nil
}

// lowerOpaque reports whether a lower directory hides those below it, and
// where these are if it was renamed.
func (x *extractor) lowerOpaque(e *lowerEntry) (opaque bool, redirect string, err error) {
	if x.form == whiteout.AUFS {
		f, err := x.lowers[e.ref.layer].root.OpenExact(path.Join(e.ref.path, whiteout.OpaqueName), unix.O_PATH|unix.O_NOFOLLOW)
		if err == nil {
			_ = f.Close()
			return true, "", nil
		}
		if errno := pathErrno(err); errno != unix.ENOENT {
			return false, "", err
		}
		return false, "", nil
	}
	fd := int(e.f.Fd())
	v, ok, err := getXattr(fd, x.form.Prefix()+"opaque")
	if err != nil || ok && v == "y" {
		return true, "", err
	}
	redirect, _, err = getXattr(fd, x.form.Prefix()+"redirect")
	return false, redirect, err
}

// lowerHasAUFS reports whether an AUFS whiteout or opaque mark hides name from
// the layers below ref.
func (x *extractor) lowerHasAUFS(ref lowerRef, name string) (bool, error) {
	f, err := x.lowers[ref.layer].root.OpenExact(path.Join(ref.path, whiteout.Prefix+name), unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		_ = f.Close()
		return true, nil
	}
	if errno := pathErrno(err); errno != unix.ENOENT && errno != unix.ENAMETOOLONG {
		return false, err
	}
	return false, nil
}

func pathErrno(err error) unix.Errno {
	var pe *fs.PathError
	if asPathError(err, &pe) {
		if errno, ok := pe.Err.(unix.Errno); ok {
			return errno
		}
	}
	return 0
}
