package fusesrv

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

type buffers struct{ in, out []byte }

func newBuffers(maxWrite int) *buffers {
	return &buffers{in: make([]byte, maxWrite+4096), out: make([]byte, maxWrite+4096)}
}

// read reads one request, parked in the poller while there is none.
func (s *Server) read(buf []byte) (n int, err error) {
	for {
		cerr := s.raw.Read(func(fd uintptr) bool {
			n, err = sys.ReadNow(int(fd), buf)
			return err != unix.EAGAIN
		})
		if cerr != nil && !errors.Is(cerr, os.ErrClosed) {
			// The poller has an error of its own for a connection that has
			// ended (EPOLLERR, fuse_dev_poll); the device says so better.
			if n, err = sys.ReadNow(s.fd, buf); err != unix.EAGAIN {
				cerr = nil
			}
		}
		if cerr != nil {
			return 0, cerr
		}
		if err == unix.EINTR || err == unix.ENOENT {
			continue // ENOENT: the request was interrupted away
		}
		return n, err
	}
}

// A reader reads requests and serves them itself. If one turns out to be slow,
// another reader takes its place meanwhile, and the surplus one ends.
type reader struct {
	s *Server
	// seq is odd while a request is served.
	seq atomic.Uint64
	// away: this one does not count as a reader.
	away atomic.Bool

	mu    sync.Mutex
	ended bool // guarded by mu: it makes no reader any more
}

// readers are those of a server, and the watch over them. A timer of its own
// for each request would wake another thread of the runtime each time.
type readers struct {
	n        atomic.Int32 // that are not away
	watching atomic.Bool
	mu       sync.Mutex
	all      map[*reader]uint64 // seq when last looked at; guarded by mu
}

func (s *Server) addReader() {
	r := &reader{s: s}
	s.readers.n.Add(1)
	s.wg.Add(1)
	s.readers.mu.Lock()
	if s.readers.all == nil {
		s.readers.all = map[*reader]uint64{}
	}
	s.readers.all[r] = 0
	s.readers.mu.Unlock()
	go r.run()
}

// leave lets another reader take r's place. The last to end lets the
// descriptor be closed, so one that ended makes no other.
func (r *reader) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended && r.away.CompareAndSwap(false, true) {
		r.s.readers.n.Add(-1)
		r.s.addReader()
	}
}

func (r *reader) end() {
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	r.s.readers.mu.Lock()
	delete(r.s.readers.all, r)
	r.s.readers.mu.Unlock()
	r.s.wg.Done()
}

func (r *reader) run() {
	defer r.end()
	s := r.s
	b := newBuffers(s.maxWrite)
	in, out := [][]byte{nil}, [][]byte{b.out}
	for {
		n, err := s.read(b.in)
		if err != nil {
			if !errors.Is(err, unix.ENODEV) && !errors.Is(err, os.ErrClosed) {
				s.log.Error("read request", "err", err)
			}
			return
		}
		s.requests.Add(1)
		r.seq.Add(1)
		if n >= 40 && certainlySlow(b.in) {
			r.leave()
		} else if !s.readers.watching.Load() && s.readers.watching.CompareAndSwap(false, true) {
			go s.watchReaders()
		}
		k, quick := s.quick(b.in[:n], b.out)
		if !quick {
			in[0] = b.in[:n]
			k, _ = s.ps.HandleRequest(in, out)
		}
		if k > 0 {
			if _, err := sys.WriteNow(s.fd, b.out[:k]); err != nil && err != unix.ENOENT && err != unix.ENODEV {
				s.log.Error("write reply", "err", err, "opcode", binary.NativeEndian.Uint32(b.in[4:]))
			}
		}
		r.seq.Add(1)
		if r.away.Load() {
			// Somebody else reads now. Go on only if that one went away, too.
			if s.readers.n.Add(1) > s.want {
				s.readers.n.Add(-1)
				return
			}
			r.away.Store(false)
		}
	}
}

// watchReaders looks for slow requests as long as there are any requests.
func (s *Server) watchReaders() {
	idle := 0
	for {
		time.Sleep(slowAfter)
		if s.lookAtReaders() {
			idle = 0
			continue
		}
		if idle++; idle < 50 {
			continue
		}
		s.readers.watching.Store(false)
		// A request that came in between relied on this watch.
		if !s.lookAtReaders() || !s.readers.watching.CompareAndSwap(false, true) {
			return
		}
		idle = 0
	}
}

// lookAtReaders replaces readers that are at the request they were at before,
// and reports whether any did something since.
func (s *Server) lookAtReaders() (active bool) {
	var slow []*reader
	s.readers.mu.Lock()
	for r, before := range s.readers.all {
		now := r.seq.Load()
		if now != before {
			s.readers.all[r] = now
			active = true
		} else if now%2 == 1 && !r.away.Load() {
			slow = append(slow, r)
			active = true
		}
	}
	s.readers.mu.Unlock()
	for _, r := range slow {
		r.leave()
	}
	return active
}

// Opcodes of fuse.h that matter to the loop.
const (
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opFsync         = 20
	opFsyncdir      = 30
	opSetlkw        = 33
	opFallocate     = 43
	opCopyFileRange = 47
)

// certainlySlow reports whether a request moves data or waits for a disk.
func certainlySlow(req []byte) bool {
	switch binary.NativeEndian.Uint32(req[4:]) {
	case opFsync, opFsyncdir, opSetlkw, opFallocate, opCopyFileRange:
		return true
	case opRead, opWrite:
		return len(req) > 0 && binary.NativeEndian.Uint32(req[40+16:]) > 64<<10
	}
	return false
}
