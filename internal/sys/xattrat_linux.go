package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sysListxattrat is listxattrat(2) of Linux 6.13, the same number on all
// architectures we build for (include/uapi/asm-generic/unistd.h).
const sysListxattrat = 465

// Listxattrat lists the xattrs of name in an open directory without following
// a link. The error is a bare errno, ENOSYS before Linux 6.13 and EPERM under
// some seccomp filters.
func Listxattrat(dir int, name string, buf []byte) (int, error) {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	for {
		n, _, errno := unix.Syscall6(sysListxattrat, uintptr(dir), uintptr(unsafe.Pointer(p)), unix.AT_SYMLINK_NOFOLLOW,
			uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, errno
	}
}
