package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/whiteout"
)

// Packing has three stages. The walker lists what goes into the stream, in
// order. Workers stat and read small files of a batch and encode them. The
// writer takes the batches in order, decides about hard links, and writes
// large files, reading ahead.

const (
	batchItems  = 24
	inlineFile  = 64 << 10 // files up to here are read by the workers
	inlineBatch = 1 << 20  // together
	aheadJobs   = 14       // batches that are under way
)

// item is one entry to be.
type item struct {
	dir  *dirFD // where base is; nil for marks
	base string // name in dir; "." for dir itself
	name string // path in the stream
	typ  byte   // 'w' and 'o' for marks, 'd' for directories, 0 for what stat will tell
	mark *header
	open bool // dir is open for reading, and base is "."
}

// job is a batch of items.
type job struct {
	items []item
	buf   []byte
	parts []part
	err   error
	done  chan struct{}

	h      header    // of the present item
	xattrs [512]byte // names of its xattrs
}

// part is a piece of a job's output: bytes of buf, or a file.
type part struct {
	end     int // of the bytes of buf that come before
	entries int
	content int64

	h      *header
	f      *os.File // content
	key    inode    // if it has several links
	nlinks int
}

type inode struct{ dev, ino uint64 }

type linkState struct {
	name string
	left int // names that have not been seen
}

// packer is one Write on Linux.
type packer struct {
	ctx   context.Context
	opts  *WriteOptions
	pl    plan
	sh    *shaper
	s     *sink
	root  *dirFD
	links map[inode]*linkState
	// linked are the names that were written as links, for WriteChanges.
	linked map[string]bool

	work  chan *job
	order chan *job
	bufs  chan []byte // of jobs that are written
	big   sync.Pool   // *[]byte of chunkSize

	cur     *job
	skipped int64 // guarded by mu
	mu      sync.Mutex
}

func pack(ctx context.Context, s *sink, dir string, opts *WriteOptions, pl plan, sh *shaper) (WriteResult, error) {
	if opts.portable {
		return packPortable(ctx, s, dir, opts, pl, sh)
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return WriteResult{}, pathError("open", dir, err)
	}
	p := &packer{
		opts: opts, pl: pl, sh: sh, s: s, root: &dirFD{fd: fd}, links: make(map[inode]*linkState), linked: make(map[string]bool),
		work: make(chan *job, aheadJobs), order: make(chan *job, aheadJobs),
		bufs: make(chan []byte, aheadJobs),
	}
	p.root.refs.Store(1)
	defer p.root.release()
	err = p.run(ctx)
	return WriteResult{Skipped: p.skipped}, err
}

func (p *packer) run(parent context.Context) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	p.ctx = ctx
	var stages sync.WaitGroup
	defer stages.Wait()
	n := p.opts.Workers
	if n == 0 {
		n = min(runtime.GOMAXPROCS(0), 8)
	}
	for range n {
		stages.Go(func() {
			for j := range p.work {
				p.encode(j)
				close(j.done)
			}
		})
	}
	var walkErr error
	walked := make(chan struct{})
	stages.Go(func() {
		defer close(walked)
		defer close(p.order)
		defer close(p.work)
		if walkErr = p.walk(); walkErr == nil {
			walkErr = p.flush()
		} else if p.cur != nil {
			p.cur.drop()
		}
	})
	err := error(nil)
	for j := range p.order {
		<-j.done
		if err == nil {
			if err = p.emit(j); err != nil {
				cancel(err) // the other stages stop, then this loop ends
			}
		}
		j.drop()
	}
	<-walked
	switch {
	case err != nil:
	case walkErr != nil:
		err = walkErr
	default:
		err = p.missingLinks()
	}
	if perr := parent.Err(); err != nil && perr != nil {
		return context.Cause(parent)
	}
	return err
}

// drop releases what a job holds.
func (j *job) drop() {
	for _, it := range j.items {
		if it.dir != nil {
			it.dir.release()
		}
	}
	j.items = nil
	for _, pt := range j.parts {
		if pt.f != nil {
			_ = pt.f.Close()
		}
	}
	j.parts = nil
}

// send adds an item.
func (p *packer) send(it item) error {
	if p.cur == nil {
		p.cur = &job{items: make([]item, 0, batchItems), done: make(chan struct{})}
	}
	if it.dir != nil {
		it.dir.retain()
	}
	p.cur.items = append(p.cur.items, it)
	if len(p.cur.items) < batchItems {
		return nil
	}
	return p.flush()
}

