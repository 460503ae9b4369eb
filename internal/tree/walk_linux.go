package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Entry is one file that [Walk] met. It is valid during the callback only.
type Entry struct {
	Path string // below the root, slash-separated; empty for the root
	Name string // last component of Path
	Dir  int    // descriptor of the directory that holds Name; -1 for the root
	Self int    // descriptor of the directory itself; -1 if it is none
	Stat unix.Stat_t
}

// IsDir reports whether e is a directory.
func (e *Entry) IsDir() bool { return e.Self >= 0 }

// Walk calls fn for root and everything below it in the order of
// [layerfs.ComparePaths]: a directory right before its contents, names by
// their bytes. A symlink is an entry and is never followed, also if one is put
// in the place of a directory during the walk; root itself may be one.
//
// If fn returns [fs.SkipDir] for a directory, its contents are left out; any
// other error ends the walk and is returned. An entry that disappears during
// the walk is left out. The context is checked for each entry.
//
// Walk keeps one descriptor for each level and the names of one directory for
// each level.
func Walk(ctx context.Context, root string, fn func(*Entry) error) error {
	fd, err := sys.Openat(unix.AT_FDCWD, root, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	e := Entry{Dir: -1, Self: fd}
	if err := unix.Fstat(fd, &e.Stat); err != nil {
		unix.Close(fd)
		return &os.PathError{Op: "fstat", Path: root, Err: err}
	}
	w := walker{ctx: ctx, fn: fn, buf: make([]byte, 32<<10)}
	return w.dir(&e)
}

type walker struct {
	ctx context.Context
	fn  func(*Entry) error
	buf []byte
}

// dir visits a directory and closes its descriptor.
func (w *walker) dir(e *Entry) error {
	fd, path := e.Self, e.Path
	defer unix.Close(fd)
	if err := w.fn(e); err != nil {
		if errors.Is(err, fs.SkipDir) {
			return nil
		}
		return err
	}
	names, err := w.names(fd, path)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.entry(fd, path, name); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) entry(dir int, parent, name string) error {
	e := Entry{Path: below(parent, name), Name: name, Dir: dir, Self: -1}
	if err := unix.Fstatat(dir, name, &e.Stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return gone("fstatat", e.Path, err)
	}
	if e.Stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return w.fn(&e)
	}
	fd, err := openDir(dir, name)
	if err != nil {
		return gone("openat", e.Path, err)
	}
	// The name may have got another directory since.
	if err := unix.Fstat(fd, &e.Stat); err != nil {
		unix.Close(fd)
		return gone("fstat", e.Path, err)
	}
	e.Self = fd
	return w.dir(&e)
}

func (w *walker) names(fd int, path string) ([]string, error) {
	var names []string
	for {
		n, err := sys.Getdents(fd, w.buf)
		if err != nil {
			return nil, &os.PathError{Op: "getdents", Path: path, Err: err}
		}
		if n == 0 {
			slices.Sort(names)
			return names, nil
		}
		for list := sys.Dirents(w.buf[:n]); ; {
			d, ok, err := list.Next()
			if err != nil {
				return nil, &os.PathError{Op: "getdents", Path: path, Err: err}
			}
			if !ok {
				break
			}
			names = append(names, string(d.Name))
		}
	}
}

// gone makes a *PathError of err, or nil if the entry was removed during the walk.
func gone(op, path string, err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		op, err = pe.Op, pe.Err
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

func below(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "/" + name
}

// openDir opens a directory for reading, not following a symlink.
func openDir(dir int, name string) (int, error) {
	return sys.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}
