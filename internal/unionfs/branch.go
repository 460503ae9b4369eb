//go:build linux

package unionfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Perm says what a branch may be used for, aufs(5) "branch permission".
type Perm uint8

// The permissions. Whiteouts are looked up on RW and ROWH branches only.
const (
	RO   Perm = iota // read-only, assumed to hold no whiteouts
	RW               // read-write
	ROWH             // read-only, whiteouts honoured
	RR               // natively read-only: as RO, and never watched
)

// String returns the notation of AUFS.
func (p Perm) String() string {
	switch p {
	case RW:
		return "rw"
	case ROWH:
		return "ro+wh"
	case RR:
		return "rr"
	}
	return "ro"
}

// Whiteouts reports whether whiteouts of the branch are honoured.
func (p Perm) Whiteouts() bool { return p == RW || p == ROWH }

// ParsePerm reads the notation of AUFS: rw, ro, ro+wh, rr, rr+wh.
func ParsePerm(s string) (Perm, error) {
	switch s {
	case "rw":
		return RW, nil
	case "ro":
		return RO, nil
	case "ro+wh", "rr+wh":
		return ROWH, nil
	case "rr":
		return RR, nil
	}
	return RO, fmt.Errorf("branch permission %q: %w", s, os.ErrInvalid)
}

// A Branch is one directory of the union. Immutable but for perm, which
// changes under FS.stackMu.
type Branch struct {
	path string // as given, absolute
	real string // path without symbolic links
	perm Perm
	dev  uint64
	ino  uint64
	root int  // O_PATH descriptor
	priv bool // root is a private clone of the mount
	// atime is what the mount does with access times, MOUNT_ATTR__ATIME.
	atime uint64
	lock  *os.File

	plnk    int          // O_PATH descriptor of the plink directory; -1 if none
	files   atomic.Int64 // open files on this branch
	wopen   atomic.Int64 // of these, with a descriptor that may write
	crashed bool         // the last union that had it rw did not end
	noTmp   atomic.Bool  // O_TMPFILE is refused here
	fsType  int64
	base    sync.Mutex // one re-creation of the whiteout base at a time
}

// Path returns the directory as it was given.
func (b *Branch) Path() string { return b.path }

// Perm returns the permission.
func (b *Branch) Perm() Perm { return b.perm }

// badFS lists file systems that make no branch, aufs branch.c
// au_test_fs_unsuppoted: the kernel's own, and AUFS itself.
var badFS = map[int64]string{
	unix.PROC_SUPER_MAGIC:     "proc",
	unix.SYSFS_MAGIC:          "sysfs",
	unix.DEBUGFS_MAGIC:        "debugfs",
	unix.SECURITYFS_MAGIC:     "securityfs",
	0x62656570:                "configfs",
	unix.ECRYPTFS_SUPER_MAGIC: "ecryptfs",
	0x61756673:                "aufs",
}

func openBranch(path string, perm Perm) (b *Branch, err error) {
	if strings.ContainsRune(path, 0) || path == "" {
		return nil, &os.PathError{Op: "branch", Path: path, Err: unix.EINVAL}
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	b = &Branch{path: path, perm: perm, root: -1, plnk: -1}
	defer func(b *Branch) {
		if err != nil {
			b.close()
		}
	}(b)
	b.root, err = unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		b.priv = true
		var sf unix.Statfs_t
		if err = unix.Fstatfs(b.root, &sf); err != nil {
			return nil, &os.PathError{Op: "fstatfs", Path: path, Err: err}
		}
		b.atime = atimeAttr(uint64(sf.Flags))
		if err = b.restrict(); err != nil {
			return nil, &os.PathError{Op: "mount_setattr", Path: path, Err: err}
		}
	} else if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, &os.PathError{Op: "open_tree", Path: path, Err: err}
	} else if b.root, err = unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err = unix.Fstat(b.root, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, &os.PathError{Op: "branch", Path: path, Err: unix.ENOTDIR}
	}
	b.dev, b.ino = uint64(st.Dev), st.Ino
	if b.real, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	var sf unix.Statfs_t
	if err = unix.Fstatfs(b.root, &sf); err != nil {
		return nil, &os.PathError{Op: "fstatfs", Path: path, Err: err}
	}
	b.fsType = int64(sf.Type)
	if name, bad := badFS[b.fsType]; bad {
		return nil, &os.PathError{Op: "branch", Path: path, Err: fmt.Errorf("%s cannot be a branch: %w", name, unix.EINVAL)}
	}
	if perm == RW && sf.Flags&unix.ST_RDONLY != 0 {
		return nil, &os.PathError{Op: "branch", Path: path, Err: fmt.Errorf("rw on a read-only file system: %w", unix.EINVAL)}
	}
	return b, nil
}

