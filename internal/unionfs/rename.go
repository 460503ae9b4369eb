//go:build linux

package unionfs

import (
	"golang.org/x/sys/unix"
)

// Rename is renameat2(2). Directories that have something on a lower branch
// are EXDEV, as in AUFS without dirren; callers such as mv(1) copy then.
// RENAME_NOREPLACE and RENAME_EXCHANGE are served, other flags are EINVAL.
func (fs *FS) Rename(from *Node, name string, to *Node, newName string, flags uint32) error {
	for _, s := range []string{name, newName} {
		if err := fs.checkName(s); err != nil {
			return err
		}
	}
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 || flags == unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE {
		return unix.EINVAL
	}
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if from != to {
		fs.renameMu.Lock()
		defer fs.renameMu.Unlock()
	}
	for try := 0; try < 16; try++ {
		m := mover{fs: fs, from: from, to: to, name: name, newName: newName, flags: flags}
		fix, err := m.locked()
		if err != errRetry {
			return errno(err)
		}
		if err := fix(); err != nil {
			return errno(err)
		}
	}
	return unix.EBUSY
}

// A mover is one rename.
type mover struct {
	fs            *FS
	from, to      *Node
	name, newName string
	flags         uint32

	a, b     found
	n, o     *Node // what is renamed; what is replaced, or exchanged
	ast, ost unix.Stat_t
	w        *Branch
	ain, bin *inst
}

// lockDirs locks both directories in their order.
func (m *mover) lockDirs() func() {
	a, b := m.from, m.to
	if a == b {
		a.mu.Lock()
		return a.mu.Unlock
	}
	// An ancestor first, else by id: see the package comment.
	if m.fs.isAncestor(b, a) || (!m.fs.isAncestor(a, b) && b.id < a.id) {
		a, b = b, a
	}
	a.mu.Lock()
	b.mu.Lock()
	return func() {
		b.mu.Unlock()
		a.mu.Unlock()
	}
}

// isAncestor reports whether a is n or above n.
func (fs *FS) isAncestor(a, n *Node) bool {
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	for ; n != nil; n = n.parent {
		if n == a {
			return true
		}
	}
	return false
}

// locked tries the rename. With errRetry, fix is to be called without locks
// before the next try.
func (m *mover) locked() (fix func() error, err error) {
	fs := m.fs
	unlock := m.lockDirs()
	defer unlock()
	defer func() {
		m.a.close()
		m.b.close()
		for _, n := range []*Node{m.n, m.o} {
			if n != nil {
				fs.Forget(n, 1)
			}
		}
	}()
	if m.from.isDead() || m.to.isDead() {
		return nil, unix.ENOENT
	}
	if err := fs.resolve(m.from, m.name, true, &m.a); err != nil {
		return nil, err
	}
	if m.a.top == nil {
		return nil, unix.ENOENT
	}
	if err := fs.resolve(m.to, m.newName, true, &m.b); err != nil {
		return nil, err
	}
	exchange := m.flags&unix.RENAME_EXCHANGE != 0
	switch {
	case m.b.top == nil && exchange:
		return nil, unix.ENOENT
	case m.b.top != nil && m.flags&unix.RENAME_NOREPLACE != 0:
		return nil, unix.EEXIST
	}
	aDir, bDir := m.a.isDir(), m.b.isDir()
	// attach consumes the list of parts.
	if m.n, err = fs.attach(m.from, m.name, keepFound(&m.a), &m.ast); err != nil {
		return nil, err
	}
	if m.b.top != nil {
		if m.o, err = fs.attach(m.to, m.newName, keepFound(&m.b), &m.ost); err != nil {
			return nil, err
		}
		if m.n == m.o {
			return nil, nil // two names of one file: rename(2) does nothing
		}
	}
	if aDir && fs.isAncestor(m.n, m.to) || exchange && bDir && fs.isAncestor(m.o, m.from) {
		return nil, unix.EINVAL
	}
	if !exchange && m.o != nil && fs.isAncestor(m.o, m.from) {
		return nil, unix.ENOTEMPTY
	}
	if m.b.top != nil && !exchange {
		if aDir && !bDir {
			return nil, unix.ENOTDIR
		}
		if !aDir && bDir {
			return nil, unix.EISDIR
		}
	}
	if m.w = fs.writeBranch(m.a.top.br); m.w == nil {
		return nil, unix.EROFS
	}
	// Both must be on w by themselves.
	if fix, err := m.raise(m.from, m.name, m.n, &m.a); err != nil {
		return fix, err
	}
	if exchange {
		if fix, err := m.raise(m.to, m.newName, m.o, &m.b); err != nil {
			return fix, err
		}
	}
	if m.b.top != nil && fs.index(m.b.top.br) < fs.index(m.w) {
		return nil, unix.EXDEV // the target would stay in front
	}
	if m.b.white != nil && fs.index(m.b.white.br) < fs.index(m.w) {
		return nil, fs.outOfSight(m.w)
	}
	if m.bin = m.to.instOn(m.w); m.bin == nil {
		to, w := m.to, m.w
		return func() error { _, err := fs.ensureUpper(to, w); return err }, errRetry
	}
	m.ain = m.from.instOn(m.w)
	if bDir && !exchange {
		m.o.mu.Lock()
		defer m.o.mu.Unlock()
		if err := fs.emptyDir(m.o); err != nil {
			return nil, err
		}
	}
	afd, err := m.ain.pin()
	if err != nil {
		return nil, err
	}
	defer m.ain.unpin()
	bfd, err := m.bin.pin()
	if err != nil {
		return nil, err
	}
	defer m.bin.unpin()
	defer m.from.touched()
	defer m.to.touched()
	if exchange {
		return nil, m.exchange(afd, bfd)
	}
	return nil, m.move(afd, bfd)
}

