//go:build linux

package unionfs

import (
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A File is an open regular file.
type File struct {
	fs    *FS
	node  *Node
	fd    int
	br    *Branch
	write bool // counts in Node.writers
	wfd   bool // fd may write: counts in Branch.wopen
	refs  atomic.Int32
	of    *File // whose descriptor this is; nil: it has its own
}

// FD returns the descriptor, valid until Close.
func (f *File) FD() int { return f.fd }

// Node returns what is open.
func (f *File) Node() *Node { return f.node }

// Lent reports whether f's descriptor is another file's.
func (f *File) Lent() bool { return f.of != nil }

// Current reports whether the file still is what its node stands for: it is
// not after the node was copied up.
func (f *File) Current() bool {
	f.fs.tabMu.Lock()
	defer f.fs.tabMu.Unlock()
	return f.node.br == f.br
}

// get takes a reference unless the file is closed; tabMu is held.
func (f *File) get() bool {
	for {
		r := f.refs.Load()
		if r == 0 {
			return false
		}
		if f.refs.CompareAndSwap(r, r+1) {
			return true
		}
	}
}

func (f *File) put() {
	if f.refs.Add(-1) != 0 {
		return
	}
	if f.of != nil {
		f.of.put()
		return
	}
	unix.Close(f.fd)
}

// Share returns another open file with f's descriptor. The file is not one that
// changes the node's content, yet if the descriptor may write, its branch cannot
// become read-only while it is open. The caller has not closed f.
func (f *File) Share() *File {
	f.refs.Add(1)
	return f.fs.addFile(&File{fs: f.fs, node: f.node, fd: f.fd, br: f.br, wfd: f.wfd, of: f})
}

// drop closes an orphan that a node had, if it had one; tabMu is not held.
func (f *File) drop() {
	if f != nil {
		f.Close()
	}
}

// Close closes the file. Calls that run on it end first.
func (f *File) Close() {
	n := f.node
	f.fs.tabMu.Lock()
	if i := slices.Index(n.files, f); i >= 0 {
		n.files = slices.Delete(n.files, i, i+1)
	}
	f.fs.tabMu.Unlock()
	f.br.files.Add(-1)
	if f.wfd {
		f.br.wopen.Add(-1)
	}
	if f.write {
		n.writers.Add(-1)
	}
	f.put()
}

// anyFile returns an open file of n on its present branch, to be put.
func (n *Node) anyFile() *File {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	for _, f := range n.files {
		if f.br == n.br && f.get() {
			return f
		}
	}
	return nil
}

func (fs *FS) newFile(n *Node, fd int, br *Branch, write bool) *File {
	return fs.addFile(&File{fs: fs, node: n, fd: fd, br: br, write: write, wfd: write})
}

func (fs *FS) addFile(f *File) *File {
	f.refs.Store(1)
	f.br.files.Add(1)
	if f.wfd {
		f.br.wopen.Add(1)
	}
	if f.write {
		f.node.writers.Add(1)
	}
	fs.tabMu.Lock()
	f.node.files = append(f.node.files, f)
	fs.tabMu.Unlock()
	return f
}

// openFlags are the flags of open(2) that mean something for a branch file.
const openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME

// OpenFile opens n with flags of open(2). Opening for writing copies the file
// up, only as much of it as O_TRUNC leaves (rule [D] of copy-up B1). kill: an
// O_TRUNC strips suid and sgid.
func (fs *FS) OpenFile(n *Node, flags int, kill bool) (*File, error) {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	if n.typ != unix.S_IFREG {
		return nil, unix.ENXIO
	}
	write := flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
	if write {
		limit := int64(-1)
		if flags&unix.O_TRUNC != 0 {
			limit = 0
		}
		if err := fs.copyUp(n, limit); err != nil {
			return nil, errno(err)
		}
	}
	var err error
	for try := 0; try < 4; try++ {
		var r ref
		if r, err = n.where(); err != nil {
			return nil, errno(err)
		}
		k := n.keyNow()
		var fd int
		fd, err = r.open(flags&openFlags, k)
		if err == unix.EPERM && flags&unix.O_NOATIME != 0 {
			fd, err = r.open(flags&openFlags&^unix.O_NOATIME, k)
		}
		r.release()
		if err == unix.ESTALE {
			continue // copied up or renamed in between
		}
		if err != nil {
			return nil, errno(err)
		}
		if kill {
			if err := KillPriv(fd); err != nil {
				unix.Close(fd)
				return nil, errno(err)
			}
		}
		return fs.newFile(n, fd, r.br, write), nil
	}
	return nil, errno(err)
}

// SyncDir writes dir's instance on the writable branch to the disk; there is
// nothing to write of the others.
func (fs *FS) SyncDir(dir *Node) error {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	for _, i := range dir.instList() {
		if i.br.perm != RW {
			continue
		}
		fd, err := i.pin()
		if err != nil {
			return errno(err)
		}
		d, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		i.unpin()
		if err != nil {
			return errno(err)
		}
		err = unix.Fsync(d)
		unix.Close(d)
		if err != nil {
			return errno(err)
		}
	}
	return nil
}