// restrict makes the private clone read-only if the branch is. Such a clone can
// note no access times, so it is told not to try at each read (touch_atime
// takes the write access of the file system first); overlayfs does the same
// with its lower layers (ovl_get_layers).
func (b *Branch) restrict() error {
	if !b.priv {
		return nil
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR__ATIME}
	if b.perm == RW {
		attr = unix.MountAttr{Attr_set: b.atime, Attr_clr: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR__ATIME}
	}
	err := unix.MountSetattr(b.root, "", unix.AT_EMPTY_PATH, &attr)
	if err == unix.EPERM {
		// A mount of another user namespace, whose atime flags are locked.
		attr.Attr_set &^= unix.MOUNT_ATTR__ATIME
		attr.Attr_clr &^= unix.MOUNT_ATTR__ATIME
		err = unix.MountSetattr(b.root, "", unix.AT_EMPTY_PATH, &attr)
	}
	return err
}

// atimeAttr translates the flags of statfs(2) into those of mount_setattr(2).
func atimeAttr(flags uint64) uint64 {
	switch {
	case flags&unix.ST_NOATIME != 0:
		return unix.MOUNT_ATTR_NOATIME
	case flags&unix.ST_RELATIME != 0:
		return unix.MOUNT_ATTR_RELATIME
	}
	return unix.MOUNT_ATTR_STRICTATIME
}

// claim takes the exclusive lock that a writable branch has one owner by
// (aufs: a branch may be rw in one union only).
func (b *Branch) claim() error {
	fd, err := unix.Openat(b.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "openat", Path: b.path, Err: err}
	}
	f := os.NewFile(uintptr(fd), b.path)
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return &os.PathError{Op: "flock", Path: b.path, Err: fmt.Errorf("writable in another union: %w", unix.EBUSY)}
	}
	b.lock = f
	return nil
}

// release gives up what a writable branch has alone.
func (b *Branch) release() {
	if b.plnk >= 0 {
		unix.Close(b.plnk)
		b.plnk = -1
	}
	if b.lock != nil {
		// Not by closing it alone: it may have been handed over.
		_ = unix.Flock(int(b.lock.Fd()), unix.LOCK_UN)
		b.lock.Close()
		b.lock = nil
	}
}

func (b *Branch) close() {
	b.release()
	if b.root >= 0 {
		unix.Close(b.root)
		b.root = -1
	}
}

// stackDepth is how deep the branch's file system is itself stacked, as far as
// FUSE passthrough asks (s_stack_depth).
func (b *Branch) stackDepth() int {
	switch b.fsType {
	case unix.OVERLAYFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return 1
	}
	return 0
}

// within reports whether a is b or lies below b.
func within(a, b string) bool {
	return a == b || b == "/" || strings.HasPrefix(a, b+"/")
}

// checkOverlap refuses branches that are one directory or contain each other.
func checkOverlap(have []*Branch, b *Branch) error {
	for _, h := range have {
		bp, hp := b.real, h.real
		if (h.dev == b.dev && h.ino == b.ino) || within(bp, hp) || within(hp, bp) {
			return &os.PathError{Op: "branch", Path: b.path, Err: fmt.Errorf("overlaps with %s: %w", h.path, unix.EINVAL)}
		}
	}
	return nil
}
