//go:build linux

package unionfs

import (
	"golang.org/x/sys/unix"
)

// Overlay is the format of overlayfs: a whiteout is a character device 0/0 in
// place of the name, or (Linux 6.7) an empty file with an xattr; an opaque
// directory has an xattr. Layers with metacopy or redirects are not understood.
//
// One prefix of names stays reserved, for temporary names and the mark of
// a mounted branch, which exist only while a union has the branch writable.
type Overlay struct {
	// User selects user.overlay. in place of trusted.overlay. (userxattr).
	User bool
}

func (f Overlay) prefix() string {
	if f.User {
		return "user.overlay."
	}
	return "trusted.overlay."
}

// MaxName is that of the branch file system.
func (Overlay) MaxName() int { return 255 }

// Reserved reports whether name starts with ".wh..wh.".
func (Overlay) Reserved(name string) bool { return hasPrefix(name, whMeta) }

// PrivateXattr reports whether the xattr is overlayfs's own. Escaped ones
// (overlay.overlay.) belong to whoever stacks on top, and are shown as they are.
func (f Overlay) PrivateXattr(name string) bool {
	p := f.prefix()
	return hasPrefix(name, p) && !hasPrefix(name[len(p):], "overlay.")
}

func isDev00(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// Probe looks at the entry itself.
func (f Overlay) Probe(fd int, name string, wh bool, st *unix.Stat_t) (Kind, error) {
	ok, err := exists(fd, name, st)
	switch {
	case err != nil:
		return Absent, err
	case !ok:
		return Absent, nil
	case !wh:
		return Entry, nil
	case isDev00(st):
		return Whiteout, nil
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0:
		if _, err := unix.Lgetxattr(procFD(fd)+"/"+name, f.prefix()+"whiteout", nil); err == nil {
			return Whiteout, nil
		}
	}
	return Entry, nil
}

// Listed cannot tell a device, nor an empty file, from a whiteout.
func (Overlay) Listed(name string, typ uint8, wh bool) (Kind, string) {
	switch {
	case hasPrefix(name, whMeta):
		return Hidden, ""
	case wh && (typ == unix.DT_CHR || typ == unix.DT_UNKNOWN):
		return Unsure, ""
	}
	return Entry, ""
}

// Concerns is the name itself; a directory's own change of attributes tells of
// the opaque xattr.
func (Overlay) Concerns(name string) (string, bool) {
	if hasPrefix(name, whMeta) {
		return "", false
	}
	return name, false
}

// XattrWhiteouts reports whether the directory may hold whiteouts that are
// files: overlayfs marks it with opaque=x (Linux 6.8), or whiteouts (6.7).
func (f Overlay) XattrWhiteouts(fd int) bool {
	var b [2]byte
	if n, err := unix.Getxattr(procFD(fd), f.prefix()+"opaque", b[:]); err == nil && n == 1 && b[0] == 'x' {
		return true
	}
	_, err := unix.Getxattr(procFD(fd), f.prefix()+"whiteouts", nil)
	return err == nil
}

// Opaque asks the xattr.
func (f Overlay) Opaque(fd int) (bool, error) {
	var b [2]byte
	n, err := unix.Getxattr(procFD(fd), f.prefix()+"opaque", b[:])
	switch err {
	case nil:
		return n == 1 && b[0] == 'y', nil
	case unix.ENODATA, unix.EOPNOTSUPP, unix.ERANGE:
		return false, nil
	}
	return false, err
}

// SetOpaque sets the xattr.
func (f Overlay) SetOpaque(_ *Branch, fd int) error {
	return unix.Setxattr(procFD(fd), f.prefix()+"opaque", []byte("y"), 0)
}

func whiteoutTemp(fd int, name string) (string, error) {
	return freshTemp(name, func(tmp string) error { return unix.Mknodat(fd, tmp, unix.S_IFCHR, 0) })
}

// Hide renames a whiteout over the name; a directory changes places with it.
func (Overlay) Hide(_ *Branch, fd int, name string, exists, isDir bool) error {
	tmp, err := whiteoutTemp(fd, name)
	if err != nil {
		return err
	}
	if exists && isDir {
		if err := unix.Renameat2(fd, tmp, fd, name, unix.RENAME_EXCHANGE); err != nil {
			unix.Unlinkat(fd, tmp, 0)
			return err
		}
		return removeTree(fd, tmp)
	}
	if err := unix.Renameat(fd, tmp, fd, name); err != nil {
		unix.Unlinkat(fd, tmp, 0)
		return err
	}
	return nil
}

// Reveal makes the entry under a temporary name and renames it over the
// whiteout; a directory changes places with it.
func (Overlay) Reveal(_ *Branch, fd int, name string, isDir bool, mk func(string) error) error {
	tmp, err := freshTemp(name, mk)
	if err != nil {
		return err
	}
	if isDir {
		err = unix.Renameat2(fd, tmp, fd, name, unix.RENAME_EXCHANGE)
	} else {
		err = unix.Renameat(fd, tmp, fd, name)
	}
	if err != nil {
		removeTree(fd, tmp)
		return err
	}
	if isDir {
		return unix.Unlinkat(fd, tmp, 0)
	}
	return nil
}

// Move leaves the whiteout in the same step where the kernel can
// (RENAME_WHITEOUT), or where one lies at the new name already.
func (f Overlay) Move(b *Branch, fd int, name string, tofd int, to string, isDir, cover, white bool) error {
	if white && (isDir || cover) {
		// The whiteout goes the other way.
		if err := unix.Renameat2(fd, name, tofd, to, unix.RENAME_EXCHANGE); err != nil || cover {
			return err
		}
		return unix.Unlinkat(fd, name, 0)
	}
	if !cover {
		return moveOver(fd, name, tofd, to, isDir)
	}
	err := unix.Renameat2(fd, name, tofd, to, unix.RENAME_WHITEOUT)
	switch {
	case err == unix.EINVAL:
		// No RENAME_WHITEOUT on this file system: the whiteout and the entry
		// change places, and the entry goes on from its temporary name.
		var tmp string
		if tmp, err = whiteoutTemp(fd, name); err != nil {
			return err
		}
		if err = unix.Renameat2(fd, tmp, fd, name, unix.RENAME_EXCHANGE); err != nil {
			unix.Unlinkat(fd, tmp, 0)
			return err
		}
		if err = moveOver(fd, tmp, tofd, to, isDir); err != nil {
			unix.Renameat2(fd, tmp, fd, name, unix.RENAME_EXCHANGE)
			unix.Unlinkat(fd, tmp, 0)
		}
		return err
	case isDir && (err == unix.ENOTEMPTY || err == unix.EEXIST):
		if err := unix.Renameat2(fd, name, tofd, to, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
		return f.Hide(b, fd, name, true, true)
	}
	return err
}

// Repair removes temporary names: every step of this format is one rename.
func (Overlay) Repair(_ *Branch, fd int, name string, _ map[string]uint8) (string, error) {
	if !isTemp(name) || !hasPrefix(name, whMeta) {
		return "", nil
	}
	return "removed temporary name", removeTree(fd, name)
}
