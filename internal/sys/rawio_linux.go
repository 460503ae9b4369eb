package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ReadNow is read(2) on a descriptor on which it does not wait (O_NONBLOCK, and
// no file system behind it). The runtime is not told of the call, which saves
// as much as a short call itself takes: its processor is not given away
// meanwhile, nor its monitor woken. EINTR is returned as it is.
func ReadNow(fd int, p []byte) (int, error) { return now(unix.SYS_READ, fd, p) }

// WriteNow is write(2), as ReadNow.
func WriteNow(fd int, p []byte) (int, error) { return now(unix.SYS_WRITE, fd, p) }

func now(call uintptr, fd int, p []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}
