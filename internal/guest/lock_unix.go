//go:build unix

package guest

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Lock waits until no other run fills the cache. The kernel drops the lock if
// the process dies.
func (c *Cache) Lock() (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return f.Close, nil
}
