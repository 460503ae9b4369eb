package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

const (
	// overrideStat is where rootless tools keep what a file should be, as
	// containers/storage pkg/idtools writes it and fuse-overlayfs reads it.
	overrideStat = "user.containers.override_stat"
)

// task is one file for a worker to make.
type task struct {
	dir      *dirFD
	name     string
	h        *header
	uid, gid uint32
	special  bool // the directory changes mode and owner of what is made in it
	defACL   bool
	pieces   []piece
	big      *bigFile // has the content instead of pieces
}

// piece is content in a chunk of the stream.
type piece struct {
	b []byte
	c *chunk
}

// bigFile is a file whose content comes while it is written. One worker at a
// time has it; it is queued again when more content is there.
type bigFile struct {
	task  task
	w     *fileWriter // set by the first worker; a failed file has none
	began bool

	mu     sync.Mutex
	queue  []piece
	active bool // in the queue of the workers or with one of them
	whole  bool // no more content comes
}

// workers make files in parallel. Methods are called by the parser's
// goroutine.
type workers struct {
	x     *extractor
	work  chan []task
	batch []task
	bytes int
	first *chunk // oldest chunk the batch holds
	span  int    // chunks since then

	inflight sync.WaitGroup
	ended    sync.WaitGroup
}

const (
	batchFiles = 48
	batchBytes = 512 << 10
	batchSpan  = 4

	// smallFile is up to which size content is gathered before a file is
	// made; larger ones are written while they come.
	smallFile = 2 * chunkSize
)

func newWorkers(x *extractor, n int) *workers {
	w := &workers{x: x, work: make(chan []task, 2*n)}
	for range n {
		w.ended.Add(1)
		go func() {
			defer w.ended.Done()
			for batch := range w.work {
				for i := range batch {
					w.do(&batch[i])
				}
				w.inflight.Done()
			}
		}()
	}
	return w
}

// add queues a task. Files of one directory stay together, so that two workers
// seldom wait for the lock of the same one.
func (w *workers) add(t task) {
	if n := len(w.batch); n > 0 && w.batch[n-1].dir != t.dir {
		w.flush()
	}
	t.dir.retain()
	w.batch = append(w.batch, t)
	for _, p := range t.pieces {
		w.bytes += len(p.b)
		if w.first == nil {
			w.first, w.span = p.c, 0
		}
	}
	if len(w.batch) >= batchFiles || w.bytes >= batchBytes {
		w.flush()
	}
}

// onWait keeps a batch from holding more and more chunks.
func (w *workers) onWait() {
	if w.first != nil {
		if w.span++; w.span >= batchSpan {
			w.flush()
		}
	}
}

func (w *workers) flush() {
	if len(w.batch) == 0 {
		return
	}
	w.inflight.Add(1)
	w.work <- w.batch
	w.batch = make([]task, 0, batchFiles)
	w.bytes, w.first, w.span = 0, nil, 0
}

// wait returns when all that was queued is done.
func (w *workers) wait() {
	w.flush()
	w.inflight.Wait()
}

func (w *workers) close() {
	w.wait()
	close(w.work)
	w.ended.Wait()
}

// feed adds content to a big file.
func (w *workers) feed(f *bigFile, p piece, whole bool) {
	f.mu.Lock()
	if p.b != nil {
		f.queue = append(f.queue, p)
	}
	f.whole = f.whole || whole
	queue := !f.active
	f.active = true
	f.mu.Unlock()
	if queue {
		w.inflight.Add(1)
		w.work <- []task{{big: f}}
	}
}

func (w *workers) do(t *task) {
	if t.big != nil {
		w.drain(t.big)
		return
	}
	if !w.x.failed.Load() {
		if err := w.x.makeFile(t); err != nil {
			w.x.fail(entryError(t.h.name, err))
		}
	}
	for _, p := range t.pieces {
		p.c.release()
	}
	t.dir.release()
}

