package fusesrv

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/unionfs"
)

// An inode is what a node id stands for. It holds one reference of its node.
type inode struct {
	id      uint64
	n       *unionfs.Node
	nlookup uint64 // guarded by Server.mu

	mu   sync.Mutex
	open int      // passthrough handles the kernel may still have
	back *backing // registered file, if any
	used bool     // since the last eviction
	ring bool     // in Server.backed; guarded by Server.mu

	handles int  // open files; guarded by Server.mu
	kept    bool // given to Config.Keep; guarded by Server.mu
}

// A backing is a file registered with the connection.
type backing struct {
	id   int32
	file *unionfs.File // nil: one that is not current, of an earlier process
	// lent: file has the descriptor of an open file that may write. It goes
	// when nobody has the inode open, so that no branch seems to be in use.
	lent bool
}

func (b *backing) current() bool { return b.file != nil && b.file.Current() }

// A handle is an open file.
type handle struct {
	s    *Server
	i    *inode
	pass bool

	mu    sync.Mutex
	file  *unionfs.File // nil: that of the inode's backing
	flags int
}

// enter makes the node id for a node that the engine just returned under a name,
// and whose reference it takes over.
func (s *Server) enter(n *unionfs.Node, dir uint64, name string) *inode {
	s.mu.Lock()
	i := s.byNode[n]
	extra := i != nil
	if i == nil {
		s.nextID++
		i = &inode{id: s.nextID, n: n}
		s.ids[i.id], s.byNode[n] = i, i
		i.nlookup++
		s.save(i, dir, name)
	} else {
		i.nlookup++
		s.state.count(kindInode, i.id, i.nlookup)
	}
	s.mu.Unlock()
	if extra {
		s.fs.Forget(n, 1)
	}
	return i
}

func (s *Server) inode(id uint64) (*inode, fuse.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.ids[id]; i != nil {
		return i, fuse.OK
	}
	return nil, fuse.Status(unix.ESTALE)
}

func (s *Server) node(id uint64) (*unionfs.Node, fuse.Status) {
	i, st := s.inode(id)
	if i == nil {
		return nil, st
	}
	return i.n, st
}

// Forget drops lookups of a node id.
func (s *Server) Forget(id, nlookup uint64) {
	s.mu.Lock()
	i := s.ids[id]
	if i == nil || id == fuse.FUSE_ROOT_ID {
		s.mu.Unlock()
		return
	}
	i.nlookup -= min(nlookup, i.nlookup)
	if i.nlookup > 0 {
		s.state.count(kindInode, id, i.nlookup)
		s.mu.Unlock()
		return
	}
	delete(s.ids, id)
	if s.byNode[i.n] == i {
		delete(s.byNode, i.n)
	}
	s.unsave(i)
	s.mu.Unlock()
	i.dropBacking(s)
	s.fs.Forget(i.n, 1)
}

// detach makes the next lookup of the node return another id.
func (s *Server) detach(i *inode) {
	s.mu.Lock()
	if s.byNode[i.n] == i {
		delete(s.byNode, i.n)
		if s.state != nil {
			s.old[i.n] = append(s.old[i.n], i)
		}
	}
	s.mu.Unlock()
}

func (i *inode) dropBacking(s *Server) {
	i.mu.Lock()
	b := i.back
	i.back = nil
	i.mu.Unlock()
	s.giveUp(b)
}

// giveUp closes a backing that was counted and that no inode has any more; nil
// is none. s.mu is not held.
func (s *Server) giveUp(b *backing) {
	if b == nil {
		return
	}
	s.mu.Lock()
	s.nBacked--
	s.mu.Unlock()
	s.closeBacking(b)
}

func (s *Server) closeBacking(b *backing) {
	if err := sys.FuseBackingClose(s.fd, b.id); err != nil {
		s.log.Debug("close backing", "err", err)
	}
	s.state.del(kindBacking, uint64(b.id))
	if b.file != nil {
		b.file.Close()
	}
}