// keepFound returns a copy of f without descriptors, whose parts attach may
// consume.
func keepFound(f *found) *found {
	c := *f
	c.dirs = make([]part, len(f.dirs))
	for i, p := range f.dirs {
		p.fd = -1
		c.dirs[i] = p
	}
	return &c
}

// raise sees to it that the entry lies on w and nowhere else that matters.
func (m *mover) raise(dir *Node, name string, n *Node, f *found) (fix func() error, err error) {
	fs, w := m.fs, m.w
	if !n.IsDir() {
		if f.top.br == w {
			return nil, nil
		}
		if fs.isUpper(n) {
			// A name on the lower branch of something copied up under
			// another one.
			fs.tabMu.Lock()
			p := n.plink
			fs.tabMu.Unlock()
			if p == nil || p.br != w {
				return nil, unix.EXDEV
			}
			return func() error {
				if _, err := fs.ensureUpper(dir, w); err != nil {
					return err
				}
				dir.mu.Lock()
				defer dir.mu.Unlock()
				return fs.materialise(p, dir, name)
			}, errRetry
		}
		n.refs.Add(1)
		return func() error {
			defer fs.Forget(n, 1)
			return fs.copyUp(n, -1)
		}, errRetry
	}
	if f.top.br != w {
		if len(f.dirs) > 0 {
			if err := fs.emptyDir(n); err != nil {
				return nil, unix.EXDEV
			}
		}
		n.refs.Add(1)
		return func() error {
			defer fs.Forget(n, 1)
			_, err := fs.ensureUpper(n, w)
			return err
		}, errRetry
	}
	// Whatever lower instances hold would be lost from sight, whiteouts too
	// (rule 8 B2); after a copy-up of an empty one they may hold nothing.
	for _, i := range n.instList() {
		if i.br == w {
			continue
		}
		fd, err := i.pin()
		if err == unix.ESTALE {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = listDir(fd, make([]byte, 4<<10), func(dirent) error { return unix.EXDEV })
		i.unpin()
		if err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (m *mover) move(afd, bfd int) error {
	fs := m.fs
	isDir := m.n.IsDir()
	white := m.b.white == m.bin
	if isDir {
		opaque := white || m.b.below || (m.b.top != nil && m.b.top.br != m.w)
		if !opaque && m.b.isDir() {
			d, err := openDirAt(bfd, m.newName)
			if err != nil {
				return err
			}
			opaque, err = fs.format.Opaque(d)
			unix.Close(d)
			if err != nil {
				return err
			}
		}
		if opaque {
			if err := m.setOpaque(afd, m.name); err != nil {
				return err
			}
		}
	}
	if m.a.below {
		fs.stats.Whiteouts.Add(1)
	}
	fs.hideMu.RLock()
	defer fs.hideMu.RUnlock()
	release := m.holdReplaced()
	if err := fs.format.Move(m.w, afd, m.name, bfd, m.newName, isDir, m.a.below, white); err != nil {
		release()
		return err
	}
	if m.o != nil {
		if m.o.IsDir() {
			fs.dirGone(m.to, m.newName, m.o, &m.ost)
		} else {
			f := m.b
			fs.unnamed(m.to, m.newName, &f, m.b.top.br == m.w)
		}
	}
	m.rename(m.n, m.from, m.name, m.to, m.newName)
	return nil
}

// holdReplaced keeps a way to the file that is about to be replaced, as long as
// somebody knows it: whoever has looked its name up and opens it next must get
// it, since a name that is replaced is there at every moment. The function it
// returns undoes that. If there is no way, such a client is told ESTALE and
// looks again.
func (m *mover) holdReplaced() (release func()) {
	fs, o := m.fs, m.o
	if o == nil || o.typ != unix.S_IFREG && o.typ != unix.S_IFLNK || o.refs.Load() < 2 {
		return func() {}
	}
	fs.tabMu.Lock()
	last := o.lastName()
	fs.tabMu.Unlock()
	if !last {
		return func() {}
	}
	in := m.b.top
	fd, err := in.pin()
	if err != nil {
		return func() {}
	}
	p, err := unix.Openat(fd, m.newName, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	in.unpin()
	if err != nil {
		return func() {}
	}
	f := fs.newFile(o, p, in.br, false)
	fs.tabMu.Lock()
	if last = o.lastName(); last { // another one may have been looked up
		o.orphan = f
	}
	fs.tabMu.Unlock()
	if !last {
		f.Close()
		return func() {}
	}
	return func() {
		fs.tabMu.Lock()
		held := o.orphan == f // another name may have been looked up
		if held {
			o.orphan = nil
		}
		fs.tabMu.Unlock()
		if held {
			f.Close()
		}
	}
}

// lastName reports whether the only way to a non-directory is the one name that
// is known of it. tabMu is held.
func (n *Node) lastName() bool { return len(n.links) == 1 && n.plink == nil && n.orphan == nil }

func (m *mover) setOpaque(fd int, name string) error {
	d, err := openDirAt(fd, name)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	return m.fs.format.SetOpaque(m.w, d)
}

// exchange makes both names mean each other's file. Both lie on w, so no
// whiteouts are needed; directories must not merge with what is below their
// new names.
func (m *mover) exchange(afd, bfd int) error {
	if m.n.IsDir() && m.b.below {
		if err := m.setOpaque(afd, m.name); err != nil {
			return err
		}
	}
	if m.o.IsDir() && m.a.below {
		if err := m.setOpaque(bfd, m.newName); err != nil {
			return err
		}
	}
	if err := unix.Renameat2(afd, m.name, bfd, m.newName, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	// The names are swapped by way of one that cannot be looked up.
	const between = "/"
	m.rename(m.n, m.from, m.name, m.from, between)
	m.rename(m.o, m.to, m.newName, m.from, m.name)
	m.rename(m.n, m.from, between, m.to, m.newName)
	return nil
}

// rename moves a node in the tables.
func (m *mover) rename(n *Node, from *Node, name string, to *Node, newName string) {
	fs := m.fs
	fs.tabMu.Lock()
	var back bool
	var orphan *File
	if n.IsDir() {
		if from.kids[name] == n {
			delete(from.kids, name)
		}
		back = n.parent != nil
		for _, i := range n.insts {
			if i.br == m.w {
				n.insts = []*inst{i}
				break
			}
		}
		n.parent, n.name = to, newName
		n.changes.Add(1)
		n.snap = nil
		to.addKid(newName, n)
	} else {
		back = n.delLink(from, name)
		orphan = n.addLink(to, newName)
	}
	fs.tabMu.Unlock()
	orphan.drop()
	if back {
		fs.Forget(from, 1)
	}
}
