//go:build linux

package unionfs

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// BranchSpec names a branch.
type BranchSpec struct {
	Path string
	Perm Perm
}

// Config is what Open needs. Only Branches is required.
type Config struct {
	Branches   []BranchSpec // top first; at least one
	Format     Format       // nil: AUFS{}
	NoPlink    bool         // hard links break on copy-up
	SumFree    bool         // Statfs adds up the branches' file systems
	MaxDirFD   int          // directory descriptors kept open; 0: a quarter of RLIMIT_NOFILE
	Watch      Watcher      // nil: nobody wants to know of direct changes
	Logger     *slog.Logger // nil: none
	SkipRepair bool         // trust the writable branches, even after a crash
	Resume     *Resume      // nil: no union before this one
	// CopiedUp is told that a non-directory that may be known elsewhere now
	// is another branch inode. It must not call the engine.
	CopiedUp func(n *Node, dev, ino uint64)
}

// A Watcher is told which branch directories were looked at, before they are.
type Watcher interface {
	// Add starts watching the directory fd for dir. It must not block on
	// the file system it reports about.
	Add(dir *Node, fd int) error
	// Remove ends all watches of dir.
	Remove(dir *Node)
}

// Repaired is one leftover of a crash that Open mended.
type Repaired struct {
	Branch string // its path
	Path   string // relative to the branch
	Action string
}

// FS is a union. Its methods are safe for concurrent use. Errors are plain
// errno values, since a kernel is the usual caller.
type FS struct {
	format      Format
	aufs        bool // the format has its own files in the root of a branch
	noPlink     bool
	sum         bool
	watch       Watcher
	log         *slog.Logger
	maxFDs      int
	canSetCreds bool
	// keepListings: direct changes of read-only branches are reported.
	keepListings bool
	resume       *Resume
	copiedUp     func(n *Node, dev, ino uint64)
	uid, gid     uint32

	stackMu sync.RWMutex // every operation holds it shared
	stack   []*Branch
	gen     atomic.Uint64

	renameMu sync.Mutex
	root     *Node
	nextID   atomic.Uint64

	tabMu   sync.Mutex     // leaf: never held over a system call
	byKey   map[key]*Node  // hard-linked non-directories
	inos    map[key]uint64 // st_ino of what was copied up
	devs    map[uint64]uint64
	extra   map[key]uint64
	plinks  map[key]*plink // by lower key
	plinkUp map[key]*plink // by upper key
	hid     map[key]uint32 // hidden names of lower files; nil: none
	indexed int            // names in indexes of directories

	hideMu  sync.RWMutex // shared while a name of a hard-linked lower file is hidden
	counted atomic.Bool  // hid is complete
	// countAgain is when hid may be counted again, in ns since 1970.
	countAgain atomic.Int64

	ringMu sync.Mutex
	ring   []*inst
	dirFDs atomic.Int64

	bufs sync.Pool

	stats Counters
}

// Counters count since Open.
type Counters struct {
	Lookups, CopyUps, CopyUpBytes, Whiteouts atomic.Int64
}

// Open opens the branches and mends what a crash left in the writable ones.
// The error is an *os.PathError for a branch that cannot be one.
func Open(cfg *Config) (*FS, []Repaired, error) {
	if len(cfg.Branches) == 0 {
		return nil, nil, fmt.Errorf("union without branches: %w", unix.EINVAL)
	}
	fs := &FS{
		format: cfg.Format, noPlink: cfg.NoPlink, sum: cfg.SumFree, watch: cfg.Watch, log: cfg.Logger,
		maxFDs: cfg.MaxDirFD,
		byKey:  map[key]*Node{}, inos: map[key]uint64{}, devs: map[uint64]uint64{}, extra: map[key]uint64{},
		plinks: map[key]*plink{}, plinkUp: map[key]*plink{}, resume: cfg.Resume, copiedUp: cfg.CopiedUp,
		uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()),
	}
	fs.bufs.New = func() any { b := make([]byte, 32<<10); return &b }
	if fs.format == nil {
		fs.format = AUFS{}
	}
	if _, fs.aufs = fs.format.(AUFS); !fs.aufs {
		fs.noPlink = true // overlayfs has no place for pseudo-links
	}
	if fs.log == nil {
		fs.log = slog.New(slog.DiscardHandler)
	}
	if fs.maxFDs <= 0 {
		var rl unix.Rlimit
		fs.maxFDs = 256
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &rl) == nil {
			fs.maxFDs = int(min(max(rl.Cur/4, 64), 65536))
		}
	}
	fs.canSetCreds = fs.uid == 0
	var repaired []Repaired
	ok := false
	defer func() {
		if !ok {
			for _, b := range fs.stack {
				b.close()
			}
		}
	}()
	for _, s := range cfg.Branches {
		b, err := openBranch(s.Path, s.Perm)
		if err != nil {
			return nil, nil, err
		}
		if err := checkOverlap(fs.stack, b); err != nil {
			b.close()
			return nil, nil, err
		}
		fs.stack = append(fs.stack, b)
		fs.devIdx(b.dev)
	}
	for _, b := range fs.stack {
		r, err := fs.join(b, cfg.SkipRepair)
		repaired = append(repaired, r...)
		if err != nil {
			return nil, repaired, err
		}
	}
	fs.root = fs.newNode(unix.S_IFDIR)
	fs.root.insts = fs.rootInsts(fs.root)
	fs.root.ino = fs.unionIno(fs.root.insts[0].key)
	fs.root.refs.Store(1)
	r, err := fs.recoverLinks()
	repaired = append(repaired, r...)
	if err != nil {
		return nil, repaired, err
	}
	ok = true
	return fs, repaired, nil
}

