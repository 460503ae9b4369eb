package sys

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mincore tells for each page of a mapping whether it is in memory: the lowest
// bit of its byte. For the pages of a file the caller must be able to write it
// or own it; otherwise all seem to be there (Linux 5.2, commit 134fca9063ad).
func Mincore(m []byte) ([]byte, error) {
	if len(m) == 0 {
		return nil, nil
	}
	page := os.Getpagesize()
	vec := make([]byte, (len(m)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&vec[0])))
	runtime.KeepAlive(m)
	if errno != 0 {
		return nil, os.NewSyscallError("mincore", errno)
	}
	return vec, nil
}