// pass gives i a backing for its node's present file and counts an open. ok is
// false if this file cannot be passed through; ESTALE says that the inode is
// open with another file. have, if not nil, is an open file of the node, which
// spares opening another.
func (s *Server) pass(i *inode, have *unionfs.File) (id int32, ok bool, st fuse.Status) {
	if s.noPass.Load() {
		return 0, false, fuse.OK
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if b := i.back; b != nil {
		if b.current() {
			i.open++
			i.used = true
			return b.id, true, fuse.OK
		}
		if i.open > 0 {
			s.detach(i)
			return 0, false, fuse.Status(unix.ESTALE)
		}
		i.back = nil
		s.giveUp(b)
	}
	var f *unionfs.File
	var err error
	if have != nil && have.Current() {
		f = have.Share()
	} else if f, err = s.fs.OpenFile(i.n, unix.O_RDONLY, false); err != nil {
		return 0, false, status(err)
	}
	bid, err := sys.FuseBackingOpen(s.fd, f.FD())
	if err != nil {
		f.Close()
		if i.open > 0 {
			return 0, false, fuse.EIO
		}
		if e := unionfs.Errno(err); e == unix.EPERM || e == unix.EOPNOTSUPP || e == unix.ENOTTY {
			// No privilege, or no kernel support: it will not get better.
			s.noPass.Store(true)
			s.log.Info("no passthrough", "err", err)
		}
		return 0, false, fuse.OK
	}
	i.back = &backing{id: bid, file: f, lent: f.Lent()}
	s.saveBacking(i)
	i.open++
	i.used = true
	s.backings(i)
	return bid, true, fuse.OK
}

// backings counts a new backing and closes some that nobody has open if there
// are too many. i.mu is held.
func (s *Server) backings(i *inode) {
	s.mu.Lock()
	s.nBacked++
	if !i.ring {
		i.ring = true
		s.backed = append(s.backed, i)
	}
	var drop []*backing
	if s.nBacked > maxBacked {
		keep := s.backed[:0]
		for _, o := range s.backed {
			if o == i || !o.mu.TryLock() {
				keep = append(keep, o)
				continue
			}
			switch {
			case o.back == nil:
				o.ring = false
			case o.open > 0 || o.used || s.nBacked <= maxBacked*7/8:
				o.used = false
				keep = append(keep, o)
			default:
				drop = append(drop, o.back)
				o.back, o.ring = nil, false
				s.nBacked--
			}
			o.mu.Unlock()
		}
		clear(s.backed[len(keep):])
		s.backed = keep
	}
	s.mu.Unlock()
	for _, b := range drop {
		s.closeBacking(b)
	}
}

// DropIdle closes all backings that nobody has open, so that they keep no
// branch busy.
func (s *Server) DropIdle() {
	s.mu.Lock()
	all := append([]*inode(nil), s.backed...)
	s.mu.Unlock()
	for _, i := range all {
		i.mu.Lock()
		var b *backing
		if i.open == 0 {
			b, i.back = i.back, nil
		}
		i.mu.Unlock()
		s.giveUp(b)
	}
}

func (s *Server) newHandle(h *handle) uint64 {
	h.s = s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextFH++
	s.handles[s.nextFH] = h
	h.i.handles++
	s.saveHandle(s.nextFH, h)
	return s.nextFH
}

func (s *Server) handle(fh uint64) *handle {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handles[fh]
}

func (h *handle) close() {
	if h.pass {
		var b *backing
		h.i.mu.Lock()
		h.i.open--
		if h.i.open == 0 && h.i.back != nil && h.i.back.lent {
			b, h.i.back = h.i.back, nil
		}
		h.i.mu.Unlock()
		h.s.giveUp(b)
	}
	h.mu.Lock()
	f := h.file
	h.file = nil
	h.mu.Unlock()
	if f != nil {
		f.Close()
	}
}

// with calls f with the handle's file, opened again if the node was copied up
// since (aufs: an old descriptor reads the new content).
func (h *handle) with(f func(fd int) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil || (!h.pass && !h.file.Current()) {
		n, err := h.s.fs.OpenFile(h.i.n, h.flags&^unix.O_TRUNC, false)
		if err != nil {
			if h.file == nil {
				return err
			}
		} else {
			if h.file != nil {
				h.file.Close()
			}
			h.file = n
		}
	}
	return f(h.file.FD())
}
