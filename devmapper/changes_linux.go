package devmapper

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/content"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/sys"
)

// NativeChanges finds the inodes that differ from their bytes in the blocks
// that differ, and then the names of these. It reads every directory of the
// layer, but no file whose inode is the same.
func (m *mechanism) NativeChanges(ctx context.Context, chain lifecycle.Chain, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		err := m.nativeChanges(ctx, chain, base, func(c layerfs.Change) bool { return yield(c, nil) })
		if err != nil && !errors.Is(err, errStopped) {
			yield(layerfs.Change{}, err)
		}
	}
}

var errStopped = errors.New("stopped")

func (m *mechanism) nativeChanges(ctx context.Context, chain lifecycle.Chain, base int, yield func(layerfs.Change) bool) (err error) {
	if base == len(chain) {
		return fmt.Errorf("%w: against the empty tree everything is new", lifecycle.ErrDecline)
	}
	newer, err := m.View(ctx, chain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	older, err := m.View(ctx, chain[base:])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, older.Release()) }()
	w := &walker{ctx: ctx, yield: yield}
	w.buffers.New = func() any { return new([64 << 10]byte) }
	if w.changed, err = m.changed(ctx, chain, base, newer.Path); err != nil {
		return err
	}
	a, err := openDir(unix.AT_FDCWD, older.Path)
	if err != nil {
		return err
	}
	defer unix.Close(a)
	b, err := openDir(unix.AT_FDCWD, newer.Path)
	if err != nil {
		return err
	}
	defer unix.Close(b)
	w.older, w.newer = a, b
	return w.root(a, b)
}

// changed returns the inodes of a layer that are not those of an ancestor.
// Both are active.
func (m *mechanism) changed(ctx context.Context, chain lifecycle.Chain, base int, tree string) (_ map[uint64]struct{}, err error) {
	ranges, err := m.ranges(ctx, chain, base, true)
	if err != nil {
		return nil, err
	}
	var readers [2]*directReader
	for i, rec := range []*lifecycle.Record{chain[base], chain.Layer()} {
		info, err := m.ctl.Info(m.deviceName(rec.ID, false))
		if err != nil {
			return nil, err
		}
		if readers[i], err = openDirect(info.Device); err != nil {
			return nil, err
		}
		defer func(r *directReader) { err = errors.Join(err, r.Close()) }(readers[i])
	}
	older, newer := readers[0], readers[1]
	was, err := parseSuper(older, m.opts.FS)
	if err != nil {
		return nil, err
	}
	is, err := parseSuper(newer, m.opts.FS)
	if err != nil {
		return nil, err
	}
	if is.fs == nil || was.fs == nil {
		return nil, fmt.Errorf("%w: %s", lifecycle.ErrDecline, is.why+was.why)
	}
	spans, err := is.fs.spans(newer, func() ([]uint64, error) { return inodeChunks(tree) })
	if err != nil {
		return nil, err
	}
	if e, ok := was.fs.(*ext4); ok {
		for i := range spans {
			spans[i].all = spans[i].first > uint64(e.groups*e.perGroup)
		}
	}
	d, err := m.load(chain[base].ID)
	if err != nil {
		return nil, err
	}
	extents := make([]extent, 0, len(ranges))
	for _, r := range ranges {
		extents = append(extents, extent{r.Offset, r.Length})
	}
	return changedInodes(older, newer, d.Size, is.fs.inodeSize(), spans, extents)
}

// inodeChunks lists the first inodes of the chunks of an xfs file system.
//
// XFS_IOC_INUMBERS, fs/xfs/libxfs/xfs_fs.h: _IOR('X', 128, struct
// xfs_inumbers_req), Linux 5.4. A head of 64 bytes, then records of 24.
func inodeChunks(tree string) ([]uint64, error) {
	f, err := os.Open(tree)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const head, record, most = 64, 24, 4096
	buf := make([]byte, head+record*most)
	var out []uint64
	for next := uint64(0); ; {
		clear(buf[:head])
		binary.NativeEndian.PutUint64(buf, next)
		binary.NativeEndian.PutUint32(buf[12:], most)
		err := sys.IoctlBytes(f, "XFS_IOC_INUMBERS", 2<<30|head<<16|'X'<<8|128, buf)
		if errors.Is(err, unix.ENOTTY) {
			return nil, fmt.Errorf("%w: %w", lifecycle.ErrDecline, err)
		}
		if err != nil {
			return nil, err
		}
		n := binary.NativeEndian.Uint32(buf[16:])
		if n == 0 || n > most {
			return out, nil
		}
		for i := range n {
			r := buf[head+record*i:]
			ino := binary.NativeEndian.Uint64(r)
			out = append(out, ino)
			next = ino + chunkInodes
		}
	}
}

// walker compares two trees of which it knows the inodes that are not the same.
type walker struct {
	ctx     context.Context
	yield   func(layerfs.Change) bool
	changed map[uint64]struct{}
	older   int // root of the older tree
	newer   int // and of the newer one
	buffers sync.Pool
}

