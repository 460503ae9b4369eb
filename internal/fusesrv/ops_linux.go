package fusesrv

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
)

func status(err error) fuse.Status { return fuse.Status(unionfs.Errno(err)) }

func (s *Server) String() string { return "layerfs" }

func cred(h *fuse.InHeader, umask uint32) unionfs.Cred {
	return unionfs.Cred{UID: h.Uid, GID: h.Gid, Umask: umask}
}

func fill(a *fuse.Attr, st *unix.Stat_t) {
	*a = fuse.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink), Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev: uint32(st.Rdev), Blksize: uint32(st.Blksize),
	}
}

// timeouts says how long the kernel may trust an entry and its attributes.
func (s *Server) timeouts(n *unionfs.Node, st *unix.Stat_t) (entry, attr time.Duration) {
	entry, attr = attrLong, attrLong
	if s.cfg.UDBA == Reval || s.cfg.UDBA == Strict {
		if _, _, upper := n.Key(); !upper {
			entry, attr = s.lowerTime(), s.lowerTime()
		}
	} else if s.cfg.UDBA == Notify && !n.IsDir() && (st.Nlink > 1 || n.HasHidden()) {
		// A change through another name is an event of that name only.
		if _, _, upper := n.Key(); !upper {
			attr = 0
		}
	}
	if n.Writers() > 0 {
		// Stores into a mapping change times without a request.
		attr = 0
	}
	return entry, attr
}

func (s *Server) lowerTime() time.Duration {
	if s.cfg.UDBA == Strict {
		return 0
	}
	return revalTime
}

func (s *Server) negativeTime() time.Duration {
	switch {
	case s.cfg.UDBA == Reval || s.cfg.UDBA == Strict:
		return s.lowerTime()
	case s.minor < protoEpoch:
		// Without epochs there is no way to drop negative entries whose
		// names are not known, which an overflow or a new branch asks for.
		return revalTime
	}
	return attrLong
}

// entry answers with a node, whose engine reference it takes over.
func (s *Server) entry(n *unionfs.Node, dir uint64, name string, st *unix.Stat_t, out *fuse.EntryOut) *inode {
	i := s.enter(n, dir, name)
	out.NodeId, out.Generation = i.id, 1
	fill(&out.Attr, st)
	e, a := s.timeouts(n, st)
	out.SetEntryTimeout(e)
	out.SetAttrTimeout(a)
	return i
}

// Lookup finds a name; one that does not exist is remembered, too.
func (s *Server) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, code := s.node(h.NodeId)
	if !code.Ok() {
		return code
	}
	if name == "." || name == ".." {
		return fuse.ENOSYS // for NFS only
	}
	var st unix.Stat_t
	n, err := s.fs.Lookup(dir, name, &st)
	if err == unix.ENOENT {
		out.SetEntryTimeout(s.negativeTime())
		return fuse.OK
	}
	if err != nil {
		return status(err)
	}
	s.entry(n, h.NodeId, name, &st, out)
	return fuse.OK
}

// GetAttr tells attributes.
func (s *Server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	if err := s.fs.GetAttr(n, &st); err != nil {
		return status(err)
	}
	s.attr(n, &st, out)
	return fuse.OK
}

func (s *Server) attr(n *unionfs.Node, st *unix.Stat_t, out *fuse.AttrOut) {
	fill(&out.Attr, st)
	_, a := s.timeouts(n, st)
	out.SetTimeout(a)
}

