package testenv

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Labels returns the SELinux labels in a tree and how many files have each, "" for
// none. Without SELinux in the kernel they are xattrs as others.
func Labels(tb testing.TB, dir string) map[string]int {
	tb.Helper()
	found := map[string]int{}
	buf := make([]byte, 256)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n, err := unix.Lgetxattr(path, "security.selinux", buf)
		if errors.Is(err, unix.ENODATA) {
			n, err = 0, nil
		}
		if err == nil {
			found[string(buf[:n])]++
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return found
}
