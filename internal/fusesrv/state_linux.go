package fusesrv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A State is what a server knows and the protocol cannot rebuild: which file
// a node id stands for, which files are open, which are registered for
// passthrough. It lies in a memfd that outlives the process, so a change costs
// a few stores and no system call, and a process may be killed between any two
// of them.
//
// The file begins with seven letters and the version of what follows: a row of
// records. A record counts if its checksum is right, and of two with the same key
// the later one does:
//
//	0   length of the record, a multiple of 8; 0 ends the row
//	4   checksum of what follows, without the counter
//	8   counter, changed in place
//	16  number
//	24  kind, 0 for a record that was deleted: outside of the checksum
//	25  length of the padding
//	32  payload
type State struct {
	mu       sync.Mutex
	f        *os.File
	m        []byte
	end      int              // of the records, which begin at stateHead
	live     int              // bytes of those that count
	at       map[stateKey]int // where they are
	err      error            // why the state is not kept any more
	replaced func(*os.File) error
	failed   func(error)
}

type stateKey struct {
	kind byte
	num  uint64
}

// Kinds of records.
const (
	kindMeta     = 'm' // one blob of whoever serves
	kindInit     = 'i' // the INIT request and what was agreed on
	kindInode    = 'n' // by node id; the counter is nlookup
	kindHandle   = 'h' // by file handle
	kindBacking  = 'b' // by backing id; the counter is their order
	kindExchange = 'x' // by request: which inode a name had
)

const (
	recordHead = 32
	stateMin   = 16 << 10

	stateMagic = "layerfs"
	stateHead  = len(stateMagic) + 1
	// stateVersion is that of the layout, and of what records have. It is
	// raised when an earlier program would misread them.
	stateVersion = 1
)

// ErrLaterState says that a later version of this package made a state, which
// this one must leave alone.
var ErrLaterState = errors.New("the state of the mount is of a later version than this program knows")

// NewState makes an empty state.
func NewState() (*State, error) {
	s := &State{at: map[stateKey]int{}, end: stateHead}
	f, m, err := stateFile(stateMin)
	s.f, s.m = f, m
	return s, err
}

func stateFile(size int) (*os.File, []byte, error) {
	fd, err := unix.MemfdCreate("layerfs-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "layerfs-state")
	// All of it now: without memory, a store into the mapping would be the end.
	if err := unix.Fallocate(fd, 0, 0, int64(size)); err != nil {
		f.Close()
		return nil, nil, os.NewSyscallError("fallocate memfd", err)
	}
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		f.Close()
		return nil, nil, os.NewSyscallError("mmap memfd", err)
	}
	m[copy(m, stateMagic)] = stateVersion
	return f, m, nil
}

// OpenState reads the state another process left in f, which it takes over. The
// error may be ErrLaterState.
func OpenState(f *os.File) (_ *State, err error) {
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() < int64(stateHead+recordHead) || fi.Size() > 1<<32 {
		return nil, fmt.Errorf("a state of %d bytes", fi.Size())
	}
	s := &State{f: f, at: map[stateKey]int{}, end: stateHead}
	if s.m, err = unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, os.NewSyscallError("mmap memfd", err)
	}
	if !strings.HasPrefix(string(s.m[:stateHead]), stateMagic) {
		err = errors.New("no state of a mount")
	} else if v := s.m[stateHead-1]; v > stateVersion {
		err = fmt.Errorf("%w: %d, and this is %d", ErrLaterState, v, stateVersion)
	}
	if err != nil {
		_ = unix.Munmap(s.m)
		return nil, err
	}
	s.scan()
	return s, nil
}

// scan finds the records that count. What was being written last may be
// anything.
func (s *State) scan() {
	for s.end+recordHead <= len(s.m) {
		r := s.m[s.end:]
		n := int(binary.NativeEndian.Uint32(r))
		if n < recordHead || n%8 != 0 || n > len(r) {
			return
		}
		r = r[:n]
		if sum(r) != binary.NativeEndian.Uint32(r[4:]) || int(r[25]) > n-recordHead {
			return
		}
		if kind := r[24]; kind != 0 {
			k := stateKey{kind, binary.NativeEndian.Uint64(r[16:])}
			if old, ok := s.at[k]; ok {
				s.kill(old)
			}
			s.at[k] = s.end
			s.live += n
		}
		s.end += n
	}
}

func sum(r []byte) uint32 {
	c := crc32.ChecksumIEEE(r[16:24])
	return crc32.Update(c, crc32.IEEETable, r[25:])
}

// OnReplace calls f with the file that is to be kept instead of the present
// one, when that has become full.
func (s *State) OnReplace(f func(*os.File) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replaced = f
}

