//go:build linux

package unionfs

import (
	"errors"

	"golang.org/x/sys/unix"
)

// GetAttr fills st with the attributes of n.
func (fs *FS) GetAttr(n *Node, st *unix.Stat_t) error {
	fs.stackMu.RLock()
	err := fs.getAttr(n, st)
	fs.stackMu.RUnlock()
	if err != nil {
		return errno(err)
	}
	return fs.linked(n, st)
}

func (fs *FS) getAttr(n *Node, st *unix.Stat_t) error {
	r, err := n.where()
	if err == nil {
		err = r.stat(st)
		r.release()
	}
	fs.tabMu.Lock()
	dead, last, k, pl, hidden, left := n.dead, n.last, n.key, n.plink, fs.hid[n.key], n.left
	is := n.insts
	fs.tabMu.Unlock()
	if n.IsDir() {
		if dead && err != nil {
			*st = *last
			return nil
		}
		if err != nil {
			return err
		}
		st.Ino = n.ino
		if dead {
			st.Nlink = 0
			return nil
		}
		nlink := uint64(st.Nlink)
		for _, i := range is[min(1, len(is)):] {
			var lst unix.Stat_t
			if fd, err := i.pin(); err == nil {
				if unix.Fstat(fd, &lst) == nil && lst.Nlink > 2 {
					nlink += uint64(lst.Nlink) - 2
				}
				i.unpin()
			}
		}
		setInt(&st.Nlink, nlink)
		return nil
	}
	if dead {
		if err != nil {
			*st = *last
		}
		st.Ino = n.ino
		setInt(&st.Nlink, uint64(left))
		return nil
	}
	if err != nil || keyOf(st) != k {
		// The name was taken away or given to another file directly; what
		// is open goes on.
		f := n.anyFile()
		if f == nil {
			return unix.ESTALE
		}
		err = unix.Fstat(f.fd, st)
		f.put()
		if err != nil {
			return err
		}
	}
	st.Ino = n.ino
	if pl != nil {
		fs.tabMu.Lock()
		setInt(&st.Nlink, uint64(pl.nlink))
		fs.tabMu.Unlock()
	} else if hidden > 0 {
		setInt(&st.Nlink, visible(uint64(st.Nlink), uint64(hidden)))
	}
	return nil
}

// SetAttr says what to change; nil fields stay.
type SetAttr struct {
	Mode, UID, GID *uint32
	Size           *int64
	Atime, Mtime   *unix.Timespec // Nsec UTIME_NOW: now
	KillPriv       bool           // the caller's truncation strips suid and sgid
	Cred           Cred
}

// SetAttr changes attributes of n, copied up first if need be, and fills st.
func (fs *FS) SetAttr(n *Node, f *File, a *SetAttr, st *unix.Stat_t) error {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	limit := int64(-1)
	if a.Size != nil {
		if n.typ != unix.S_IFREG {
			return unix.EINVAL
		}
		limit = *a.Size
	}
	if err := fs.writable(n, limit); err != nil {
		return errno(err)
	}
	r, err := n.where()
	if err != nil {
		return errno(err)
	}
	err = fs.setAttr(n, &r, a)
	r.release()
	if err != nil {
		return errno(err)
	}
	return errno(fs.getAttr(n, st))
}

// writable makes sure that n lies on a writable branch.
func (fs *FS) writable(n *Node, limit int64) error {
	if !n.IsDir() {
		return fs.copyUp(n, limit)
	}
	fs.tabMu.Lock()
	dead := n.dead
	var top *Branch
	if len(n.insts) > 0 {
		top = n.insts[0].br
	}
	fs.tabMu.Unlock()
	if top == nil {
		return unix.ESTALE
	}
	if top.perm == RW {
		return nil
	}
	if dead {
		return unix.ENOENT
	}
	w := fs.writeBranch(top)
	if w == nil {
		return unix.EROFS
	}
	_, err := fs.ensureUpper(n, w)
	return err
}

