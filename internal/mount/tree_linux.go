package mount

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Open mounts the overlay nowhere and returns its root. The mount ends when
// the file is closed; no crash can leave it behind. The tree is walked through
// the descriptor, or through "/proc/self/fd/N".
//
// Without the new mount API it is mounted for a moment in a directory made in
// the system's temporary directory.
func (o *Overlay) Open() (*os.File, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	source := o.Source
	if source == "" {
		source = "overlay"
	}
	if o.Method == Auto || o.Method == NewAPI {
		root, err := o.openNew(source)
		if err == nil || o.Method == NewAPI || !declines(err) {
			return root, err
		}
	}
	return o.openAttached()
}

func (o *Overlay) openNew(source string) (*os.File, error) {
	c, err := o.context(source)
	if err != nil {
		return nil, err
	}
	defer c.close()
	fd, err := c.detached(o.Flags)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), source), nil
}

func (o *Overlay) openAttached() (_ *os.File, err error) {
	dir, err := os.MkdirTemp("", "overlay")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	at := filepath.Join(dir, "root")
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(at)) }()
	if err := o.Mount(at); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY, 0)
	return f, errors.Join(err, Unmount(at))
}
