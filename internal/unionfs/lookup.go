//go:build linux

package unionfs

import (
	"slices"

	"golang.org/x/sys/unix"
)

func (fs *FS) checkName(name string) error {
	if len(name) > fs.format.MaxName() {
		return unix.ENAMETOOLONG
	}
	if fs.format.Reserved(name) {
		return unix.EPERM
	}
	if name == "" || name == "." || name == ".." {
		return unix.EINVAL
	}
	for i := 0; i < len(name); i++ {
		if name[i] == '/' || name[i] == 0 {
			return unix.EINVAL
		}
	}
	return nil
}

// part is one instance of a directory that was found.
type part struct {
	br  *Branch
	key key
	fd  int // -1, or an open descriptor
}

// found is what a name resolves to.
type found struct {
	top   *inst // instance of the parent that has it; nil: not found
	st    unix.Stat_t
	dirs  []part // if a directory
	nlink uint64 // of a directory
	below bool   // something would be seen if the top entry went away
	white *inst  // where the search met a whiteout
	told  uint64 // Node.told of the parent when the search began
}

func (f *found) isDir() bool { return f.top != nil && f.st.Mode&unix.S_IFMT == unix.S_IFDIR }

func (f *found) close() {
	for _, p := range f.dirs {
		if p.fd >= 0 {
			unix.Close(p.fd)
		}
	}
	f.dirs = nil
}

// look pins an instance for looking into it. ok is false if the instance has
// gone from its branch, which counts as empty.
func (fs *FS) look(dir *Node, i *inst) (fd int, ok bool, err error) {
	fd, err = i.pin()
	switch err {
	case nil:
	case unix.ESTALE:
		return -1, false, nil
	default:
		return -1, false, err
	}
	if fs.watch != nil && (i.br.perm == RO || i.br.perm == ROWH) && !i.watched.Swap(true) {
		if err := fs.watch.Add(dir, fd); err != nil {
			i.watched.Store(false)
			fs.log.Warn("watch", "branch", i.br.path, "err", err)
		}
	}
	return fd, true, nil
}

