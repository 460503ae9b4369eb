//go:build !layerfs_portable

package copyup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/tree"
)

// copier is one copy. What it learns about the file systems it keeps, so that
// a call that cannot work is tried once.
type copier struct {
	counters
	ctx  context.Context
	opts *Options
	dev  uint64 // of the source's root
	bare bool   // the destination directories have no default ACL

	noClone, noCopyRange, noSeek, noTmpfile atomic.Bool

	scratch sync.Pool // *scratch
}

func newCopier(ctx context.Context, opts *Options) *copier {
	c := &copier{ctx: ctx, opts: opts}
	c.progress = opts.Progress
	c.noClone.Store(opts.force.noClone || opts.NoReflink)
	// copy_file_range shares blocks too where it can.
	c.noCopyRange.Store(opts.force.noCopyRange || opts.NoReflink)
	c.noSeek.Store(opts.force.noSeek)
	c.noTmpfile.Store(opts.force.noTmpfile)
	c.scratch.New = func() any { return new(scratch) }
	return c
}

// handle is a file: open, or an entry of an open directory.
type handle struct {
	fd   int // -1: use dir and name
	dir  int
	name string
	at   place // of a source
}

// place is where a source lies, for messages.
type place struct {
	dir  *tree.Dir
	name string
}

func (p place) String() string {
	if p.dir == nil {
		return p.name
	}
	return p.dir.Path(p.name)
}

// openSource opens a regular file. Nothing is waited for, and nothing becomes
// a controlling terminal, should it have become a fifo or a device meanwhile.
func openSource(dir int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY
	fd, err := sys.Openat(dir, name, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // O_NOATIME is for owners
		fd, err = sys.Openat(dir, name, flags, 0)
	}
	return fd, err
}

// fill gives dst, a new regular file, all that src has.
func (c *copier) fill(dst, src handle, st *unix.Stat_t) error {
	s := c.scratch.Get().(*scratch)
	defer c.scratch.Put(s)
	if c.opts.InodeFlags {
		if err := earlyFlags(dst.fd, src.fd); err != nil {
			return err
		}
	}
	if err := c.data(dst.fd, src.fd, st, s); err != nil {
		return err
	}
	return c.attributes(dst, src, st, s)
}

// attributes sets owner, mode, xattrs and times, in this order: a change of
// the owner clears set-id bits and capabilities, an ACL may be what the mode
// shows, and everything before changes a time.
func (c *copier) attributes(dst, src handle, st *unix.Stat_t, s *scratch) error {
	var got unix.Stat_t
	if err := dst.stat(&got); err != nil {
		return err
	}
	if !c.opts.IgnoreOwners && (got.Uid != st.Uid || got.Gid != st.Gid) {
		if err := dst.chown(int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
		got.Mode &^= unix.S_ISUID | unix.S_ISGID
	}
	link := st.Mode&unix.S_IFMT == unix.S_IFLNK
	if !c.bare && !link {
		if err := dst.removeACLs(); err != nil {
			return err
		}
		got.Mode = ^uint32(0) // not known now
	}
	if !link && got.Mode&07777 != st.Mode&07777 {
		if err := dst.chmod(st.Mode & 07777); err != nil {
			return err
		}
	}
	if err := c.xattrs(dst, src, link, s); err != nil {
		return err
	}
	return dst.utimes(st.Atim, st.Mtim)
}

func (h handle) stat(st *unix.Stat_t) error {
	if h.fd >= 0 {
		return os.NewSyscallError("fstat", unix.Fstat(h.fd, st))
	}
	return os.NewSyscallError("fstatat", unix.Fstatat(h.dir, h.name, st, unix.AT_SYMLINK_NOFOLLOW))
}

func (h handle) chown(uid, gid int) error {
	if h.fd >= 0 {
		return os.NewSyscallError("fchown", unix.Fchown(h.fd, uid, gid))
	}
	return os.NewSyscallError("fchownat", unix.Fchownat(h.dir, h.name, uid, gid, unix.AT_SYMLINK_NOFOLLOW))
}

func (h handle) chmod(mode uint32) error {
	if h.fd >= 0 {
		return os.NewSyscallError("fchmod", unix.Fchmod(h.fd, mode))
	}
	// fchmodat2 came with Linux 6.6; before, a descriptor that cannot follow
	// a symlink has to stand for the name.
	err := unix.Fchmodat(h.dir, h.name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
		fd, oerr := sys.Openat(h.dir, h.name, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if oerr != nil {
			return oerr
		}
		defer unix.Close(fd)
		err = unix.Fchmodat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), mode, 0)
	}
	return os.NewSyscallError("fchmodat", err)
}

