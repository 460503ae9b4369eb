package btrfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// Changes yields what newSnap changes against oldSnap, two read-only
// subvolumes of one file system, by the rules of [layerfs.Change] and in the
// order of [layerfs.ComparePaths]. It is what a walk over both trees gives,
// except that nested subvolumes do not exist (see the package comment).
//
// Cost and memory grow with what was changed: the kernel reads the parts of
// both trees that are not shared, and only places it names are compared. New
// trees are walked. Content is compared only where the kernel says it was
// written and every attribute is equal. It needs CAP_SYS_ADMIN. Both
// snapshots must stay as they are, which their flag ensures.
//
// The error matches [ErrTooDeep], before anything is yielded, if a changed path
// has more than about 4,000 bytes.
func Changes(ctx context.Context, oldSnap, newSnap string) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		err := walkPlaces(ctx, oldSnap, newSnap, false, func(d *difference) error {
			if !yield(layerfs.Change{Path: d.path, Kind: d.kind}, nil) {
				return errStop
			}
			return nil
		})
		if err != nil && err != errStop {
			yield(layerfs.Change{}, err)
		}
	}
}

// ErrTooDeep says that the kernel cannot name a changed path in a send stream,
// because it is longer than PATH_MAX. Only a walk can tell the changes then.
var ErrTooDeep = errors.New("a changed path is too long for a send stream")

var errStop = errors.New("stopped by the caller")

// difference is a change with what the comparison knows about it. It is valid
// only during the call.
type difference struct {
	path     string
	kind     layerfs.Kind
	old, new *file // nil if absent
	same     bool  // both are the same inode
	spans    []span
}

// file is one name in one of the trees.
type file struct {
	dir  int // descriptor of the directory; for the root, of itself, and name is "."
	name string
	st   unix.Stat_t
}

func (f *file) isType(t uint32) bool { return f != nil && f.st.Mode&unix.S_IFMT == t }
func (f *file) isDir() bool          { return f.isType(unix.S_IFDIR) }

// open opens the file for reading.
func (f *file) open(flags int) (*os.File, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(f.dir, f.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
		return err
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: f.name, Err: err}
	}
	return os.NewFile(uintptr(fd), f.name), nil
}

// walkPlaces calls visit for every difference, in order. With extents it does
// so for every regular file whose content may differ, equal or not, and kind
// has no meaning.
func walkPlaces(ctx context.Context, oldSnap, newSnap string, extents bool, visit func(*difference) error) error {
	delta, err := deltaOf(ctx, oldSnap, newSnap)
	if err != nil {
		return err
	}
	w := &walker{ctx: ctx, visit: visit, extents: extents, inodes: map[uint64]*change{}}
	or, err := openDir(oldSnap)
	if err != nil {
		return err
	}
	defer or.Close()
	nr, err := openDir(newSnap)
	if err != nil {
		return err
	}
	defer nr.Close()
	if err := w.mark(delta, or, nr); err != nil {
		return err
	}
	of := &file{dir: int(or.Fd()), name: "."}
	nf := &file{dir: int(nr.Fd()), name: "."}
	for _, f := range []*file{of, nf} {
		if err := retry(func() error { return unix.Fstat(f.dir, &f.st) }); err != nil {
			return os.NewSyscallError("fstat", err)
		}
	}
	w.oldDev, w.newDev = of.st.Dev, nf.st.Dev
	// The roots are the same directory by definition, also of unrelated trees.
	return w.both("/", of, nf, &w.places, true)
}

func deltaOf(ctx context.Context, oldSnap, newSnap string) (_ *Delta, err error) {
	s, err := OpenSend(ctx, newSnap, &SendOptions{Parent: oldSnap, NoFileData: true})
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := s.Close(); err == nil {
			err = cerr
		}
		if errors.Is(err, unix.ENAMETOOLONG) {
			err = fmt.Errorf("%w: %w", ErrTooDeep, err)
		}
	}()
	r := bufio.NewReaderSize(s, 256<<10)
	dec, err := NewDecoder(r)
	if err != nil {
		return nil, err
	}
	d, err := Fold(dec)
	if err != nil {
		return nil, err
	}
	// Reads the error that the kernel may report after the end command.
	if _, err := r.ReadByte(); err != io.EOF {
		if err == nil {
			err = &StreamError{Offset: dec.Offset(), Op: OpEnd, Reason: "more follows"}
		}
		return nil, err
	}
	return d, nil
}

// place is a node of the tree of places to compare.
type place struct {
	marked bool
	below  map[string]*place
}

func (p *place) add(path string) {
	for rest, more := path, path != ""; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		next := p.below[name]
		if next == nil {
			next = &place{}
			if p.below == nil {
				p.below = map[string]*place{}
			}
			p.below[name] = next
		}
		p = next
	}
	p.marked = true
}

