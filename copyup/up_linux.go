//go:build !layerfs_portable

package copyup

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

const lookup = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW

// copyUp goes down the components of path with one descriptor in upper and one
// in each lower that still has the directory.
func copyUp(ctx context.Context, upper string, lowers []string, path string, opts *Options) error {
	up, err := sys.Openat(unix.AT_FDCWD, upper, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { unix.Close(up) }()
	var low []int // open directories, the topmost first
	defer func() { closeAll(low) }()
	for _, l := range lowers {
		fd, err := sys.Openat(unix.AT_FDCWD, l, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		low = append(low, fd)
	}
	c := newCopier(ctx, opts)
	rest := path
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		name, tail, more := strings.Cut(rest, "/")
		rest = tail
		if err := c.upEntry(up, low, name, more); err != nil {
			return at(strings.TrimSuffix(path[:len(path)-len(rest)], "/"), err)
		}
		if !more {
			return nil
		}
		next, err := sys.Openat(up, name, lookup, 0)
		if err != nil {
			return err
		}
		unix.Close(up)
		up = next
		if low, err = descend(low, name); err != nil {
			return err
		}
	}
}

// upEntry makes entry name in directory up if it is missing there.
func (c *copier) upEntry(up int, low []int, name string, dir bool) error {
	var before unix.Stat_t
	if err := unix.Fstatat(up, name, &before, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		return nil
	} else if err != unix.ENOENT {
		return os.NewSyscallError("fstatat", err)
	}
	if err := unix.Fstat(up, &before); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	for _, l := range low {
		var st unix.Stat_t
		err := unix.Fstatat(l, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return os.NewSyscallError("fstatat", err)
		}
		if dir && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return unix.ENOTDIR
		}
		err = c.publish(up, name, l, name)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		// The copy is not a change of the union: the directory looks as
		// it did.
		return os.NewSyscallError("futimens", sys.Futimens(up, before.Atim, before.Mtim))
	}
	return unix.ENOENT
}

// descend replaces directories by their children of that name, and closes
// those that have none. Below something else than a directory, nothing is
// visible.
func descend(dirs []int, name string) ([]int, error) {
	next := dirs[:0]
	for i, dir := range dirs {
		fd, err := sys.Openat(dir, name, lookup, 0)
		unix.Close(dir)
		switch {
		case err == nil:
			next = append(next, fd)
		case errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			closeAll(dirs[i+1:])
			return next, nil
		default:
			closeAll(dirs[i+1:])
			return next, err
		}
	}
	return next, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// at says which path an error is about.
func at(path string, err error) error {
	if err == nil {
		return nil
	}
	op := "copy"
	var pe *os.PathError
	var se *os.SyscallError
	switch {
	case errors.As(err, &pe) && pe == err:
		op, err = pe.Op, pe.Err
	case errors.As(err, &se) && error(se) == err:
		op, err = se.Syscall, se.Err
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
