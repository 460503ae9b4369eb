package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Futimens sets access and modification time of an open file, utimensat(2)
// with a NULL path. It spares the lookup that a path costs. The error is a
// bare errno: it is called once for each file that is unpacked.
func Futimens(fd int, atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}
