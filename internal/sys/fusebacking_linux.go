package sys

import (
	"os"
	"runtime"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fuseBackingMap is struct fuse_backing_map, linux/fuse.h 7.40.
type fuseBackingMap struct {
	_       structs.HostLayout
	fd      int32
	flags   uint32
	padding uint64
}

// FuseBackingOpen registers the open file fd as a backing file of the FUSE
// connection of dev, a descriptor of /dev/fuse, and returns its id
// (FUSE_DEV_IOC_BACKING_OPEN, Linux 6.9). It needs CAP_SYS_ADMIN in the
// initial user namespace.
func FuseBackingOpen(dev, fd int) (int32, error) {
	m := fuseBackingMap{fd: int32(fd)}
	for {
		id, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), uintptr(IOW[fuseBackingMap](229, 1)), uintptr(unsafe.Pointer(&m)))
		runtime.KeepAlive(&m)
		switch errno {
		case 0:
			return int32(id), nil
		case unix.EINTR:
			continue
		}
		return 0, &os.PathError{Op: "FUSE_DEV_IOC_BACKING_OPEN", Path: "/dev/fuse", Err: errno}
	}
}

// FuseBackingClose drops a registration (FUSE_DEV_IOC_BACKING_CLOSE). Files
// opened with it go on.
func FuseBackingClose(dev int, id int32) error {
	v := uint32(id)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), uintptr(IOW[uint32](229, 2)), uintptr(unsafe.Pointer(&v)))
	runtime.KeepAlive(&v)
	if errno != 0 {
		return &os.PathError{Op: "FUSE_DEV_IOC_BACKING_CLOSE", Path: "/dev/fuse", Err: errno}
	}
	return nil
}