func (h handle) utimes(atime, mtime unix.Timespec) error {
	if h.fd >= 0 {
		return os.NewSyscallError("futimens", sys.Futimens(h.fd, atime, mtime))
	}
	return os.NewSyscallError("utimensat",
		unix.UtimesNanoAt(h.dir, h.name, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW))
}

func (h handle) listxattr(buf []byte) (int, error) {
	if h.fd >= 0 {
		return unix.Flistxattr(h.fd, buf)
	}
	return sys.ListxattrAt(h.dir, h.name, buf)
}

func (h handle) getxattr(name string, buf []byte) (int, error) {
	if h.fd >= 0 {
		return unix.Fgetxattr(h.fd, name, buf)
	}
	return sys.GetxattrAt(h.dir, h.name, name, buf)
}

func (h handle) setxattr(name string, value []byte) error {
	if h.fd >= 0 {
		return unix.Fsetxattr(h.fd, name, value, 0)
	}
	return sys.SetxattrAt(h.dir, h.name, name, value, 0)
}

// removeACLs removes what the file got from the default ACL of its directory.
func (h handle) removeACLs() error {
	for _, name := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		var err error
		if h.fd >= 0 {
			err = unix.Fremovexattr(h.fd, name)
		} else {
			err = sys.RemovexattrAt(h.dir, h.name, name)
		}
		switch {
		case err == nil, errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL),
			errors.Is(err, unix.EACCES): // a default ACL on what is no directory
		default:
			return fmt.Errorf("removexattr %s: %w", name, err)
		}
	}
	return nil
}

func (c *copier) xattrs(dst, src handle, link bool, s *scratch) error {
	n, err := src.listxattr(s.list[:])
	if errors.Is(err, unix.EOPNOTSUPP) || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		if link && errors.Is(err, unix.ENOENT) && !procMounted() {
			// Only symlinks need /proc for this, and those hardly ever have
			// xattrs, but it has to be said.
			return fmt.Errorf("listxattr of a symlink needs /proc: %w", err)
		}
		return c.xattrError(src, "", fmt.Errorf("listxattr: %w", err))
	}
	for list := string(s.list[:n]); list != ""; {
		var name string
		name, list, _ = strings.Cut(list, "\x00")
		if sys.IsStorageXattr(name) || c.opts.SkipXattr != nil && c.opts.SkipXattr(name) {
			continue
		}
		n, err := src.getxattr(name, s.value[:])
		if errors.Is(err, unix.ENODATA) { // removed since
			continue
		}
		if err != nil {
			err = fmt.Errorf("getxattr %s: %w", name, err)
		} else if err = dst.setxattr(name, s.value[:n]); err != nil {
			err = fmt.Errorf("setxattr %s: %w", name, err)
		}
		if err != nil {
			if err := c.xattrError(src, name, err); err != nil {
				return err
			}
		}
	}
	return nil
}

func procMounted() bool {
	_, err := os.Stat("/proc/self/fd")
	return err == nil
}

func (c *copier) xattrError(src handle, name string, err error) error {
	if c.opts.XattrError == nil {
		return err
	}
	return c.opts.XattrError(src.at.String(), name, err)
}

