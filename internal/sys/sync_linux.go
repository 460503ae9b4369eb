package sys

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Fsync makes a file or the names in a directory durable; a link at path is
// followed. It is (*os.File).Sync without the calls that prepare a descriptor
// for polling.
func Fsync(path string) error { return syncBy("fsync", path, unix.Fsync) }

// Syncfs writes back the whole file system that path is on (syncfs(2); errors
// of earlier writes are reported from Linux 5.8 on). It costs what is dirty
// there, whoever wrote it.
func Syncfs(path string) error { return syncBy("syncfs", path, unix.Syncfs) }

func syncBy(op, path string, sync func(int) error) error {
	fd, err := Openat(unix.AT_FDCWD, path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	for {
		if err = sync(fd); err != unix.EINTR {
			break
		}
	}
	return errors.Join(pathError(op, path, err), pathError("close", path, unix.Close(fd)))
}