// change is what the stream says about the content of an inode.
type change struct {
	spans []span // that may differ, in order
}

type walker struct {
	ctx            context.Context
	visit          func(*difference) error
	extents        bool
	places         place
	inodes         map[uint64]*change // touched inodes that both trees may have
	oldDev, newDev uint64
}

// mark collects the places to compare, also those of further hard links, which
// the stream does not name.
func (w *walker) mark(delta *Delta, oldRoot, newRoot *os.File) error {
	w.places.marked = true
	paths, touched := delta.paths()
	for _, p := range paths {
		w.places.add(p)
	}
	oldNames, newNames := newNameFinder(oldRoot), newNameFinder(newRoot)
	for _, t := range touched {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if !t.n.inOld {
			continue // all of its names are commands of the stream
		}
		var st unix.Stat_t
		ok, err := statBelow(oldRoot, t.n.oldPath, &st)
		if err != nil {
			return err
		}
		if !ok || st.Mode&unix.S_IFMT == unix.S_IFDIR {
			continue
		}
		c := w.inodes[st.Ino]
		if c == nil {
			c = &change{}
			w.inodes[st.Ino] = c
		}
		if t.n.data {
			c.spans = mergeSpans(append(c.spans, t.n.spans()...))
		}
		if st.Nlink == 1 && len(t.paths) == 1 {
			var now unix.Stat_t
			if ok, err := statBelow(newRoot, t.paths[0], &now); err != nil {
				return err
			} else if ok && now.Nlink == 1 {
				continue
			}
		}
		for _, f := range []*nameFinder{oldNames, newNames} {
			names, err := f.names(st.Ino)
			if err != nil {
				return err
			}
			for _, n := range names {
				w.places.add(n)
			}
		}
	}
	return nil
}

// statBelow looks at a path without following links, and reports whether it
// is there.
func statBelow(root *os.File, path string, st *unix.Stat_t) (bool, error) {
	dir := int(root.Fd())
	for {
		part, rest, more := strings.Cut(path, "/")
		if len(path) < 1024 { // no need to go step by step
			part, more = path, false
		}
		if !more {
			err := retry(func() error { return unix.Fstatat(dir, part, st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) })
			if dir != int(root.Fd()) {
				unix.Close(dir)
			}
			if err == unix.ENOENT || err == unix.ENOTDIR {
				return false, nil
			}
			return err == nil, os.NewSyscallError("fstatat", err)
		}
		var next int
		err := retry(func() (err error) {
			next, err = unix.Openat(dir, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			return err
		})
		if dir != int(root.Fd()) {
			unix.Close(dir)
		}
		if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
			return false, nil
		}
		if err != nil {
			return false, os.NewSyscallError("openat", err)
		}
		dir, path = next, rest
	}
}

// both compares a path that is in both trees. p may be nil, which means that
// the stream has nothing about it.
func (w *walker) both(path string, of, nf *file, p *place, isRoot bool) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	same := isRoot
	var od, nd *os.File
	if of.isDir() && nf.isDir() {
		var err error
		if od, err = of.open(unix.O_DIRECTORY); err != nil {
			return err
		}
		defer od.Close()
		if nd, err = nf.open(unix.O_DIRECTORY); err != nil {
			return err
		}
		defer nd.Close()
	}
	if !same && of.st.Ino == nf.st.Ino {
		var err error
		if same, err = sameInode(of, nf, od, nd); err != nil {
			return err
		}
	}
	if !same || p != nil && p.marked {
		d := &difference{path: path, kind: layerfs.Modified, old: of, new: nf, same: same}
		w.setSpans(d)
		differs, err := w.extents, error(nil)
		if !differs {
			differs, err = w.differs(d)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if differs {
			if err := w.visit(d); err != nil {
				return err
			}
		}
	}
	switch {
	case od != nil && same:
		if p == nil {
			return nil
		}
		names := make([]string, 0, len(p.below))
		for n := range p.below {
			names = append(names, n)
		}
		return w.entries(path, od, nd, names, p)
	case od != nil:
		// Two directories that only share the name: everything is compared.
		names, err := readNames(od)
		if err != nil {
			return err
		}
		more, err := readNames(nd)
		if err != nil {
			return err
		}
		return w.entries(path, od, nd, append(names, more...), p)
	case nf.isDir():
		return w.added(path, nf)
	}
	return nil
}

