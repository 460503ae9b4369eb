//go:build linux

package unionfs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// key names an inode of a branch file system.
type key struct{ dev, ino uint64 }

func keyOf(st *unix.Stat_t) key { return key{uint64(st.Dev), st.Ino} }

// An inst is the part of a directory that lies on one branch. Its descriptor
// is opened when needed and closed by the cache when too many are open.
type inst struct {
	br   *Branch
	key  key
	node *Node // the directory

	mu     sync.Mutex
	fd     int // -1: closed
	pins   int
	used   bool // since the cache last looked
	cached bool // listed in the cache
	gone   bool // its node was freed

	watched atomic.Bool
	defACL  atomic.Int32 // 0 not known, 1 no default ACL, 2 has one
}

// A link is one name of a non-directory.
type link struct {
	dir  *Node
	name string
}

// A Node is a file of the union: what a FUSE node id or an open file stands
// for. Nodes are counted: Lookup and the calls that create return one
// reference, Forget gives it back.
type Node struct {
	fs  *FS
	id  uint64 // orders locks
	ino uint64 // st_ino in the union
	typ uint32 // S_IFMT of mode

	// mu of a directory guards its names: held shared while a name is looked
	// up, exclusively while one is made or removed.
	mu sync.RWMutex

	copyMu sync.Mutex // one copy-up at a time

	refs atomic.Int64 // references by callers, plus one per node in kids

	// FS.tabMu guards what follows.
	insts  []*inst // directories: top first; replaced, never changed
	parent *Node   // directories: nil for the root
	name   string
	kids   map[string]*Node // known children, without a reference
	snap   *listing
	index  *index      // directories: what read-only branches have
	stale  atomic.Bool // insts must be found again

	told    atomic.Uint64 // changes that were reported
	probes  int           // instances asked since there was an index
	indexAt int           // probes after which to make one

	remerged atomic.Bool   // insts changed since Changed asked
	changes  atomic.Uint64 // counts changes of names

	links   []link  // non-directories
	br      *Branch // where a non-directory lies
	key     key
	plink   *plink
	orphan  *File        // a way to what lost its names while somebody knows it
	files   []*File      // open ones
	dead    bool         // no known name any more
	left    uint32       // names a dead non-directory still has
	last    *unix.Stat_t // attributes when it died
	writers atomic.Int32
	hashed  bool // in FS.byKey
	freed   bool

	// Tag is for the binding that serves the node.
	Tag atomic.Pointer[any]
}

// Type returns the S_IFMT bits of the mode.
func (n *Node) Type() uint32 { return n.typ }

// Ino returns the inode number in the union.
func (n *Node) Ino() uint64 { return n.ino }

// IsDir reports whether n is a directory.
func (n *Node) IsDir() bool { return n.typ == unix.S_IFDIR }

// Writers returns how many open files may change n's content.
func (n *Node) Writers() int { return int(n.writers.Load()) }

// Key returns the branch inode the node stands for at the moment, and whether
// it lies on a writable branch. It changes when the node is copied up.
func (n *Node) Key() (dev, ino uint64, writable bool) {
	n.fs.stackMu.RLock()
	defer n.fs.stackMu.RUnlock()
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	if n.IsDir() {
		if len(n.insts) == 0 {
			return 0, 0, false
		}
		i := n.insts[0]
		return i.key.dev, i.key.ino, i.br.perm == RW
	}
	return n.key.dev, n.key.ino, n.br != nil && n.br.perm == RW
}

// Names returns the known names of a node, as directory and name.
func (n *Node) Names(each func(dir *Node, name string)) {
	n.fs.tabMu.Lock()
	var ls []link
	if n.IsDir() {
		if n.parent != nil {
			ls = []link{{n.parent, n.name}}
		}
	} else {
		ls = append(ls, n.links...)
	}
	n.fs.tabMu.Unlock()
	for _, l := range ls {
		each(l.dir, l.name)
	}
}

// Child returns the known child of that name, without a reference; it stays
// valid only as long as the caller knows it does.
func (n *Node) Child(name string) *Node {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.kids[name]
}

func (n *Node) instList() []*inst {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.insts
}

func (n *Node) instOn(b *Branch) *inst {
	for _, i := range n.instList() {
		if i.br == b {
			return i
		}
	}
	return nil
}

// pin returns the descriptor of the instance, which stays open until unpin.
// ESTALE says that the directory is no longer where it was.
func (i *inst) pin() (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.fd < 0 {
		if err := i.open(); err != nil {
			return -1, err
		}
	}
	i.pins++
	i.used = true
	return i.fd, nil
}

func (i *inst) unpin() {
	i.mu.Lock()
	i.pins--
	if i.gone && i.pins == 0 {
		i.closeFD()
	}
	i.mu.Unlock()
}

// open is called with i.mu held. It goes up the tree, child before parent.
func (i *inst) open() error {
	n := i.node
	n.fs.tabMu.Lock()
	parent, name, dead := n.parent, n.name, n.dead
	n.fs.tabMu.Unlock()
	if dead || parent == nil {
		return unix.ESTALE
	}
	pi := parent.instOn(i.br)
	if pi == nil {
		return unix.ESTALE
	}
	pfd, err := pi.pin()
	if err != nil {
		return err
	}
	defer pi.unpin()
	fd, err := openDirAt(pfd, name)
	if err != nil {
		if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
			err = unix.ESTALE
		}
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || keyOf(&st) != i.key {
		unix.Close(fd)
		if err == nil {
			err = unix.ESTALE
		}
		return err
	}
	i.setFD(fd)
	return nil
}

