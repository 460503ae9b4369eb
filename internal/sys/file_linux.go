package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// WriteFile makes or truncates a file and syncs it if told to. It is
// os.WriteFile without the calls that prepare a descriptor for polling.
func WriteFile(path string, data []byte, mode uint32, sync bool) error {
	fd, err := Openat(unix.AT_FDCWD, path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, mode)
	if err != nil {
		return err
	}
	op, err := "write", writeAll(fd, data)
	if err == nil && sync {
		op, err = "fsync", unix.Fsync(fd)
	}
	if cerr := unix.Close(fd); err == nil && cerr != nil {
		op, err = "close", cerr
	}
	if err != nil {
		return &os.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