// entries compares names of two directories; od is nil if there is no old one.
func (w *walker) entries(path string, od, nd *os.File, names []string, p *place) error {
	slices.Sort(names)
	if path == "/" {
		path = ""
	}
	for _, name := range slices.Compact(names) {
		of, err := w.look(od, name, w.oldDev)
		if err != nil {
			return err
		}
		nf, err := w.look(nd, name, w.newDev)
		if err != nil {
			return err
		}
		full := path + "/" + name
		switch {
		case of == nil && nf == nil:
		case nf == nil:
			err = w.visit(&difference{path: full, kind: layerfs.Deleted, old: of})
		case of == nil:
			if err = w.visit(&difference{path: full, kind: layerfs.Added, new: nf}); err == nil && nf.isDir() {
				err = w.added(full, nf)
			}
		default:
			var below *place
			if p != nil {
				below = p.below[name]
			}
			err = w.both(full, of, nf, below, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// added reports everything below a new directory.
func (w *walker) added(path string, nf *file) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	d, err := nf.open(unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := readNames(d)
	if err != nil {
		return err
	}
	return w.entries(path, nil, d, names, nil)
}

// look returns a directory entry, nil if it is absent or leads to another
// subvolume or file system.
func (w *walker) look(dir *os.File, name string, dev uint64) (*file, error) {
	if dir == nil {
		return nil, nil
	}
	f := &file{dir: int(dir.Fd()), name: name}
	err := retry(func() error { return unix.Fstatat(f.dir, name, &f.st, unix.AT_SYMLINK_NOFOLLOW) })
	switch {
	case err == unix.ENOENT:
		return nil, nil
	case err != nil:
		return nil, &os.PathError{Op: "fstatat", Path: name, Err: err}
	case f.st.Dev != dev || f.isDir() && f.st.Ino == placeholderInode:
		// Linux 6.18 shows the place of a nested subvolume with another device too.
		return nil, nil
	}
	return f, nil
}

func readNames(d *os.File) ([]string, error) {
	if _, err := d.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return d.Readdirnames(-1)
}

// sameInode tells whether two files with equal inode numbers are the same: the
// number may have been given out again after the file system was mounted anew,
// but then with another generation.
func sameInode(of, nf *file, od, nd *os.File) (bool, error) {
	if (of.st.Mode^nf.st.Mode)&unix.S_IFMT != 0 {
		return false, nil
	}
	var gen [2]int32
	for i, f := range []*file{of, nf} {
		h := []*os.File{od, nd}[i]
		if h == nil {
			if !f.isType(unix.S_IFREG) {
				// A generation can be asked of nothing else. It does not matter
				// there: only content and entries depend on the answer.
				return false, nil
			}
			var err error
			if h, err = f.open(0); err != nil {
				return false, err
			}
			defer h.Close()
		}
		if err := sys.Ioctl(h, "ioctl FS_IOC_GETVERSION", sys.FsIocGetVersion, &gen[i]); err != nil {
			return false, err
		}
	}
	return gen[0] == gen[1], nil
}

// setSpans sets the ranges in which the content of two files may differ.
func (w *walker) setSpans(d *difference) {
	switch {
	case !d.new.isType(unix.S_IFREG) || !d.old.isType(unix.S_IFREG):
	case !d.same:
		d.spans = []span{{0, max(d.old.st.Size, d.new.st.Size)}}
	default:
		if c := w.inodes[d.new.st.Ino]; c != nil {
			d.spans = c.spans
		}
	}
}

// differs compares the attributes of two files, then the content if need be.
func (w *walker) differs(d *difference) (bool, error) {
	o, n := &d.old.st, &d.new.st
	if o.Mode != n.Mode || o.Uid != n.Uid || o.Gid != n.Gid || o.Mtim != n.Mtim {
		return true, nil
	}
	switch o.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if o.Size != n.Size {
			return true, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if o.Rdev != n.Rdev {
			return true, nil
		}
	case unix.S_IFLNK:
		a, err := readlink(d.old)
		if err != nil {
			return false, err
		}
		b, err := readlink(d.new)
		if err != nil || a != b {
			return true, err
		}
	}
	if differs, err := xattrsDiffer(d.old, d.new); err != nil || differs {
		return true, err
	}
	if len(d.spans) > 0 {
		return w.contentDiffers(d)
	}
	return false, nil
}

func readlink(f *file) (string, error) {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		var n int
		err := retry(func() (err error) { n, err = unix.Readlinkat(f.dir, f.name, buf); return err })
		if err != nil {
			return "", &os.PathError{Op: "readlinkat", Path: f.name, Err: err}
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// contentDiffers compares the ranges of d in files of equal size.
func (w *walker) contentDiffers(d *difference) (bool, error) {
	of, err := d.old.open(0)
	if err != nil {
		return false, err
	}
	defer of.Close()
	nf, err := d.new.open(0)
	if err != nil {
		return false, err
	}
	defer nf.Close()
	size := d.new.st.Size
	a, b := make([]byte, 128<<10), make([]byte, 128<<10)
	for _, s := range d.spans {
		for off, end := s.off, min(s.end, size); off < end; {
			if err := w.ctx.Err(); err != nil {
				return false, err
			}
			k := int(min(end-off, int64(len(a))))
			if err := readFull(of, a[:k], off); err != nil {
				return false, err
			}
			if err := readFull(nf, b[:k], off); err != nil {
				return false, err
			}
			if string(a[:k]) != string(b[:k]) {
				return true, nil
			}
			off += int64(k)
		}
	}
	return false, nil
}

func readFull(f *os.File, b []byte, off int64) error {
	_, err := f.ReadAt(b, off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // a read-only snapshot does not shrink
	}
	return err
}

// xattrsDiffer compares all xattrs. Calls by name below /proc/self/fd serve
// every type of file, also symbolic links, and do not depend on the length of
// the path.
func xattrsDiffer(of, nf *file) (bool, error) {
	a, err := xattrs(of)
	if err != nil {
		return false, err
	}
	b, err := xattrs(nf)
	if err != nil {
		return false, err
	}
	if len(a) != len(b) {
		return true, nil
	}
	for k, v := range a {
		if x, ok := b[k]; !ok || x != v {
			return true, nil
		}
	}
	return false, nil
}

func xattrs(f *file) (map[string]string, error) {
	path := fmt.Sprintf("/proc/self/fd/%d/%s", f.dir, f.name)
	list, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if err != nil {
		return nil, &os.PathError{Op: "llistxattr", Path: f.name, Err: err}
	}
	if len(list) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		v, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err != nil {
			return nil, &os.PathError{Op: "lgetxattr " + name, Path: f.name, Err: err}
		}
		m[name] = string(v)
	}
	return m, nil
}

// grow calls get with larger buffers until one suffices.
func grow(get func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		var n int
		err := retry(func() (err error) { n, err = get(buf); return err })
		if err == unix.ERANGE && size < 1<<20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// nameFinder finds all names of an inode in a subvolume.
type nameFinder struct {
	root *os.File
	dirs map[uint64]string // paths of directories met
}

func newNameFinder(root *os.File) *nameFinder {
	return &nameFinder{root: root, dirs: map[uint64]string{rootInode: ""}}
}

// names returns the paths of an inode, none if it is not there. It reads the
// references of the inode and of its directories, because BTRFS_IOC_INO_PATHS
// returns 4 KiB at most.
func (f *nameFinder) names(ino uint64) ([]string, error) {
	var out []string
	refs, err := f.refs(ino)
	if err != nil {
		return nil, err
	}
	for _, r := range refs {
		dir, err := f.dir(r.dir, 0)
		if err != nil {
			return nil, err
		}
		out = append(out, join(dir, r.name))
	}
	return out, nil
}

func (f *nameFinder) dir(ino uint64, depth int) (string, error) {
	if p, ok := f.dirs[ino]; ok {
		return p, nil
	}
	refs, err := f.refs(ino)
	if err != nil {
		return "", err
	}
	if len(refs) != 1 || depth > 1<<16 {
		return "", fmt.Errorf("directory %d of %s has %d names", ino, f.root.Name(), len(refs))
	}
	up, err := f.dir(refs[0].dir, depth+1)
	if err != nil {
		return "", err
	}
	p := join(up, refs[0].name)
	f.dirs[ino] = p
	return p, nil
}

type inodeRef struct {
	dir  uint64
	name string
}

func (f *nameFinder) refs(ino uint64) ([]inodeRef, error) {
	var out []inodeRef
	r := Range{Min: Key{ino, itemInodeRef, 0}, Max: Key{ino, itemInodeExtref, ^uint64(0)}}
	for item, err := range search(f.root, 0, r, 4<<10) {
		if err != nil {
			return nil, err
		}
		// struct btrfs_inode_ref: index, name_len, name; the key has the directory.
		// struct btrfs_inode_extref: parent, index, name_len, name.
		for d := item.Data; len(d) > 0; {
			dir, head := item.Offset, 10
			if item.Type == itemInodeExtref {
				head = 18
			}
			if len(d) < head {
				return nil, fmt.Errorf("reference of inode %d has %d bytes", ino, len(d))
			}
			if item.Type == itemInodeExtref {
				dir = le64(d)
			}
			end := head + int(le16(d[head-2:]))
			if len(d) < end {
				return nil, fmt.Errorf("reference of inode %d has %d bytes", ino, len(d))
			}
			out = append(out, inodeRef{dir, string(d[head:end])})
			d = d[end:]
		}
	}
	return out, nil
}
