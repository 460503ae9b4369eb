package tree

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// node is everything that can be asked about one file but its content.
type node struct {
	path     string // absolute on the host
	stat     unix.Stat_t
	target   string            // of a symlink
	xattrs   map[string]string // nil if the file system has none
	children []string          // of a directory, sorted
}

func (n *node) typ() uint32 { return n.stat.Mode & unix.S_IFMT }

func scan(path string) (*node, error) {
	n := &node{path: path}
	if err := unix.Lstat(path, &n.stat); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	var err error
	switch n.typ() {
	case unix.S_IFLNK:
		if n.target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	case unix.S_IFDIR:
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			n.children = append(n.children, e.Name())
		}
		slices.Sort(n.children)
	}
	n.xattrs, err = xattrs(path)
	return n, err
}

func xattrs(path string) (map[string]string, error) {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(path, list)
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "llistxattr", Path: path, Err: err}
	}
	m := map[string]string{}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if sys.IsStorageXattr(name) {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, &os.PathError{Op: "lgetxattr " + name, Path: path, Err: err}
		}
		m[name] = string(value[:n])
	}
	return m, nil
}

// sameContent compares two regular files byte by byte and returns the first
// offset at which they differ, or -1.
func sameContent(a, b string) (int64, error) {
	fa, err := os.Open(a)
	if err != nil {
		return 0, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return 0, err
	}
	defer fb.Close()
	bufA, bufB := make([]byte, 256<<10), make([]byte, 256<<10)
	for off := int64(0); ; {
		na, errA := io.ReadFull(fa, bufA)
		nb, errB := io.ReadFull(fb, bufB)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return 0, err
			}
		}
		if !bytes.Equal(bufA[:na], bufB[:nb]) {
			for i := range min(na, nb) {
				if bufA[i] != bufB[i] {
					return off + int64(i), nil
				}
			}
			return off + int64(min(na, nb)), nil
		}
		if na < len(bufA) {
			return -1, nil
		}
		off += int64(na)
	}
}

// dataRanges lists the parts of a regular file that are not holes.
func dataRanges(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var b strings.Builder
	for off := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return b.String(), nil
		}
		if err != nil {
			return "", &os.PathError{Op: "lseek SEEK_DATA", Path: path, Err: err}
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return "", &os.PathError{Op: "lseek SEEK_HOLE", Path: path, Err: err}
		}
		fmt.Fprintf(&b, "[%d,%d)", data, hole)
		off = hole
	}
}

func join(dir, name string) string { return filepath.Join(dir, name) }

// inodeFlags returns those FS_IOC_GETFLAGS that a user can set on any file
// system: sync, immutable, append, nodump, noatime, dirsync, nocow
// (linux/fs.h). The others, such as extents, are the file system's own.
func inodeFlags(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == unix.ENOTTY || err == unix.ENOTSUP {
		return 0, nil
	}
	if err != nil {
		return 0, &os.PathError{Op: "ioctl FS_IOC_GETFLAGS", Path: path, Err: err}
	}
	const settable = 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x10000 | 0x800000
	return flags & settable, nil
}
