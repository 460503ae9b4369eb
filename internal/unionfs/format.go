//go:build linux

package unionfs

import (
	"errors"
	"hash/maphash"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Kind is what a name in a branch directory stands for.
type Kind uint8

// The kinds.
const (
	Absent   Kind = iota // nothing
	Entry                // a file of the union
	Whiteout             // hides the name in the branches below
	Hidden               // bookkeeping, shown to nobody
	Unsure               // an entry or a whiteout: only Probe can tell
)

// A Format is how whiteouts and opaque directories are written on a branch.
// Every method names one component of the directory fd. Methods of one
// directory are called under that directory's lock.
type Format interface {
	// MaxName is the longest name a file of the union can have, in bytes.
	MaxName() int
	// Reserved reports whether clients must not use the name.
	Reserved(name string) bool
	// Probe says what name is in fd. wh: honour whiteouts. st is filled for
	// an Entry. An entry and a whiteout of one name is EIO.
	Probe(fd int, name string, wh bool, st *unix.Stat_t) (Kind, error)
	// Listed says what a listed name of type typ (DT_*) is, and for
	// a Whiteout which name it hides.
	Listed(name string, typ uint8, wh bool) (Kind, string)
	// Concerns says which name of the union changes with a name in
	// a directory of a branch; self: the directory itself may have become
	// opaque, or ceased to be.
	Concerns(name string) (target string, self bool)
	// XattrWhiteouts reports whether a listed regular file of fd may be
	// a whiteout.
	XattrWhiteouts(fd int) bool
	// Opaque reports whether fd hides the directories below.
	Opaque(fd int) (bool, error)
	// SetOpaque makes fd opaque.
	SetOpaque(b *Branch, fd int) error
	// Hide leaves a whiteout in place of name, which exists (as a directory
	// if isDir) or does not. The old entry is gone when it returns, and at
	// no moment can the name below be seen.
	Hide(b *Branch, fd int, name string, exists, isDir bool) error
	// Reveal creates an entry where fd has a whiteout of that name: mk makes
	// the entry under the name it is given. The whiteout is gone when it
	// returns, and at no moment can the name below be seen.
	Reveal(b *Branch, fd int, name string, isDir bool, mk func(at string) error) error
	// Move renames within the branch. cover: leave a whiteout at the old
	// name. white: there is a whiteout of the new name.
	Move(b *Branch, fd int, name string, tofd int, to string, isDir, cover, white bool) error
	// PrivateXattr reports whether the xattr is the format's own, to be
	// hidden from clients.
	PrivateXattr(name string) bool
	// Repair mends what a crash left of name in directory fd, which was
	// listed; it returns what it did, or "".
	Repair(b *Branch, fd int, name string, listed map[string]uint8) (string, error)
}

const (
	whPrefix   = ".wh."
	whMeta     = ".wh..wh."
	whBase     = ".wh..wh.aufs"
	whPlink    = ".wh..wh.plnk"
	whOrphan   = ".wh..wh.orph"
	whOpaque   = ".wh..wh..opq"
	whRenamed  = ".wh..wh.hino"    // inodes of directories that dirren renamed
	whMounted  = ".wh..wh.mounted" // ours: there while a union has the branch rw
	aufsMaxLen = 255 - 2*len(whPrefix) - 1 - 4
)

func hasPrefix(s, p string) bool { return len(s) >= len(p) && s[:len(p)] == p }

// tempName is where AUFS puts a name that is being replaced:
// .wh..wh.NAME.<4 hex>.
func tempName(name string, n uint64) string {
	const digits = "0123456789abcdef"
	name = name[:min(len(name), aufsMaxLen)]
	return whMeta + name + "." + string([]byte{digits[n>>12&15], digits[n>>8&15], digits[n>>4&15], digits[n&15]})
}

// freshTemp calls mk with temporary names until one is free.
func freshTemp(name string, mk func(tmp string) error) (string, error) {
	n := maphash.String(tempSeed(), name)
	for i := uint64(0); ; i++ {
		tmp := tempName(name, n+i)
		err := mk(tmp)
		if !errors.Is(err, unix.EEXIST) || i == 1<<16 {
			return tmp, err
		}
	}
}

func tempSeed() maphash.Seed { return maphash.MakeSeed() }

// AUFS is the format of AUFS: whiteouts are files named .wh.NAME, hard links
// to one base file.
type AUFS struct {
	// NoLink makes every whiteout a file of its own (attribute nolwh).
	NoLink bool
}

// MaxName is 242, aufs fstype.h AUFS_MAX_NAMELEN.
func (AUFS) MaxName() int { return aufsMaxLen }

// Reserved reports whether name starts with ".wh.".
func (AUFS) Reserved(name string) bool { return hasPrefix(name, whPrefix) }

// PrivateXattr is always false: AUFS uses no xattrs.
func (AUFS) PrivateXattr(string) bool { return false }

func exists(fd int, name string, st *unix.Stat_t) (bool, error) {
	err := fstatat(fd, name, st)
	switch err {
	case nil:
		return true, nil
	case unix.ENOENT, unix.ENOTDIR:
		return false, nil
	}
	return false, err
}

// Probe looks for the whiteout first, then for the entry.
func (AUFS) Probe(fd int, name string, wh bool, st *unix.Stat_t) (Kind, error) {
	white := false
	if wh {
		// .wh.NAME of a name near 255 bytes cannot exist.
		if len(name) <= 255-len(whPrefix) {
			ok, err := exists(fd, whPrefix+name, st)
			if err != nil {
				return Absent, err
			}
			if ok && st.Mode&unix.S_IFMT != unix.S_IFREG {
				return Absent, unix.EIO
			}
			white = ok
		}
	}
	ok, err := exists(fd, name, st)
	switch {
	case err != nil:
		return Absent, err
	case ok && white:
		return Absent, unix.EIO
	case white:
		return Whiteout, nil
	case ok:
		return Entry, nil
	}
	return Absent, nil
}

// Listed classifies by name alone. On a branch without whiteouts, .wh. names
// are still nobody's business (aufs vdir.c).
func (AUFS) Listed(name string, _ uint8, wh bool) (Kind, string) {
	switch {
	case !hasPrefix(name, whPrefix):
		return Entry, ""
	case hasPrefix(name, whMeta) || !wh:
		return Hidden, ""
	}
	return Whiteout, name[len(whPrefix):]
}

// Concerns reads the names that Probe and Opaque look for.
func (AUFS) Concerns(name string) (string, bool) {
	switch {
	case name == whOpaque:
		return "", true
	case hasPrefix(name, whMeta):
		return "", false
	case hasPrefix(name, whPrefix):
		return name[len(whPrefix):], false
	}
	return name, false
}

// XattrWhiteouts is always false.
func (AUFS) XattrWhiteouts(int) bool { return false }

// Opaque looks for .wh..wh..opq.
func (AUFS) Opaque(fd int) (bool, error) {
	var st unix.Stat_t
	return exists(fd, whOpaque, &st)
}

func (f AUFS) link(b *Branch, fd int, name string) error {
	if !f.NoLink {
		err := unix.Linkat(b.root, whBase, fd, name, 0)
		if err == nil || err == unix.EEXIST {
			return nil
		}
		if err == unix.EMLINK && f.newBase(b) == nil {
			if err = unix.Linkat(b.root, whBase, fd, name, 0); err == nil || err == unix.EEXIST {
				return nil
			}
		}
	}
	// Any regular file is a whiteout, so a base that cannot be linked to
	// costs an inode and nothing else.
	return mkfile(fd, name, 0o444)
}

// newBase puts a base file with no links in place of one that has as many as
// the file system allows.
func (f AUFS) newBase(b *Branch) error {
	b.base.Lock()
	defer b.base.Unlock()
	tmp, err := freshTemp("aufs", func(tmp string) error { return mkfileExcl(b.root, tmp, 0o444) })
	if err != nil {
		return err
	}
	return unix.Renameat(b.root, tmp, b.root, whBase)
}

func mkfileExcl(fd int, name string, mode uint32) error {
	f, err := unix.Openat(fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	return unix.Close(f)
}

func mkfile(fd int, name string, mode uint32) error {
	err := mkfileExcl(fd, name, mode)
	if err == unix.EEXIST {
		return nil
	}
	return err
}

// SetOpaque makes .wh..wh..opq.
func (f AUFS) SetOpaque(b *Branch, fd int) error { return f.link(b, fd, whOpaque) }

// Hide makes the whiteout and then removes the entry. A crash in between
// leaves both, which Repair undoes by keeping the entry.
func (f AUFS) Hide(b *Branch, fd int, name string, exists, isDir bool) error {
	if err := f.link(b, fd, whPrefix+name); err != nil || !exists {
		return err
	}
	err := dispose(fd, name, isDir)
	if err != nil {
		unix.Unlinkat(fd, whPrefix+name, 0)
	}
	return err
}

// dispose removes an entry; a directory may still hold whiteouts.
func dispose(fd int, name string, isDir bool) error {
	if !isDir {
		return unix.Unlinkat(fd, name, 0)
	}
	err := unix.Unlinkat(fd, name, unix.AT_REMOVEDIR)
	if err != unix.ENOTEMPTY && err != unix.EEXIST {
		return err
	}
	tmp, err := freshTemp(name, func(tmp string) error {
		return unix.Renameat2(fd, name, fd, tmp, unix.RENAME_NOREPLACE)
	})
	if err != nil {
		return err
	}
	return removeTree(fd, tmp)
}

// Reveal creates a directory under a temporary name, since its opaque mark
// must be there before its name is; other entries at once.
func (AUFS) Reveal(_ *Branch, fd int, name string, isDir bool, mk func(string) error) error {
	if isDir {
		tmp, err := freshTemp(name, mk)
		if err != nil {
			return err
		}
		if err := unix.Renameat2(fd, tmp, fd, name, unix.RENAME_NOREPLACE); err != nil {
			removeTree(fd, tmp)
			return err
		}
	} else if err := mk(name); err != nil {
		return err
	}
	return unix.Unlinkat(fd, whPrefix+name, 0)
}

// Move makes the whiteout, renames, and removes the other whiteout.
func (f AUFS) Move(b *Branch, fd int, name string, tofd int, to string, isDir, cover, white bool) error {
	if cover {
		if err := f.link(b, fd, whPrefix+name); err != nil {
			return err
		}
	}
	if err := moveOver(fd, name, tofd, to, isDir); err != nil {
		if cover {
			unix.Unlinkat(fd, whPrefix+name, 0)
		}
		return err
	}
	if white {
		return unix.Unlinkat(tofd, whPrefix+to, 0)
	}
	return nil
}

// moveOver is rename(2), also onto a directory that holds nothing but
// whiteouts: that one changes places with the source and is then removed.
func moveOver(fd int, name string, tofd int, to string, isDir bool) error {
	err := unix.Renameat(fd, name, tofd, to)
	if !isDir || (err != unix.ENOTEMPTY && err != unix.EEXIST) {
		return err
	}
	if err := unix.Renameat2(fd, name, tofd, to, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return dispose(fd, name, true)
}

// Repair keeps the entry of an entry and whiteout pair: all operations make
// the one before they remove the other, so the entry is either what was there
// before or what was wanted. Temporary names are removed.
func (AUFS) Repair(_ *Branch, fd int, name string, listed map[string]uint8) (string, error) {
	if hasPrefix(name, whMeta) {
		if !isTemp(name) {
			return "", nil
		}
		return "removed temporary name", removeTree(fd, name)
	}
	if !hasPrefix(name, whPrefix) {
		return "", nil
	}
	if _, pair := listed[name[len(whPrefix):]]; pair {
		return "removed whiteout beside its entry", unix.Unlinkat(fd, name, 0)
	}
	return "", nil
}

// isTemp reports whether name has the shape of tempName.
func isTemp(name string) bool {
	if len(name) < len(whMeta)+1+5 || name[len(name)-5] != '.' {
		return false
	}
	_, err := strconv.ParseUint(name[len(name)-4:], 16, 16)
	return err == nil
}

// fstatat is fstatat(2) without following name.
func fstatat(fd int, name string, st *unix.Stat_t) error {
	for {
		err := unix.Fstatat(fd, name, st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			return err
		}
	}
}

// A dirent is one entry of a branch directory.
type dirent struct {
	name string
	ino  uint64
	typ  uint8
}

// listDir reads a whole directory without "." and "..".
func listDir(fd int, buf []byte, each func(dirent) error) error {
	d, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(d)
	for {
		n, err := sys.Getdents(d, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := each(dirent{string(e.Name), e.Ino, e.Type}); err != nil {
				return err
			}
		}
	}
}

// removeTree removes what a temporary name holds. It goes down by descriptor
// and never through a symbolic link.
func removeTree(fd int, name string) error {
	err := unix.Unlinkat(fd, name, 0)
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	d, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var names []string
	err = listDir(d, make([]byte, 32<<10), func(e dirent) error {
		names = append(names, e.name)
		return nil
	})
	for _, n := range names {
		if err == nil {
			err = removeTree(d, n)
		}
	}
	unix.Close(d)
	if err != nil {
		return err
	}
	return unix.Unlinkat(fd, name, unix.AT_REMOVEDIR)
}