// SetAttr changes attributes.
func (s *Server) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	a := unionfs.SetAttr{Cred: cred(&in.InHeader, 0), KillPriv: in.Valid&fuse.FATTR_KILL_SUIDGID != 0}
	if in.Valid&fuse.FATTR_MODE != 0 {
		a.Mode = &in.Mode
	}
	if in.Valid&fuse.FATTR_UID != 0 {
		a.UID = &in.Uid
	}
	if in.Valid&fuse.FATTR_GID != 0 {
		a.GID = &in.Gid
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		size := int64(in.Size)
		a.Size = &size
	}
	if in.Valid&fuse.FATTR_ATIME_NOW != 0 {
		a.Atime = &unix.Timespec{Nsec: unix.UTIME_NOW}
	} else if in.Valid&fuse.FATTR_ATIME != 0 {
		a.Atime = &unix.Timespec{Sec: int64(in.Atime), Nsec: int64(in.Atimensec)}
	}
	if in.Valid&fuse.FATTR_MTIME_NOW != 0 {
		a.Mtime = &unix.Timespec{Nsec: unix.UTIME_NOW}
	} else if in.Valid&fuse.FATTR_MTIME != 0 {
		a.Mtime = &unix.Timespec{Sec: int64(in.Mtime), Nsec: int64(in.Mtimensec)}
	}
	var st unix.Stat_t
	if err := s.fs.SetAttr(n, nil, &a, &st); err != nil {
		return status(err)
	}
	s.attr(n, &st, out)
	return fuse.OK
}

// made answers with what was made. A request that comes again, since the server
// that had it was killed, may find that it was done.
func (s *Server) made(h *fuse.InHeader, dir *unionfs.Node, name string, n *unionfs.Node, err error, typ uint32, st *unix.Stat_t, out *fuse.EntryOut) fuse.Status {
	if err == unix.EEXIST && resent(h) {
		n, err = s.fs.Lookup(dir, name, st)
		if err == nil && n.Type() != typ {
			s.fs.Forget(n, 1)
			err = unix.EEXIST
		}
	}
	if err != nil {
		return status(err)
	}
	s.entry(n, h.NodeId, name, st, out)
	return fuse.OK
}

// Mknod makes a file, device, fifo or socket.
func (s *Server) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	n, err := s.fs.Mknod(dir, name, in.Mode, in.Rdev, cred(&in.InHeader, in.Umask), &st)
	return s.made(&in.InHeader, dir, name, n, err, in.Mode&unix.S_IFMT, &st, out)
}

// Mkdir makes a directory.
func (s *Server) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	n, err := s.fs.Mkdir(dir, name, in.Mode, cred(&in.InHeader, in.Umask), &st)
	return s.made(&in.InHeader, dir, name, n, err, unix.S_IFDIR, &st, out)
}

// Symlink makes a symbolic link.
func (s *Server) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	dir, code := s.node(h.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	n, err := s.fs.Symlink(dir, name, target, cred(h, 0), &st)
	return s.made(h, dir, name, n, err, unix.S_IFLNK, &st, out)
}

// Unlink removes a name.
func (s *Server) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, code := s.node(h.NodeId)
	if !code.Ok() {
		return code
	}
	done := s.losing(dir, name)
	err := s.fs.Unlink(dir, name)
	done()
	return status(again(h, err, unix.ENOENT))
}

// Rmdir removes an empty directory.
func (s *Server) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	dir, code := s.node(h.NodeId)
	if !code.Ok() {
		return code
	}
	return status(again(h, s.fs.Rmdir(dir, name), unix.ENOENT))
}

// Rename renames.
func (s *Server) Rename(_ <-chan struct{}, in *fuse.RenameIn, name, newName string) fuse.Status {
	from, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	to, code := s.node(in.Newdir)
	if !code.Ok() {
		return code
	}
	return status(s.rename(in, from, name, to, newName))
}

// Link makes another name.
func (s *Server) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	i, code := s.inode(in.Oldnodeid)
	if !code.Ok() {
		return code
	}
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	err := s.fs.Link(i.n, dir, name, &st)
	if err == unix.EEXIST && resent(&in.InHeader) {
		var n *unionfs.Node
		if n, err = s.fs.Lookup(dir, name, &st); err == nil {
			s.fs.Forget(n, 1)
			if n != i.n {
				err = unix.EEXIST
			}
		}
	}
	if err != nil {
		return status(err)
	}
	// The kernel wants the id it asked with.
	s.mu.Lock()
	i.nlookup++
	s.saveAgain(i)
	s.mu.Unlock()
	out.NodeId, out.Generation = i.id, 1
	fill(&out.Attr, &st)
	e, a := s.timeouts(i.n, &st)
	out.SetEntryTimeout(e)
	out.SetAttrTimeout(a)
	return fuse.OK
}

