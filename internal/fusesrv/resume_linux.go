package fusesrv

import (
	"encoding/binary"
	"errors"
	"os"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
)

// ErrNoResend says that the kernel cannot give requests again that a killed
// server had read (Linux before 6.9), so that their callers would wait for
// ever: the connection has to be aborted.
var ErrNoResend = errors.New("the kernel does not send requests again")

// notifyResend is FUSE_NOTIFY_RESEND; what is sent again has uniqueResend in
// its number (linux/fuse.h 7.40, Linux 6.9).
const (
	notifyResend = 7
	uniqueResend = 1 << 63
)

func resent(h *fuse.InHeader) bool { return h.Unique&uniqueResend != 0 }

// again is for requests that fail if they were done already.
func again(h *fuse.InHeader, err error, done unix.Errno) error {
	if err == done && resent(h) { //nolint:errorlint // the engine returns bare errno values
		return nil
	}
	return err
}

// Resume goes on with a connection whose server was killed, with the State it
// left, in cfg, and the files that were given to Keep. It takes over fd and
// the files. Clients see nothing but the time it takes: some microseconds for
// each inode the kernel knows. An inode that is no longer where it was, since
// somebody changed the branches meanwhile, is answered with ESTALE, which
// makes the kernel look names up again.
func Resume(cfg Config, fd int, kept map[uint64]*os.File) (*Server, error) {
	s := newServer(cfg)
	if err := s.connect(fd); err != nil {
		return nil, err
	}
	s.restore(kept)
	err := s.loadInit()
	if err == nil {
		err = s.resend()
	}
	if err != nil {
		s.finish()
		return nil, err
	}
	s.start()
	if cfg.UDBA != None {
		// What happened to the branches meanwhile was seen by nobody, and
		// directories are watched when they are looked at.
		s.pushLost()
	}
	return s, nil
}

func (s *Server) resend() error {
	var b [16]byte
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	_, err := unix.Write(s.fd, b[:])
	switch err {
	case nil, unix.ENODEV: // the mount is gone; the readers will see
		return nil
	case unix.EINVAL:
		return ErrNoResend
	}
	return &os.PathError{Op: "write RESEND", Path: "/dev/fuse", Err: err}
}

// saveInit keeps the INIT request and what was agreed on.
func (s *Server) saveInit(in []byte) {
	var flags [8]byte
	binary.NativeEndian.PutUint64(flags[:], s.flags)
	s.state.put(kindInit, 0, 0, flags[:], string(in))
}

// loadInit gives the protocol server the INIT request of the first process
// again, cut down to what was agreed on then: this may be another version.
func (s *Server) loadInit() error {
	_, b, ok := s.state.get(kindInit, 0)
	const initExt = 1 << 30 // there is a second word of flags
	if !ok || len(b) < 8+64 {
		return errors.New("no state of the connection")
	}
	agreed, in := binary.NativeEndian.Uint64(b), b[8:]
	for k, bits := range []uint32{uint32(agreed) | initExt, uint32(agreed >> 32)} {
		at := in[52+4*k:]
		binary.NativeEndian.PutUint32(at, binary.NativeEndian.Uint32(at)&bits)
	}
	_, err := s.agree(in, newBuffers(s.maxWrite).out)
	return err
}

// A saved is the payload of an inode's record.
type saved struct {
	parent, ino uint64
	dev, branch uint64 // inode on the branch; of non-directories
	typ         uint32
	old         bool // not what its name leads to: another id has taken over
	name        string
}

const savedHead = 40

// save keeps where i is. s.mu is held, by all that save.
func (s *Server) save(i *inode, dir uint64, name string) {
	if s.state == nil || i.id == fuse.FUSE_ROOT_ID {
		return
	}
	var b [savedHead]byte
	binary.NativeEndian.PutUint64(b[0:], dir)
	binary.NativeEndian.PutUint64(b[8:], i.n.Ino())
	dev, ino := i.n.Inode()
	binary.NativeEndian.PutUint64(b[16:], dev)
	binary.NativeEndian.PutUint64(b[24:], ino)
	binary.NativeEndian.PutUint32(b[32:], i.n.Type())
	if s.byNode[i.n] != i {
		b[36] = 1
	}
	s.state.put(kindInode, i.id, i.nlookup, b[:], name)
}

