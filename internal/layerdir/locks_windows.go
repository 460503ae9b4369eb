package layerdir

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/windows"
)

// lockFile locks ranges of a file with LockFileEx, whose locks belong to the
// handle. They exclude the handle's own second lock too, so what it has is
// remembered. Only single bytes are locked.
type lockFile struct {
	path string
	file *os.File

	mu  sync.Mutex
	own map[int64]bool // guarded by mu
}

func (l *lockFile) open(path string) (err error) {
	l.path = path
	l.own = make(map[int64]bool)
	l.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	return err
}

func (l *lockFile) tryLock(start, _ int64, exclusive bool) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.own[start] {
		return true, nil
	}
	ok, err := l.take(start, exclusive)
	if ok {
		l.own[start] = true
	}
	return ok, err
}

func (l *lockFile) unlock(start, _ int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.own[start] {
		l.give(start)
		delete(l.own, start)
	}
}

// probe takes and gives back each byte. It is called under the layer's lock,
// so nobody can slip in between where it gives up its own for a moment.
func (l *lockFile) probe(start, length int64) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for b := start; b < start+length; b++ {
		if l.own[b] {
			l.give(b)
		}
		ok, err := l.take(b, true)
		if ok {
			l.give(b)
		}
		if l.own[b] {
			if again, aerr := l.take(b, false); aerr != nil || !again {
				return true, errors.Join(err, aerr)
			}
		}
		if err != nil || !ok {
			return !ok, err
		}
	}
	return false, nil
}

func (l *lockFile) take(b int64, exclusive bool) (bool, error) {
	flags := uint32(windows.LOCKFILE_FAIL_IMMEDIATELY)
	if exclusive {
		flags |= windows.LOCKFILE_EXCLUSIVE_LOCK
	}
	err := windows.LockFileEx(windows.Handle(l.file.Fd()), flags, 0, 1, 0, overlapped(b))
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
		return false, nil
	}
	if err != nil {
		return false, errPath("LockFileEx", l.path, err)
	}
	return true, nil
}

func (l *lockFile) give(b int64) {
	_ = windows.UnlockFileEx(windows.Handle(l.file.Fd()), 0, 1, 0, overlapped(b))
}

func overlapped(b int64) *windows.Overlapped {
	return &windows.Overlapped{Offset: uint32(b), OffsetHigh: uint32(b >> 32)}
}

func (l *lockFile) close() error { return l.file.Close() }
