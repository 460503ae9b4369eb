package sys

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Dirent is one entry of a directory.
type Dirent struct {
	Ino  uint64
	Type byte   // DT_REG and so on; DT_UNKNOWN if the file system does not tell
	Name []byte // lies in the buffer, for those who skip most names
}

// Getdents fills buf with entries of a directory, for [Dirents.Next]; 0 is the end.
// It retries EINTR. The error is an errno: only the caller knows a path.
func Getdents(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Getdents(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Dirents is what is left of a buffer that [Getdents] filled, entry by entry. It
// is no iterator because the buffers of callers that would be on the stack are
// not when what is in them goes through a function that is passed.
type Dirents []byte

// Next takes an entry; ok is false at the end. It leaves out "." and "..". What
// is no entry is EIO, now and later: who takes it for the end loses the names
// behind it.
//
// The layout is that of struct linux_dirent64 (getdents(2)): inode and offset,
// eight bytes each, then the length of the record in two, the type in one, and
// the name with a NUL, behind which is whatever was there.
func (l *Dirents) Next() (d Dirent, ok bool, err error) {
	const header = 19
	for len(*l) > 0 {
		b := *l
		if len(b) <= header {
			return Dirent{}, false, unix.EIO
		}
		size := int(binary.NativeEndian.Uint16(b[16:]))
		if size <= header || size > len(b) {
			return Dirent{}, false, unix.EIO
		}
		name := b[header:size]
		end := bytes.IndexByte(name, 0)
		if end <= 0 {
			return Dirent{}, false, unix.EIO
		}
		*l = (*l)[size:] // and not b, which would then be on the heap
		if name[0] == '.' && (end == 1 || end == 2 && name[1] == '.') {
			continue
		}
		return Dirent{Ino: binary.NativeEndian.Uint64(b), Type: b[18], Name: name[:end]}, true, nil
	}
	return Dirent{}, false, nil
}

// EntryType returns the type of an entry that a directory listed with typ: typ
// itself, or what fstatat(2) says if that is DT_UNKNOWN, which file systems may
// give for any (readdir(3)). Symlinks are not followed, EINTR is retried. The
// error is an *os.PathError.
func EntryType(dir int, name string, typ byte) (byte, error) {
	if typ != unix.DT_UNKNOWN {
		return typ, nil
	}
	return statType(dir, name)
}

func statType(dir int, name string) (byte, error) {
	for {
		var st unix.Stat_t
		err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, pathError("fstatat", name, err)
		}
		return byte(st.Mode & unix.S_IFMT >> 12), nil // IFTODT in <dirent.h>
	}
}