func (fs *FS) rootInsts(root *Node) []*inst {
	is := make([]*inst, len(fs.stack))
	for k, b := range fs.stack {
		is[k] = &inst{br: b, key: key{b.dev, b.ino}, node: root, fd: b.root}
	}
	return is
}

// Close ends the union. The caller has made sure that no operation runs and
// that FlushLinks was called if links are to stay.
func (fs *FS) Close() error {
	fs.stackMu.Lock()
	defer fs.stackMu.Unlock()
	fs.ringMu.Lock()
	for _, i := range fs.ring {
		i.mu.Lock()
		i.closeFD()
		i.mu.Unlock()
	}
	fs.ring = nil
	fs.ringMu.Unlock()
	var err error
	for _, b := range fs.stack {
		if b.perm == RW {
			if e := b.unmark(); err == nil {
				err = e
			}
		}
		b.close()
	}
	fs.stack = nil
	return err
}

// Root returns the root, without a reference: it lives as long as fs.
func (fs *FS) Root() *Node { return fs.root }

// Counters returns the live counters.
func (fs *FS) Counters() *Counters { return &fs.stats }

// Generation grows with every change of the branches.
func (fs *FS) Generation() uint64 { return fs.gen.Load() }

// Branches returns the stack, top first.
func (fs *FS) Branches() []BranchSpec {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	out := make([]BranchSpec, len(fs.stack))
	for i, b := range fs.stack {
		out[i] = BranchSpec{b.path, b.perm}
	}
	return out
}

// StackDepth is the deepest stacking among the branches' file systems.
func (fs *FS) StackDepth() int {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	d := 0
	for _, b := range fs.stack {
		d = max(d, b.stackDepth())
	}
	return d
}

func (fs *FS) newNode(typ uint32) *Node {
	n := &Node{fs: fs, id: fs.nextID.Add(1), typ: typ}
	return n
}

// devIdx gives every branch device a small number.
func (fs *FS) devIdx(dev uint64) uint64 {
	if i, ok := fs.devs[dev]; ok {
		return i
	}
	i := uint64(len(fs.devs))
	fs.devs[dev] = i
	return i
}

const inoBits = 48

// unionIno is the st_ino of a branch inode: its own number with the number of
// its file system above. Inodes that were copied up keep the number they had.
func (fs *FS) unionIno(k key) uint64 {
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	if ino, ok := fs.inos[k]; ok {
		return ino
	}
	idx := fs.devIdx(k.dev)
	if k.ino < 1<<inoBits && idx < 1<<(64-inoBits)-1 {
		return idx<<inoBits | k.ino
	}
	if ino, ok := fs.extra[k]; ok {
		return ino
	}
	ino := uint64(1<<(64-inoBits)-1)<<inoBits | uint64(len(fs.extra))
	fs.extra[k] = ino
	return ino
}

func (fs *FS) keepIno(k key, ino uint64) {
	fs.tabMu.Lock()
	fs.inos[k] = ino
	fs.tabMu.Unlock()
}

func (fs *FS) dropIno(k key) {
	fs.tabMu.Lock()
	delete(fs.inos, k)
	fs.tabMu.Unlock()
}

// Forget gives back k references.
func (fs *FS) Forget(n *Node, k int64) {
	for n != nil && n != fs.root {
		if n.refs.Add(-k) != 0 {
			return
		}
		n, k = fs.free(n), 1
	}
}

// free takes n out of the tables if it is still unused, and returns its
// parent, whose reference it held. References are taken under tabMu.
func (fs *FS) free(n *Node) *Node {
	fs.tabMu.Lock()
	if n.refs.Load() != 0 || n.freed {
		fs.tabMu.Unlock()
		return nil
	}
	n.freed = true
	fs.dropIndex(n)
	is := n.insts
	n.insts = nil
	var parent *Node
	if n.IsDir() {
		parent = n.parent
		if parent != nil && parent.kids[n.name] == n {
			delete(parent.kids, n.name)
		}
		n.parent = nil
	}
	links := n.links
	n.links = nil
	for _, l := range links {
		if l.dir.kids[l.name] == n {
			delete(l.dir.kids, l.name)
		}
	}
	if n.hashed && fs.byKey[n.key] == n {
		delete(fs.byKey, n.key)
	}
	if n.plink != nil && n.plink.node == n {
		n.plink.node = nil
	}
	if n.dead && n.left == 0 && !n.IsDir() {
		delete(fs.inos, n.key) // the branch may use the number again
	}
	orphan := n.orphan
	n.orphan = nil
	fs.tabMu.Unlock()
	orphan.drop()
	if n.IsDir() && fs.watch != nil {
		fs.watch.Remove(n)
	}
	for _, i := range is {
		i.drop()
	}
	for k, l := range links {
		if k == 0 {
			parent = l.dir
		} else {
			fs.Forget(l.dir, 1)
		}
	}
	return parent
}

func (i *inst) drop() {
	i.mu.Lock()
	i.gone = true
	if i.pins == 0 {
		i.closeFD()
	}
	i.mu.Unlock()
}

// procFD is the path by which calls without an *at form reach a descriptor.
func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// errno makes sure that an error can be told to a kernel.
func errno(err error) error {
	if err == nil {
		return nil
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return unix.EIO
}

// Errno returns the errno in err, EIO if there is none, 0 for nil.
func Errno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return unix.EIO
}
