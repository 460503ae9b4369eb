package aufs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/whiteout"
)

// merged is the tree that AUFS would show of a stack of branches all of which
// may hold whiteouts, looked up in user space by its rules (aufs(5); design
// document 02struct, "lookup"). It never follows a symbolic link: what is
// looked up is always one component in an open directory.
type merged struct {
	roots []*os.File // of the branches, the top one first
}

// maxName is the longest name AUFS shows: a whiteout of a temporary name has
// to fit into 255 bytes.
const maxName = 242

// place is a file or directory in one branch.
type place struct {
	layer int
	path  string // from the branch's root, "." for the root itself
}

// node is what the merged tree has under one name.
type node struct {
	stat   unix.Stat_t
	places []place // of a directory: all that are merged, the top one first; else one
}

func (n *node) isDir() bool { return n.stat.Mode&unix.S_IFMT == unix.S_IFDIR }

func openMerged(dirs []string) (_ *merged, err error) {
	m := new(merged)
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	for _, d := range dirs {
		f, err := os.OpenFile(d, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		m.roots = append(m.roots, f)
	}
	return m, nil
}

func (m *merged) close() {
	for _, f := range m.roots {
		f.Close()
	}
}

// root returns the root of the tree that the branches from the given one make.
// An opaque mark in a root hides the branches below.
func (m *merged) root(from int) (*node, error) {
	n := new(node)
	for i := from; i < len(m.roots); i++ {
		n.places = append(n.places, place{i, "."})
		opaque, err := exists(m.roots[i], whiteout.OpaqueName)
		if err != nil {
			return nil, err
		}
		if opaque {
			break
		}
	}
	if len(n.places) == 0 {
		return n, nil
	}
	if err := unix.Fstat(int(m.roots[from].Fd()), &n.stat); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: m.roots[from].Name(), Err: err}
	}
	return n, nil
}

// directory is a merged directory that is open.
type directory struct {
	m    *merged
	open []openPlace
}

type openPlace struct {
	place
	file *os.File
}

// dir opens all places of a merged directory. Only one directory of a tree is
// open at a time: with hundreds of branches each is hundreds of descriptors.
func (m *merged) dir(places []place) (*directory, error) {
	d := &directory{m: m}
	for _, p := range places {
		f, err := m.openDir(p)
		if err != nil {
			d.close()
			return nil, err
		}
		d.open = append(d.open, openPlace{p, f})
	}
	return d, nil
}

func (d *directory) close() {
	for _, o := range d.open {
		o.file.Close()
	}
}

// openDir opens a directory component by component, so that a name that was
// made a link meanwhile is an error.
func (m *merged) openDir(p place) (*os.File, error) {
	at := int(m.roots[p.layer].Fd())
	name := path.Join(m.roots[p.layer].Name(), p.path)
	var last *os.File
	for part := range strings.SplitSeq(p.path, "/") {
		fd, err := openat(at, part, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if last != nil {
			last.Close()
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat", Path: name, Err: err}
		}
		last = os.NewFile(uintptr(fd), name)
		at = fd
	}
	return last, nil
}

func openat(at int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(at, name, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// names lists the names that those places of a directory tell of which are in
// branches above the given one, whiteouts by what they hide, sorted.
func (d *directory) names(above int) ([]string, error) {
	var all []string
	for _, o := range d.open {
		if o.layer >= above {
			break
		}
		// A second descriptor: reading moves the position of the first.
		fd, err := openat(int(o.file.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, &os.PathError{Op: "openat", Path: o.file.Name(), Err: err}
		}
		f := os.NewFile(uintptr(fd), o.file.Name())
		names, err := f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if whiteout.IsReserved(n) {
				base, ok, err := whiteout.Target(n)
				if !ok || err != nil || whiteout.IsReserved(base) {
					continue
				}
				n = base
			}
			if len(n) <= maxName {
				all = append(all, n)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// lookup finds a name in a merged directory; nil if it is not there. The search
// ends at a whiteout, at what is no directory, and below an opaque directory;
// what is no directory below one that is, is passed over.
func (d *directory) lookup(name string) (found *node, err error) {
	for _, o := range d.open {
		hidden, err := whitedOut(o.file, name)
		if err != nil {
			return nil, err
		}
		var st unix.Stat_t
		err = unix.Fstatat(int(o.file.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case errors.Is(err, unix.ENOENT):
			if hidden {
				return found, nil
			}
			continue
		case err != nil:
			return nil, &os.PathError{Op: "fstatat", Path: path.Join(o.file.Name(), name), Err: err}
		case hidden:
			return nil, &os.PathError{Op: "lookup", Path: path.Join(o.file.Name(), name), Err: fmt.Errorf("entry and whiteout of one name: %w", unix.EIO)}
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		where := place{o.layer, path.Join(o.path, name)}
		if found == nil {
			found = &node{stat: st, places: []place{where}}
			if !isDir {
				return found, nil
			}
		} else if !isDir {
			continue
		} else {
			found.places = append(found.places, where)
		}
		opaque, err := isOpaque(o.file, name)
		if err != nil || opaque {
			return found, err
		}
	}
	return found, nil
}

// whitedOut reports whether a directory has a whiteout of a name.
func whitedOut(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), whiteout.Prefix+name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENAMETOOLONG):
		return false, nil
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("whiteout that is no regular file: %w", unix.EIO)
	}
	if err != nil {
		return false, &os.PathError{Op: "fstatat", Path: path.Join(dir.Name(), whiteout.Prefix+name), Err: err}
	}
	return true, nil
}

// isOpaque reports whether a subdirectory has an opaque mark. It is opened
// rather than asked by a path of two components, the first of which could be
// made a link.
func isOpaque(dir *os.File, name string) (bool, error) {
	fd, err := openat(int(dir.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return false, &os.PathError{Op: "openat", Path: path.Join(dir.Name(), name), Err: err}
	}
	f := os.NewFile(uintptr(fd), path.Join(dir.Name(), name))
	defer f.Close()
	return exists(f, whiteout.OpaqueName)
}

func exists(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "fstatat", Path: path.Join(dir.Name(), name), Err: err}
	}
	return true, nil
}