func loadInode(b []byte) (v saved, ok bool) {
	if len(b) < savedHead {
		return v, false
	}
	return saved{
		parent: binary.NativeEndian.Uint64(b[0:]), ino: binary.NativeEndian.Uint64(b[8:]),
		dev: binary.NativeEndian.Uint64(b[16:]), branch: binary.NativeEndian.Uint64(b[24:]),
		typ: binary.NativeEndian.Uint32(b[32:]), old: b[36] != 0, name: string(b[savedHead:]),
	}, true
}

// saveAgain keeps where i is now.
func (s *Server) saveAgain(i *inode) {
	if s.state == nil {
		return
	}
	dir, name, ok := i.n.Place(func(d *unionfs.Node) bool { return s.byNode[d] != nil })
	if !ok {
		s.save(i, 0, "")
		return
	}
	s.save(i, s.byNode[dir].id, name)
}

// saveNode is saveAgain for all ids of a node.
func (s *Server) saveNode(n *unionfs.Node) {
	if s.state == nil || n == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.byNode[n]; i != nil {
		s.saveAgain(i)
	}
	for _, i := range s.old[n] {
		s.saveAgain(i)
	}
}

// CopiedUp is for unionfs.Config.
func (s *Server) CopiedUp(n *unionfs.Node) { s.saveNode(n) }

// unsave forgets an inode.
func (s *Server) unsave(i *inode) {
	if s.state == nil {
		return
	}
	s.state.del(kindInode, i.id)
	if i.kept {
		i.kept = false
		s.cfg.Unkeep(i.id)
	}
	list := s.old[i.n]
	for k, o := range list {
		if o == i {
			list = append(list[:k:k], list[k+1:]...)
			break
		}
	}
	if len(list) == 0 {
		delete(s.old, i.n)
	} else {
		s.old[i.n] = list
	}
}

func (s *Server) saveHandle(fh uint64, h *handle) {
	if s.state == nil {
		return
	}
	var b [16]byte
	binary.NativeEndian.PutUint64(b[0:], h.i.id)
	binary.NativeEndian.PutUint32(b[8:], uint32(h.flags))
	if h.pass {
		b[12] = 1
	}
	s.state.put(kindHandle, fh, 0, b[:], "")
}

