package union

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
)

// FS is a merged tree as an [io/fs.FS]. Symbolic links are followed within the
// tree, absolute ones from its root. Its methods are safe for concurrent use.
type FS struct{ u *unionfs.FS }

var (
	_ fs.ReadDirFS  = (*FS)(nil)
	_ fs.StatFS     = (*FS)(nil)
	_ fs.ReadFileFS = (*FS)(nil)
	_ fs.ReadLinkFS = (*FS)(nil)
)

// NewFS opens a merged tree, top branch first. It writes to no branch,
// whatever its permission, so RW means ROWH here. Close releases it.
func NewFS(branches ...Branch) (*FS, error) {
	ec, err := (&Config{Branches: branches}).engine()
	if err != nil {
		return nil, err
	}
	for i := range ec.Branches {
		if ec.Branches[i].Perm == unionfs.RW {
			ec.Branches[i].Perm = unionfs.ROWH
		}
	}
	u, _, err := unionfs.Open(ec)
	if err != nil {
		return nil, err
	}
	return &FS{u}, nil
}

// Close releases the tree. Open files go on.
func (f *FS) Close() error { return f.u.Close() }

// maxLinks is the kernel's MAXSYMLINKS.
const maxLinks = 40

// walk finds name and calls do with its node and attributes. follow: also
// a link in the last place.
func (f *FS) walk(op, name string, follow bool, do func(*unionfs.Node, *unix.Stat_t) error) error {
	if !fs.ValidPath(name) {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	err := f.resolve(name, follow, do)
	if err != nil && !errors.As(err, new(*fs.PathError)) {
		err = &fs.PathError{Op: op, Path: name, Err: err}
	}
	return err
}

func (f *FS) resolve(name string, follow bool, do func(*unionfs.Node, *unix.Stat_t) error) error {
	// held are the nodes from the root down.
	held := []*unionfs.Node{f.u.Root()}
	defer func() {
		for _, n := range held[1:] {
			f.u.Forget(n, 1)
		}
	}()
	var st unix.Stat_t
	if err := f.u.GetAttr(held[0], &st); err != nil {
		return err
	}
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		at := held[len(held)-1]
		switch c {
		case "", ".":
			continue
		case "..":
			if len(held) > 1 {
				f.u.Forget(at, 1)
				held = held[:len(held)-1]
			}
			continue
		}
		if !at.IsDir() {
			return unix.ENOTDIR
		}
		n, err := f.u.Lookup(at, c, &st)
		if err == unix.EPERM {
			err = unix.ENOENT // a reserved name
		}
		if err != nil {
			return err
		}
		if n.Type() != unix.S_IFLNK || (len(todo) == 0 && !follow) {
			held = append(held, n)
			continue
		}
		target, err := f.u.Readlink(n)
		f.u.Forget(n, 1)
		if err != nil {
			return err
		}
		if links++; links > maxLinks {
			return unix.ELOOP
		}
		if strings.HasPrefix(target, "/") {
			for _, n := range held[1:] {
				f.u.Forget(n, 1)
			}
			held = held[:1]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	last := held[len(held)-1]
	if err := f.u.GetAttr(last, &st); err != nil {
		return err
	}
	return do(last, &st)
}

// Open opens a file or directory. Devices, fifos and sockets can be examined,
// but not read.
func (f *FS) Open(name string) (fs.File, error) {
	var out fs.File
	err := f.walk("open", name, true, func(n *unionfs.Node, st *unix.Stat_t) error {
		fi := newInfo(path.Base(name), st)
		switch n.Type() {
		case unix.S_IFDIR:
			out = &dir{f: f, name: name, info: fi}
		case unix.S_IFREG:
			uf, err := f.u.OpenFile(n, unix.O_RDONLY, false)
			if err != nil {
				return err
			}
			defer uf.Close()
			fd, err := unix.FcntlInt(uintptr(uf.FD()), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return err
			}
			out = &file{File: os.NewFile(uintptr(fd), name), info: fi}
		default:
			out = &special{name, fi}
		}
		return nil
	})
	return out, err
}

// Stat describes a file, following links.
func (f *FS) Stat(name string) (fs.FileInfo, error) { return f.stat("stat", name, true) }

// Lstat describes a file, links themselves.
func (f *FS) Lstat(name string) (fs.FileInfo, error) { return f.stat("lstat", name, false) }

func (f *FS) stat(op, name string, follow bool) (out fs.FileInfo, err error) {
	err = f.walk(op, name, follow, func(_ *unionfs.Node, st *unix.Stat_t) error {
		out = newInfo(path.Base(name), st)
		return nil
	})
	return out, err
}

// ReadLink returns the target of a symbolic link.
func (f *FS) ReadLink(name string) (target string, err error) {
	err = f.walk("readlink", name, false, func(n *unionfs.Node, _ *unix.Stat_t) error {
		target, err = f.u.Readlink(n)
		return err
	})
	return target, err
}

// ReadFile reads a whole file.
func (f *FS) ReadFile(name string) ([]byte, error) {
	o, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	return io.ReadAll(o)
}

// ReadDir lists a directory, sorted by name.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	var out []fs.DirEntry
	err := f.walk("readdir", name, true, func(n *unionfs.Node, _ *unix.Stat_t) error {
		if !n.IsDir() {
			return unix.ENOTDIR
		}
		ents, err := f.u.ReadDir(n, 0)
		if err != nil {
			return err
		}
		for i := range ents {
			e := &ents[i]
			out = append(out, &entry{f: f, name: e.Name, path: path.Join(name, e.Name), typ: fileMode(uint32(e.Type) << 12).Type()})
		}
		return nil
	})
	slices.SortFunc(out, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return out, err
}

type entry struct {
	f          *FS
	name, path string
	typ        fs.FileMode
}

func (e *entry) Name() string               { return e.name }
func (e *entry) IsDir() bool                { return e.typ.IsDir() }
func (e *entry) Type() fs.FileMode          { return e.typ }
func (e *entry) Info() (fs.FileInfo, error) { return e.f.Lstat(e.path) }
func (e *entry) String() string             { return fs.FormatDirEntry(e) }

type info struct {
	name string
	st   syscall.Stat_t
	mode fs.FileMode
}

func newInfo(name string, st *unix.Stat_t) *info {
	return &info{name: name, mode: fileMode(st.Mode), st: syscall.Stat_t{
		Dev: st.Dev, Ino: st.Ino, Nlink: st.Nlink, Mode: st.Mode, Uid: st.Uid, Gid: st.Gid, Rdev: st.Rdev,
		Size: st.Size, Blksize: st.Blksize, Blocks: st.Blocks,
		Atim: syscall.Timespec(st.Atim), Mtim: syscall.Timespec(st.Mtim), Ctim: syscall.Timespec(st.Ctim),
	}}
}

func (i *info) Name() string       { return i.name }
func (i *info) Size() int64        { return i.st.Size }
func (i *info) Mode() fs.FileMode  { return i.mode }
func (i *info) IsDir() bool        { return i.mode.IsDir() }
func (i *info) ModTime() time.Time { return time.Unix(int64(i.st.Mtim.Sec), int64(i.st.Mtim.Nsec)) }
func (i *info) String() string     { return fs.FormatFileInfo(i) }

// Sys returns a *syscall.Stat_t whose Ino and Nlink are those of the union.
func (i *info) Sys() any { return &i.st }

func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, t := range []struct {
		bits uint32
		mode fs.FileMode
	}{
		{unix.S_IFDIR, fs.ModeDir},
		{unix.S_IFLNK, fs.ModeSymlink},
		{unix.S_IFBLK, fs.ModeDevice},
		{unix.S_IFCHR, fs.ModeDevice | fs.ModeCharDevice},
		{unix.S_IFIFO, fs.ModeNamedPipe},
		{unix.S_IFSOCK, fs.ModeSocket},
	} {
		if m&unix.S_IFMT == t.bits {
			mode |= t.mode
		}
	}
	if m&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if m&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if m&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

// file is a regular file; reading is the branch file's.
type file struct {
	*os.File
	info *info
}

func (f *file) Stat() (fs.FileInfo, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	i := newInfo(f.info.name, &st)
	i.st.Ino, i.st.Nlink = f.info.st.Ino, f.info.st.Nlink
	return i, nil
}

type special struct {
	name string
	info *info
}

func (s *special) Stat() (fs.FileInfo, error) { return s.info, nil }
func (s *special) Close() error               { return nil }
func (s *special) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: s.name, Err: unix.ENXIO}
}

type dir struct {
	f    *FS
	name string
	info *info

	mu   sync.Mutex
	read bool
	rest []fs.DirEntry
}

func (d *dir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *dir) Close() error               { return nil }
func (d *dir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.name, Err: unix.EISDIR}
}

func (d *dir) ReadDir(n int) ([]fs.DirEntry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.read {
		ents, err := d.f.ReadDir(d.name)
		if err != nil {
			return nil, err
		}
		d.read, d.rest = true, ents
	}
	if n <= 0 {
		out := d.rest
		d.rest = nil
		return out, nil
	}
	if len(d.rest) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(d.rest))
	out := d.rest[:n:n]
	d.rest = d.rest[n:]
	return out, nil
}
