//go:build linux

package unionfs

import (
	"slices"

	"golang.org/x/sys/unix"
)

// writeBranch is where a change of something on branch b is written: b itself
// if it is writable, else the topmost writable branch above it, since one
// below would not be seen.
func (fs *FS) writeBranch(b *Branch) *Branch {
	if b.perm == RW {
		return b
	}
	for _, o := range fs.stack {
		if o == b {
			return nil
		}
		if o.perm == RW {
			return o
		}
	}
	return nil
}

// topRW is the branch new files are created on: the topmost writable one. AUFS's
// policy "tdp" takes the topmost that has the directory, which is the same with
// one writable branch.
func (fs *FS) topRW() *Branch {
	for _, b := range fs.stack {
		if b.perm == RW {
			return b
		}
	}
	return nil
}

func (fs *FS) index(b *Branch) int { return slices.Index(fs.stack, b) }

// ensureUpper returns dir's instance on w and makes it, and those of its
// ancestors, if there is none. The caller holds no directory lock.
func (fs *FS) ensureUpper(dir *Node, w *Branch) (*inst, error) {
	for try := 0; try < 8; try++ {
		if i := dir.instOn(w); i != nil {
			return i, nil
		}
		fs.tabMu.Lock()
		parent, name, dead := dir.parent, dir.name, dir.dead
		fs.tabMu.Unlock()
		if dead || parent == nil {
			return nil, unix.ENOENT
		}
		if _, err := fs.ensureUpper(parent, w); err != nil {
			return nil, err
		}
		i, err := fs.copyUpDir(parent, name, dir, w)
		if i != nil || err != nil {
			return i, err
		}
	}
	return nil, unix.ESTALE
}

// copyUpDir makes an empty copy of dir on w. nil, nil: dir has moved.
func (fs *FS) copyUpDir(parent *Node, name string, dir *Node, w *Branch) (*inst, error) {
	parent.mu.Lock()
	defer parent.mu.Unlock()
	if i := dir.instOn(w); i != nil {
		return i, nil
	}
	fs.tabMu.Lock()
	moved := dir.parent != parent || dir.name != name || dir.dead
	fs.tabMu.Unlock()
	pi := parent.instOn(w)
	if moved || pi == nil {
		return nil, nil
	}
	if err := fs.covered(parent, name, dir, w); err != nil {
		return nil, err
	}
	src, err := dir.where()
	if err != nil {
		return nil, err
	}
	defer src.release()
	var st unix.Stat_t
	if err := src.stat(&st); err != nil {
		return nil, err
	}
	pfd, err := pi.pin()
	if err != nil {
		return nil, err
	}
	defer pi.unpin()
	restore := keepTimes(pfd)
	defer restore()

	tmp, err := freshTemp(name, func(tmp string) error { return unix.Mkdirat(pfd, tmp, 0o700) })
	if err != nil {
		return nil, err
	}
	nst, err := fs.dressDir(pfd, tmp, &src, &st)
	if err == nil {
		err = unix.Renameat2(pfd, tmp, pfd, name, unix.RENAME_NOREPLACE)
	}
	if err != nil {
		removeTree(pfd, tmp)
		return nil, err
	}
	i := &inst{br: w, key: keyOf(&nst), node: dir, fd: -1}
	fs.keepIno(i.key, dir.ino)
	fs.tabMu.Lock()
	is := slices.Clone(dir.insts)
	at := 0
	for at < len(is) && fs.index(is[at].br) < fs.index(w) {
		at++
	}
	dir.insts = slices.Insert(is, at, i)
	dir.changes.Add(1)
	fs.tabMu.Unlock()
	fs.stats.CopyUps.Add(1)
	return i, nil
}