// saveBacking keeps i.back. i.mu is held.
func (s *Server) saveBacking(i *inode) {
	if s.state == nil {
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(i.back.file.FD(), &st); err != nil {
		s.log.Warn("fstat backing", "err", err)
	}
	var b [24]byte
	binary.NativeEndian.PutUint64(b[0:], i.id)
	binary.NativeEndian.PutUint64(b[8:], uint64(st.Dev))
	binary.NativeEndian.PutUint64(b[16:], st.Ino)
	s.state.put(kindBacking, uint64(i.back.id), s.backOrder.Add(1), b[:], "")
}

// keep hands over a file that has no name, or is about to lose it.
func (s *Server) keep(i *inode, fd int) {
	if s.state == nil {
		return
	}
	s.mu.Lock()
	if s.keeping == nil {
		s.keeping = map[*inode]int{}
	}
	s.keeping[i]++ // so that KeepAgain knows
	s.mu.Unlock()
	err := s.cfg.Keep(i.id, fd)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keeping[i]--; s.keeping[i] == 0 {
		delete(s.keeping, i)
	}
	if err != nil {
		s.log.Warn("keep open file", "err", err)
		return
	}
	if s.ids[i.id] == i {
		i.kept = true
	} else {
		s.cfg.Unkeep(i.id)
	}
}

// KeepAgain gives all files to Config.Keep that it was given, since it has lost
// them.
func (s *Server) KeepAgain() {
	s.mu.Lock()
	var open []*inode
	for _, i := range s.ids {
		if i.kept || s.keeping[i] > 0 {
			open = append(open, i)
		}
	}
	s.mu.Unlock()
	for _, i := range open {
		f, err := s.fs.OpenFile(i.n, unix.O_RDONLY, false)
		if err != nil {
			// It may have been closed, or be about to get its content.
			s.log.Info("keep again", "node", i.id, "err", err)
			continue
		}
		s.keep(i, f.FD())
		f.Close()
	}
}

// losing is called before a name goes, and the function it returns after that:
// files that are open go on without a name.
func (s *Server) losing(dir *unionfs.Node, name string) func() {
	if s.state == nil {
		return func() {}
	}
	// The kernel has the name's inode, so the node stays what it is.
	n := dir.Child(name)
	if n == nil || n.IsDir() {
		return func() { s.saveNode(n) }
	}
	s.mu.Lock()
	var open []*inode
	for _, i := range append([]*inode{s.byNode[n]}, s.old[n]...) {
		if i != nil && i.handles > 0 && !i.kept {
			open = append(open, i)
		}
	}
	s.mu.Unlock()
	for _, i := range open {
		if f, err := s.fs.OpenFile(i.n, unix.O_RDONLY, false); err == nil {
			s.keep(i, f.FD())
			f.Close()
		}
	}
	return func() {
		s.saveNode(n)
		if n.Dead() {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, i := range open {
			if i.kept {
				i.kept = false
				s.cfg.Unkeep(i.id)
			}
		}
	}
}

// rename renames, and knows what it did if it has to do it again.
func (s *Server) rename(in *fuse.RenameIn, from *unionfs.Node, name string, to *unionfs.Node, newName string) error {
	moved, over := from.Child(name), to.Child(newName)
	done := func() {}
	if in.Flags&unix.RENAME_EXCHANGE == 0 && over != moved {
		done = s.losing(to, newName)
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 && s.state != nil {
		if resent(&in.InHeader) && s.exchanged(in, from, name) {
			return nil
		}
		s.exchanging(in, from, name)
		defer s.state.del(kindExchange, in.Unique&^uniqueResend)
	}
	err := again(&in.InHeader, s.fs.Rename(from, name, to, newName, in.Flags), unix.ENOENT)
	s.saveNode(moved)
	if over != nil && over != moved {
		s.saveNode(over)
	}
	done()
	return err
}

// exchanging keeps which inode a name has before it is exchanged: the one
// request that would be undone if it were done twice.
func (s *Server) exchanging(in *fuse.RenameIn, dir *unionfs.Node, name string) {
	if ino, ok := s.inoOf(dir, name); ok {
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], ino)
		s.state.put(kindExchange, in.Unique&^uniqueResend, 0, b[:], "")
	}
}

// exchanged reports whether the name has another inode than it had.
func (s *Server) exchanged(in *fuse.RenameIn, dir *unionfs.Node, name string) bool {
	_, b, ok := s.state.get(kindExchange, in.Unique&^uniqueResend)
	if !ok || len(b) != 8 {
		return false
	}
	s.state.del(kindExchange, in.Unique&^uniqueResend)
	ino, ok := s.inoOf(dir, name)
	return ok && ino != binary.NativeEndian.Uint64(b)
}

func (s *Server) inoOf(dir *unionfs.Node, name string) (uint64, bool) {
	var st unix.Stat_t
	n, err := s.fs.Lookup(dir, name, &st)
	if err != nil {
		return 0, false
	}
	s.fs.Forget(n, 1)
	return st.Ino, true
}

// restore makes inodes and open files of the state.
func (s *Server) restore(kept map[uint64]*os.File) {
	r := &restorer{s: s, kept: kept, todo: map[uint64]saved{}, count: map[uint64]uint64{}}
	s.state.each(kindInode, func(id, count uint64, b []byte) {
		if v, ok := loadInode(b); ok {
			r.todo[id], r.count[id] = v, count
		}
		s.nextID = max(s.nextID, id)
	})
	for id := range r.todo {
		r.inode(id)
	}
	// First what is open: nobody else may have a backing closed.
	s.state.each(kindHandle, r.handle)
	s.state.each(kindBacking, r.backing)
	for id, f := range kept {
		f.Close()
		if i := s.ids[id]; i != nil {
			i.kept = true
		} else {
			s.cfg.Unkeep(id)
		}
	}
}

type restorer struct {
	s     *Server
	kept  map[uint64]*os.File
	todo  map[uint64]saved
	count map[uint64]uint64
	order map[*inode]uint64 // of the backing it has
}

// inode restores one and those above it; nil if it is not to be found.
func (r *restorer) inode(id uint64) *inode {
	s := r.s
	if i := s.ids[id]; i != nil {
		return i
	}
	v, ok := r.todo[id]
	if !ok {
		return nil
	}
	delete(r.todo, id) // also against a circle of parents
	n := r.find(id, v)
	if n == nil {
		s.state.del(kindInode, id)
		return nil
	}
	i := &inode{id: id, n: n, nlookup: r.count[id]}
	s.ids[id] = i
	if v.old || s.byNode[n] != nil {
		s.old[n] = append(s.old[n], i)
	} else {
		s.byNode[n] = i
	}
	return i
}

func (r *restorer) find(id uint64, v saved) *unionfs.Node {
	s := r.s
	if p := r.inode(v.parent); p != nil {
		var st unix.Stat_t
		n, err := s.fs.Lookup(p.n, v.name, &st)
		if err == nil {
			dev, ino := n.Inode()
			if n.Type() == v.typ && (n.IsDir() || dev == v.dev && ino == v.branch) {
				s.fs.KeepIno(n, v.ino)
				return n
			}
			s.fs.Forget(n, 1)
		}
	}
	f := r.kept[id]
	if f == nil {
		return nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	n, err := s.fs.Adopt(fd, v.ino)
	if err != nil {
		unix.Close(fd)
		return nil
	}
	return n
}

// backing restores the file that is registered for an inode. One that nobody
// can use any more is closed.
func (r *restorer) backing(id, order uint64, b []byte) {
	s := r.s
	s.backOrder.Store(max(s.backOrder.Load(), order))
	if len(b) < 24 {
		return
	}
	back := &backing{id: int32(id)}
	i := s.ids[binary.NativeEndian.Uint64(b)]
	if i == nil || r.order[i] > order {
		s.closeBacking(back)
		return
	}
	if dev, ino := i.n.Inode(); dev == binary.NativeEndian.Uint64(b[8:]) && ino == binary.NativeEndian.Uint64(b[16:]) {
		if f, err := s.fs.OpenFile(i.n, unix.O_RDONLY, false); err == nil {
			back.file = f
		}
	}
	s.giveUp(i.back)
	i.back, i.used = back, true
	if r.order == nil {
		r.order = map[*inode]uint64{}
	}
	r.order[i] = order
	s.backings(i)
}

// handle restores an open file. One that cannot be opened any more is opened
// when it is used; until then it is open for passthrough all the same.
func (r *restorer) handle(fh, _ uint64, b []byte) {
	s := r.s
	s.nextFH = max(s.nextFH, fh)
	if len(b) < 16 {
		return
	}
	i := s.ids[binary.NativeEndian.Uint64(b)]
	if i == nil {
		s.state.del(kindHandle, fh)
		return
	}
	const once = unix.O_TRUNC | unix.O_CREAT | unix.O_EXCL
	h := &handle{s: s, i: i, flags: int(binary.NativeEndian.Uint32(b[8:])) &^ once, pass: b[12] != 0}
	if !h.pass || h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		if f, err := s.fs.OpenFile(i.n, h.flags, false); err == nil {
			h.file = f
		} else {
			s.log.Warn("open again", "node", i.id, "err", err)
		}
	}
	if h.pass {
		i.open++
	}
	i.handles++
	s.handles[fh] = h
}