// Readlink reads a symbolic link.
func (s *Server) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n, code := s.node(h.NodeId)
	if !code.Ok() {
		return nil, code
	}
	t, err := s.fs.Readlink(n)
	return []byte(t), status(err)
}

// GetXAttr reads an xattr.
func (s *Server) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	n, code := s.node(h.NodeId)
	if !code.Ok() {
		return 0, code
	}
	k, err := s.fs.Getxattr(n, name, dest)
	return uint32(k), status(err)
}

// ListXAttr lists xattrs.
func (s *Server) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n, code := s.node(h.NodeId)
	if !code.Ok() {
		return 0, code
	}
	k, err := s.fs.Listxattr(n, dest)
	return uint32(k), status(err)
}

// SetXAttr sets an xattr.
func (s *Server) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	n, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	flags := int(in.Flags)
	if resent(&in.InHeader) {
		flags = 0 // it may be there, or as it shall be, already
	}
	err := s.fs.Setxattr(n, name, data, flags)
	if err == nil && in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
		var st unix.Stat_t
		if err = s.fs.GetAttr(n, &st); err == nil && st.Mode&unix.S_ISGID != 0 {
			mode := st.Mode & 0o7777 &^ unix.S_ISGID
			err = s.fs.SetAttr(n, nil, &unionfs.SetAttr{Mode: &mode}, &st)
		}
	}
	return status(err)
}

// RemoveXAttr removes an xattr.
func (s *Server) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	n, code := s.node(h.NodeId)
	if !code.Ok() {
		return code
	}
	return status(again(h, s.fs.Removexattr(n, name), unix.ENODATA))
}

// StatFs tells about the file system.
func (s *Server) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	var st unix.Statfs_t
	if err := s.fs.Statfs(&st); err != nil {
		return status(err)
	}
	*out = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), NameLen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}
	return fuse.OK
}

// privileged reports whether writes must strip suid, sgid or capabilities of
// the file, which passthrough does not do.
func (s *Server) privileged(n *unionfs.Node) bool {
	var st unix.Stat_t
	if s.fs.GetAttr(n, &st) != nil || st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
		return true
	}
	if s.cfg.NoXattr {
		return false
	}
	_, err := s.fs.Getxattr(n, "security.capability", nil)
	return err == nil
}

// Open opens a file.
func (s *Server) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	i, code := s.inode(in.NodeId)
	if !code.Ok() {
		return code
	}
	h := &handle{i: i, flags: int(in.Flags) &^ (unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY)}
	write := h.flags&unix.O_ACCMODE != unix.O_RDONLY || h.flags&unix.O_TRUNC != 0
	direct := false
	if write {
		if s.cfg.ReadOnly {
			return fuse.EROFS
		}
		var err error
		h.file, err = s.fs.OpenFile(i.n, h.flags, in.Mode&fuse.OPEN_KILL_SUIDGID != 0)
		if err != nil {
			return status(err)
		}
		direct = !s.noPass.Load() && s.privileged(i.n)
	}
	if code := s.opened(h, direct, out); !code.Ok() {
		if h.file != nil {
			h.file.Close()
		}
		return code
	}
	return fuse.OK
}

// opened decides how the kernel reads and writes an open file.
func (s *Server) opened(h *handle, direct bool, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_NOFLUSH
	if direct {
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	} else {
		id, ok, code := s.pass(h.i, h.file)
		if !code.Ok() {
			return code
		}
		if h.pass = ok; ok {
			out.OpenFlags |= fuse.FOPEN_PASSTHROUGH
			out.BackingID = id
		} else {
			if s.cfg.UDBA == Notify || s.cfg.UDBA == None {
				out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
			}
			if h.file == nil {
				// Not later, when the file may have lost its name.
				f, err := s.fs.OpenFile(h.i.n, h.flags, false)
				if err != nil {
					return status(err)
				}
				h.file = f
			}
		}
	}
	out.Fh = s.newHandle(h)
	return fuse.OK
}