// covered says whether an instance of dir on w would stay out of sight, below
// an opaque one or a whiteout. With the topmost branch as w it costs nothing.
func (fs *FS) covered(parent *Node, name string, dir *Node, w *Branch) error {
	test := func(is []*inst, hides func(fd int) (bool, error)) error {
		for _, i := range is {
			if fs.index(i.br) >= fs.index(w) {
				return nil
			}
			if !i.br.perm.Whiteouts() {
				continue
			}
			fd, err := i.pin()
			if err == unix.ESTALE {
				continue
			}
			if err != nil {
				return err
			}
			yes, err := hides(fd)
			i.unpin()
			if err == nil && yes {
				err = fs.outOfSight(w)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := test(dir.instList(), fs.format.Opaque); err != nil {
		return err
	}
	return test(parent.instList(), func(fd int) (bool, error) {
		var st unix.Stat_t
		kind, err := fs.format.Probe(fd, name, true, &st)
		return kind == Whiteout, err
	})
}

// outOfSight is the error for what cannot be done on w, since something above
// would hide it: EXDEV if it can be done there by copying.
func (fs *FS) outOfSight(w *Branch) error {
	if fs.topRW() == w {
		return unix.EROFS
	}
	return unix.EXDEV
}

// keepTimes returns a function that sets the times of fd back: copying
// something up is no change of the directory it lies in.
func keepTimes(fd int) func() {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return func() {}
	}
	return func() {
		unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), []unix.Timespec{st.Atim, st.Mtim}, 0)
	}
}

// dressDir gives the new directory tmp everything the source has.
func (fs *FS) dressDir(pfd int, tmp string, src *ref, st *unix.Stat_t) (nst unix.Stat_t, err error) {
	fd, err := unix.Openat(pfd, tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nst, err
	}
	defer unix.Close(fd)
	if err := fs.dress(fd, src, st); err != nil {
		return nst, err
	}
	return nst, unix.Fstat(fd, &nst)
}