func (fs *FS) setAttr(n *Node, r *ref, a *SetAttr) error {
	if a.Size != nil {
		fd, err := r.open(unix.O_WRONLY, n.keyNow())
		if err != nil {
			return err
		}
		err = unix.Ftruncate(fd, *a.Size)
		if err == nil && a.KillPriv {
			err = KillPriv(fd)
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if a.UID != nil || a.GID != nil {
		uid, gid := -1, -1
		if a.UID != nil {
			uid = int(*a.UID)
		}
		if a.GID != nil {
			gid = int(*a.GID)
		}
		var err error
		if r.name == "" {
			err = unix.Fchownat(r.fd, "", uid, gid, unix.AT_EMPTY_PATH)
		} else {
			err = unix.Fchownat(r.fd, r.name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
		}
		if err != nil {
			return err
		}
	}
	if a.Mode != nil {
		if err := r.chmod(*a.Mode & 0o7777); err != nil {
			return err
		}
	}
	if a.Atime != nil || a.Mtime != nil {
		ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
		if a.Atime != nil {
			ts[0] = *a.Atime
		}
		if a.Mtime != nil {
			ts[1] = *a.Mtime
		}
		if err := r.utimes(ts); err != nil {
			return err
		}
	}
	return nil
}

func (r *ref) chmod(mode uint32) error {
	if r.name == "" {
		return unix.Fchmodat(unix.AT_FDCWD, procFD(r.fd), mode, 0)
	}
	return chmodAt(r.fd, r.name, mode)
}

// chmodAt changes the mode of a name without following it: fchmodat2 where
// the kernel has it (Linux 6.6), else through a descriptor.
func chmodAt(fd int, name string, mode uint32) error {
	p, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := unix.Fstat(p, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Fchmodat(unix.AT_FDCWD, procFD(p), mode, 0)
}

func (r *ref) utimes(ts []unix.Timespec) error {
	if r.name == "" {
		return unix.UtimesNanoAt(unix.AT_FDCWD, procFD(r.fd), ts, 0)
	}
	return unix.UtimesNanoAt(r.fd, r.name, ts, unix.AT_SYMLINK_NOFOLLOW)
}

// KillPriv strips suid, sgid of group-executable files, and capabilities.
func KillPriv(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mode := st.Mode &^ unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	if mode != st.Mode {
		if err := unix.Fchmod(fd, mode&0o7777); err != nil {
			return err
		}
	}
	err := unix.Fremovexattr(fd, "security.capability")
	if err == unix.ENODATA || err == unix.EOPNOTSUPP || err == unix.EPERM {
		return nil
	}
	return err
}

// Readlink returns the target of a symbolic link.
func (fs *FS) Readlink(n *Node) (string, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if n.typ != unix.S_IFLNK {
		return "", unix.EINVAL
	}
	r, err := n.where()
	if err != nil {
		return "", errno(err)
	}
	defer r.release()
	s, err := r.readlink()
	return s, errno(err)
}

func (r *ref) readlink() (string, error) {
	buf := make([]byte, unix.PathMax)
	k, err := unix.Readlinkat(r.fd, r.name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:k]), nil
}

// path is a path for calls that have no *at form. Its last component is never
// followed by the l* calls; a ref without name is the file itself, which those
// calls must follow.
func (r *ref) path() (string, bool) {
	if r.name == "" {
		return procFD(r.fd), true
	}
	return procFD(r.fd) + "/" + r.name, false
}

// Getxattr reads an xattr into dest and returns its size.
func (fs *FS) Getxattr(n *Node, name string, dest []byte) (int, error) {
	if fs.format.PrivateXattr(name) {
		return 0, unix.ENODATA
	}
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	r, err := n.where()
	if err != nil {
		return 0, errno(err)
	}
	defer r.release()
	k, err := r.getxattr(name, dest)
	return k, errno(err)
}

func (r *ref) getxattr(name string, dest []byte) (int, error) {
	p, follow := r.path()
	if follow {
		return unix.Getxattr(p, name, dest)
	}
	return unix.Lgetxattr(p, name, dest)
}

// Listxattr reads the names of the xattrs into dest and returns their size.
func (fs *FS) Listxattr(n *Node, dest []byte) (int, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	r, err := n.where()
	if err != nil {
		return 0, errno(err)
	}
	defer r.release()
	names, err := r.listxattr()
	if err != nil {
		return 0, errno(err)
	}
	total := 0
	for _, x := range names {
		if fs.format.PrivateXattr(x) {
			continue
		}
		if len(dest) > 0 {
			if total+len(x)+1 > len(dest) {
				return 0, unix.ERANGE
			}
			copy(dest[total:], x)
			dest[total+len(x)] = 0
		}
		total += len(x) + 1
	}
	return total, nil
}

func (r *ref) listxattr() ([]string, error) {
	p, follow := r.path()
	call := unix.Llistxattr
	if follow {
		call = unix.Listxattr
	}
	return xattrNames(func(b []byte) (int, error) { return call(p, b) })
}

// xattrNames splits the answer of listxattr(2). A file system without xattrs
// has no names.
func xattrNames(call func([]byte) (int, error)) ([]string, error) {
	buf := make([]byte, 1024)
	for {
		n, err := call(buf)
		if errors.Is(err, unix.ERANGE) && len(buf) < 1<<16 {
			buf = make([]byte, 1<<16)
			continue
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		var names []string
		start := 0
		for i, c := range buf[:n] {
			if c == 0 {
				names = append(names, string(buf[start:i]))
				start = i + 1
			}
		}
		return names, nil
	}
}

// Setxattr sets an xattr with the flags of setxattr(2).
func (fs *FS) Setxattr(n *Node, name string, value []byte, flags int) error {
	return fs.changeXattr(n, name, func(r *ref) error {
		p, follow := r.path()
		if follow {
			return unix.Setxattr(p, name, value, flags)
		}
		return unix.Lsetxattr(p, name, value, flags)
	})
}

// Removexattr removes an xattr.
func (fs *FS) Removexattr(n *Node, name string) error {
	return fs.changeXattr(n, name, func(r *ref) error {
		// Removing what is not there must not copy anything up, so where
		// there is a choice the question comes first.
		p, follow := r.path()
		if follow {
			return unix.Removexattr(p, name)
		}
		return unix.Lremovexattr(p, name)
	})
}

func (fs *FS) changeXattr(n *Node, name string, do func(*ref) error) error {
	if fs.format.PrivateXattr(name) {
		return unix.EPERM
	}
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if err := fs.writable(n, -1); err != nil {
		return errno(err)
	}
	r, err := n.where()
	if err != nil {
		return errno(err)
	}
	defer r.release()
	if r.in != nil && n.IsDir() {
		r.in.defACL.Store(0)
	}
	return errno(do(&r))
}

// setInt sets a field of a kernel structure whose width depends on the
// processor.
func setInt[T int32 | int64 | uint32 | uint64](field *T, v uint64) { *field = T(v) }

// Statfs tells about the first branch, or with SumFree about all.
func (fs *FS) Statfs(out *unix.Statfs_t) error {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if len(fs.stack) == 0 {
		return unix.ENODEV
	}
	if err := unix.Fstatfs(fs.stack[0].root, out); err != nil {
		return err
	}
	setInt(&out.Namelen, uint64(fs.format.MaxName()))
	if !fs.sum {
		return nil
	}
	seen := map[uint64]bool{fs.stack[0].dev: true}
	for _, b := range fs.stack[1:] {
		if seen[b.dev] {
			continue
		}
		seen[b.dev] = true
		var s unix.Statfs_t
		if err := unix.Fstatfs(b.root, &s); err != nil || out.Bsize == 0 {
			continue
		}
		scale := func(n uint64) uint64 { return n * uint64(s.Bsize) / uint64(out.Bsize) }
		out.Blocks += scale(s.Blocks)
		out.Bfree += scale(s.Bfree)
		out.Bavail += scale(s.Bavail)
		out.Files += s.Files
		out.Ffree += s.Ffree
	}
	return nil
}
