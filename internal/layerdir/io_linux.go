package layerdir

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// A life of a layer is a few dozen system calls here; package os would make it
// twice as many (descriptors are put into non-blocking mode and back, Rename
// and Remove look before they act).

// create makes an empty file, which may exist.
func create(path string) error {
	err := unix.Mknod(path, unix.S_IFREG|0o600, 0)
	if err == nil || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return errPath("mknod", path, err)
}

// writeNew makes or truncates a file.
func writeNew(path string, data []byte, sync bool) error {
	return sys.WriteFile(path, data, 0o600, sync)
}

func rename(from, to string) error {
	if err := unix.Rename(from, to); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// unlink removes a file; a missing one is no error.
func unlink(path string) error {
	if err := unix.Unlink(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errPath("unlink", path, err)
	}
	return nil
}

// rmdir removes a directory if it is there and empty.
func rmdir(path string) { _ = unix.Rmdir(path) }