type entry struct {
	name string
	ino  uint64
	dir  bool
}

func openDir(at int, name string) (int, error) {
	return sys.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// openPath opens a directory by its path in a tree.
func openPath(root int, path string) (int, error) {
	fd, err := unix.Openat2(root, "."+path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if errors.Is(err, unix.ENOSYS) { // before Linux 5.6
		return openDir(root, "."+path)
	}
	if err != nil {
		return -1, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	return fd, nil
}

// list reads a directory, by name: all of it, or only the directories and what
// has changed. Most layers have many directories in which nothing is changed,
// and what is left out of these costs no more than a look at its number.
func (w *walker) list(fd int, all bool) ([]entry, error) {
	if err := context.Cause(w.ctx); err != nil {
		return nil, err
	}
	buf, _ := w.buffers.Get().(*[64 << 10]byte)
	defer w.buffers.Put(buf)
	var out []entry
	for {
		n, err := sys.Getdents(fd, buf[:])
		if err != nil {
			return nil, &os.PathError{Op: "getdents64", Path: strconv.Itoa(fd), Err: err}
		}
		if n == 0 {
			break
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return nil, &os.PathError{Op: "getdents64", Path: strconv.Itoa(fd), Err: err}
			}
			if !ok {
				break
			}
			if !all && e.Type != unix.DT_DIR && e.Type != unix.DT_UNKNOWN && !w.isChanged(e.Ino) {
				continue
			}
			s := string(e.Name)
			typ, err := sys.EntryType(fd, s, e.Type)
			if err != nil {
				return nil, err
			}
			out = append(out, entry{s, e.Ino, typ == unix.DT_DIR})
		}
	}
	slices.SortFunc(out, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	return out, nil
}

func (w *walker) emit(path string, kind layerfs.Kind) error {
	if !w.yield(layerfs.Change{Path: path, Kind: kind}) {
		return errStopped
	}
	return nil
}

func (w *walker) isChanged(ino uint64) bool {
	_, ok := w.changed[ino]
	return ok
}

func (w *walker) root(a, b int) error {
	var st unix.Stat_t
	if err := unix.Fstat(b, &st); err != nil {
		return &os.PathError{Op: "stat", Path: "/", Err: err}
	}
	if !w.isChanged(st.Ino) {
		return w.same("", b)
	}
	differs, err := w.differs(a, b, ".")
	if err != nil {
		return err
	}
	if differs {
		if err := w.emit("/", layerfs.Modified); err != nil {
			return err
		}
	}
	return w.merge("", a, b)
}

// same looks below a directory that has the same entries in both trees.
func (w *walker) same(path string, b int) error {
	g, ctx := errgroup.WithContext(w.ctx)
	// Enough to have the disk read some directories while others are looked at.
	const readers = 4
	g.SetLimit(readers)
	s := &scan{w: w, ctx: ctx, g: g}
	var top level
	err := s.read(&top, b)
	if err := errors.Join(g.Wait(), err); err != nil {
		return err
	}
	return w.sameLevel(path, &top)
}

// level is what is of interest in a directory that has the same entries in both
// trees.
type level struct {
	entries []entry
	below   []level // for each entry, if that is such a directory
}

// scan reads directories, several at a time.
type scan struct {
	w   *walker
	ctx context.Context
	g   *errgroup.Group
}

func (s *scan) read(l *level, fd int) error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	var err error
	if l.entries, err = s.w.list(fd, false); err != nil {
		return err
	}
	l.below = make([]level, len(l.entries))
	for i, e := range l.entries {
		if !e.dir || s.w.isChanged(e.ino) {
			continue
		}
		sub, err := openDir(fd, e.name)
		if err != nil {
			return err
		}
		read := func() error { return errors.Join(s.read(&l.below[i], sub), unix.Close(sub)) }
		if s.g.TryGo(read) {
			continue
		}
		if err := read(); err != nil {
			return err
		}
	}
	return nil
}

// sameLevel tells, in order, what scan has found.
func (w *walker) sameLevel(path string, l *level) error {
	for i, e := range l.entries {
		var err error
		switch {
		case w.isChanged(e.ino):
			err = w.withBoth(path, func(a, b int) error { return w.pair(path+"/"+e.name, e, e, a, b) })
		case e.dir:
			err = w.sameLevel(path+"/"+e.name, &l.below[i])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) withBoth(path string, fn func(a, b int) error) error {
	a, err := openPath(w.older, path+"/.")
	if err != nil {
		return err
	}
	defer unix.Close(a)
	b, err := openPath(w.newer, path+"/.")
	if err != nil {
		return err
	}
	defer unix.Close(b)
	return fn(a, b)
}

func within(at int, name string, fn func(fd int) error) error {
	fd, err := openDir(at, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return fn(fd)
}

// merge compares two directories whose entries may differ.
func (w *walker) merge(path string, a, b int) error {
	olds, err := w.list(a, true)
	if err != nil {
		return err
	}
	news, err := w.list(b, true)
	if err != nil {
		return err
	}
	for len(olds) > 0 || len(news) > 0 {
		switch {
		case len(news) == 0 || len(olds) > 0 && olds[0].name < news[0].name:
			err = w.emit(path+"/"+olds[0].name, layerfs.Deleted)
			olds = olds[1:]
		case len(olds) == 0 || news[0].name < olds[0].name:
			err = w.added(path+"/"+news[0].name, news[0], b)
			news = news[1:]
		default:
			err = w.pair(path+"/"+news[0].name, olds[0], news[0], a, b)
			olds, news = olds[1:], news[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// added tells of an entry and all that is below it.
func (w *walker) added(path string, e entry, b int) error {
	if err := w.emit(path, layerfs.Added); err != nil || !e.dir {
		return err
	}
	return w.contents(path, e.name, b)
}

func (w *walker) contents(path, name string, b int) error {
	return within(b, name, func(fd int) error {
		entries, err := w.list(fd, true)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := w.added(path+"/"+e.name, e, fd); err != nil {
				return err
			}
		}
		return nil
	})
}

// pair compares two entries of one name in directories a and b.
func (w *walker) pair(path string, was, is entry, a, b int) error {
	unchanged := was.ino == is.ino && !w.isChanged(is.ino)
	if unchanged && !is.dir {
		return nil
	}
	if unchanged && was.dir {
		return within(b, is.name, func(fd int) error { return w.same(path, fd) })
	}
	differs, err := w.differs(a, b, is.name)
	if err != nil {
		return err
	}
	if differs {
		if err := w.emit(path, layerfs.Modified); err != nil {
			return err
		}
	}
	switch {
	case is.dir && was.dir:
		return within(a, is.name, func(afd int) error {
			return within(b, is.name, func(bfd int) error { return w.merge(path, afd, bfd) })
		})
	case is.dir:
		return w.contents(path, is.name, b)
	}
	return nil
}

// differs compares an entry of two directories in everything but the names
// below it.
func (w *walker) differs(a, b int, name string) (bool, error) {
	var x, y unix.Stat_t
	for _, s := range []struct {
		fd int
		st *unix.Stat_t
	}{{a, &x}, {b, &y}} {
		if err := unix.Fstatat(s.fd, name, s.st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, &os.PathError{Op: "stat", Path: name, Err: err}
		}
	}
	if x.Ino == y.Ino && x.Ctim == y.Ctim { // see tick
		return false, nil
	}
	typ := y.Mode & unix.S_IFMT
	if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid || x.Mtim != y.Mtim ||
		(typ == unix.S_IFBLK || typ == unix.S_IFCHR) && x.Rdev != y.Rdev ||
		typ == unix.S_IFREG && x.Size != y.Size {
		return true, nil
	}
	one, other := fdPath(a, name), fdPath(b, name)
	switch typ {
	case unix.S_IFLNK:
		s, err := os.Readlink(one)
		if err != nil {
			return false, err
		}
		t, err := os.Readlink(other)
		if err != nil || s != t {
			return true, err
		}
	case unix.S_IFREG:
		if same, err := sameContent(w.ctx, a, b, name); err != nil || !same {
			return true, err
		}
	}
	return xattrsDiffer(one, other)
}

func fdPath(fd int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
}

// sameContent reads both files.
func sameContent(ctx context.Context, a, b int, name string) (bool, error) {
	var files [2]*os.File
	for i, at := range []int{a, b} {
		fd, err := sys.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return false, err
		}
		files[i] = os.NewFile(uintptr(fd), name)
		defer files[i].Close()
	}
	return content.Equal(ctx, files[0], files[1])
}

func xattrsDiffer(a, b string) (bool, error) {
	x, err := xattrs(a)
	if err != nil {
		return false, err
	}
	y, err := xattrs(b)
	if err != nil || len(x) != len(y) {
		return true, err
	}
	for k, v := range x {
		if w, ok := y[k]; !ok || v != w {
			return true, nil
		}
	}
	return false, nil
}

// xattrs returns all xattrs of an entry, which is not followed.
func xattrs(path string) (map[string]string, error) {
	list, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "llistxattr", Path: path, Err: err}
	}
	out := make(map[string]string)
	for len(list) > 0 {
		i := slices.Index(list, 0)
		if i < 0 {
			break
		}
		key := string(list[:i])
		list = list[i+1:]
		v, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, key, b) })
		if err != nil {
			return nil, &os.PathError{Op: "lgetxattr " + key, Path: path, Err: err}
		}
		out[key] = string(v)
	}
	return out, nil
}

// grow calls fn with a buffer that is large enough.
func grow(fn func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 8 {
		b := make([]byte, size)
		n, err := fn(b)
		if err == unix.ERANGE && size < 1<<20 {
			continue
		}
		return b[:max(n, 0)], err
	}
}