// dress copies owner, xattrs, mode and times of src to the open file fd. What
// the parent's default ACL put on the new file is removed.
func (fs *FS) dress(fd int, src *ref, st *unix.Stat_t) error {
	if err := unix.Fchown(fd, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	names, err := src.listxattr()
	if err != nil {
		return err
	}
	have, err := xattrNames(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if err != nil {
		return err
	}
	for _, x := range have {
		if !slices.Contains(names, x) && hasPrefix(x, "system.posix_acl_") {
			if err := unix.Fremovexattr(fd, x); err != nil {
				return err
			}
		}
	}
	if err := unix.Fchmod(fd, st.Mode&0o7777); err != nil {
		return err
	}
	for _, x := range names {
		if fs.format.PrivateXattr(x) {
			continue // what a lower directory hides, it goes on hiding itself
		}
		v, err := src.xattr(x)
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(fd, x, v, 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), []unix.Timespec{st.Atim, st.Mtim}, 0)
}

func (r *ref) xattr(name string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := r.getxattr(name, buf)
		if err == unix.ERANGE && len(buf) < 1<<16 {
			buf = make([]byte, 1<<16)
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// copyUp makes sure that the non-directory n lies on a writable branch. At
// most limit bytes of its content are copied; all of them if negative. No
// reader sees a half-made file: it gets its name when it is complete.
func (fs *FS) copyUp(n *Node, limit int64) error {
	if fs.isUpper(n) {
		return nil
	}
	n.copyMu.Lock()
	defer n.copyMu.Unlock()
	for try := 0; try < 8; try++ {
		if fs.isUpper(n) {
			return nil
		}
		again, err := fs.tryCopyUp(n, limit)
		if err != nil {
			return err
		}
		if !again {
			fs.stats.CopyUps.Add(1)
			return nil
		}
	}
	return unix.ESTALE
}

func (fs *FS) isUpper(n *Node) bool {
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	return n.br != nil && n.br.perm == RW
}

func (fs *FS) tryCopyUp(n *Node, limit int64) (again bool, err error) {
	fs.tabMu.Lock()
	br, k, dead := n.br, n.key, n.dead
	var l link
	if len(n.links) > 0 {
		l = n.links[0]
	}
	links := slices.Clone(n.links)
	fs.tabMu.Unlock()
	if br == nil {
		return false, unix.ESTALE
	}
	w := fs.writeBranch(br)
	if w == nil {
		return false, unix.EROFS
	}
	src, err := n.where()
	if err != nil {
		return false, err
	}
	defer src.release()
	var st unix.Stat_t
	if err := src.stat(&st); err != nil {
		return false, err
	}
	if keyOf(&st) != k {
		return false, unix.ESTALE
	}
	if dead {
		return fs.copyUpOrphan(n, w, &src, &st, limit)
	}
	// The name that is copied must be the one that was found to work.
	if src.in != nil {
		for _, o := range links {
			if o.dir == src.in.node && o.name == src.name {
				l = o
			}
		}
	}
	pi, err := fs.ensureUpper(l.dir, w)
	if err != nil {
		return false, err
	}
	pfd, err := pi.pin()
	if err != nil {
		return false, err
	}
	defer pi.unpin()
	c, err := fs.makeCopy(&dup{dir: pfd, fd: -1, quietly: func(change func() error) error {
		l.dir.mu.Lock()
		defer l.dir.mu.Unlock()
		defer keepTimes(pfd)()
		return change()
	}}, l.name, w, &src, &st, limit)
	if err != nil {
		return false, err
	}
	defer c.close()
	return fs.placeCopy(n, l, w, pfd, c, &st)
}

// A dup is a complete copy of a file that has no name yet, or a temporary one.
type dup struct {
	dir int
	fd  int    // -1 if not a regular file
	tmp string // "" if it has no name
	st  unix.Stat_t
	// quietly makes and removes tmp in a way that is no change of dir.
	quietly func(change func() error) error
}

func (c *dup) close() {
	if c.fd >= 0 {
		unix.Close(c.fd)
		c.fd = -1
	}
	if c.tmp != "" {
		c.quietly(func() error { return unix.Unlinkat(c.dir, c.tmp, 0) })
		c.tmp = ""
	}
}

// named makes c.tmp by mk.
func (c *dup) named(name string, mk func(tmp string) error) error {
	return c.quietly(func() (err error) {
		if c.tmp, err = freshTemp(name, mk); err != nil {
			c.tmp = ""
		}
		return err
	})
}

// linkTo gives the copy its name.
func (c *dup) linkTo(fd int, name string) error {
	if c.tmp != "" {
		if fd == c.dir {
			err := unix.Renameat2(c.dir, c.tmp, fd, name, unix.RENAME_NOREPLACE)
			if err == nil {
				c.tmp = ""
			}
			return err
		}
		return unix.Linkat(c.dir, c.tmp, fd, name, 0)
	}
	return unix.Linkat(unix.AT_FDCWD, procFD(c.fd), fd, name, unix.AT_SYMLINK_FOLLOW)
}

// makeCopy completes c, of which it is told the directory.
func (fs *FS) makeCopy(c *dup, name string, w *Branch, src *ref, st *unix.Stat_t, limit int64) (_ *dup, err error) {
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		err = fs.copyRegular(c, name, w, src, st, limit)
	} else {
		err = copySpecial(c, name, src, st)
	}
	if err != nil {
		return nil, err
	}
	if c.fd >= 0 {
		err = unix.Fstat(c.fd, &c.st)
	} else {
		err = fstatat(c.dir, c.tmp, &c.st)
	}
	return c, err
}

// tmpFile opens a file without a name in c.dir, or with a temporary one where
// the file system has no O_TMPFILE.
func (c *dup) tmpFile(name string, w *Branch) (err error) {
	if !w.noTmp.Load() {
		c.fd, err = unix.Openat(c.dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return nil
		}
		c.fd = -1
		if err != unix.EOPNOTSUPP && err != unix.EISDIR && err != unix.ENOENT {
			return err
		}
		w.noTmp.Store(true)
	}
	err = c.named(name, func(tmp string) (err error) {
		c.fd, err = unix.Openat(c.dir, tmp, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		c.fd = -1
	}
	return err
}

func (fs *FS) copyRegular(c *dup, name string, w *Branch, src *ref, st *unix.Stat_t, limit int64) error {
	in, err := src.open(unix.O_RDONLY|unix.O_NOATIME, keyOf(st))
	if err == unix.EPERM {
		in, err = src.open(unix.O_RDONLY, keyOf(st))
	}
	if err != nil {
		return err
	}
	defer unix.Close(in)
	if err := c.tmpFile(name, w); err != nil {
		return err
	}
	size := st.Size
	if limit >= 0 && limit < size {
		size = limit
	}
	n, err := copyData(in, c.fd, size, st.Size)
	fs.stats.CopyUpBytes.Add(n)
	if err != nil {
		return err
	}
	var fref ref
	fref.fd = in
	return fs.dress(c.fd, &fref, st)
}

// copyData copies the first size bytes of in, a file of full bytes, to the
// empty file out: as a clone if the file system can, else what holds data,
// leaving holes holes. It returns how much was copied byte by byte.
func copyData(in, out int, size, full int64) (int64, error) {
	if size == 0 {
		return 0, nil
	}
	if unix.IoctlFileClone(out, in) == nil {
		if size < full {
			return 0, unix.Ftruncate(out, size)
		}
		return 0, nil
	}
	if err := unix.Ftruncate(out, size); err != nil {
		return 0, err
	}
	var copied int64
	for off := int64(0); off < size; {
		data, err := unix.Seek(in, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		hole := size
		if err == nil {
			if hole, err = unix.Seek(in, data, unix.SEEK_HOLE); err != nil {
				hole = size
			}
		} else {
			data = off
		}
		hole = min(hole, size)
		if data >= size {
			break
		}
		n, err := copyRange(in, out, data, hole-data)
		copied += n
		if err != nil {
			return copied, err
		}
		if n < hole-data {
			break // the source became shorter meanwhile
		}
		off = hole
	}
	return copied, nil
}

// copyRange copies within the kernel, and through a buffer where that is not
// possible (between file systems before Linux 5.19, some FUSE servers).
func copyRange(in, out int, off, n int64) (int64, error) {
	var done int64
	for done < n {
		ro, wo := off+done, off+done
		k, err := unix.CopyFileRange(in, &ro, out, &wo, int(min(n-done, 1<<30)), 0)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EXDEV, err == unix.EINVAL, err == unix.EOPNOTSUPP, err == unix.ENOSYS, err == unix.EPERM:
			m, err := copyBuffer(in, out, off+done, n-done)
			return done + m, err
		case err != nil:
			return done, err
		case k == 0:
			return done, nil
		}
		done += int64(k)
	}
	return done, nil
}

func copyBuffer(in, out int, off, n int64) (int64, error) {
	buf := make([]byte, min(n, 1<<20))
	var done int64
	for done < n {
		k, err := unix.Pread(in, buf[:min(n-done, int64(len(buf)))], off+done)
		if err == unix.EINTR {
			continue
		}
		if err != nil || k == 0 {
			return done, err
		}
		for b := buf[:k]; len(b) > 0; {
			m, err := unix.Pwrite(out, b, off+done)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return done, err
			}
			b = b[m:]
			done += int64(m)
		}
	}
	return done, nil
}

// copySpecial copies symbolic links, devices, fifos and sockets.
func copySpecial(c *dup, name string, src *ref, st *unix.Stat_t) error {
	pfd := c.dir
	mk := func(tmp string) error { return unix.Mknodat(pfd, tmp, st.Mode&unix.S_IFMT|0o600, int(st.Rdev)) }
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		target, err := src.readlink()
		if err != nil {
			return err
		}
		mk = func(tmp string) error { return unix.Symlinkat(target, pfd, tmp) }
	}
	if err := c.named(name, mk); err != nil {
		return err
	}
	if err := unix.Fchownat(pfd, c.tmp, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := chmodAt(pfd, c.tmp, st.Mode&0o7777); err != nil {
			return err
		}
	}
	names, err := src.listxattr()
	if err != nil {
		return err
	}
	for _, x := range names {
		v, err := src.xattr(x)
		if err == nil {
			err = unix.Lsetxattr(procFD(pfd)+"/"+c.tmp, x, v, 0)
		}
		if err != nil && err != unix.ENODATA {
			return err
		}
	}
	return unix.UtimesNanoAt(pfd, c.tmp, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// placeCopy names the copy and makes n mean it.
func (fs *FS) placeCopy(n *Node, l link, w *Branch, pfd int, c *dup, st *unix.Stat_t) (again bool, err error) {
	l.dir.mu.Lock()
	defer l.dir.mu.Unlock()
	fs.tabMu.Lock()
	still := slices.Contains(n.links, l) && !n.dead
	fs.tabMu.Unlock()
	if !still {
		return true, nil // renamed or removed meanwhile
	}
	var p *plink
	if st.Nlink > 1 && !fs.noPlink {
		fs.tabMu.Lock()
		nlink := visible(uint64(st.Nlink), uint64(fs.hid[keyOf(st)]))
		fs.tabMu.Unlock()
		if p, err = fs.makePlink(n, w, c, keyOf(st), nlink); err != nil {
			return false, err
		}
	}
	if p == nil && st.Nlink > 1 {
		fs.hideMu.RLock()
		defer fs.hideMu.RUnlock()
	}
	restore := keepTimes(pfd)
	err = c.linkTo(pfd, l.name)
	restore()
	if err != nil {
		if p != nil {
			fs.dropPlink(p)
		}
		if err == unix.EEXIST {
			err = unix.EBUSY // made directly on the branch meanwhile
		}
		return false, err
	}
	k := keyOf(&c.st)
	fs.tabMu.Lock()
	if n.hashed && fs.byKey[n.key] == n {
		delete(fs.byKey, n.key)
		n.hashed = false
	}
	n.br, n.key, n.plink = w, k, p
	fs.inos[k] = n.ino
	if p == nil && st.Nlink > 1 {
		fs.addHidden(keyOf(st)) // the copy hides a name of the other ones
	}
	if p != nil {
		fs.plinks[p.lower], fs.plinkUp[p.upper] = p, p
	}
	fs.tabMu.Unlock()
	l.dir.touched()
	if fs.copiedUp != nil {
		fs.copiedUp(n, k.dev, k.ino)
	}
	return false, nil
}

// copyUpOrphan copies a file that has no name any more but is open. What other
// names of it the lower branch may have go on meaning the file there.
func (fs *FS) copyUpOrphan(n *Node, w *Branch, src *ref, st *unix.Stat_t, limit int64) (again bool, err error) {
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false, unix.EROFS
	}
	dir, err := fs.orphanDir(w)
	if err != nil {
		return false, err
	}
	defer unix.Close(dir)
	alone := func(change func() error) error { return change() }
	c, err := fs.makeCopy(&dup{dir: dir, fd: -1, quietly: alone}, "orphan", w, src, st, limit)
	if err != nil {
		return false, err
	}
	defer c.close()
	fs.tabMu.Lock()
	if !n.dead {
		fs.tabMu.Unlock()
		return true, nil // looked up by another name meanwhile
	}
	f := &File{fs: fs, node: n, fd: c.fd, br: w, wfd: true}
	f.refs.Store(1)
	c.fd = -1
	w.files.Add(1)
	w.wopen.Add(1)
	if n.hashed && fs.byKey[n.key] == n {
		delete(fs.byKey, n.key)
		n.hashed = false
	}
	old := n.orphan
	n.br, n.key, n.orphan = w, keyOf(&c.st), f
	n.files = append(n.files, f)
	fs.inos[n.key] = n.ino
	k := n.key
	fs.tabMu.Unlock()
	old.drop()
	if fs.copiedUp != nil {
		fs.copiedUp(n, k.dev, k.ino)
	}
	return false, nil
}
