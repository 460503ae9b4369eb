//go:build linux

package unionfs

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Resume says that another process had the union and was killed, so that its
// clients wait for it to go on. What it left half done is mended as after any
// crash, but files that are open without a name stay.
type Resume struct {
	// Locks are those of writable branches, held since the other process took
	// them. Open takes over those it needs, which are then nil here.
	Locks []*os.File
}

// claim takes the lock of a writable branch, or the one that is held already.
func (fs *FS) claim(b *Branch) error {
	if b.lock != nil {
		return nil // kept when the branch could not be given up, see Modify
	}
	if fs.resume == nil {
		return b.claim()
	}
	for k, f := range fs.resume.Locks {
		var st unix.Stat_t
		if f == nil || unix.Fstat(int(f.Fd()), &st) != nil || uint64(st.Dev) != b.dev || st.Ino != b.ino {
			continue
		}
		// It may have been given up when its owner was killed.
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return &os.PathError{Op: "flock", Path: b.path, Err: fmt.Errorf("writable in another union: %w", unix.EBUSY)}
		}
		b.lock, fs.resume.Locks[k] = f, nil
		return nil
	}
	return b.claim()
}

// Locks returns descriptors of the locks of the writable branches, which are the
// caller's. They are the same locks, and given up with them.
func (fs *FS) Locks() (fds []int, err error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	for _, b := range fs.stack {
		if b.lock == nil {
			continue
		}
		fd, err := unix.FcntlInt(b.lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, &os.PathError{Op: "fcntl", Path: b.path, Err: err}
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// Place returns a name of n in a directory that accept takes; ok is false if
// there is none.
func (n *Node) Place(accept func(dir *Node) bool) (dir *Node, name string, ok bool) {
	n.Names(func(d *Node, s string) {
		if !ok && accept(d) {
			dir, name, ok = d, s, true
		}
	})
	return dir, name, ok
}

// KeepIno gives n, which nobody else uses yet, the inode number it had.
func (fs *FS) KeepIno(n *Node, ino uint64) {
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	if n.ino == ino {
		return
	}
	k := n.key
	if n.IsDir() {
		if len(n.insts) == 0 {
			return
		}
		k = n.insts[0].key
	}
	n.ino = ino
	fs.inos[k] = ino
}

// Adopt makes a node, with one reference, of a regular file that has lost all
// its names but is open as fd, which it takes over, however it was opened.
func (fs *FS) Adopt(fd int, ino uint64) (*Node, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	n := fs.newNode(unix.S_IFREG)
	n.last = new(unix.Stat_t)
	if err := unix.Fstat(fd, n.last); err != nil {
		return nil, err
	}
	if n.last.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, unix.EINVAL
	}
	n.ino, n.dead, n.key = ino, true, keyOf(n.last)
	n.br = fs.ownerOf(n.key.dev, fd)
	f := &File{fs: fs, node: n, fd: fd, br: n.br}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil {
		f.wfd = flags&unix.O_ACCMODE != unix.O_RDONLY
	}
	f.refs.Store(1)
	n.br.files.Add(1)
	if f.wfd {
		n.br.wopen.Add(1)
	}
	n.orphan, n.files = f, []*File{f}
	n.refs.Store(1)
	return n, nil
}

// ownerOf finds the branch a file without a name is on: one of its file
// system, whose mount is read-only just as the file's is.
func (fs *FS) ownerOf(dev uint64, fd int) *Branch {
	readOnly := false
	var sf unix.Statfs_t
	if unix.Fstatfs(fd, &sf) == nil {
		readOnly = sf.Flags&unix.ST_RDONLY != 0
	}
	fits := func(b *Branch) bool { return b.dev == dev && (b.perm != RW) == readOnly }
	if i := slices.IndexFunc(fs.stack, fits); i >= 0 {
		return fs.stack[i]
	}
	if i := slices.IndexFunc(fs.stack, func(b *Branch) bool { return b.dev == dev }); i >= 0 {
		return fs.stack[i]
	}
	return fs.stack[0]
}

// Inode returns the branch inode that a non-directory stands for, without the
// lock that Key takes: it may be called by CopiedUp.
func (n *Node) Inode() (dev, ino uint64) {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.key.dev, n.key.ino
}

// Dead reports whether n has no name that the union knows.
func (n *Node) Dead() bool {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.dead
}
