package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// hands does in a tree what programs in a container do.
type hands struct {
	root string
	done func(demoStep)
}

// work does one thing of each kind, as far as the tree has something to do it
// with.
func (h *hands) work(v victims) error {
	renamed := v.movedDir + "-renamed"
	steps := []struct {
		what, path string
		do         func(path string) error
	}{
		{"write a new file", "layerfs-demo/notes", func(p string) error {
			return os.WriteFile(p, []byte("made in a container\n"), 0o644)
		}},
		{fmt.Sprintf("append a byte to the largest file (%s)", humanBytes(v.size)), v.largest, appendByte},
		{"change a mode", v.attribute, func(p string) error { return os.Chmod(p, 0o640) }},
		{"delete a file", v.file, os.Remove},
		{"rename a file", v.moved, func(p string) error { return os.Rename(p, p+"-renamed") }},
		{"delete a directory", v.dir, removeAll},
		{"rename a directory", v.movedDir, func(p string) error {
			return move(p, filepath.Join(h.root, renamed))
		}},
	}
	for _, s := range steps {
		if s.path == "" {
			continue
		}
		path := filepath.Join(h.root, s.path)
		begin := time.Now()
		err := s.do(path)
		if errors.Is(err, fs.ErrPermission) {
			// Trees of the Go toolchain in the module cache are read-only, and
			// users other than root have to open them first.
			if err = open(path); err == nil {
				begin = time.Now()
				err = s.do(path)
			}
		}
		if err != nil {
			return err
		}
		h.done(demoStep{s.what, "/" + filepath.ToSlash(s.path), time.Since(begin)})
	}
	return nil
}

// open lets the owner write to a file or directory and to what holds it.
func open(path string) error {
	for _, p := range []string{filepath.Dir(path), path} {
		fi, err := os.Lstat(p)
		if err != nil {
			return err
		}
		if err := os.Chmod(p, fi.Mode().Perm()|0o200); err != nil {
			return err
		}
	}
	return nil
}

func appendByte(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("\n")
	return errors.Join(err, f.Close())
}

// removeAll is os.RemoveAll that does not begin with what it cannot end.
func removeAll(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if os.Geteuid() > 0 && fi.Mode().Perm()&0o200 == 0 {
		return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrPermission}
	}
	return os.RemoveAll(path)
}

// move renames a directory, or, where the file system cannot, copies and
// deletes it as mv(1) does.
func move(from, to string) error {
	err := os.Rename(from, to)
	if !crossDevice(err) {
		return err
	}
	fi, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, fi.Mode().Perm()); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries { // a directory with files only
		if err := copyFile(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return os.RemoveAll(from)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fi.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
