package sys

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// The xattr calls below act on entry name of directory dirfd and never follow
// a symlink there; with an empty name they act on what dirfd itself is, which
// may be open with O_PATH. They go through /proc/self/fd because the calls
// that take a directory (setxattrat and its kind) came only with Linux 6.13.

// entryPath returns a path to entry name of dirfd.
func entryPath(dirfd int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
}

func selfPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// GetxattrAt reads one xattr into buf and returns its length; an empty buf
// asks for the length only. The error is an *os.PathError.
func GetxattrAt(dirfd int, name, attr string, buf []byte) (n int, err error) {
	for {
		if name == "" {
			n, err = unix.Getxattr(selfPath(dirfd), attr, buf)
		} else {
			n, err = unix.Lgetxattr(entryPath(dirfd, name), attr, buf)
		}
		if err != unix.EINTR {
			return n, pathError("getxattr "+attr, name, err)
		}
	}
}

// SetxattrAt writes one xattr. flags are those of setxattr(2).
func SetxattrAt(dirfd int, name, attr string, value []byte, flags int) (err error) {
	for {
		if name == "" {
			err = unix.Setxattr(selfPath(dirfd), attr, value, flags)
		} else {
			err = unix.Lsetxattr(entryPath(dirfd, name), attr, value, flags)
		}
		if err != unix.EINTR {
			return pathError("setxattr "+attr, name, err)
		}
	}
}

// RemovexattrAt removes one xattr.
func RemovexattrAt(dirfd int, name, attr string) (err error) {
	for {
		if name == "" {
			err = unix.Removexattr(selfPath(dirfd), attr)
		} else {
			err = unix.Lremovexattr(entryPath(dirfd, name), attr)
		}
		if err != unix.EINTR {
			return pathError("removexattr "+attr, name, err)
		}
	}
}

// ListxattrAt fills buf with NUL-terminated names and returns their length.
func ListxattrAt(dirfd int, name string, buf []byte) (n int, err error) {
	for {
		if name == "" {
			n, err = unix.Listxattr(selfPath(dirfd), buf)
		} else {
			n, err = unix.Llistxattr(entryPath(dirfd, name), buf)
		}
		if err != unix.EINTR {
			return n, pathError("listxattr", name, err)
		}
	}
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