func (p *packer) flush() error {
	j := p.cur
	p.cur = nil
	if j == nil {
		return nil
	}
	select {
	case p.order <- j:
	case <-p.ctx.Done():
		j.drop()
		return context.Cause(p.ctx)
	}
	p.work <- j // has room for all that order has, see aheadJobs
	return nil
}

// encode is the work of the second stage.
func (p *packer) encode(j *job) {
	select {
	case b := <-p.bufs:
		j.buf = b[:0]
	default:
	}
	for i := range j.items {
		it := &j.items[i]
		err := p.ctx.Err()
		if err == nil {
			err = p.encodeItem(j, it)
		}
		if err != nil {
			j.err = entryError(it.name, err)
			return
		}
	}
	j.addPart(part{})
}

// addPart ends the bytes so far and puts a file behind them.
func (j *job) addPart(pt part) {
	pt.end = len(j.buf)
	j.parts = append(j.parts, pt)
}

func (p *packer) encodeItem(j *job, it *item) error {
	if it.mark != nil {
		j.buf = appendHeader(j.buf, it.mark)
		j.count(0)
		return nil
	}
	j.h = header{name: it.name, xattrs: j.h.xattrs[:0]}
	h := &j.h
	if it.open {
		return p.encodeOpen(j, it, h, it.dir.fd)
	}
	var st unix.Stat_t
	if it.typ == typeReg || it.typ == typeDir {
		f, err := p.openItem(it)
		if err == nil {
			return p.encodeOpen(j, it, h, f)
		}
		if err != unix.ELOOP && err != unix.ENOTDIR && err != unix.ENXIO {
			return pathError("openat", it.name, err)
		}
		// It became something else since it was listed.
	}
	if err := unix.Fstatat(it.dir.fd, it.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("fstatat", it.name, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
		f, err := p.openItem(it)
		if err != nil {
			return pathError("openat", it.name, err)
		}
		return p.encodeOpen(j, it, h, f)
	case unix.S_IFLNK:
		h.typ = typeSymlink
		target, err := readlinkAt(it.dir.fd, it.base)
		if err != nil {
			return pathError("readlinkat", it.name, err)
		}
		h.link = target
	case unix.S_IFIFO:
		h.typ = typeFifo
	case unix.S_IFCHR:
		h.typ = typeChar
	case unix.S_IFBLK:
		h.typ = typeBlock
	default:
		p.mu.Lock()
		p.skipped++
		p.mu.Unlock()
		return nil
	}
	if h.typ == typeChar || h.typ == typeBlock {
		h.major, h.minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	proc := procName(it.dir.fd, it.base)
	err := p.fillXattrs(h, j.xattrs[:],
		func(b []byte) (int, error) { return unix.Llistxattr(proc, b) },
		func(name string, b []byte) (int, error) { return unix.Lgetxattr(proc, name, b) })
	if err != nil {
		return err
	}
	if err := p.fillStat(h, &st); err != nil {
		return err
	}
	if st.Nlink > 1 {
		j.addPart(part{h: h.clone(), key: inode{uint64(st.Dev), st.Ino}, nlinks: int(st.Nlink)})
		return nil
	}
	j.buf = appendHeader(j.buf, h)
	j.count(0)
	return nil
}

// count notes an entry whose bytes are in buf.
func (j *job) count(content int64) {
	if n := len(j.parts); n == 0 || j.parts[n-1].h != nil {
		j.addPart(part{})
	}
	last := &j.parts[len(j.parts)-1]
	last.end = len(j.buf)
	last.entries++
	last.content += content
}

// clone copies what is reused for the next item.
func (h *header) clone() *header {
	c := *h
	c.xattrs = slices.Clone(h.xattrs)
	return &c
}

// openItem opens a file without changing its access time where that is
// permitted, and without waiting should it have become a fifo.
func (p *packer) openItem(it *item) (int, error) {
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_LARGEFILE
	fd, err := ignoringEINTR(func() (int, error) { return unix.Openat(it.dir.fd, it.base, flags|unix.O_NOATIME, 0) })
	if err == unix.EPERM {
		fd, err = ignoringEINTR(func() (int, error) { return unix.Openat(it.dir.fd, it.base, flags, 0) })
	}
	return fd, err
}

// encodeOpen encodes a regular file or directory.
func (p *packer) encodeOpen(j *job, it *item, h *header, fd int) (err error) {
	keep := it.open
	defer func() {
		if !keep {
			_ = unix.Close(fd)
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return pathError("fstat", it.name, err)
	}
	err = p.fillXattrs(h, j.xattrs[:],
		func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
	if err != nil {
		return err
	}
	if err := p.fillStat(h, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.typ = typeDir
		h.name += "/"
		j.buf = appendHeader(j.buf, h)
		j.count(0)
		return nil
	case unix.S_IFREG:
		h.typ = typeReg
	default:
		return fmt.Errorf("changed while it was read: %w", unix.ESTALE)
	}
	h.size, h.stored = st.Size, st.Size
	if p.opts.Profile == layerfs.ProfileFull && st.Blocks*512 < st.Size {
		if err := findHoles(fd, h); err != nil {
			return pathError("lseek", it.name, err)
		}
	}
	if st.Nlink == 1 && !h.isSparse && st.Size <= inlineFile && len(j.buf)+int(st.Size) <= inlineBatch {
		j.buf = appendHeader(j.buf, h)
		if j.buf, err = appendFile(j.buf, fd, int(st.Size)); err != nil {
			return pathError("read", it.name, err)
		}
		j.count(st.Size)
		return nil
	}
	keep = true
	pt := part{h: h.clone(), f: os.NewFile(uintptr(fd), it.name)}
	if st.Nlink > 1 {
		pt.key, pt.nlinks = inode{uint64(st.Dev), st.Ino}, int(st.Nlink)
	}
	j.addPart(pt)
	return nil
}

// appendFile appends size bytes of a file and the padding.
func appendFile(dst []byte, fd, size int) ([]byte, error) {
	dst = slices.Grow(dst, size+blockSize)
	start := len(dst)
	for len(dst) < start+size {
		n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, dst[len(dst):start+size]) })
		if err != nil {
			return dst, err
		}
		if n == 0 {
			return dst, errShrunk
		}
		dst = dst[:len(dst)+n]
	}
	return appendPadding(dst, size), nil
}

func (p *packer) fillStat(h *header, st *unix.Stat_t) error {
	h.mode = st.Mode & 0o7777
	h.uid, h.gid = int64(st.Uid), int64(st.Gid)
	h.mtime = stamp{int64(st.Mtim.Sec), int64(st.Mtim.Nsec)}
	h.atime, h.hasAtime = stamp{int64(st.Atim.Sec), int64(st.Atim.Nsec)}, true
	return p.sh.shape(h)
}

func (p *packer) fillXattrs(h *header, buf []byte, list func([]byte) (int, error), get func(string, []byte) (int, error)) error {
	names, err := listXattrs(buf, list)
	if err != nil {
		return pathError("listxattr", h.name, err)
	}
	for _, name := range names {
		shown, ok, err := p.sh.xattr(name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		v, ok, err := readXattr(func(b []byte) (int, error) { return get(name, b) })
		if err != nil {
			return pathError("getxattr", h.name, err)
		}
		if ok {
			h.xattrs = append(h.xattrs, xattr{shown, v})
		}
	}
	return nil
}

// findHoles asks the file system where a file has data.
func findHoles(fd int, h *header) error {
	var extents []extent
	var stored int64
	for pos := int64(0); pos < h.size; {
		data, err := unix.Seek(fd, pos, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && data >= h.size {
			break // a hole up to the end
		}
		if err != nil {
			return nil // holes are not known here
		}
		end, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end = min(end, h.size)
		if end <= data || len(extents) >= maxExtents {
			return nil // it changes under our hands; take it as it comes
		}
		extents = append(extents, extent{data, end - data})
		stored += end - data
		pos = end
	}
	if stored == h.size {
		_, err := unix.Seek(fd, 0, io.SeekStart)
		return err
	}
	h.isSparse, h.sparse, h.stored = true, extents, stored
	return nil
}

// emit is the work of the third stage.
func (p *packer) emit(j *job) error {
	if j.err != nil {
		return j.err
	}
	written := 0
	write := func(end int) error {
		if end == written {
			return nil
		}
		b := j.buf[written:end]
		written = end
		return p.s.write(b)
	}
	for i := range j.parts {
		pt := &j.parts[i]
		p.s.entries.Add(int64(pt.entries))
		p.s.content.Add(pt.content)
		if pt.h == nil {
			continue
		}
		if err := write(pt.end); err != nil {
			return err
		}
		if err := p.emitFile(pt); err != nil {
			return entryError(pt.h.name, err)
		}
	}
	if err := write(len(j.buf)); err != nil {
		return err
	}
	if cap(j.buf) <= 2*inlineBatch {
		select {
		case p.bufs <- j.buf:
		default:
		}
	}
	return nil
}

// emitFile writes a file that a worker left alone.
func (p *packer) emitFile(pt *part) error {
	h := pt.h
	p.s.entries.Add(1)
	if pt.nlinks > 1 {
		if l := p.links[pt.key]; l != nil {
			if l.left--; l.left == 0 && p.pl.changes == nil {
				delete(p.links, pt.key) // no more names to come
			}
			if p.pl.changes != nil {
				p.linked[h.name] = true
			}
			h.typ, h.link, h.size, h.stored, h.isSparse, h.xattrs = typeLink, l.name, 0, 0, false, nil
			return p.s.write(appendHeader(nil, h))
		}
		p.links[pt.key] = &linkState{h.name, pt.nlinks - 1}
	}
	var head []byte
	if h.isSparse {
		data := h.stored
		body := appendMap(nil, h.sparse, h.size)
		h.stored += int64(len(body))
		head = append(appendHeader(nil, h), body...)
		h.stored = data
	} else {
		head = appendHeader(nil, h)
	}
	if err := p.s.write(head); err != nil || pt.f == nil {
		return err
	}
	extents := h.sparse
	if !h.isSparse {
		extents = []extent{{0, h.size}}
	}
	if err := p.copyContent(pt.f, extents); err != nil {
		return err
	}
	if pad := -h.stored & (blockSize - 1); pad > 0 {
		return p.s.write(make([]byte, pad))
	}
	return nil
}

// copyContent writes ranges of a file while the next ones are read.
func (p *packer) copyContent(f *os.File, extents []extent) error {
	var total int64
	for _, e := range extents {
		total += e.len
	}
	if total == 0 {
		return nil
	}
	if total <= chunkSize {
		return p.copySmall(f, extents)
	}
	const buffers = 4
	free := make(chan []byte, buffers)
	full := make(chan []byte, buffers)
	for range min(buffers, (total+chunkSize-1)/chunkSize) {
		b := p.bigBuffer()
		defer p.big.Put(b)
		free <- *b
	}
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	var readErr error
	go func() {
		defer close(full)
		for _, e := range extents {
			for e.len > 0 {
				var b []byte
				select {
				case b = <-free:
				case <-ctx.Done():
					readErr = context.Cause(ctx)
					return
				}
				if ctx.Err() != nil {
					readErr = context.Cause(ctx)
					return
				}
				b = b[:min(int64(cap(b)), e.len)]
				n, err := f.ReadAt(b, e.off)
				if n < len(b) {
					if readErr = err; err == io.EOF {
						readErr = errShrunk
					}
					return
				}
				e.off, e.len = e.off+int64(n), e.len-int64(n)
				full <- b
			}
		}
	}()
	err := error(nil)
	for b := range full {
		if err == nil {
			if err = p.s.write(b); err != nil {
				cancel()
			}
			p.s.content.Add(int64(len(b)))
		}
		free <- b
	}
	if err == nil {
		err = readErr
	}
	return err
}

func (p *packer) bigBuffer() *[]byte {
	if b, ok := p.big.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, chunkSize)
	return &b
}

// copySmall writes ranges that fit one buffer together: for these another
// goroutine costs more than it saves.
func (p *packer) copySmall(f *os.File, extents []extent) error {
	if err := p.ctx.Err(); err != nil {
		return context.Cause(p.ctx)
	}
	buf := p.bigBuffer()
	defer p.big.Put(buf)
	b := (*buf)[:0]
	for _, e := range extents {
		part := b[len(b) : len(b)+int(e.len)]
		if n, err := f.ReadAt(part, e.off); n < len(part) {
			if err == io.EOF {
				err = errShrunk
			}
			return err
		}
		b = b[:len(b)+len(part)]
	}
	if err := p.s.write(b); err != nil {
		return err
	}
	p.s.content.Add(int64(len(b)))
	return nil
}

// walk lists what goes into the stream.
func (p *packer) walk() error {
	if p.pl.changes != nil {
		return p.walkChanges()
	}
	if err := p.send(item{dir: p.root, base: ".", name: ".", typ: typeDir}); err != nil {
		return err
	}
	return p.walkDir(p.root, "")
}

// walkDir lists the contents of a directory.
func (p *packer) walkDir(d *dirFD, dir string) error {
	if err := p.ctx.Err(); err != nil {
		return context.Cause(p.ctx)
	}
	entries, err := readEntries(d.fd)
	if err != nil {
		return entryError(dir, pathError("getdents64", dir, err))
	}
	if p.pl.form != Merged {
		if entries, err = p.walkMarks(d, dir, entries); err != nil {
			return err
		}
	}
	for _, e := range entries {
		name := e.name
		if dir != "" {
			name = dir + "/" + name
		}
		if whiteout.IsReserved(e.name) {
			return &EntryError{name, malformed("name is reserved for whiteouts")}
		}
		it := item{dir: d, base: e.name, name: name, typ: e.typ}
		if e.typ != typeDir {
			if err := p.send(it); err != nil {
				return err
			}
			continue
		}
		if err := p.walkSub(d, it); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) walkSub(d *dirFD, it item) error {
	fd, err := p.openItem(&item{dir: d, base: it.base})
	if err != nil {
		return entryError(it.name, pathError("openat", it.name, err))
	}
	sub := &dirFD{fd: fd}
	sub.refs.Store(1)
	defer sub.release()
	if err := p.send(item{dir: sub, base: ".", name: it.name, typ: typeDir, open: true}); err != nil {
		return err
	}
	return p.walkDir(sub, it.name)
}

// walkMarks lists the whiteouts of a directory and returns what else is there.
func (p *packer) walkMarks(d *dirFD, dir string, entries []dirEntry) ([]dirEntry, error) {
	mark := func(base string) error {
		h, err := whiteoutHeader(dir, base)
		if err != nil {
			return entryError(path.Join(dir, base), err)
		}
		return p.send(item{name: h.name, mark: h})
	}
	marked := false // has xattr whiteouts
	if isOverlay(p.pl.form) {
		v, ok, err := getXattr(d.fd, p.pl.form.Prefix()+"opaque")
		if err != nil {
			return nil, entryError(dir, pathError("getxattr", dir, err))
		}
		marked = ok && v == "x"
		if _, old, _ := getXattr(d.fd, p.pl.form.Prefix()+"whiteouts"); old {
			marked = true
		}
		if ok && v == "y" {
			if err := mark(""); err != nil {
				return nil, err
			}
		}
	}
	rest := entries[:0]
	for _, e := range entries {
		gone, base, err := p.isMark(d, dir, e, marked)
		if err != nil {
			return nil, entryError(path.Join(dir, e.name), err)
		}
		if !gone {
			rest = append(rest, e)
			continue
		}
		if base == "" && e.name != whiteout.OpaqueName {
			continue // AUFS's own
		}
		if err := mark(base); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// isMark reports whether an entry is no file of the layer, and what it hides.
func (p *packer) isMark(d *dirFD, dir string, e dirEntry, marked bool) (gone bool, base string, err error) {
	if p.pl.form == whiteout.AUFS {
		if whiteout.IsMeta(e.name) {
			return true, "", nil
		}
		base, ok, err := whiteout.Target(e.name)
		return ok, base, err
	}
	switch e.typ {
	case typeChar:
		var st unix.Stat_t
		if err := unix.Fstatat(d.fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, "", pathError("fstatat", e.name, err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
			return true, e.name, nil
		}
	case typeReg:
		if !marked {
			return false, "", nil
		}
		_, ok, err := readXattr(func(b []byte) (int, error) {
			return unix.Lgetxattr(procName(d.fd, e.name), p.pl.form.Prefix()+"whiteout", b)
		})
		return ok, e.name, err
	}
	return false, "", nil
}

// dirEntry is a name in a directory and its type, as a tar type; 0 for those
// that need a stat.
type dirEntry struct {
	name string
	typ  byte
}

// readEntries lists a directory in order. Its position is set to the start
// first, so that a descriptor can be listed again.
func readEntries(fd int) ([]dirEntry, error) {
	if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
		return nil, err
	}
	var out []dirEntry
	buf := make([]byte, 32<<10)
	for {
		n, err := sys.Getdents(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			name := string(e.Name)
			typ, err := entryType(fd, name, e.Type)
			if err != nil {
				return nil, err
			}
			out = append(out, dirEntry{name, typ})
		}
	}
	slices.SortFunc(out, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// entryType returns the tar type of a name in a directory that is listed with
// type dt, which may be unknown. A name that is gone by now has none.
func entryType(dir int, name string, dt byte) (byte, error) {
	dt, err := sys.EntryType(dir, name, dt)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return 0, nil
		}
		return 0, err
	}
	switch dt {
	case unix.DT_REG:
		return typeReg, nil
	case unix.DT_DIR:
		return typeDir, nil
	case unix.DT_CHR:
		return typeChar, nil
	}
	return 0, nil
}