// Create makes and opens a file.
func (s *Server) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	n, f, err := s.fs.Create(dir, name, int(in.Flags), in.Mode, cred(&in.InHeader, in.Umask), &st)
	if err == unix.EEXIST && resent(&in.InHeader) {
		if n, err = s.fs.Lookup(dir, name, &st); err == nil {
			if f, err = s.fs.OpenFile(n, int(in.Flags)&^(unix.O_CREAT|unix.O_EXCL), false); err != nil {
				s.fs.Forget(n, 1)
			}
		}
	}
	if err != nil {
		return status(err)
	}
	return s.created(n, f, name, &st, in, out)
}

// Tmpfile makes a file without a name.
func (s *Server) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	var st unix.Stat_t
	n, f, err := s.fs.Tmpfile(dir, int(in.Flags), in.Mode, cred(&in.InHeader, in.Umask), &st)
	if err != nil {
		return status(err)
	}
	return s.created(n, f, "", &st, in, out)
}

func (s *Server) created(n *unionfs.Node, f *unionfs.File, name string, st *unix.Stat_t, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	i := s.entry(n, in.NodeId, name, st, &out.EntryOut)
	// The first write asks whether it may read an xattr, and so for attributes
	// that are those just told.
	out.SetAttrTimeout(attrFresh)
	if name == "" {
		s.keep(i, f.FD())
	}
	h := &handle{i: i, file: f, flags: int(in.Flags) &^ (unix.O_CREAT | unix.O_EXCL | unix.O_TRUNC | unix.O_NOCTTY)}
	direct := st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0
	if code := s.opened(h, direct, &out.OpenOut); !code.Ok() {
		f.Close()
		s.Forget(i.id, 1)
		return code
	}
	return fuse.OK
}

// Release ends an open file.
func (s *Server) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	s.mu.Lock()
	h := s.handles[in.Fh]
	if h != nil {
		delete(s.handles, in.Fh)
		h.i.handles--
		s.state.del(kindHandle, in.Fh)
	}
	s.mu.Unlock()
	if h != nil {
		h.close()
	}
}

// Read reads where there is no passthrough.
func (s *Server) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	h := s.handle(in.Fh)
	if h == nil {
		return nil, fuse.Status(unix.ESTALE)
	}
	n := 0
	err := h.with(func(fd int) error {
		for n < len(buf) {
			k, err := unix.Pread(fd, buf[n:], int64(in.Offset)+int64(n))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			if k == 0 {
				break
			}
			n += k
		}
		return nil
	})
	if err != nil {
		return nil, status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// Write writes where there is no passthrough.
func (s *Server) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	h := s.handle(in.Fh)
	if h == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	n := 0
	err := h.with(func(fd int) error {
		if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
			if err := unionfs.KillPriv(fd); err != nil {
				return err
			}
		}
		for n < len(data) {
			k, err := unix.Pwrite(fd, data[n:], int64(in.Offset)+int64(n))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				if n > 0 {
					return nil
				}
				return err
			}
			n += k
		}
		return nil
	})
	return uint32(n), status(err)
}

// Flush has nothing to do: data is never kept here.
func (s *Server) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Fsync writes a file to the disk. A file opened for reading has nothing to be
// written, so that is no reason to wait (aufs: fsync on a read-only fd is 0).
func (s *Server) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h := s.handle(in.Fh)
	if h == nil {
		return fuse.Status(unix.ESTALE)
	}
	if h.flags&unix.O_ACCMODE == unix.O_RDONLY {
		return fuse.OK
	}
	return status(h.with(func(fd int) error {
		if in.FsyncFlags&1 != 0 {
			return unix.Fdatasync(fd)
		}
		return unix.Fsync(fd)
	}))
}

// FsyncDir writes a directory to the disk.
func (s *Server) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	return status(s.fs.SyncDir(n))
}

// Fallocate changes the space of a file.
func (s *Server) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	h := s.handle(in.Fh)
	if h == nil {
		return fuse.Status(unix.ESTALE)
	}
	return status(h.with(func(fd int) error {
		return unix.Fallocate(fd, in.Mode, int64(in.Offset), int64(in.Length))
	}))
}