// OnFail calls f, once and soon, with the reason why the state is not kept any
// more: what is served goes on, but not in another process. f must not use the
// state.
func (s *State) OnFail(f func(error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = f
	if s.err != nil {
		f(s.err)
	}
}

// Hand calls f with the memfd, which is not replaced meanwhile.
func (s *State) Hand(f func(*os.File) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return f(s.f)
}

// Err returns why the state stopped being kept, or nil.
func (s *State) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// SetMeta keeps a blob for whoever serves.
func (s *State) SetMeta(b []byte) error {
	s.put(kindMeta, 0, 0, b, "")
	return s.Err()
}

// Meta returns the blob.
func (s *State) Meta() []byte {
	_, b, _ := s.get(kindMeta, 0)
	return b
}

func (s *State) get(kind byte, num uint64) (count uint64, payload []byte, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.at[stateKey{kind, num}]
	if !ok {
		return 0, nil, false
	}
	count, payload = s.record(at)
	return count, payload, true
}

func (s *State) record(at int) (count uint64, payload []byte) {
	r := s.m[at:]
	r = r[:binary.NativeEndian.Uint32(r)]
	return binary.NativeEndian.Uint64(r[8:]), append([]byte(nil), r[recordHead:len(r)-int(r[25])]...)
}

// each calls f with the records of a kind.
func (s *State) each(kind byte, f func(num, count uint64, payload []byte)) {
	s.mu.Lock()
	at := map[uint64]int{}
	for k, v := range s.at {
		if k.kind == kind {
			at[k.num] = v
		}
	}
	s.mu.Unlock()
	for num, off := range at {
		count, payload := s.record(off)
		f(num, count, payload)
	}
}

// put makes or replaces a record, whose payload is head and tail.
func (s *State) put(kind byte, num, count uint64, head []byte, tail string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	size := len(head) + len(tail)
	pad := -size & 7
	n := recordHead + size + pad
	if s.end+n > len(s.m) {
		if err := s.grow(n); err != nil {
			s.fail(err)
			return
		}
	}
	r := s.m[s.end : s.end+n]
	binary.NativeEndian.PutUint64(r[8:], count)
	binary.NativeEndian.PutUint64(r[16:], num)
	r[24], r[25] = kind, byte(pad)
	rest := r[recordHead:]
	rest = rest[copy(rest, head):]
	clear(rest[copy(rest, tail):])
	binary.NativeEndian.PutUint32(r[4:], sum(r))
	binary.NativeEndian.PutUint32(r, uint32(n))
	k := stateKey{kind, num}
	if old, ok := s.at[k]; ok {
		s.kill(old)
	}
	s.at[k] = s.end
	s.end += n
	s.live += n
}

func (s *State) kill(at int) {
	s.m[at+24] = 0
	s.live -= int(binary.NativeEndian.Uint32(s.m[at:]))
}

// count changes the counter of a record.
func (s *State) count(kind byte, num, count uint64) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.at[stateKey{kind, num}]; ok {
		binary.NativeEndian.PutUint64(s.m[at+8:], count)
	}
}

// del deletes a record.
func (s *State) del(kind byte, num uint64) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := stateKey{kind, num}
	if at, ok := s.at[k]; ok {
		s.kill(at)
		delete(s.at, k)
	}
}

// grow puts the records that count into another file with room for more.
func (s *State) grow(room int) error {
	size := stateMin
	for size < 2*(stateHead+s.live+room) {
		size *= 2
	}
	if size > 1<<32 {
		return fmt.Errorf("more state than %d bytes", 1<<32)
	}
	f, m, err := stateFile(size)
	if err != nil {
		return err
	}
	end := stateHead
	at := make(map[stateKey]int, len(s.at))
	for k, off := range s.at {
		n := int(binary.NativeEndian.Uint32(s.m[off:]))
		copy(m[end:], s.m[off:off+n])
		at[k] = end
		end += n
	}
	if s.replaced != nil {
		if err := s.replaced(f); err != nil {
			_ = unix.Munmap(m)
			f.Close()
			return err
		}
	}
	_ = unix.Munmap(s.m)
	s.f.Close()
	s.f, s.m, s.at, s.end, s.live = f, m, at, end, end-stateHead
	return nil
}

// fail makes the state say that it is none.
func (s *State) fail(err error) {
	s.err = err
	s.at, s.end, s.live = map[stateKey]int{}, stateHead, 0
	clear(s.m[stateHead : stateHead+recordHead])
	if s.failed != nil {
		s.failed(err)
	}
}

// Close releases the memory.
func (s *State) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		return nil
	}
	err := unix.Munmap(s.m)
	s.m, s.at, s.err = nil, nil, os.ErrClosed
	if cerr := s.f.Close(); err == nil {
		err = cerr
	}
	return err
}
