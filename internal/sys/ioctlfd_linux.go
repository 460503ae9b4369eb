package sys

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IoctlFD is [Ioctl] on a bare descriptor, for those who open one for a call or
// two: an *os.File would cost as much as the call. path is for the error.
func IoctlFD[T any](fd int, path, name string, req uint, arg *T) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(arg)))
		runtime.KeepAlive(arg)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return &os.PathError{Op: name, Path: path, Err: errno}
	}
}
