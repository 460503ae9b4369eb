//go:build linux

package unionfs

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Cred is who creates a file.
type Cred struct {
	UID, GID uint32
	Umask    uint32 // applies where the directory has no default ACL
}

// as runs f with the file system ids of c, so that the new file belongs to its
// creator from its first moment, with quota and set-group-id directories
// treated as the kernel treats them. Capabilities stay: the right to create
// was checked by whoever asks.
func (fs *FS) as(c Cred, f func() error) error {
	if !fs.canSetCreds || (c.UID == fs.uid && c.GID == fs.gid) {
		return f()
	}
	runtime.LockOSThread()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps, now [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	unix.SetfsgidRetGid(int(c.GID))
	unix.SetfsuidRetUid(int(c.UID))
	// setfsuid(2) takes the file capabilities away; they are still permitted.
	if err := unix.Capget(&hdr, &now[0]); err == nil && now != caps {
		unix.Capset(&hdr, &caps[0])
	}
	err := f()
	unix.SetfsuidRetUid(int(fs.uid))
	unix.SetfsgidRetGid(int(fs.gid))
	u, _ := unix.SetfsuidRetUid(-1)
	g, _ := unix.SetfsgidRetGid(-1)
	if uint32(u) == fs.uid && uint32(g) == fs.gid && unix.Capset(&hdr, &caps[0]) == nil {
		runtime.UnlockOSThread()
	} // else the thread ends with its goroutine
	return err
}

// spot is where a new entry goes.
type spot struct {
	in    *inst
	fd    int
	white bool // over a whiteout there
	acl   bool // the directory has a default ACL
	sgid  bool
}

// withSpot finds out where name can be made in dir and calls f with dir
// locked.
func (fs *FS) withSpot(dir *Node, name string, w *Branch, f func(*spot) error) error {
	if err := fs.checkName(name); err != nil {
		return err
	}
	if w == nil {
		return unix.EROFS
	}
	in, err := fs.ensureUpper(dir, w)
	if err != nil {
		return err
	}
	dir.mu.Lock()
	defer dir.mu.Unlock()
	if dir.isDead() {
		return unix.ENOENT
	}
	var at found
	if err := fs.resolve(dir, name, false, &at); err != nil {
		return err
	}
	if at.top != nil {
		at.close()
		return unix.EEXIST
	}
	s := spot{in: in, white: at.white == in}
	if at.white != nil && fs.index(at.white.br) < fs.index(w) {
		return fs.outOfSight(w)
	}
	if s.fd, err = in.pin(); err != nil {
		return err
	}
	defer in.unpin()
	s.acl = in.hasDefaultACL(s.fd)
	defer dir.touched()
	return f(&s)
}

func (n *Node) isDead() bool {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.dead
}

// hasDefaultACL is remembered until an xattr of the directory is set.
func (i *inst) hasDefaultACL(fd int) bool {
	switch i.defACL.Load() {
	case 1:
		return false
	case 2:
		return true
	}
	_, err := unix.Getxattr(procFD(fd), "system.posix_acl_default", nil)
	if err == nil {
		i.defACL.Store(2)
		return true
	}
	i.defACL.Store(1)
	return false
}

// make makes an entry and returns its node and attributes.
func (fs *FS) make(dir *Node, name string, mode uint32, c Cred, st *unix.Stat_t, mk func(fd int, at string, mode uint32) error) (n *Node, err error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	isDir := mode&unix.S_IFMT == unix.S_IFDIR
	err = fs.withSpot(dir, name, fs.topRW(), func(s *spot) error {
		if !s.acl {
			mode &^= c.Umask & 0o777
		}
		create := func(at string) error {
			if err := fs.as(c, func() error { return mk(s.fd, at, mode) }); err != nil {
				return err
			}
			err := fs.settle(s, at, mode, st)
			if err == nil && isDir && s.white {
				var d int
				if d, err = openDirAt(s.fd, at); err == nil {
					err = fs.format.SetOpaque(s.in.br, d)
					unix.Close(d)
				}
			}
			if err != nil {
				removeTree(s.fd, at)
			}
			return err
		}
		var err error
		if s.white {
			err = fs.format.Reveal(s.in.br, s.fd, name, isDir, create)
		} else {
			err = create(name)
		}
		if err != nil {
			return err
		}
		n = fs.attachNew(dir, name, s.in, st)
		return nil
	})
	return n, errno(err)
}

// settle gives a new entry the mode it was asked for, which the umask of this
// process may have cut, and reads its attributes.
func (fs *FS) settle(s *spot, at string, mode uint32, st *unix.Stat_t) error {
	if err := fstatat(s.fd, at, st); err != nil {
		return err
	}
	if s.acl || mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	if missing := mode & 0o1777 &^ st.Mode; missing != 0 {
		if err := chmodAt(s.fd, at, (st.Mode|missing)&0o7777); err != nil {
			return err
		}
		return fstatat(s.fd, at, st)
	}
	return nil
}

func (fs *FS) attachNew(dir *Node, name string, in *inst, st *unix.Stat_t) *Node {
	k := keyOf(st)
	fs.dropIno(k) // a number kept for a file that was removed directly
	ino := fs.unionIno(k)
	n := fs.newNode(st.Mode & unix.S_IFMT)
	n.ino = ino
	fs.tabMu.Lock()
	if n.IsDir() {
		n.parent, n.name = dir, name
		n.insts = []*inst{{br: in.br, key: k, node: n, fd: -1}}
		dir.addKid(name, n)
	} else {
		n.br, n.key = in.br, k
		n.addLink(dir, name)
	}
	n.refs.Add(1)
	fs.tabMu.Unlock()
	st.Ino = ino
	return n
}

// Mkdir makes a directory; mode has no type bits. It is opaque only if it
// takes the place of a whiteout, so what a branch added later has under that
// name merges with it (aufs diropq=whiteouted).
func (fs *FS) Mkdir(dir *Node, name string, mode uint32, c Cred, st *unix.Stat_t) (*Node, error) {
	return fs.make(dir, name, mode&0o7777|unix.S_IFDIR, c, st, func(fd int, at string, mode uint32) error {
		return unix.Mkdirat(fd, at, mode&0o7777)
	})
}

// Mknod makes a regular file, device, fifo or socket.
func (fs *FS) Mknod(dir *Node, name string, mode, rdev uint32, c Cred, st *unix.Stat_t) (*Node, error) {
	return fs.make(dir, name, mode, c, st, func(fd int, at string, mode uint32) error {
		return unix.Mknodat(fd, at, mode, int(rdev))
	})
}

// Symlink makes a symbolic link to target.
func (fs *FS) Symlink(dir *Node, name, target string, c Cred, st *unix.Stat_t) (*Node, error) {
	return fs.make(dir, name, unix.S_IFLNK|0o777, c, st, func(fd int, at string, _ uint32) error {
		return unix.Symlinkat(target, fd, at)
	})
}

// Create makes and opens a regular file; EEXIST if the name is taken.
func (fs *FS) Create(dir *Node, name string, flags int, mode uint32, c Cred, st *unix.Stat_t) (*Node, *File, error) {
	fd := -1
	flags = flags&openFlags&^unix.O_TRUNC | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		// The backing of passthrough may serve readers, too.
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	n, err := fs.make(dir, name, mode&0o7777|unix.S_IFREG, c, st, func(d int, at string, mode uint32) (err error) {
		fd, err = unix.Openat(d, at, flags, mode&0o7777)
		return err
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, nil, err
	}
	fs.tabMu.Lock()
	br := n.br
	fs.tabMu.Unlock()
	return n, fs.newFile(n, fd, br, flags&unix.O_ACCMODE != unix.O_RDONLY), nil
}

// Tmpfile makes and opens a file without a name near dir (O_TMPFILE).
func (fs *FS) Tmpfile(dir *Node, flags int, mode uint32, c Cred, st *unix.Stat_t) (*Node, *File, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	w := fs.topRW()
	if w == nil {
		return nil, nil, unix.EROFS
	}
	in, err := fs.ensureUpper(dir, w)
	if err != nil {
		return nil, nil, errno(err)
	}
	d, err := in.pin()
	if err != nil {
		return nil, nil, errno(err)
	}
	defer in.unpin()
	if !in.hasDefaultACL(d) {
		mode &^= c.Umask & 0o777
	}
	fd := -1
	err = fs.as(c, func() (err error) {
		fd, err = unix.Openat(d, ".", unix.O_TMPFILE|flags&openFlags&unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, mode&0o7777)
		return err
	})
	if err != nil {
		return nil, nil, errno(err)
	}
	if err = unix.Fstat(fd, st); err == nil {
		if missing := mode & 0o1777 &^ st.Mode; missing != 0 {
			if err = unix.Fchmod(fd, (st.Mode|missing)&0o7777); err == nil {
				err = unix.Fstat(fd, st)
			}
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, nil, errno(err)
	}
	n := fs.newNode(unix.S_IFREG)
	n.br, n.key, n.dead, n.last = w, keyOf(st), true, new(*st)
	fs.dropIno(n.key)
	n.ino = fs.unionIno(n.key)
	n.refs.Store(1)
	st.Ino = n.ino
	return n, fs.newFile(n, fd, w, true), nil
}

// Link gives the non-directory n another name.
func (fs *FS) Link(n *Node, dir *Node, name string, st *unix.Stat_t) error {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if n.IsDir() {
		return unix.EPERM
	}
	if err := fs.writable(n, -1); err != nil {
		return errno(err)
	}
	n.copyMu.Lock() // no other link or removal decides about n's names
	defer n.copyMu.Unlock()
	// On the branch where n lies (rule 8 B6), which stays while copyMu is held.
	fs.tabMu.Lock()
	br := n.br
	fs.tabMu.Unlock()
	err := fs.withSpot(dir, name, br, func(s *spot) error {
		r, err := n.where()
		if err != nil {
			return err
		}
		defer r.release()
		mk := func(at string) error {
			if r.name == "" {
				return unix.Linkat(unix.AT_FDCWD, procFD(r.fd), s.fd, at, unix.AT_SYMLINK_FOLLOW)
			}
			return unix.Linkat(r.fd, r.name, s.fd, at, 0)
		}
		if s.white {
			err = fs.format.Reveal(s.in.br, s.fd, name, false, mk)
		} else {
			err = mk(name)
		}
		if err != nil {
			return err
		}
		fs.tabMu.Lock()
		if n.plink != nil {
			n.plink.nlink++
		} else if !n.hashed && !fs.noPlink {
			n.hashed = true
			fs.byKey[n.key] = n
		}
		orphan := n.addLink(dir, name)
		fs.tabMu.Unlock()
		orphan.drop()
		return nil
	})
	if err != nil {
		return errno(err)
	}
	return errno(fs.getAttr(n, st))
}
