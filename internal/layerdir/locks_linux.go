package layerdir

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// lockFile locks ranges of a file with open file description locks
// (fcntl(2), F_OFD_SETLK, Linux 3.15).
//
// It keeps a bare descriptor: the finalizer of an os.File would drop the holds
// of a driver that was closed while it held layers.
type lockFile struct {
	path string
	fd   int
}

func (l *lockFile) open(path string) (err error) {
	l.path = path
	for {
		l.fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return errPath("open", path, err)
	}
	return nil
}

// tryLock locks a range, or changes the kind of its own lock, unless another
// open file stands in the way.
func (l *lockFile) tryLock(start, length int64, exclusive bool) (bool, error) {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: start, Len: length}
	if exclusive {
		lk.Type = unix.F_WRLCK
	}
	err := l.fcntl(unix.F_OFD_SETLK, &lk)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	return err == nil, err
}

// unlock cannot fail for a range and a file that are right.
func (l *lockFile) unlock(start, length int64) {
	lk := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart, Start: start, Len: length}
	_ = l.fcntl(unix.F_OFD_SETLK, &lk)
}

// probe reports whether another open file has a lock in the range.
func (l *lockFile) probe(start, length int64) (bool, error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: start, Len: length}
	if err := l.fcntl(unix.F_OFD_GETLK, &lk); err != nil {
		return false, err
	}
	return lk.Type != unix.F_UNLCK, nil
}

func (l *lockFile) fcntl(cmd int, lk *unix.Flock_t) error {
	for {
		err := unix.FcntlFlock(uintptr(l.fd), cmd, lk)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return errPath("fcntl", l.path, err)
		}
	}
}

func (l *lockFile) close() error {
	if err := unix.Close(l.fd); err != nil {
		return errPath("close", l.path, err)
	}
	return nil
}
