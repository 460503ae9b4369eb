package fusesrv

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/internal/watch"
)

// UDBA is how direct changes of the branches are noticed.
type UDBA int

// The modes.
const (
	Notify UDBA = iota // inotify, long timeouts
	None               // not at all
	Reval              // timeouts of a second
	Strict             // whatever is not on a writable branch is asked for each time
)

// Config is what Mount needs.
type Config struct {
	FS            *unionfs.FS
	Target        string
	UDBA          UDBA
	Watch         *Watch // for Notify; what the FS was opened with
	ReadOnly      bool
	NoPassthrough bool
	NoXattr       bool
	Private       bool // only the mounting user may enter (no allow_other)
	NoSuid, NoDev bool
	NoExec        bool
	Source        string // first field in mountinfo; "" = "union"
	Logger        *slog.Logger

	// State, if not nil, is kept so that another process can Resume.
	State *State
	// Keep gives an open file that has lost its names to whoever keeps the
	// state, by node id; Unkeep takes it back. Both are nil without State.
	Keep   func(id uint64, fd int) error
	Unkeep func(id uint64)
}

// Stats describe a mount.
type Stats struct {
	Requests    int64
	Nodes       int
	Handles     int
	Backings    int
	Passthrough bool
	Invalidated int64
	Lost        int64 // overflows of the event queue
}

// A Server serves one mount.
type Server struct {
	fuse.RawFileSystem
	cfg   Config
	fs    *unionfs.FS
	log   *slog.Logger
	ps    *fuse.ProtocolServer
	f     *os.File
	fd    int
	raw   syscall.RawConn // of f
	minor uint32          // of the protocol
	flags uint64          // negotiated

	maxWrite int
	want     int32
	readers  readers
	wg       sync.WaitGroup
	done     chan struct{}

	mu      sync.Mutex
	ids     map[uint64]*inode
	byNode  map[*unionfs.Node]*inode
	nextID  uint64
	handles map[uint64]*handle
	nextFH  uint64
	backed  []*inode // ring of inodes with a backing, for eviction
	nBacked int
	old     map[*unionfs.Node][]*inode // ids that gave way to another; with a state

	state     *State
	backOrder atomic.Uint64

	noPass atomic.Bool

	qmu     sync.Mutex
	queue   []watch.Event
	lost    bool
	qrun    bool
	qwait   []chan struct{}
	closing bool

	requests, invalidated, lostCount atomic.Int64

	keeping map[*inode]int // calls of Config.Keep; guarded by mu

	// What Alive saw last.
	waited bool
	taken  int64
}

const (
	attrLong  = 365 * 24 * time.Hour
	revalTime = time.Second
	attrFresh = 20 * time.Millisecond
	// slowAfter is how long a request may hold the reader before another
	// one takes its place.
	slowAfter = 2 * time.Millisecond
	// maxBacked is how many files stay registered while nobody has them
	// open, so that the next open costs neither an open nor an ioctl.
	maxBacked = 4096
	// maxPlus is how many entries of a directory are listed with attributes.
	maxPlus = 2000
)

