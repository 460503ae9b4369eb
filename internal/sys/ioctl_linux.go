package sys

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The direction bits of an ioctl number, asm-generic/ioctl.h.
const (
	iocWrite = 1
	iocRead  = 2
)

// IO returns _IO(typ, nr).
func IO(typ, nr uint) uint { return typ<<8 | nr }

// IOW returns _IOW(typ, nr, T).
func IOW[T any](typ, nr uint) uint { return ioc[T](iocWrite, typ, nr) }

// IOR returns _IOR(typ, nr, T).
func IOR[T any](typ, nr uint) uint { return ioc[T](iocRead, typ, nr) }

// IOWR returns _IOWR(typ, nr, T).
func IOWR[T any](typ, nr uint) uint { return ioc[T](iocRead|iocWrite, typ, nr) }

func ioc[T any](dir, typ, nr uint) uint {
	var t T
	return dir<<30 | uint(unsafe.Sizeof(t))<<16 | typ<<8 | nr
}

// Ioctl calls ioctl(2) with a pointer to arg and retries EINTR. The error is
// an *os.PathError whose Op is name.
func Ioctl[T any](f *os.File, name string, req uint, arg *T) error {
	err := IoctlFD(int(f.Fd()), f.Name(), name, req, arg)
	runtime.KeepAlive(f)
	return err
}

// IoctlFD is [Ioctl] on a bare descriptor, for those who open one for a call or
// two: an *os.File would cost as much as the call. path is for the error.
func IoctlFD[T any](fd int, path, name string, req uint, arg *T) error {
	return ioctl(path, name, func() unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(arg)))
		return errno
	})
}

// IoctlInt calls ioctl(2) with a plain number.
func IoctlInt(f *os.File, name string, req uint, arg int) error {
	err := ioctl(f.Name(), name, func() unix.Errno {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg))
		return errno
	})
	runtime.KeepAlive(f)
	return err
}

// IoctlBytes calls ioctl(2) with a pointer to the first byte of a buffer that
// holds a header with data behind it. The buffer must not be empty.
func IoctlBytes(f *os.File, name string, req uint, buf []byte) error {
	return Ioctl(f, name, req, unsafe.SliceData(buf))
}

func ioctl(path, name string, call func() unix.Errno) error {
	for {
		switch errno := call(); errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		default:
			return &os.PathError{Op: name, Path: path, Err: errno}
		}
	}
}

// View reads the bytes of buf as a T without copying. It panics if buf is too
// short, which is a bug of the caller: lengths are checked before.
func View[T any](buf []byte) *T {
	var t T
	_ = buf[:unsafe.Sizeof(t)]
	return (*T)(unsafe.Pointer(unsafe.SliceData(buf)))
}

// SizeOf returns the size of T as the kernel sees it.
func SizeOf[T any]() int {
	var t T
	return int(unsafe.Sizeof(t))
}
