package archive

import (
	"bytes"
	"errors"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

func asPathError(err error, pe **fs.PathError) bool { return errors.As(err, pe) }

// procPath names an open file, of whatever kind and also with O_PATH, to calls
// that want a path: the only way to the xattrs of links and devices that does
// not look a path up again (until setxattrat of Linux 6.13).
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// procName names what is at name in an open directory.
func procName(fd int, name string) string { return procPath(fd) + "/" + name }

// getXattr reads an xattr of a file opened with O_PATH. A file system without
// xattrs has none.
func getXattr(fd int, name string) (string, bool, error) {
	return readXattr(func(buf []byte) (int, error) { return unix.Getxattr(procPath(fd), name, buf) })
}

func readXattr(get func([]byte) (int, error)) (string, bool, error) {
	buf := make([]byte, 256)
	for {
		n, err := ignoringEINTR(func() (int, error) { return get(buf) })
		switch err {
		case nil:
			return string(buf[:n]), true, nil
		case unix.ENODATA, unix.ENOTSUP, unix.EINVAL, unix.EPERM, unix.EACCES:
			return "", false, nil
		case unix.ERANGE:
			n, err := get(nil)
			if err != nil {
				return "", false, err
			}
			buf = make([]byte, n+64)
			continue
		}
		return "", false, err
	}
}

// listXattrs calls list with a growing buffer and returns the names.
func listXattrs(buf []byte, list func([]byte) (int, error)) ([]string, error) {
	if len(buf) == 0 {
		buf = make([]byte, 512) // an empty one would ask for the size only
	}
	for {
		n, err := ignoringEINTR(func() (int, error) { return list(buf) })
		switch err {
		case nil:
			if n == 0 {
				return nil, nil
			}
			var names []string
			for b := range bytes.SplitSeq(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
				if name := string(b); !sys.IsStorageXattr(name) {
					names = append(names, name)
				}
			}
			return names, nil
		case unix.ENOTSUP:
			return nil, nil
		case unix.ERANGE:
			n, err := list(nil)
			if err != nil {
				return nil, err
			}
			buf = make([]byte, n+256)
			continue
		}
		return nil, err
	}
}