// resolve finds name. below: find out what lies below the top entry, too.
// The caller holds dir.mu.
func (fs *FS) resolve(dir *Node, name string, below bool, f *found) (err error) {
	f.told = dir.told.Load()
	is, err := fs.insts(dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	opaque := false
	way := fs.route(dir, is, name)
	for k, i := range is {
		if way.skips(k) {
			continue
		}
		fd, ok, err := fs.look(dir, i)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		var st unix.Stat_t
		wh := i.br.perm.Whiteouts()
		kind, err := fs.format.Probe(fd, name, wh, &st)
		if err != nil {
			i.unpin()
			return err
		}
		more := true
		switch {
		case kind == Whiteout:
			f.white = i
			more = false
		case kind != Entry:
		case f.top != nil && (opaque || !f.isDir() || st.Mode&unix.S_IFMT != unix.S_IFDIR):
			f.below = true
			// AUFS looks past a file for more of the directory, overlayfs
			// (ovl_lookup_single) stops there.
			more = f.isDir() && !opaque && fs.aufs
		default:
			isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
			if f.top == nil {
				f.top, f.st = i, st
				more = isDir || below
			} else {
				f.below = true
			}
			if !isDir {
				break
			}
			p := part{br: i.br, key: keyOf(&st), fd: -1}
			if f.nlink == 0 {
				f.nlink = uint64(st.Nlink)
			} else if st.Nlink > 2 {
				f.nlink += uint64(st.Nlink) - 2
			}
			if wh && k < len(is)-1 {
				// Opened rather than asked by a path of two components,
				// whose first could be changed into a symbolic link.
				if p.fd, err = openDirAt(fd, name); err == nil {
					opaque, err = fs.format.Opaque(p.fd)
				}
				if err != nil {
					i.unpin()
					return err
				}
				more = !opaque || below
			}
			f.dirs = append(f.dirs, p)
		}
		i.unpin()
		if !more {
			break
		}
	}
	return nil
}

// maxFind is how often instances are looked for while changes are reported.
const maxFind = 4

// insts returns dir's instances, found again if a change of a branch may have
// added or removed some.
func (fs *FS) insts(dir *Node) ([]*inst, error) {
	for try := 1; dir != fs.root && dir.stale.Load() && try <= maxFind; try++ {
		fs.tabMu.Lock()
		parent, name := dir.parent, dir.name
		fs.tabMu.Unlock()
		if parent == nil {
			break
		}
		dir.stale.Store(false)
		var f found
		// Without parent.mu: the caller holds dir.mu, and the order is
		// parent first.
		if err := fs.resolve(parent, name, false, &f); err != nil {
			dir.stale.Store(true)
			return nil, err
		}
		fs.tabMu.Lock()
		late := f.told != parent.told.Load()
		if late {
			dir.stale.Store(true)
		}
		// Else another directory took the name; a lookup tells.
		ours := len(dir.insts) == 0 || shares(dir.insts, f.dirs)
		if f.isDir() && ours && (!late || try == maxFind) {
			fs.setInsts(dir, f.dirs)
			f.dirs = nil
		}
		fs.tabMu.Unlock()
		f.close()
	}
	is := dir.instList()
	if len(is) == 0 {
		return nil, unix.ENOENT
	}
	return is, nil
}

// setInsts gives dir the instances in parts, keeping those it has. tabMu is
// held.
func (fs *FS) setInsts(dir *Node, parts []part) {
	old := dir.insts
	same := len(old) == len(parts)
	for k := 0; same && k < len(parts); k++ {
		same = old[k].br == parts[k].br && old[k].key == parts[k].key
	}
	if same {
		for _, p := range parts {
			if p.fd >= 0 {
				unix.Close(p.fd)
			}
		}
		return
	}
	is := make([]*inst, 0, len(parts))
next:
	for _, p := range parts {
		for _, o := range old {
			if o.br == p.br && o.key == p.key {
				if p.fd >= 0 {
					unix.Close(p.fd)
				}
				is = append(is, o)
				continue next
			}
		}
		is = append(is, &inst{br: p.br, key: p.key, node: dir, fd: -1})
		if p.fd >= 0 {
			unix.Close(p.fd)
		}
	}
	if len(old) > 0 {
		dir.remerged.Store(true)
	}
	dir.insts = is
	dir.changes.Add(1)
	dir.snap = nil
}

// Lookup finds name in dir and returns a node with one reference, and its
// attributes in st. ENOENT if there is none.
func (fs *FS) Lookup(dir *Node, name string, st *unix.Stat_t) (*Node, error) {
	if err := fs.checkName(name); err != nil {
		return nil, err
	}
	n, err := fs.lookupName(dir, name, st)
	if err != nil {
		return nil, err
	}
	if err := fs.linked(n, st); err != nil {
		fs.Forget(n, 1)
		return nil, err
	}
	return n, nil
}

func (fs *FS) lookupName(dir *Node, name string, st *unix.Stat_t) (*Node, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	fs.stats.Lookups.Add(1)
	dir.mu.RLock()
	defer dir.mu.RUnlock()
	return fs.lookup(dir, name, st)
}

func (fs *FS) lookup(dir *Node, name string, st *unix.Stat_t) (*Node, error) {
	var f found
	if err := fs.resolve(dir, name, false, &f); err != nil {
		return nil, errno(err)
	}
	if f.top == nil {
		return nil, unix.ENOENT
	}
	return fs.attach(dir, name, &f, st)
}

// attach returns the node for what was found, with one reference more. It
// consumes f.
func (fs *FS) attach(dir *Node, name string, f *found, st *unix.Stat_t) (*Node, error) {
	k := keyOf(&f.st)
	typ := f.st.Mode & unix.S_IFMT
	ino := fs.unionIno(k)
	fs.tabMu.Lock()
	n := dir.kids[name]
	if f.isDir() {
		if n == nil || !n.IsDir() || n.dead || !shares(n.insts, f.dirs) {
			n = fs.newNode(typ)
			n.ino, n.parent, n.name = ino, dir, name
			dir.addKid(name, n)
		}
		n.refs.Add(1)
		fd := -1
		if len(n.insts) == 0 {
			fd, f.dirs[0].fd = f.dirs[0].fd, -1
		}
		// A change that was reported during the search may have given n
		// others than it found.
		late := f.told != dir.told.Load()
		if late {
			n.stale.Store(true)
		}
		if !late || len(n.insts) == 0 {
			fs.setInsts(n, f.dirs)
			f.dirs = nil
		}
		first := n.insts[0]
		fs.tabMu.Unlock()
		f.close()
		if fd >= 0 {
			// The descriptor that looked for the opaque mark serves on.
			first.mu.Lock()
			if first.fd < 0 {
				first.setFD(fd)
			} else {
				unix.Close(fd)
			}
			first.mu.Unlock()
		}
		if late {
			_, err := fs.insts(n)
			if err == nil {
				err = fs.getAttr(n, st)
			}
			if err != nil {
				fs.Forget(n, 1)
				return nil, errno(err)
			}
			return n, nil
		}
		*st = f.st
		st.Ino = n.ino
		setInt(&st.Nlink, f.nlink)
		return n, nil
	}
	p := fs.plinks[k]
	var orphan *File
	switch {
	case n != nil && n.typ == typ && !n.dead && (n.key == k || p != nil && n.plink == p):
	case p != nil && p.node != nil:
		n = p.node
		orphan = n.addLink(dir, name)
	case p != nil:
		n = fs.newNode(typ)
		n.ino, n.br, n.key, n.plink = p.ino, p.br, p.upper, p
		p.node = n
		orphan = n.addLink(dir, name)
	default:
		multi := f.st.Nlink > 1 && !fs.noPlink
		n = nil
		if multi {
			n = fs.byKey[k]
		}
		if n == nil {
			if up := fs.plinkUp[k]; up != nil {
				if n = up.node; n == nil {
					n = fs.newNode(typ)
					n.ino, n.br, n.key, n.plink = up.ino, up.br, k, up
					up.node = n
				}
			}
		}
		if n == nil {
			n = fs.newNode(typ)
			n.ino, n.br, n.key = ino, f.top.br, k
			if multi {
				n.hashed = true
				fs.byKey[k] = n
			}
		}
		orphan = n.addLink(dir, name)
	}
	n.refs.Add(1)
	pl, hidden := n.plink, fs.hid[k]
	fs.tabMu.Unlock()
	orphan.drop()
	*st = f.st
	if pl != nil {
		if err := fstatat(pl.br.plnk, pl.name, st); err != nil {
			fs.Forget(n, 1)
			return nil, errno(err)
		}
		setInt(&st.Nlink, uint64(pl.nlink))
	} else if hidden > 0 {
		setInt(&st.Nlink, visible(uint64(st.Nlink), uint64(hidden)))
	}
	st.Ino = n.ino
	return n, nil
}

func shares(is []*inst, parts []part) bool {
	for _, i := range is {
		for _, p := range parts {
			if i.br == p.br && i.key == p.key {
				return true
			}
		}
	}
	return false
}

// addKid makes n the known child of that name; the child holds its parent.
// tabMu is held.
func (dir *Node) addKid(name string, n *Node) {
	if dir.kids == nil {
		dir.kids = map[string]*Node{}
	}
	dir.kids[name] = n
	dir.refs.Add(1)
}

// addLink adds a name of a non-directory, by which it can be reached from then
// on: the orphan it returns is to be dropped. tabMu is held.
func (n *Node) addLink(dir *Node, name string) (orphan *File) {
	orphan, n.orphan = n.orphan, nil
	n.dead = false
	for _, l := range n.links {
		if l.dir == dir && l.name == name {
			if dir.kids == nil {
				dir.kids = map[string]*Node{}
			}
			dir.kids[name] = n
			return orphan
		}
	}
	n.links = append(n.links, link{dir, name})
	dir.addKid(name, n)
	return orphan
}

// delLink takes a name away and returns whether the parent's reference is to
// be given back. tabMu is held.
func (n *Node) delLink(dir *Node, name string) bool {
	if dir.kids[name] == n {
		delete(dir.kids, name)
	}
	for i, l := range n.links {
		if l.dir == dir && l.name == name {
			n.links = slices.Delete(n.links, i, i+1)
			return true
		}
	}
	return false
}

// DirEntry is one entry of a merged directory.
type DirEntry struct {
	Name string
	Ino  uint64 // as a later Lookup gives it
	Off  uint64 // where a reader goes on behind it; grows through the listing
	Type uint8  // DT_*

	top  *inst
	many bool // more than one instance has it
}

// listing is a merged directory at one moment.
type listing struct {
	ents    []DirEntry
	changes uint64
}

// firstOff is the offset of the first entry; 1 and 2 are "." and "..".
const firstOff = 3

// ReadDir returns the entries of dir behind offset off. The offset of an entry
// is a hash of its name, so it means the same in every later listing. At off 0
// the directory is read anew; the slice is not to be changed.
func (fs *FS) ReadDir(dir *Node, off uint64) ([]DirEntry, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	fs.tabMu.Lock()
	l := dir.snap
	fs.tabMu.Unlock()
	if off == 0 || l == nil {
		var err error
		if l, err = fs.list(dir); err != nil {
			return nil, errno(err)
		}
	}
	i, _ := slices.BinarySearchFunc(l.ents, off, func(e DirEntry, off uint64) int {
		if e.Off <= off {
			return -1
		}
		return 1
	})
	fs.tabMu.Lock()
	if i == len(l.ents) {
		dir.snap = nil
	} else {
		dir.snap = l
	}
	fs.tabMu.Unlock()
	return l.ents[i:], nil
}

func (fs *FS) list(dir *Node) (*listing, error) {
	dir.mu.RLock()
	defer dir.mu.RUnlock()
	return fs.listLocked(dir)
}

// listLocked is list for callers that hold dir.mu.
func (fs *FS) listLocked(dir *Node) (*listing, error) {
	l := &listing{changes: dir.changes.Load()}
	is, err := fs.insts(dir)
	if err != nil {
		return nil, err
	}
	bp := fs.bufs.Get().(*[]byte)
	defer fs.bufs.Put(bp)
	var seen map[string]int // index in ents, or -1 for a whiteout
	var white []string
	if len(is) > 1 {
		seen = map[string]int{}
	}
	for _, i := range is {
		fd, ok, err := fs.look(dir, i)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		white = white[:0]
		err = fs.listBranch(i.br, fd, *bp, func(e dirent) {
			if seen != nil {
				if k, ok := seen[e.name]; ok {
					if k >= 0 {
						l.ents[k].many = true
					}
					return
				}
				seen[e.name] = len(l.ents)
			}
			l.ents = append(l.ents, DirEntry{Name: e.name, Ino: e.ino, Type: e.typ, top: i})
		}, func(w string) { white = append(white, w) })
		i.unpin()
		if err == unix.ENOENT || err == unix.ESTALE {
			err = nil // removed directly while we looked
		}
		if err != nil {
			return nil, err
		}
		if seen != nil {
			for _, w := range white {
				if _, ok := seen[w]; !ok {
					seen[w] = -1
				}
			}
		}
	}
	for k := range l.ents {
		e := &l.ents[k]
		e.Off = nameOff(e.Name)
		e.Ino = fs.listIno(key{e.top.key.dev, e.Ino})
	}
	slices.SortFunc(l.ents, func(a, b DirEntry) int {
		if a.Off < b.Off {
			return -1
		}
		if a.Off > b.Off {
			return 1
		}
		return 0
	})
	for k := 1; k < len(l.ents); k++ {
		if l.ents[k].Off <= l.ents[k-1].Off {
			l.ents[k].Off = l.ents[k-1].Off + 1
		}
	}
	return l, nil
}

// listBranch reads a directory on one branch: its entries, and the names that
// it hides.
func (fs *FS) listBranch(br *Branch, fd int, buf []byte, entry func(dirent), white func(name string)) error {
	wh := br.perm.Whiteouts()
	maxName := fs.format.MaxName()
	files := wh && fs.format.XattrWhiteouts(fd)
	var scratch [8]dirent
	unsure := scratch[:0]
	err := listDir(fd, buf, func(e dirent) error {
		kind, target := fs.format.Listed(e.name, e.typ, wh)
		if files && kind == Entry && e.typ == unix.DT_REG {
			kind = Unsure
		}
		switch kind {
		case Entry:
			if len(e.name) <= maxName {
				entry(e)
			}
		case Whiteout:
			white(target)
		case Unsure:
			unsure = append(unsure, e)
		}
		return nil
	})
	for _, e := range unsure {
		if err != nil {
			break
		}
		var st unix.Stat_t
		var kind Kind
		kind, err = fs.format.Probe(fd, e.name, wh, &st)
		switch kind {
		case Entry:
			entry(e)
		case Whiteout:
			white(e.name)
		}
	}
	return err
}

// listIno is the number a listed inode has in the union.
func (fs *FS) listIno(k key) uint64 {
	fs.tabMu.Lock()
	p := fs.plinks[k]
	fs.tabMu.Unlock()
	if p != nil {
		return p.ino
	}
	return fs.unionIno(k)
}

// nameOff is a hash of a name (FNV-1a), and no random one: a listing that one
// process began may be ended by another.
func nameOff(name string) uint64 {
	h := uint64(14695981039346656037)
	for i := 0; i < len(name); i++ {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	return h>>2 + firstOff
}

// LookupEntry is Lookup for an entry that ReadDir returned, cheaper if nothing
// changed since.
func (fs *FS) LookupEntry(dir *Node, e *DirEntry, st *unix.Stat_t) (*Node, error) {
	n, err := fs.lookupEntry(dir, e, st)
	if err != nil {
		return nil, err
	}
	if err := fs.linked(n, st); err != nil {
		fs.Forget(n, 1)
		return nil, err
	}
	return n, nil
}

func (fs *FS) lookupEntry(dir *Node, e *DirEntry, st *unix.Stat_t) (*Node, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	dir.mu.RLock()
	defer dir.mu.RUnlock()
	fs.tabMu.Lock()
	l := dir.snap
	ok := l != nil && l.changes == dir.changes.Load() && !dir.stale.Load()
	told := dir.told.Load()
	fs.tabMu.Unlock()
	if !ok || e.top == nil || e.many {
		return fs.lookup(dir, e.Name, st)
	}
	fd, ok, err := fs.look(dir, e.top)
	if err != nil || !ok {
		return fs.lookup(dir, e.Name, st)
	}
	f := found{told: told}
	err = fstatat(fd, e.Name, &f.st)
	e.top.unpin()
	if err != nil {
		return nil, errno(err)
	}
	if f.st.Mode&unix.S_IFMT>>12 != uint32(e.Type) {
		return fs.lookup(dir, e.Name, st)
	}
	f.top = e.top
	if f.isDir() {
		f.nlink = uint64(f.st.Nlink)
		f.dirs = []part{{br: e.top.br, key: keyOf(&f.st), fd: -1}}
	}
	return fs.attach(dir, e.Name, &f, st)
}

// touched notes that names in dir changed. The caller holds dir.mu.
func (dir *Node) touched() { dir.changes.Add(1) }

// A Change says what a direct change of a branch means for the union.
type Change struct {
	Name   string // what to look up again in the directory; "" for nothing
	Child  *Node  // the known child of that name
	Merged bool   // Child, or the directory itself, merges other directories now
}

// Changed tells the engine that name in dir, or with an empty name dir itself,
// may have changed directly on a branch. What it knows of the listing and of
// a directory of that name is found again.
func (fs *FS) Changed(dir *Node, name string) Change {
	target, self := name, name == ""
	if name != "" {
		target, self = fs.format.Concerns(name)
	}
	c := Change{Name: target}
	fs.tabMu.Lock()
	dir.changes.Add(1)
	dir.snap = nil
	fs.unindex(dir, target)
	if name == "" {
		dir.unwatch()
	}
	if target != "" {
		c.Child = dir.kids[target]
	}
	if len(dir.insts) > 1 {
		fs.counted.Store(false) // a name may have been hidden, or shown again
	}
	fs.tabMu.Unlock()
	switch {
	case self:
		c.Merged = fs.remerge(dir)
	case c.Child != nil && c.Child.IsDir():
		c.Merged = fs.remerge(c.Child)
	}
	if c.Merged {
		below := dir
		if !self {
			below = c.Child
		}
		fs.eachBelow(below, fs.doubt)
	}
	return c
}

// remerge finds the instances of dir again and reports whether they are others
// than before, also if a lookup was faster to find out.
func (fs *FS) remerge(dir *Node) bool {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if dir == fs.root {
		return false // its instances are the branches
	}
	dir.stale.Store(true)
	if _, err := fs.insts(dir); err != nil {
		dir.stale.Store(true)
	}
	return dir.remerged.Swap(false)
}

// ChangedAll is Changed for every known directory.
func (fs *FS) ChangedAll() {
	fs.eachNode(fs.doubt)
}

// doubt makes what is known of n be found again; tabMu is held.
func (fs *FS) doubt(n *Node) {
	n.stale.Store(n.IsDir() && n != fs.root)
	n.snap = nil
	n.changes.Add(1)
	fs.unindex(n, "")
	n.unwatch()
}

// unwatch makes the directory n be watched again when it is looked at: it may
// have been removed and made anew with the same inode number, and a watch ends
// with its inode. tabMu is held.
func (n *Node) unwatch() {
	for _, i := range n.insts {
		i.watched.Store(false)
	}
}

// eachNode calls f for every node that can be reached from the root, under
// tabMu.
func (fs *FS) eachNode(f func(*Node)) { fs.eachBelow(fs.root, f) }

func (fs *FS) eachBelow(top *Node, f func(*Node)) {
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	todo := []*Node{top}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		f(n)
		for _, k := range n.kids {
			todo = append(todo, k)
		}
	}
}

// EachName calls f with every known directory and child name.
func (fs *FS) EachName(f func(dir *Node, name string, n *Node)) {
	fs.eachNode(func(n *Node) {
		for name, k := range n.kids {
			f(n, name, k)
		}
	})
}
