//go:build !linux && !windows

package layerdir

import (
	"errors"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// lockFile stands each byte of the range for a file of its own that is locked
// with flock(2), since the BSDs have no range locks that belong to an open
// file. The files are made on demand, in a directory, and stay.
type lockFile struct {
	path string

	mu    sync.Mutex
	files map[int64]*os.File // guarded by mu; the bytes this process has locked
}

func (l *lockFile) open(path string) error {
	l.path = path
	l.files = make(map[int64]*os.File)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// tryLock is only called for single bytes.
func (l *lockFile) tryLock(start, _ int64, exclusive bool) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.files[start]
	if f == nil {
		var err error
		if f, err = l.file(start); err != nil {
			return false, err
		}
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if err != nil {
		if l.files[start] == nil {
			f.Close()
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return false, errPath("flock", f.Name(), err)
	}
	l.files[start] = f
	return true, nil
}

func (l *lockFile) unlock(start, _ int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.files[start]; f != nil {
		f.Close()
		delete(l.files, start)
	}
}

// probe asks about the bytes that this process has not locked through a
// second open file, and about those it has through the lock of another.
func (l *lockFile) probe(start, length int64) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for b := start; b < start+length; b++ {
		own := l.files[b]
		f := own
		if own == nil {
			var err error
			if f, err = l.file(b); err != nil {
				return false, err
			}
		}
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if own == nil {
			f.Close()
		} else if rerr := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err == nil && rerr != nil {
			err = rerr
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			return true, nil
		}
		if err != nil {
			return false, errPath("flock", f.Name(), err)
		}
	}
	return false, nil
}

func (l *lockFile) file(b int64) (*os.File, error) {
	return os.OpenFile(l.path+"/"+strconv.FormatInt(b, 16), os.O_RDWR|os.O_CREATE, 0o600)
}

func (l *lockFile) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.files {
		f.Close()
	}
	l.files = nil
	return nil
}
