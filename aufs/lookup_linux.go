package aufs

import (
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/merged"
	"github.com/layerfs/layerfs/whiteout"
)

// rules are how AUFS branches hide what is below them where all of them may
// hold whiteouts (aufs(5); design document 02struct, "lookup").
type rules struct{}

// maxName is the longest name AUFS shows: a whiteout of a temporary name has
// to fit into 255 bytes.
const maxName = 242

// Name stands each whiteout for the name it hides.
func (rules) Name(entry string) (string, bool) {
	if whiteout.IsReserved(entry) {
		base, ok, err := whiteout.Target(entry)
		if !ok || err != nil || whiteout.IsReserved(base) {
			return "", false
		}
		entry = base
	}
	return entry, len(entry) <= maxName
}

// Xattr shows all xattrs: AUFS has none of its own.
func (rules) Xattr(stored string) (string, bool) { return stored, true }

// Opaque reports whether a directory of a branch has the opaque mark.
func (rules) Opaque(dir *os.File) (bool, error) { return exists(dir, whiteout.OpaqueName) }

// Lookup finds a name in a merged directory; nil if it is not there. The search
// ends at a whiteout, at what is no directory, and below an opaque directory;
// what is no directory below one that is, is passed over.
func (rules) Lookup(d *merged.Directory, name string) (found *merged.Node, err error) {
	for _, o := range d.Places {
		hidden, err := whitedOut(o.File, name)
		if err != nil {
			return nil, err
		}
		var st unix.Stat_t
		err = unix.Fstatat(int(o.File.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case errors.Is(err, unix.ENOENT):
			if hidden {
				return found, nil
			}
			continue
		case err != nil:
			return nil, &os.PathError{Op: "fstatat", Path: path.Join(o.File.Name(), name), Err: err}
		case hidden:
			return nil, &os.PathError{Op: "lookup", Path: path.Join(o.File.Name(), name), Err: fmt.Errorf("entry and whiteout of one name: %w", unix.EIO)}
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		where := merged.Place{Layer: o.Layer, Path: path.Join(o.Path, name)}
		if found == nil {
			found = &merged.Node{Stat: st, Places: []merged.Place{where}, Data: where}
			if !isDir {
				return found, nil
			}
		} else if !isDir {
			continue
		} else {
			found.Places = append(found.Places, where)
		}
		opaque, err := isOpaque(o.File, name)
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
	f, err := merged.OpenAt(dir, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
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