// special makes a copy of an entry that is neither a regular file nor a
// directory as dstName in directory dstDir. made is false if it was left out.
func (c *copier) special(dstDir int, dstName string, src handle, st *unix.Stat_t) (made bool, err error) {
	dst := handle{fd: -1, dir: dstDir, name: dstName}
	switch typ := st.Mode & unix.S_IFMT; typ {
	case unix.S_IFLNK:
		target, err := readlink(src.dir, src.name)
		if err != nil {
			return false, err
		}
		err = unix.Symlinkat(target, dstDir, dstName)
		if err != nil {
			return false, os.NewSyscallError("symlinkat", err)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		switch c.opts.Devices {
		case layerfs.DevicesSkip:
			c.skipped.Add(1)
			return false, nil
		case layerfs.DevicesRefuse:
			return false, fmt.Errorf("device node %d:%d refused: %w", unix.Major(st.Rdev), unix.Minor(st.Rdev), unix.EPERM)
		case layerfs.DevicesRecord:
			return true, c.record(dstDir, dstName, src, st)
		}
		fallthrough
	case unix.S_IFIFO, unix.S_IFSOCK:
		if err := unix.Mknodat(dstDir, dstName, typ|st.Mode&0777, int(st.Rdev)); err != nil {
			return false, os.NewSyscallError("mknodat", err)
		}
	default:
		return false, fmt.Errorf("changed to type %#o while it was copied: %w", typ, unix.ESTALE)
	}
	s := c.scratch.Get().(*scratch)
	defer c.scratch.Put(s)
	return true, c.attributes(dst, src, st, s)
}

// record makes the regular file that stands for a device node, in the form of
// containers/storage: "uid:gid:mode:type-major-minor".
func (c *copier) record(dstDir int, dstName string, src handle, st *unix.Stat_t) error {
	fd, err := sys.Openat(dstDir, dstName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, st.Mode&0777)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	kind := "char"
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		kind = "block"
	}
	value := fmt.Sprintf("%d:%d:%#o:%s-%d-%d", st.Uid, st.Gid, st.Mode&07777, kind, unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if err := unix.Fsetxattr(fd, "user.containers.override_stat", []byte(value), 0); err != nil {
		return os.NewSyscallError("setxattr user.containers.override_stat", err)
	}
	s := c.scratch.Get().(*scratch)
	defer c.scratch.Put(s)
	return c.attributes(handle{fd: fd}, src, st, s)
}

func readlink(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax+1)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", os.NewSyscallError("readlinkat", err)
	}
	return string(buf[:n]), nil
}

// publish copies the entry name of srcDir to dstName in dstDir, where it
// appears complete.
func (c *copier) publish(dstDir int, dstName string, srcDir int, srcName string) error {
	src := handle{fd: -1, dir: srcDir, name: srcName, at: place{name: srcName}}
	var st unix.Stat_t
	if err := src.stat(&st); err != nil {
		return err
	}
	c.entries.Add(1)
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return c.publishRegular(dstDir, dstName, srcDir, srcName)
	}
	tmp := tempName()
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return c.publishDir(dstDir, dstName, tmp, src)
	}
	made, err := c.special(dstDir, tmp, src, &st)
	if err == nil && made {
		err = rename(dstDir, tmp, dstName)
	}
	if err != nil {
		unix.Unlinkat(dstDir, tmp, 0)
	}
	return err
}