// newServer makes what Mount mounts.
func newServer(cfg Config) *Server {
	s := &Server{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		cfg:           cfg, fs: cfg.FS, log: cfg.Logger,
		ids: map[uint64]*inode{}, byNode: map[*unionfs.Node]*inode{}, handles: map[uint64]*handle{},
		nextID: fuse.FUSE_ROOT_ID, done: make(chan struct{}),
		state: cfg.State, old: map[*unionfs.Node][]*inode{},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.noPass.Store(cfg.NoPassthrough)
	s.fs.KeepListings(cfg.UDBA == Notify || cfg.UDBA == None)
	root := &inode{id: fuse.FUSE_ROOT_ID, n: s.fs.Root(), nlookup: 1}
	s.ids[root.id], s.byNode[root.n] = root, root

	s.maxWrite = cfg.maxWrite()
	opts := &fuse.MountOptions{
		MaxWrite:      s.maxWrite,
		DisableXAttrs: cfg.NoXattr,
		EnableAcl:     !cfg.NoXattr,
		MaxStackDepth: 1 + s.fs.StackDepth(),
		Name:          "layerfs",
		Logger:        log.New(io.Discard, "", 0),
		ExtraCapabilities: fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_DONT_MASK | fuse.CAP_ATOMIC_O_TRUNC |
			fuse.CAP_HAS_EXPIRE_ONLY | fuse.CAP_ASYNC_DIO |
			fuse.CAP_SETXATTR_EXT | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
		PanicHandler: func(p any) fuse.Status {
			s.log.Error("[bug] panic in a request", "panic", p, "stack", string(stack()))
			return fuse.EIO
		},
	}
	if cfg.UDBA == Notify || cfg.UDBA == None {
		// The kernel keeps listings and link targets; notifications drop them.
		opts.ExtraCapabilities |= fuse.CAP_NO_OPENDIR_SUPPORT
		opts.EnableSymlinkCaching = true
	}
	if cfg.NoPassthrough {
		opts.DisabledCapabilities |= fuse.CAP_PASSTHROUGH
	}
	s.ps = fuse.NewProtocolServer(s, opts)
	return s
}

// Mount mounts and serves until Unmount, or an unmount by somebody else.
func Mount(cfg Config) (*Server, error) {
	s := newServer(cfg)
	if err := s.attach(); err != nil {
		return nil, err
	}
	// INIT comes first and alone; whoever uses the mount waits for it.
	if err := s.handshake(); err != nil {
		unix.Unmount(cfg.Target, unix.MNT_DETACH)
		s.f.Close()
		return nil, err
	}
	s.start()
	s.refusePoll()
	return s, nil
}

// Serve serves a mount that MountDevice made, maybe in another process, of the
// device fd, which it takes over. The process must have no other use for the
// mount.
func Serve(cfg Config, fd int) (*Server, error) {
	s := newServer(cfg)
	if err := s.connect(fd); err != nil {
		return nil, err
	}
	if err := s.handshake(); err != nil {
		s.f.Close()
		return nil, err
	}
	s.start()
	return s, nil
}

// start begins to serve.
func (s *Server) start() {
	s.want = int32(min(max(runtime.NumCPU()/2, 1), 8))
	if s.cfg.Watch != nil {
		s.cfg.Watch.start(s)
	}
	for range s.want {
		s.addReader()
	}
	go func() {
		s.wg.Wait()
		s.finish()
	}()
}

// maxWrite is how much data a request may carry.
func (c *Config) maxWrite() int {
	if c.NoPassthrough {
		return 1 << 20
	}
	return 128 << 10
}

func stack() []byte {
	b := make([]byte, 32<<10)
	return b[:runtime.Stack(b, false)]
}

// OpenDevice opens /dev/fuse.
func OpenDevice() (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	return fd, nil
}

// MountDevice mounts a device on cfg.Target as the fields of cfg say that are
// not about serving. Whoever uses the mount waits until somebody serves it.
func MountDevice(fd int, cfg *Config) error {
	source, fstype, flags, data := cfg.MountCall(fd)
	if err := unix.Mount(source, cfg.Target, fstype, flags, data); err != nil {
		return &os.PathError{Op: "mount", Path: cfg.Target, Err: err}
	}
	return nil
}

// MountCall returns the arguments of mount(2) for MountDevice.
func (c *Config) MountCall(fd int) (source, fstype string, flags uintptr, data string) {
	for _, f := range []struct {
		on  bool
		bit uintptr
	}{{c.ReadOnly, unix.MS_RDONLY}, {c.NoSuid, unix.MS_NOSUID}, {c.NoDev, unix.MS_NODEV}, {c.NoExec, unix.MS_NOEXEC}} {
		if f.on {
			flags |= f.bit
		}
	}
	options := []string{
		fmt.Sprintf("fd=%d", fd), "rootmode=40000", fmt.Sprintf("user_id=%d", os.Geteuid()), fmt.Sprintf("group_id=%d", os.Getegid()),
		"default_permissions", fmt.Sprintf("max_read=%d", c.maxWrite()),
	}
	if !c.Private {
		options = append(options, "allow_other")
	}
	source = c.Source
	if source == "" {
		source = "union"
	}
	return source, "fuse.layerfs", flags, strings.Join(options, ",")
}

// attach opens /dev/fuse and mounts.
func (s *Server) attach() error {
	fd, err := OpenDevice()
	if err != nil {
		return err
	}
	if err := MountDevice(fd, &s.cfg); err != nil {
		unix.Close(fd)
		return err
	}
	if err := s.connect(fd); err != nil {
		unix.Unmount(s.cfg.Target, unix.MNT_DETACH)
		return err
	}
	return nil
}

// connect takes over a device that is mounted. Not before: the poller would
// wait on a descriptor that has no connection yet, and never be woken
// (fuse_dev_poll).
func (s *Server) connect(fd int) (err error) {
	s.fd = fd
	s.f = os.NewFile(uintptr(fd), "/dev/fuse")
	if s.raw, err = s.f.SyscallConn(); err != nil {
		s.f.Close()
	}
	return err
}

// handshake serves the INIT request.
func (s *Server) handshake() error {
	b := newBuffers(s.maxWrite)
	n, err := s.read(b.in)
	if err != nil {
		return &os.PathError{Op: "read INIT", Path: "/dev/fuse", Err: err}
	}
	out, err := s.agree(b.in[:n], b.out)
	if err != nil {
		return err
	}
	s.saveInit(b.in[:n])
	if _, err := unix.Write(s.fd, b.out[:out]); err != nil {
		return &os.PathError{Op: "write INIT", Path: "/dev/fuse", Err: err}
	}
	return nil
}

// agree makes the answer to an INIT request.
func (s *Server) agree(in, out []byte) (int, error) {
	n, _ := s.ps.HandleRequest([][]byte{in}, [][]byte{out})
	if n < 52 || binary.NativeEndian.Uint32(out[4:]) != 0 {
		return 0, &os.PathError{Op: "INIT", Path: "/dev/fuse", Err: unix.EPROTO}
	}
	// struct fuse_init_in behind the 40 byte header, fuse_init_out behind 16.
	s.minor = binary.NativeEndian.Uint32(in[44:])
	s.flags = uint64(binary.NativeEndian.Uint32(out[16+12:])) | uint64(binary.NativeEndian.Uint32(out[16+32:]))<<32
	if s.flags&fuse.CAP_PASSTHROUGH == 0 {
		s.noPass.Store(true)
	}
	return n, nil
}

// finish runs when the kernel has ended the connection.
func (s *Server) finish() {
	s.qmu.Lock()
	s.closing = true
	s.queue = nil
	for _, c := range s.qwait {
		close(c)
	}
	s.qwait = nil
	for s.qrun {
		s.qmu.Unlock()
		time.Sleep(time.Millisecond)
		s.qmu.Lock()
	}
	s.qmu.Unlock()
	if s.cfg.Watch != nil {
		s.cfg.Watch.stop()
	}
	s.mu.Lock()
	handles, ids := s.handles, s.ids
	s.handles, s.ids, s.byNode = map[uint64]*handle{}, map[uint64]*inode{}, map[*unionfs.Node]*inode{}
	s.mu.Unlock()
	for _, h := range handles {
		h.close()
	}
	for _, i := range ids {
		i.dropBacking(s)
		if i.id != fuse.FUSE_ROOT_ID {
			s.fs.Forget(i.n, 1)
		}
	}
	s.f.Close()
	close(s.done)
}

// Done is closed when the mount is gone and everything is released.
func (s *Server) Done() <-chan struct{} { return s.done }

// Unmount unmounts, EBUSY if the mount is in use. detach: take it out of the
// tree at once and end when the last user is gone.
func (s *Server) Unmount(ctx context.Context, detach bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if detach {
		flags |= unix.MNT_DETACH
	}
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := unix.Unmount(s.cfg.Target, flags); err != nil && err != unix.EINVAL {
		return &os.PathError{Op: "umount", Path: s.cfg.Target, Err: err}
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Stats returns counters.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Requests: s.requests.Load(), Nodes: len(s.ids), Handles: len(s.handles), Backings: s.nBacked,
		Passthrough: !s.noPass.Load(), Invalidated: s.invalidated.Load(), Lost: s.lostCount.Load(),
	}
}
