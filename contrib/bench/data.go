package main

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lifecycleRoot returns an empty directory on the file system that the job
// asks for. The mount ends with this process's mount namespace.
func lifecycleRoot(ctx context.Context, j *job) (string, error) {
	if !j.Ext4 {
		return j.Dir, nil
	}
	image, dir := filepath.Join(j.Dir, "image"), filepath.Join(j.Dir, "ext4")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return "", err
	}
	if err := unix.Truncate(image, 1<<30); err != nil {
		return "", err
	}
	// Not lazily: the kernel's own initialising would go on meanwhile.
	if err := command(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image); err != nil {
		return "", err
	}
	return dir, command(ctx, "mount", "-o", "loop", image, dir)
}

// changedFile is the one file that two copies of the small layer differ in.
const changedFile = "page-00000.html"

// changeOne changes the content of one file of the small layer's copy.
func changeOne(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, "usr/share/doc/package-0000/part-0", changedFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("changed\n")
	return errors.Join(err, f.Close())
}

// generateTar writes n files of 16 bytes, a hundred in each directory.
func generateTar(name string, n int) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil // made for another task
	}
	if err != nil {
		return err
	}
	defer f.Close()
	buf := bufio.NewWriterSize(f, 1<<20)
	w := tar.NewWriter(buf)
	when := time.Unix(1_700_000_000, 0)
	for i := range n {
		if i%100 == 0 {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%04d/", i/100), Mode: 0o755, ModTime: when}); err != nil {
				return err
			}
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%04d/f%02d", i/100, i%100), Mode: 0o644, Size: 16, ModTime: when}); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "file %010d\n", i); err != nil {
			return err
		}
	}
	if err := errors.Join(w.Close(), buf.Flush()); err != nil {
		return err
	}
	return f.Close()
}
