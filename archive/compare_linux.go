package archive

import (
	"bytes"
	"context"
	"io"
	"path"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// comparer is one Compare on Linux. Each pair of directories is a task; tasks
// are worked on from the top of a stack, so that they are done nearly in the
// order in which their results are wanted.
type comparer struct {
	ctx               context.Context
	opts              *CompareOptions
	since, sinceWhole stamp

	mu    sync.Mutex
	more  sync.Cond // stack grew, ahead shrank, or stopped changed
	stack []*pair   // guarded by mu
	ahead int       // tasks done and not yet yielded, guarded by mu
	stop  bool      // guarded by mu

	noAt    atomic.Bool // listxattrat does not work here
	entries atomic.Int64
	bytes   atomic.Int64
	bufs    sync.Pool
}

// pair is a directory of both trees, or of the new one alone.
type pair struct {
	path    string // absolute in the trees; empty for the root
	base    string
	oldUp   *oldDir // where base is; nil if the old tree has no such directory
	newUp   *dirFD
	same    bool // has the same names in both trees
	taken   bool // by a worker, guarded by comparer.mu
	done    chan struct{}
	results []result
	err     error
}

// result is a change, a directory to go into, or both in this order.
type result struct {
	change layerfs.Change // Kind 0 means none
	sub    *pair
}

// maxAhead limits how many directories are compared before their changes are
// wanted, and so the memory for a slow consumer.
const maxAhead = 512

func compareTrees(ctx context.Context, oldDir, newDir string, opts *CompareOptions, yield func(layerfs.Change) bool) error {
	if opts.portable {
		return comparePortable(ctx, oldDir, newDir, opts, yield)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &comparer{ctx: ctx, opts: opts}
	c.more.L = &c.mu
	c.noAt.Store(opts.noAt)
	if !opts.Since.IsZero() {
		c.since = stampOf(opts.Since.Add(-changeTimeSlack))
		c.sinceWhole = stampOf(opts.Since.Add(-wholeSeconds))
	}
	var roots [2]*dirFD
	for i, dir := range []string{oldDir, newDir} {
		fd, err := ignoringEINTR(func() (int, error) {
			return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		})
		if err != nil {
			return pathError("open", dir, err)
		}
		roots[i] = &dirFD{fd: fd}
		roots[i].refs.Store(1)
		defer roots[i].release()
	}
	report := startReport(opts.Progress, "compare", func() (int64, int64) { return c.bytes.Load(), c.entries.Load() })
	defer report()
	return c.run(roots[0], roots[1], yield)
}

func (c *comparer) run(oldRoot, newRoot *dirFD, yield func(layerfs.Change) bool) error {
	var ended sync.WaitGroup
	defer ended.Wait()
	defer func() {
		c.mu.Lock()
		c.stop = true
		for _, p := range c.stack {
			if !p.taken {
				p.release()
			}
		}
		c.stack = nil
		c.mu.Unlock()
		c.more.Broadcast()
	}()
	old := &oldDir{d: oldRoot.retain()}
	old.refs.Store(1)
	defer old.release()
	d, err := c.diff(old, newRoot, ".")
	if err != nil {
		return err
	}
	if d.differ && !yield(layerfs.Change{Path: "/", Kind: layerfs.Modified}) {
		return errStopped
	}
	root := &pair{base: ".", oldUp: old.retain(), newUp: newRoot.retain(), same: d.untouched, done: make(chan struct{})}
	c.push([]*pair{root})
	n := c.opts.Workers
	if n == 0 {
		n = min(runtime.GOMAXPROCS(0), 8)
	}
	for range n {
		ended.Go(c.worker)
	}
	return c.emit(root, yield)
}

func (p *pair) release() {
	if p.oldUp != nil {
		p.oldUp.release()
	}
	p.newUp.release()
}

func (c *comparer) push(pairs []*pair) {
	if len(pairs) == 0 {
		return
	}
	c.mu.Lock()
	if c.stop {
		for _, p := range pairs {
			p.release()
			close(p.done)
		}
	}
	for i := len(pairs) - 1; i >= 0 && !c.stop; i-- {
		c.stack = append(c.stack, pairs[i])
	}
	c.mu.Unlock()
	c.more.Broadcast()
}

func (c *comparer) worker() {
	for {
		c.mu.Lock()
		for !c.stop && (len(c.stack) == 0 || c.ahead >= maxAhead) {
			c.more.Wait()
		}
		if c.stop {
			c.mu.Unlock()
			return
		}
		p := c.stack[len(c.stack)-1]
		c.stack = c.stack[:len(c.stack)-1]
		taken := p.taken
		p.taken = true
		if !taken {
			c.ahead++
		}
		c.mu.Unlock()
		if !taken {
			c.compare(p)
		}
	}
}

// emit yields the changes of a task and of all below it. A task no worker has
// begun is done here: workers may be waiting for this goroutine.
func (c *comparer) emit(p *pair, yield func(layerfs.Change) bool) error {
	c.mu.Lock()
	mine := !p.taken
	p.taken = true
	if !mine {
		c.ahead--
	}
	c.mu.Unlock()
	if mine {
		c.compare(p)
	} else {
		c.more.Broadcast()
		select {
		case <-p.done:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
	for i := range p.results {
		r := &p.results[i]
		if r.change.Kind != 0 && !yield(r.change) {
			return errStopped
		}
		if r.sub != nil {
			if err := c.emit(r.sub, yield); err != nil {
				return err
			}
			r.sub = nil
		}
	}
	p.results = nil
	return p.err
}

// compare does one task.
func (c *comparer) compare(p *pair) {
	defer close(p.done)
	defer p.release()
	if p.err = context.Cause(c.ctx); p.err != nil {
		return
	}
	var subs []*pair
	subs, p.err = c.compareDirs(p)
	if p.err != nil {
		p.err = entryError(strings.TrimPrefix(p.path, "/"), p.err)
	}
	c.push(subs)
}

// oldDir is a directory of the old tree. It is opened when something in it is
// looked at, which with CompareOptions.Since is seldom.
type oldDir struct {
	up   *oldDir // nil for the root
	base string
	refs atomic.Int32

	mu sync.Mutex // before that of up
	d  *dirFD     // guarded by mu; nil if not open
}

func newOldDir(up *oldDir, base string) *oldDir {
	d := &oldDir{up: up.retain(), base: base}
	d.refs.Store(1)
	return d
}

func (o *oldDir) retain() *oldDir { o.refs.Add(1); return o }

func (o *oldDir) release() {
	if o.refs.Add(-1) > 0 {
		return
	}
	if o.d != nil {
		o.d.release()
	}
	if o.up != nil {
		o.up.release()
	}
}

// open returns the descriptor, which is valid until o is released.
func (o *oldDir) open() (*dirFD, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.d != nil {
		return o.d, nil
	}
	up, err := o.up.open()
	if err != nil {
		return nil, err
	}
	o.d, err = openCompared(up, o.base)
	return o.d, err
}

func openCompared(up *dirFD, base string) (*dirFD, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(up.fd, base, flags|unix.O_NOATIME, 0) })
	if err == unix.EPERM {
		fd, err = ignoringEINTR(func() (int, error) { return unix.Openat(up.fd, base, flags, 0) })
	}
	if err != nil {
		return nil, pathError("openat", base, err)
	}
	d := &dirFD{fd: fd}
	d.refs.Store(1)
	return d, nil
}

func (c *comparer) compareDirs(p *pair) ([]*pair, error) {
	newDir, err := openCompared(p.newUp, p.base)
	if err != nil {
		return nil, err
	}
	defer newDir.release()
	newNames, err := readEntries(newDir.fd)
	if err != nil {
		return nil, pathError("getdents64", p.path, err)
	}
	var old *oldDir
	var oldNames []dirEntry
	if p.oldUp != nil {
		old = newOldDir(p.oldUp, p.base)
		defer old.release()
		if p.same {
			oldNames = newNames
		} else if oldNames, err = readOld(old, p.path); err != nil {
			return nil, err
		}
	}
	c.entries.Add(int64(len(newNames)))
	var subs []*pair
	down := func(name string, withOld, same bool) *pair {
		s := &pair{path: p.path + "/" + name, base: name, newUp: newDir.retain(), same: same, done: make(chan struct{})}
		if withOld {
			s.oldUp = old.retain()
		}
		subs = append(subs, s)
		return s
	}
	for len(oldNames) > 0 || len(newNames) > 0 {
		order := 0
		switch {
		case len(oldNames) == 0:
			order = 1
		case len(newNames) == 0:
			order = -1
		default:
			order = strings.Compare(oldNames[0].name, newNames[0].name)
		}
		var r result
		switch {
		case order < 0:
			r.change = layerfs.Change{Path: p.path + "/" + oldNames[0].name, Kind: layerfs.Deleted}
			oldNames = oldNames[1:]
		case order > 0:
			e := newNames[0]
			newNames = newNames[1:]
			r.change = layerfs.Change{Path: p.path + "/" + e.name, Kind: layerfs.Added}
			isDir := e.typ == typeDir
			if e.typ == 0 {
				var st unix.Stat_t
				if err := statAt(newDir, e.name, &st); err != nil {
					return subs, err
				}
				isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
			}
			if isDir {
				r.sub = down(e.name, false, false)
			}
		default:
			name := newNames[0].name
			oldNames, newNames = oldNames[1:], newNames[1:]
			d, err := c.diff(old, newDir, name)
			if err != nil {
				return subs, entryError(strings.TrimPrefix(path.Join(p.path, name), "/"), err)
			}
			if d.differ {
				r.change = layerfs.Change{Path: p.path + "/" + name, Kind: layerfs.Modified}
			}
			if d.newIsDir {
				r.sub = down(name, d.oldIsDir, d.untouched)
			}
		}
		if r.change.Kind != 0 || r.sub != nil {
			p.results = append(p.results, r)
		}
	}
	return subs, nil
}

func readOld(old *oldDir, path string) ([]dirEntry, error) {
	d, err := old.open()
	if err != nil {
		return nil, err
	}
	names, err := readEntries(d.fd)
	return names, pathError("getdents64", path, err)
}

func statAt(d *dirFD, name string, st *unix.Stat_t) error {
	return pathError("fstatat", name, retryEINTR(func() error {
		return unix.Fstatat(d.fd, name, st, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// difference is what diff finds out about one name.
type difference struct {
	differ             bool
	oldIsDir, newIsDir bool
	untouched          bool // since CompareOptions.Since: a directory has the names it had
}

// diff compares what two directories have at one name.
func (c *comparer) diff(old *oldDir, newDir *dirFD, name string) (d difference, err error) {
	var a, b unix.Stat_t
	if err := statAt(newDir, name, &b); err != nil {
		return d, err
	}
	d.newIsDir = b.Mode&unix.S_IFMT == unix.S_IFDIR
	if c.unchanged(b.Ctim) {
		d.oldIsDir, d.untouched = d.newIsDir, true
		return d, nil
	}
	oldDir, err := old.open()
	if err != nil {
		return d, err
	}
	if err := statAt(oldDir, name, &a); err != nil {
		return d, err
	}
	d.oldIsDir = a.Mode&unix.S_IFMT == unix.S_IFDIR
	if a.Dev == b.Dev && a.Ino == b.Ino {
		return d, nil
	}
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Mtim != b.Mtim {
		d.differ = true
		return d, nil
	}
	d.differ, err = c.diffMore(oldDir, newDir, name, &a, &b)
	return d, err
}

// unchanged reports whether a change time is that of the copy.
func (c *comparer) unchanged(at unix.Timespec) bool {
	switch {
	case c.opts.Since.IsZero():
		return false
	case at.Nsec == 0:
		return before(at, c.sinceWhole)
	}
	return before(at, c.since)
}

func before(t unix.Timespec, s stamp) bool {
	return int64(t.Sec) < s.sec || int64(t.Sec) == s.sec && int64(t.Nsec) < s.nsec
}

// diffMore compares what stat does not tell.
func (c *comparer) diffMore(oldDir, newDir *dirFD, name string, a, b *unix.Stat_t) (bool, error) {
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFLNK:
		if a.Size != b.Size {
			return true, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			return true, nil
		}
	}
	if differ, err := c.diffXattrs(oldDir, newDir, name); differ || err != nil {
		return differ, err
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		s, err := readlinkAt(oldDir.fd, name)
		if err != nil {
			return false, pathError("readlinkat", name, err)
		}
		t, err := readlinkAt(newDir.fd, name)
		return s != t, pathError("readlinkat", name, err)
	case unix.S_IFREG:
		if a.Size > 0 && c.opts.Content == ContentExact {
			return c.diffContent(oldDir, newDir, name, a.Size)
		}
	}
	return false, nil
}

func (c *comparer) listXattrs(d *dirFD, name string, buf []byte) ([]string, error) {
	names, err := listXattrs(buf, func(b []byte) (int, error) {
		if !c.noAt.Load() {
			n, err := sys.Listxattrat(d.fd, name, b)
			if err != unix.ENOSYS && err != unix.EPERM {
				return n, err
			}
			c.noAt.Store(true)
		}
		return unix.Llistxattr(procName(d.fd, name), b)
	})
	if err != nil {
		return nil, pathError("listxattr", name, err)
	}
	if c.opts.IgnoreXattr != nil {
		kept := names[:0]
		for _, n := range names {
			if !c.opts.IgnoreXattr(n) {
				kept = append(kept, n)
			}
		}
		names = kept
	}
	return names, nil
}

func (c *comparer) diffXattrs(oldDir, newDir *dirFD, name string) (bool, error) {
	var buf [512]byte
	as, err := c.listXattrs(oldDir, name, buf[:])
	if err != nil {
		return false, err
	}
	bs, err := c.listXattrs(newDir, name, buf[:])
	if err != nil || len(as) != len(bs) {
		return true, err
	}
	for _, x := range as {
		v, ok, err := readXattr(func(b []byte) (int, error) { return unix.Lgetxattr(procName(oldDir.fd, name), x, b) })
		if err != nil {
			return false, pathError("getxattr", name, err)
		}
		w, ok2, err := readXattr(func(b []byte) (int, error) { return unix.Lgetxattr(procName(newDir.fd, name), x, b) })
		if err != nil || v != w || ok != ok2 {
			return true, pathError("getxattr", name, err)
		}
	}
	return false, nil
}

// diffContent reads two files of one size.
func (c *comparer) diffContent(oldDir, newDir *dirFD, name string, size int64) (bool, error) {
	var fds [2]int
	for i, d := range []*dirFD{oldDir, newDir} {
		const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_LARGEFILE
		fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(d.fd, name, flags|unix.O_NOATIME, 0) })
		if err == unix.EPERM {
			fd, err = ignoringEINTR(func() (int, error) { return unix.Openat(d.fd, name, flags, 0) })
		}
		if err != nil {
			return false, pathError("openat", name, err)
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	buf, ok := c.bufs.Get().(*[]byte)
	if !ok {
		b := make([]byte, 2*chunkSize)
		buf = &b
	}
	defer c.bufs.Put(buf)
	a, b := (*buf)[:chunkSize], (*buf)[chunkSize:]
	for pos := int64(0); pos < size; {
		if err := c.ctx.Err(); err != nil {
			return false, context.Cause(c.ctx)
		}
		n := int(min(chunkSize, size-pos))
		if err := readExactly(fds[0], a[:n], pos); err != nil {
			return err == io.ErrUnexpectedEOF, notShort(name, err)
		}
		if err := readExactly(fds[1], b[:n], pos); err != nil {
			return err == io.ErrUnexpectedEOF, notShort(name, err)
		}
		if !bytes.Equal(a[:n], b[:n]) {
			return true, nil
		}
		pos += int64(n)
		c.bytes.Add(int64(n))
	}
	return false, nil
}

func notShort(name string, err error) error {
	if err == io.ErrUnexpectedEOF {
		return nil
	}
	return pathError("pread", name, err)
}

func readExactly(fd int, b []byte, pos int64) error {
	for len(b) > 0 {
		n, err := ignoringEINTR(func() (int, error) { return unix.Pread(fd, b, pos) })
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		b, pos = b[n:], pos+int64(n)
	}
	return nil
}