// Lseek finds data and holes.
func (s *Server) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h := s.handle(in.Fh)
	if h == nil {
		return fuse.Status(unix.ESTALE)
	}
	return status(h.with(func(fd int) error {
		off, err := unix.Seek(fd, int64(in.Offset), int(in.Whence))
		out.Offset = uint64(off)
		return err
	}))
}

// CopyFileRange copies between two open files of one branch file system.
func (s *Server) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	src, dst := s.handle(in.FhIn), s.handle(in.FhOut)
	if src == nil || dst == nil {
		return 0, fuse.Status(unix.ESTALE)
	}
	var n int
	copyTo := func(in_, out int) (err error) {
		var a, b unix.Stat_t
		if unix.Fstat(in_, &a) != nil || unix.Fstat(out, &b) != nil || a.Dev != b.Dev {
			return unix.EXDEV
		}
		ro, wo := int64(in.OffIn), int64(in.OffOut)
		n, err = unix.CopyFileRange(in_, &ro, out, &wo, int(min(in.Len, 1<<30)), int(in.Flags))
		return err
	}
	var err error
	if src == dst {
		err = src.with(func(fd int) error { return copyTo(fd, fd) })
	} else {
		// In the order of their ids, since another copy may go the other way.
		a, b := src, dst
		if in.FhIn > in.FhOut {
			a, b = dst, src
		}
		err = a.with(func(x int) error {
			return b.with(func(y int) error {
				if a == dst {
					x, y = y, x
				}
				return copyTo(x, y)
			})
		})
	}
	return uint32(max(n, 0)), status(err)
}

// OpenDir is not needed where the kernel may keep listings; it then keeps them
// as long as nothing changes.
func (s *Server) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if s.flags&fuse.CAP_NO_OPENDIR_SUPPORT != 0 {
		return fuse.ENOSYS
	}
	return fuse.OK
}

// ReadDir lists names.
func (s *Server) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(in, out, false)
}

// ReadDirPlus lists names and looks them up.
func (s *Server) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.readDir(in, out, true)
}

func (s *Server) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	dir, code := s.node(in.NodeId)
	if !code.Ok() {
		return code
	}
	for off := in.Offset; off < 2; off++ {
		e := fuse.DirEntry{Name: "..."[:off+1], Mode: unix.S_IFDIR, Ino: dir.Ino(), Off: off + 1}
		if off == 1 {
			e.Ino = dir.ParentIno()
		}
		if plus {
			if out.AddDirLookupEntry(e) == nil {
				return fuse.OK
			}
		} else if !out.AddDirEntry(e) {
			return fuse.OK
		}
	}
	from := in.Offset
	if from <= 2 {
		from = 0
	}
	ents, err := s.fs.ReadDir(dir, from)
	if err != nil {
		return status(err)
	}
	// Whoever lists a directory mostly wants the attributes, too, and asking for
	// each costs more than all of them here. Of a very long listing only the end
	// has them, lest the kernel and we remember more than is ever used.
	bare := len(ents) - maxPlus
	for k := range ents {
		e := &ents[k]
		d := fuse.DirEntry{Name: e.Name, Ino: e.Ino, Mode: uint32(e.Type) << 12, Off: e.Off}
		if !plus {
			if !out.AddDirEntry(d) {
				break
			}
			continue
		}
		eo := out.AddDirLookupEntry(d)
		if eo == nil {
			break
		}
		if k < bare {
			continue
		}
		var st unix.Stat_t
		n, err := s.fs.LookupEntry(dir, e, &st)
		if err != nil {
			continue // listed without attributes; a lookup will tell
		}
		out.FixMode(st.Mode)
		s.entry(n, in.NodeId, e.Name, &st, eo)
	}
	return fuse.OK
}

// Access is never asked with default_permissions.
func (s *Server) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

// Statx would add the birth time only.
func (s *Server) Statx(<-chan struct{}, *fuse.StatxIn, *fuse.StatxOut) fuse.Status {
	return fuse.ENOSYS
}