// setFD is called with i.mu held, or before i is shared.
func (i *inst) setFD(fd int) {
	i.fd = fd
	n := i.node.fs.dirFDs.Add(1)
	if !i.cached {
		i.cached = true
		i.node.fs.addInst(i)
	}
	if n > int64(i.node.fs.maxFDs) {
		// The sweep takes other instances' locks by TryLock only.
		i.node.fs.sweepFDs(i)
	}
}

func (i *inst) closeFD() {
	if i.fd >= 0 && i.fd != i.br.root {
		unix.Close(i.fd)
		i.node.fs.dirFDs.Add(-1)
	}
	i.fd = -1
}

func openDirAt(fd int, name string) (int, error) {
	for {
		d, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return d, err
		}
	}
}

// addInst puts i on the ring the sweep goes round.
func (fs *FS) addInst(i *inst) {
	fs.ringMu.Lock()
	if len(fs.ring) > 1024+2*int(fs.dirFDs.Load()) {
		// Most of it was freed without a sweep.
		keep := fs.ring[:0]
		for _, o := range fs.ring {
			if o.mu.TryLock() {
				closed := o.fd < 0
				o.cached = !closed
				o.mu.Unlock()
				if closed {
					continue
				}
			}
			keep = append(keep, o)
		}
		clear(fs.ring[len(keep):])
		fs.ring = keep
	}
	fs.ring = append(fs.ring, i)
	fs.ringMu.Unlock()
}

// sweepFDs closes descriptors that were not used since the last sweep, until
// an eighth of them is free: second chance, which needs no list moves when a
// descriptor is used.
func (fs *FS) sweepFDs(self *inst) {
	if !fs.ringMu.TryLock() {
		return
	}
	defer fs.ringMu.Unlock()
	want := int64(fs.maxFDs) * 7 / 8
	keep := fs.ring[:0]
	for k, i := range fs.ring {
		if i == self || (k < 2*len(fs.ring) && fs.dirFDs.Load() <= want) || !i.mu.TryLock() {
			keep = append(keep, i)
			continue
		}
		switch {
		case i.fd < 0:
			i.cached = false
		case i.pins > 0 || i.fd == i.br.root:
			keep = append(keep, i)
		case i.used:
			i.used = false
			keep = append(keep, i)
		default:
			i.closeFD()
			i.cached = false
		}
		i.mu.Unlock()
	}
	clear(fs.ring[len(keep):])
	fs.ring = keep
}

// A ref is a place to act on a file: a name in a pinned directory, or, with
// name empty, a descriptor of the file itself.
type ref struct {
	fd   int
	name string
	in   *inst
	file *File
	br   *Branch
}

func (r *ref) release() {
	if r.in != nil {
		r.in.unpin()
		r.in = nil
	}
	if r.file != nil {
		r.file.put()
		r.file = nil
	}
}

// where finds a way to n. dir instances: the topmost.
func (n *Node) where() (ref, error) {
	if n.IsDir() {
		is := n.instList()
		if len(is) == 0 {
			return ref{}, unix.ESTALE
		}
		fd, err := is[0].pin()
		if err != nil {
			return ref{}, err
		}
		return ref{fd: fd, in: is[0], br: is[0].br}, nil
	}
	n.fs.tabMu.Lock()
	br, pl := n.br, n.plink
	var first link
	if len(n.links) > 0 {
		first = n.links[0]
	}
	var all []link
	if len(n.links) > 1 {
		all = append(all, n.links...)
	}
	var f *File
	for _, o := range n.files {
		if o.br == br && o.get() {
			f = o
			break
		}
	}
	dead := n.dead
	n.fs.tabMu.Unlock()
	if dead {
		if f != nil {
			return ref{fd: f.fd, file: f, br: br}, nil
		}
		return ref{}, unix.ESTALE
	}
	if f != nil {
		f.put()
	}
	if pl != nil {
		return ref{fd: br.plnk, name: pl.name, br: br}, nil
	}
	if all == nil && first.dir != nil {
		all = []link{first}
	}
	err := error(unix.ESTALE)
	for _, l := range all {
		i := l.dir.instOn(br)
		if i == nil {
			continue
		}
		fd, e := i.pin()
		if e != nil {
			err = e
			continue
		}
		if len(all) > 1 {
			// Some of the names may have been taken away directly.
			var st unix.Stat_t
			if fstatat(fd, l.name, &st) != nil || keyOf(&st) != n.keyNow() {
				i.unpin()
				continue
			}
		}
		return ref{fd: fd, name: l.name, in: i, br: br}, nil
	}
	return ref{}, err
}

func (n *Node) keyNow() key {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.key
}

func (r *ref) stat(st *unix.Stat_t) error {
	if r.name == "" {
		return unix.Fstat(r.fd, st)
	}
	return fstatat(r.fd, r.name, st)
}

// open opens a regular file and checks that it is the one meant.
func (r *ref) open(flags int, want key) (int, error) {
	var fd int
	var err error
	for {
		if r.name == "" {
			fd, err = unix.Open(procFD(r.fd), flags&^unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		} else {
			fd, err = unix.Openat(r.fd, r.name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		}
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		if err == unix.ENOENT || err == unix.ELOOP {
			err = unix.ESTALE
		}
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || keyOf(&st) != want {
		unix.Close(fd)
		return -1, unix.ESTALE
	}
	return fd, nil
}

// ParentIno returns the inode number of a directory's parent; that of the root
// is its own.
func (n *Node) ParentIno() uint64 {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	if n.parent == nil {
		return n.ino
	}
	return n.parent.ino
}
