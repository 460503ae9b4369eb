package fusesrv

import (
	"context"
	"encoding/binary"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/internal/watch"
)

// Codes and versions of notifications, linux/fuse.h.
const (
	notifyInvalInode = 2
	notifyInvalEntry = 3
	notifyIncEpoch   = 8
	protoEpoch       = 44 // 7.44, Linux 6.16
	expireOnly       = 1
)

// A Watch joins an engine to a hub: the engine says what it looked at, the
// server hears what happened there.
type Watch struct {
	hub *watch.Hub

	mu     sync.Mutex
	client *watch.Client
	s      *Server
}

// NewWatch returns a Watch to open an engine with.
func NewWatch(hub *watch.Hub) *Watch {
	w := &Watch{hub: hub}
	w.client = hub.Client(w)
	return w
}

// Add watches a branch directory.
func (w *Watch) Add(dir *unionfs.Node, fd int) error { return w.client.Add(dir, fd) }

// Remove ends the watches of dir.
func (w *Watch) Remove(dir *unionfs.Node) { w.client.Remove(dir) }

// Event queues an event.
func (w *Watch) Event(e watch.Event) {
	w.mu.Lock()
	s := w.s
	w.mu.Unlock()
	if s != nil {
		s.push(e)
	}
}

// Lost queues an overflow.
func (w *Watch) Lost() {
	w.mu.Lock()
	s := w.s
	w.mu.Unlock()
	if s != nil {
		s.pushLost()
	}
}

func (w *Watch) start(s *Server) {
	w.mu.Lock()
	w.s = s
	w.mu.Unlock()
}

func (w *Watch) stop() {
	w.mu.Lock()
	w.s = nil
	w.mu.Unlock()
	w.client.Close()
}

// Close ends a Watch that was never served.
func (w *Watch) Close() { w.client.Close() }

func (s *Server) push(e watch.Event) {
	s.qmu.Lock()
	defer s.qmu.Unlock()
	if s.closing || s.lost {
		return
	}
	if n := len(s.queue); n > 0 && s.queue[n-1] == e {
		return
	}
	if len(s.queue) > 1<<16 {
		// The kernel takes notifications more slowly than the branch changes.
		s.queue, s.lost = nil, true
		s.lostCount.Add(1)
	} else {
		s.queue = append(s.queue, e)
	}
	s.runQueue()
}

func (s *Server) pushLost() {
	s.qmu.Lock()
	defer s.qmu.Unlock()
	s.lostCount.Add(1)
	if s.closing {
		return
	}
	s.queue, s.lost = nil, true
	s.runQueue()
}

func (s *Server) runQueue() {
	if !s.qrun {
		s.qrun = true
		go s.drain()
	}
}

// drain tells the kernel what changed. It may wait for locks that clients of
// the mount hold while their requests are served.
func (s *Server) drain() {
	for {
		s.qmu.Lock()
		q, lost := s.queue, s.lost
		s.queue, s.lost = nil, false
		if len(q) == 0 && !lost {
			s.qrun = false
			for _, c := range s.qwait {
				close(c)
			}
			s.qwait = nil
			s.qmu.Unlock()
			return
		}
		s.qmu.Unlock()
		if lost {
			s.fs.ChangedAll()
			s.InvalidateAll()
			continue
		}
		for _, e := range q {
			s.changed(e)
		}
	}
}

func (s *Server) changed(e watch.Event) {
	dir, ok := e.Token.(*unionfs.Node)
	if !ok {
		return
	}
	c := s.fs.Changed(dir, e.Name)
	s.mu.Lock()
	var dirID, childID uint64
	if i := s.byNode[dir]; i != nil {
		dirID = i.id
	}
	if i := s.byNode[c.Child]; c.Child != nil && i != nil {
		childID = i.id
	}
	s.mu.Unlock()
	s.invalidated.Add(1)
	// A name with a meaning of its own does not show, what it stands for
	// comes or goes.
	names := e.Names || c.Name != e.Name
	switch {
	case c.Name == "":
		if dirID != 0 {
			s.invalInode(dirID, -1)
		}
	case names:
		if childID != 0 {
			s.invalInode(childID, -1)
		}
		if dirID != 0 {
			s.invalEntry(dirID, c.Name)
			s.invalInode(dirID, 0) // the kernel's listing
		}
	case childID != 0:
		s.invalInode(childID, 0)
	}
	if c.Merged {
		// A directory that stays got or lost a tree below it, in which the
		// kernel may remember names we never heard of.
		s.InvalidateAll()
	}
}

// Sync returns when every change of a branch made before the call shows.
func (s *Server) Sync(ctx context.Context) error {
	w := s.cfg.Watch
	if w == nil {
		s.fs.ChangedAll()
		s.InvalidateAll()
		return nil
	}
	if err := w.hub.Barrier(ctx); err != nil {
		return err
	}
	s.qmu.Lock()
	if !s.qrun {
		s.qmu.Unlock()
		return nil
	}
	c := make(chan struct{})
	s.qwait = append(s.qwait, c)
	s.qmu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// InvalidateAll makes the kernel ask for everything again.
func (s *Server) InvalidateAll() {
	if s.minor >= protoEpoch {
		s.notify(notifyIncEpoch, nil)
	}
	type entry struct {
		dir  *unionfs.Node
		name string
	}
	var names []entry
	if s.minor < protoEpoch {
		s.fs.EachName(func(dir *unionfs.Node, name string, _ *unionfs.Node) { names = append(names, entry{dir, name}) })
	}
	s.mu.Lock()
	ids := make([]uint64, 0, len(s.ids))
	for id := range s.ids {
		ids = append(ids, id)
	}
	dirs := make(map[*unionfs.Node]uint64, len(s.byNode))
	for n, i := range s.byNode {
		dirs[n] = i.id
	}
	s.mu.Unlock()
	for _, e := range names {
		if id := dirs[e.dir]; id != 0 {
			s.invalEntry(id, e.name)
		}
	}
	for _, id := range ids {
		s.invalInode(id, 0)
	}
}

// invalInode drops attributes, and from off on content or a listing; nothing
// but attributes if off is negative.
func (s *Server) invalInode(id uint64, off int64) {
	var b [24]byte
	binary.NativeEndian.PutUint64(b[0:], id)
	binary.NativeEndian.PutUint64(b[8:], uint64(off))
	s.notify(notifyInvalInode, b[:])
}

// invalEntry makes the kernel look name up again. Where it can (Linux 6.2),
// the entry only expires, so that a directory in use stays where it is if the
// lookup finds it again.
func (s *Server) invalEntry(dir uint64, name string) {
	b := make([]byte, 16+len(name)+1)
	binary.NativeEndian.PutUint64(b[0:], dir)
	binary.NativeEndian.PutUint32(b[8:], uint32(len(name)))
	if s.flags&fuse.CAP_HAS_EXPIRE_ONLY != 0 {
		binary.NativeEndian.PutUint32(b[12:], expireOnly)
	}
	copy(b[16:], name)
	s.notify(notifyInvalEntry, b)
}

// notify sends an unasked message: struct fuse_out_header with the code as
// error and no unique number.
func (s *Server) notify(code uint32, body []byte) {
	b := make([]byte, 16+len(body))
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], code)
	copy(b[16:], body)
	if _, err := unix.Write(s.fd, b); err != nil && err != unix.ENOENT && err != unix.ENODEV {
		s.log.Warn("notify", "code", code, "err", err)
	}
}
