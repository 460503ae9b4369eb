//go:build !linux

package layerdir

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// folder is a directory of the state; see its form for Linux.
type folder struct {
	path string
}

func openFolder(path string) (folder, error) { return folder{path}, nil }

func (f folder) close() error { return nil }

func (f folder) at(name string) string { return filepath.Join(f.path, name) }

// append adds to a file, which need not exist, and returns its size then.
func (f folder) append(name, data string) (size int64, err error) {
	file, err := os.OpenFile(f.at(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	if _, err = file.WriteString(data); err == nil {
		size, err = file.Seek(0, io.SeekEnd)
	}
	if cerr := file.Close(); err == nil {
		err = cerr
	}
	return size, err
}

// rename moves an entry to another folder.
func (f folder) rename(name string, to folder) error { return os.Rename(f.at(name), to.at(name)) }

// unlink removes a file; a missing one is no error.
func (f folder) unlink(name string) error {
	if err := os.Remove(f.at(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// stamp tells one state of a file that is replaced and not rewritten from
// another.
type stamp struct {
	info fs.FileInfo
}

func (s stamp) same(t stamp) bool {
	return os.SameFile(s.info, t.info) && s.info.ModTime().Equal(t.info.ModTime()) && s.info.Size() == t.info.Size()
}

func (stamp) unfinished() bool { return false }

// settled goes by a file system of whole seconds.
func (s stamp) settled(bool) bool { return s.info.ModTime().Before(wall().Add(-settled)) }

func (f folder) stat(name string) (stamp, error) {
	fi, err := os.Lstat(f.at(name))
	return stamp{fi}, err
}

// read returns the content of a file.
func (f folder) read(name string) ([]byte, error) { return os.ReadFile(f.at(name)) }

// names lists the entries of a directory in the folder, or of "." itself.
func (f folder) names(name string) ([]string, error) {
	dir, err := os.Open(f.at(name))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// state tells whether a directory has changed; that is not asked here.
type state struct{}

func (state) before(time.Time) bool { return false }

func (state) fine() bool { return false }

func (f folder) state() (state, bool) { return state{}, false }

func (f folder) few(int) map[string]bool { return nil }

// noSpace and settle are for file systems of Linux.
func noSpace(error) bool { return false }

func (f folder) settle() error { return errors.ErrUnsupported }

// sync makes the names in the folder durable.
func (f folder) sync() error { return syncDir(f.path) }

// replace puts a file with this content under a name in one step, by way of a
// temporary name.
func (f folder) replace(name, temp string, data []byte, how durability) (_ stamp, err error) {
	if err := writeNew(f.at(temp), data, how != volatile); err != nil {
		return stamp{}, errors.Join(err, f.unlink(temp))
	}
	if err := os.Rename(f.at(temp), f.at(name)); err != nil {
		_ = f.unlink(temp) // what went wrong first is what is told
		return stamp{}, err
	}
	if how != volatile {
		if err := f.sync(); err != nil {
			return stamp{}, err
		}
	}
	return f.stat(name)
}

func writeNew(path string, data []byte, sync bool) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// add is for the file systems of newNames.
func (f folder) add(name string, data []byte, sync bool) (stamp, error) {
	return stamp{}, errors.ErrUnsupported
}

func (f folder) finish(string) error { return errors.ErrUnsupported }

// newNames is known of file systems of Linux only.
func newNames(string) bool { return false }

// inOrder is known of file systems of Linux only.
func inOrder(string) bool { return false }
