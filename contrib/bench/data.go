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

// workRoot returns an empty directory on the file system that the job asks
// for. The mount ends with this process's mount namespace.
func workRoot(ctx context.Context, j *job) (string, error) {
	if j.FS == "" {
		return j.Dir, nil
	}
	image, dir := filepath.Join(j.Dir, "image"), filepath.Join(j.Dir, "fs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return "", err
	}
	if err := unix.Truncate(image, 1<<30); err != nil {
		return "", err
	}
	args := []string{"-q", image}
	if j.FS == "ext4" {
		// Not lazily: the kernel's own initialising would go on meanwhile.
		args = []string{"-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image}
	}
	if err := command(ctx, "mkfs."+j.FS, args...); err != nil {
		return "", err
	}
	return dir, command(ctx, "mount", "-o", "loop", image, dir)
}

// copySource returns an empty directory and a tree to copy, on one file system.
func copySource(ctx context.Context, j *job) (root, tree string, err error) {
	root, err = workRoot(ctx, j)
	if err != nil || j.FS == "" {
		return root, j.Tree, err
	}
	tree = filepath.Join(root, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", "", err
	}
	return root, tree, command(ctx, "tar", tarExtract(j.Tar, tree)...)
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