// drain writes what has come of a big file.
func (w *workers) drain(f *bigFile) {
	err := error(nil)
	if !f.began {
		f.began = true
		if !w.x.failed.Load() {
			f.w, err = w.x.create(&f.task)
		}
	}
	for {
		f.mu.Lock()
		queue := f.queue
		f.queue = nil
		whole := f.whole
		if len(queue) == 0 && !whole {
			f.active = false
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		for _, p := range queue {
			if f.w != nil && err == nil && !w.x.failed.Load() {
				err = f.w.write(p.b)
			}
			p.c.release()
		}
		if whole {
			if f.w != nil {
				if err == nil && !w.x.failed.Load() {
					err = f.w.finish(w.x, &f.task)
				} else {
					_ = unix.Close(f.w.fd)
				}
			}
			f.task.dir.release()
		}
		if err != nil {
			w.x.fail(entryError(f.task.h.name, err))
		}
		if whole {
			return
		}
	}
}

// fileWriter writes the bytes of the stream to where they belong in a file.
type fileWriter struct {
	fd      int
	size    int64
	pos     int64    // where the next byte goes
	extents []extent // of a sparse file: what is left, the first one cut
	sparse  bool
	holes   bool // make holes of zeros
	at      int64
	moved   bool // pos is not where the file offset is
}

// create makes an empty file. What is at its name is not of this stream, and
// is removed.
func (x *extractor) create(t *task) (*fileWriter, error) {
	fd, err := x.createAt(t)
	if err != nil {
		return nil, pathError("openat", t.name, err)
	}
	w := &fileWriter{fd: fd, size: t.h.size, holes: x.opts.Holes}
	if t.h.isSparse {
		w.sparse, w.extents = true, t.h.sparse
		w.seek()
	}
	return w, nil
}

func (x *extractor) createAt(t *task) (int, error) {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_LARGEFILE
	var fd int
	err := x.replacing(t.dir.fd, t.name, func() (err error) {
		fd, err = unix.Openat(t.dir.fd, t.name, flags, t.h.mode&0o777)
		return err
	})
	return fd, err
}

// replacing calls make, and if something is in the way removes it and calls
// make once more.
func (x *extractor) replacing(dir int, name string, make func() error) error {
	err := retryEINTR(make)
	if err == unix.EEXIST {
		if err := removeAll(dir, name); err != nil {
			return err
		}
		err = retryEINTR(make)
	}
	return err
}

// seek goes to where the next byte of a sparse file belongs.
func (w *fileWriter) seek() {
	for len(w.extents) > 0 && w.extents[0].len == 0 {
		w.extents = w.extents[1:]
	}
	if len(w.extents) > 0 && w.extents[0].off != w.pos {
		w.pos, w.moved = w.extents[0].off, true
	}
}

func (w *fileWriter) write(b []byte) error {
	for len(b) > 0 {
		part := b
		if w.sparse {
			if len(w.extents) == 0 {
				return malformed("more content than the map of holes has")
			}
			part = b[:min(int64(len(b)), w.extents[0].len)]
		}
		if err := w.writeAll(part); err != nil {
			return err
		}
		b = b[len(part):]
		if w.sparse {
			n := int64(len(part))
			w.extents[0].off += n
			w.extents[0].len -= n
			w.seek()
		}
	}
	return nil
}

// holeSize is the smallest hole worth making: the block of most file systems.
const holeSize = 4096

func (w *fileWriter) writeAll(b []byte) error {
	for len(b) > 0 {
		n := len(b)
		if w.holes {
			// Only whole blocks at block boundaries become holes.
			block := holeSize - int(w.pos%holeSize)
			if block <= len(b) && block == holeSize && zeros(b[:block]) {
				n = block
				for n+holeSize <= len(b) && zeros(b[n:n+holeSize]) {
					n += holeSize
				}
				w.pos, w.moved = w.pos+int64(n), true
				b = b[n:]
				continue
			}
			n = min(block, len(b))
			for n+holeSize <= len(b) && !zeros(b[n:n+holeSize]) {
				n += holeSize
			}
			if len(b)-n < holeSize {
				n = len(b)
			}
		}
		var m int
		err := retryEINTR(func() (err error) {
			if w.moved {
				m, err = unix.Pwrite(w.fd, b[:n], w.pos)
			} else {
				m, err = unix.Write(w.fd, b[:n])
			}
			return err
		})
		if err != nil {
			return pathError("write", "", err)
		}
		w.pos += int64(m)
		w.at = max(w.at, w.pos)
		b = b[m:]
	}
	return nil
}

func zeros(b []byte) bool {
	var z [holeSize]byte
	return bytes.Equal(b, z[:len(b)])
}

// finish sets size and attributes and closes the file.
func (w *fileWriter) finish(x *extractor, t *task) error {
	err := error(nil)
	if w.at < w.size {
		err = pathError("ftruncate", "", retryEINTR(func() error { return unix.Ftruncate(w.fd, w.size) }))
	}
	if err == nil {
		err = x.setFileAttrs(w.fd, t)
	}
	if cerr := unix.Close(w.fd); err == nil && cerr != nil && cerr != unix.EINTR {
		err = pathError("close", "", cerr)
	}
	return err
}

// setFileAttrs gives an open file what the header has, in an order in which
// nothing takes back what was done: chown clears set-id bits and capabilities,
// chmod changes an ACL, and all of them the change time only.
func (x *extractor) setFileAttrs(fd int, t *task) error {
	if t.special || t.uid != x.euid || t.gid != x.egid {
		if err := retryEINTR(func() error { return unix.Fchown(fd, int(t.uid), int(t.gid)) }); err != nil {
			return pathError("fchown", "", err)
		}
	}
	if t.special || t.h.mode&(0o7000|x.umask) != 0 {
		if err := retryEINTR(func() error { return unix.Fchmod(fd, t.h.mode) }); err != nil {
			return pathError("fchmod", "", err)
		}
	}
	if t.defACL {
		_ = unix.Fremovexattr(fd, aclAccess) // inherited
	}
	for _, a := range t.h.xattrs {
		name, ok, err := x.xattrName(t.h, a.name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		err = retryEINTR(func() error { return unix.Fsetxattr(fd, name, []byte(a.value), 0) })
		if err := x.lostXattr(t.h, a.name, err); err != nil {
			return err
		}
	}
	atime, mtime := t.h.times()
	return pathError("utimensat", "", sys.Futimens(fd, atime, mtime))
}

// makeFile makes all but directories, hard links and big files.
func (x *extractor) makeFile(t *task) error {
	switch t.h.typ {
	case typeReg:
		w, err := x.create(t)
		if err != nil {
			return err
		}
		for _, p := range t.pieces {
			if err := w.write(p.b); err != nil {
				_ = unix.Close(w.fd)
				return err
			}
		}
		return w.finish(x, t)
	case typeSymlink:
		err := x.replacing(t.dir.fd, t.name, func() error { return unix.Symlinkat(t.h.link, t.dir.fd, t.name) })
		if err != nil {
			return pathError("symlinkat", t.name, err)
		}
	case typeFifo:
		err := x.replacing(t.dir.fd, t.name, func() error {
			return unix.Mknodat(t.dir.fd, t.name, unix.S_IFIFO|t.h.mode&0o777, 0)
		})
		if err != nil {
			return pathError("mknodat", t.name, err)
		}
	case typeChar, typeBlock:
		kind := uint32(unix.S_IFCHR)
		if t.h.typ == typeBlock {
			kind = unix.S_IFBLK
		}
		err := x.replacing(t.dir.fd, t.name, func() error {
			return unix.Mknodat(t.dir.fd, t.name, kind|t.h.mode&0o777, int(unix.Mkdev(t.h.major, t.h.minor)))
		})
		if err != nil {
			return pathError("mknodat", t.name, err)
		}
	}
	return x.setNodeAttrs(t)
}

// setNodeAttrs is setFileAttrs for what cannot be opened without consequences.
func (x *extractor) setNodeAttrs(t *task) error {
	if t.special || t.uid != x.euid || t.gid != x.egid {
		err := retryEINTR(func() error {
			return unix.Fchownat(t.dir.fd, t.name, int(t.uid), int(t.gid), unix.AT_SYMLINK_NOFOLLOW)
		})
		if err != nil {
			return pathError("fchownat", t.name, err)
		}
	}
	if t.h.typ != typeSymlink && (t.special || t.h.mode&(0o7000|x.umask) != 0) {
		// fchmodat without AT_SYMLINK_NOFOLLOW, which old kernels lack: we have
		// just made the file and it is no link.
		err := retryEINTR(func() error { return unix.Fchmodat(t.dir.fd, t.name, t.h.mode, 0) })
		if err != nil {
			return pathError("fchmodat", t.name, err)
		}
	}
	if t.defACL && t.h.typ != typeSymlink {
		_ = unix.Lremovexattr(procName(t.dir.fd, t.name), aclAccess)
	}
	for _, a := range t.h.xattrs {
		name, ok, err := x.xattrName(t.h, a.name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		err = retryEINTR(func() error { return unix.Lsetxattr(procName(t.dir.fd, t.name), name, []byte(a.value), 0) })
		if err := x.lostXattr(t.h, a.name, err); err != nil {
			return err
		}
	}
	return setTimesAt(t.dir.fd, t.name, t.h)
}

func setTimesAt(dir int, name string, h *header) error {
	atime, mtime := h.times()
	ts := []unix.Timespec{atime, mtime}
	err := retryEINTR(func() error { return unix.UtimesNanoAt(dir, name, ts, unix.AT_SYMLINK_NOFOLLOW) })
	return pathError("utimensat", name, err)
}

// times returns access and modification time. Without an access time in the
// stream it is the modification time: equal streams make equal trees.
func (h *header) times() (atime, mtime unix.Timespec) {
	mtime = h.mtime.timespec()
	if h.hasAtime {
		return h.atime.timespec(), mtime
	}
	return mtime, mtime
}

func (s stamp) timespec() (ts unix.Timespec) {
	setInt(&ts.Sec, s.sec)
	setInt(&ts.Nsec, s.nsec)
	return ts
}

// setInt sets a field that has 32 bits on some systems; what does not fit
// becomes the nearest that does.
func setInt[T int32 | int64](to *T, v int64) {
	if *to = T(v); int64(*to) != v {
		n := int32(1<<31 - 1)
		if v < 0 {
			n = -1 << 31
		}
		*to = T(n)
	}
}

// xattrName returns under which name an xattr is stored, and false if it is
// not for the file system.
func (x *extractor) xattrName(h *header, name string) (string, bool, error) {
	if isOverlay(x.form) && strings.HasPrefix(name, x.form.Prefix()) {
		// What overlayfs would take for its own is escaped (Linux 6.7,
		// overlayfs.rst, "Nesting overlayfs mounts"): a layer must not be able
		// to redirect or hide what is below it by other means than whiteouts.
		return x.form.Prefix() + "overlay." + name[len(x.form.Prefix()):], true, nil
	}
	return name, true, nil
}

// lostXattr decides what an error from setting an xattr means.
func (x *extractor) lostXattr(h *header, name string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("xattr %s: %w", shorten(name), err)
	switch {
	case x.opts.Lost == nil:
		return err
	case isErrno(err, unix.ENOTSUP, unix.EPERM, unix.EACCES, unix.EINVAL, unix.ERANGE, unix.E2BIG):
		x.lost(h.name, err)
		return nil
	}
	return err
}

// recordDevice turns a device node into what stands for it.
func recordDevice(h *header, uid, gid uint32) *header {
	kind := "char"
	if h.typ == typeBlock {
		kind = "block"
	}
	r := *h
	r.typ = typeReg
	r.xattrs = append(r.xattrs[:len(r.xattrs):len(r.xattrs)], xattr{
		overrideStat, fmt.Sprintf("%d:%d:0%o:%s-%d-%d", uid, gid, h.mode, kind, h.major, h.minor),
	})
	return &r
}

// removeAll removes a name and, if it is a directory, all that is in it.
// It never follows a link. It is no error if there is nothing.
func removeAll(dir int, name string) error {
	err := retryEINTR(func() error { return unix.Unlinkat(dir, name, 0) })
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	derr := retryEINTR(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
	switch derr {
	case nil, unix.ENOENT:
		return nil
	case unix.ENOTDIR:
		return err
	case unix.ENOTEMPTY, unix.EEXIST:
	default:
		return derr
	}
	// os.Root keeps each step inside and copes with any depth.
	root, err := os.OpenRoot(procPath(dir))
	if err != nil {
		return err
	}
	defer root.Close()
	err = root.RemoveAll(name)
	if errors.Is(err, unix.EACCES) && unix.Geteuid() != 0 {
		if err := unlockAll(root, name); err != nil {
			return err
		}
		err = root.RemoveAll(name)
	}
	return err
}

// unlockAll gives the owner of directories, who is no root, the permissions to
// remove what is in them.
func unlockAll(root *os.Root, name string) error {
	return fs.WalkDir(root.FS(), name, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return root.Chmod(p, 0o700)
	})
}
