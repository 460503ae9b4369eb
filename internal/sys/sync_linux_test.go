package sys

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSync: roots may be links, and errors name the call and the path.
func TestSync(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(file, []byte("x"), 0o644), os.Symlink(".", link)); err != nil {
		t.Fatal(err)
	}
	for _, sync := range []func(string) error{Fsync, Syncfs} {
		for _, path := range []string{dir, file, link, filepath.Join(link, "file")} {
			if err := sync(path); err != nil {
				t.Error(err)
			}
		}
		gone := filepath.Join(dir, "gone")
		var perr *fs.PathError
		if err := sync(gone); !errors.As(err, &perr) || perr.Path != gone || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", gone, err)
		}
	}
	var perr *fs.PathError
	if err := Fsync("/proc/self/mem"); !errors.As(err, &perr) || perr.Op != "fsync" || !errors.Is(err, unix.EINVAL) {
		t.Errorf("a file that has nothing to sync: %v", err)
	}
}
