package sys

import "golang.org/x/sys/unix"

// Calls that take bare descriptors are for walks that make several
// of them for each of very many files, where an *os.File would cost more than
// the call itself.

// Openat opens entry name of directory dirfd, close-on-exec, and retries
// EINTR. The error is an *os.PathError.
func Openat(dirfd int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dirfd, name, flags|unix.O_CLOEXEC, mode)
		if err == unix.EINTR {
			continue
		}
		return fd, pathError("openat", name, err)
	}
}
