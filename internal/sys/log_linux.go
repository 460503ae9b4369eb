package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// OpenLog opens a file to append to, and makes it if it is missing. One of more
// than limit bytes is put aside first, as path.old in place of what that was; if
// that cannot be, it grows on. A symbolic link is not followed (ELOOP).
func OpenLog(path string, limit int64) (*os.File, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() && fi.Size() > limit {
		_ = os.Rename(path, path+".old")
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
}