func (c *copier) publishRegular(dstDir int, dstName string, srcDir int, srcName string) (err error) {
	srcFD, err := openSource(srcDir, srcName)
	if err != nil {
		return err
	}
	defer unix.Close(srcFD)
	src := handle{fd: srcFD, at: place{name: srcName}}
	var st unix.Stat_t
	if err := src.stat(&st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("changed while it was copied: %w", unix.ESTALE)
	}
	c.dev = st.Dev
	var tmp string
	fd := -1
	if !c.noTmpfile.Load() {
		fd, err = sys.Openat(dstDir, ".", unix.O_WRONLY|unix.O_TMPFILE, 0o600)
		if err != nil {
			// EISDIR is what kernels and file systems without it say; EINVAL
			// and ENOENT come from some.
			if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return err
			}
			c.noTmpfile.Store(true)
		}
	}
	if fd < 0 {
		tmp = tempName()
		fd, err = sys.Openat(dstDir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
	}
	defer func() {
		unix.Close(fd)
		if err != nil && tmp != "" {
			unix.Unlinkat(dstDir, tmp, 0)
		}
	}()
	if err := c.fill(handle{fd: fd}, src, &st); err != nil {
		return err
	}
	if tmp != "" {
		err = rename(dstDir, tmp, dstName)
	} else {
		err = linkTmpfile(fd, dstDir, dstName)
	}
	if err != nil {
		return err
	}
	if c.opts.InodeFlags {
		if err := copyFlags(fd, srcFD); err != nil {
			unix.Unlinkat(dstDir, dstName, 0)
			return err
		}
	}
	return nil
}

// linkTmpfile gives a nameless file a name. Without CAP_DAC_READ_SEARCH that
// needs /proc, open(2).
func linkTmpfile(fd, dir int, name string) error {
	err := unix.Linkat(fd, "", dir, name, unix.AT_EMPTY_PATH)
	if err == unix.ENOENT || err == unix.EPERM || err == unix.EINVAL {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), dir, name, unix.AT_SYMLINK_FOLLOW)
	}
	return os.NewSyscallError("linkat", err)
}

// publishDir makes a directory with the attributes, but without the contents,
// of src.
func (c *copier) publishDir(dstDir int, dstName, tmp string, src handle) (err error) {
	srcFD, err := sys.Openat(src.dir, src.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(srcFD)
	var st unix.Stat_t
	if err := unix.Fstat(srcFD, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := unix.Mkdirat(dstDir, tmp, 0o700); err != nil {
		return os.NewSyscallError("mkdirat", err)
	}
	fd := -1
	defer func() {
		if fd >= 0 {
			unix.Close(fd)
		}
		if err != nil {
			unix.Unlinkat(dstDir, tmp, unix.AT_REMOVEDIR)
		}
	}()
	if fd, err = sys.Openat(dstDir, tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
		return err
	}
	s := c.scratch.Get().(*scratch)
	defer c.scratch.Put(s)
	if err := c.attributes(handle{fd: fd}, handle{fd: srcFD, at: src.at}, &st, s); err != nil {
		return err
	}
	return rename(dstDir, tmp, dstName)
}

// rename moves tmp to name, which must not exist.
func rename(dir int, tmp, name string) error {
	err := unix.Renameat2(dir, tmp, dir, name, unix.RENAME_NOREPLACE)
	if err != unix.EINVAL && err != unix.ENOSYS {
		return os.NewSyscallError("renameat2", err)
	}
	// A file system without the flag (NFS and others). A link never replaces
	// anything; a directory is replaced only if it is empty.
	var st unix.Stat_t
	if err := unix.Fstatat(dir, tmp, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fstatat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return os.NewSyscallError("renameat", unix.Renameat(dir, tmp, dir, name))
	}
	if err := unix.Linkat(dir, tmp, dir, name, 0); err != nil {
		return os.NewSyscallError("linkat", err)
	}
	return os.NewSyscallError("unlinkat", unix.Unlinkat(dir, tmp, 0))
}

func copyFile(ctx context.Context, dst, src string, opts *Options) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	dstParent, err := os.Open(filepath.Dir(dst))
	if err != nil {
		return err
	}
	defer dstParent.Close()
	srcParent, err := os.Open(filepath.Dir(src))
	if err != nil {
		return err
	}
	defer srcParent.Close()
	st, err := os.Lstat(src)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return &os.PathError{Op: "copy", Path: src, Err: unix.EISDIR}
	}
	c := newCopier(ctx, opts)
	return c.publish(int(dstParent.Fd()), filepath.Base(dst), int(srcParent.Fd()), filepath.Base(src))
}
