package feature

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/quota"
	"github.com/layerfs/layerfs/internal/sys"
)

func probe(f Feature, dir string) error {
	switch f {
	case NewMountAPI:
		// An impossible descriptor: EINVAL or EBADF if the call is there.
		return probeCall(f, "Linux 5.2", unix.FsconfigCreate(-1))
	case MountSetattr:
		return probeCall(f, "Linux 5.12", unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
	case OpenAt2:
		_, err := unix.Openat2(-1, "x", &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_BENEATH})
		return probeCall(f, "Linux 5.6", err)
	case LowerAppend:
		return probeLowerAppend()
	case SysAdmin:
		return probeCapability(f, unix.CAP_SYS_ADMIN)
	case Mknod:
		if err := probeCapability(f, unix.CAP_MKNOD); err != nil {
			return err
		}
		return probeFirstNamespace(f)
	case Reflink:
		return probeReflink(dir)
	case DType:
		return probeDType(dir)
	case IDMap:
		return probeIDMap(dir)
	case ProjectQuota:
		return quota.Supported(dir)
	}
	if t, ok := trials()[f]; ok {
		return t.run(f, dir)
	}
	return unknown(f)
}

// no is the answer no. Since is given only if this kernel is older: a newer
// one that lacks the feature has another reason.
func no(f Feature, since, format string, args ...any) error {
	if since != "" && !olderThan(since) {
		since = ""
	}
	return &layerfs.UnsupportedError{Feature: string(f), Since: since, Reason: fmt.Sprintf(format, args...)}
}

// olderThan reports whether the running kernel is older than since, such as
// "Linux 5.11".
func olderThan(since string) bool {
	var major, minor int
	n, _ := fmt.Sscanf(since, "Linux %d.%d", &major, &minor)
	return n == 2 && !sys.KernelAtLeast(major, minor)
}

// probeCall judges a system call that was called with impossible arguments.
func probeCall(f Feature, since string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return no(f, since, "%v", err)
	case errors.Is(err, unix.EPERM):
		return no(f, "", "refused, by a seccomp filter or for lack of privileges: %v", err)
	}
	return nil
}

func probeLowerAppend() error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENODEV):
		return no(LowerAppend, "Linux 6.8", "fsopen overlay: %v", err)
	case errors.Is(err, unix.EPERM):
		return no(LowerAppend, "", "fsopen overlay: %v", err)
	case err != nil:
		return &os.PathError{Op: "fsopen", Path: "overlay", Err: err}
	}
	defer unix.Close(fd)
	// Before 6.5 overlayfs has no fs_context of its own, and the generic one
	// takes every option until the mount is made. It is told by the old kind
	// being happy with nonsense.
	if unix.FsconfigSetString(fd, "layerfs_nonsense", "x") == nil {
		return no(LowerAppend, "Linux 6.8", "options are not checked one by one")
	}
	if err := unix.FsconfigSetString(fd, "lowerdir+", "/"); err != nil {
		return no(LowerAppend, "Linux 6.8", "fsconfig lowerdir+: %v", err)
	}
	return nil
}

func probeCapability(f Feature, c uint) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	if data[c/32].Effective&(1<<(c%32)) == 0 {
		return no(f, "", "not effective in this process")
	}
	return nil
}

func probeFirstNamespace(f Feature) error {
	in, err := InUserNamespace()
	if err == nil && in {
		return no(f, "", "in a user namespace device nodes cannot be made")
	}
	return err
}

// InUserNamespace reports whether this process is in a user namespace other
// than the first one, by the inode number the kernel gives that one:
// PROC_USER_INIT_INO, include/linux/proc_ns.h.
func InUserNamespace() (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/user", &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return false, nil // without CONFIG_USER_NS there is only one
		}
		return false, &os.PathError{Op: "stat", Path: "/proc/thread-self/ns/user", Err: err}
	}
	return st.Ino != 0xEFFFFFFD, nil
}

func probeReflink(dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	defer cleanUp(tmp, &err)
	from, err := os.Create(filepath.Join(tmp, "from"))
	if err != nil {
		return err
	}
	defer from.Close()
	// Data, because some file systems clone nothing without complaint.
	if _, err := from.Write(make([]byte, 4096)); err != nil {
		return err
	}
	to, err := os.Create(filepath.Join(tmp, "to"))
	if err != nil {
		return err
	}
	defer to.Close()
	err = unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EXDEV):
		return no(Reflink, "", "FICLONE: %v", err)
	case err != nil:
		return &os.PathError{Op: "FICLONE", Path: dir, Err: err}
	}
	return nil
}

// probeDType looks for DT_UNKNOWN in what getdents64 gives, of which
// ext3-like file systems without filetype and xfs with ftype=0 are guilty.
func probeDType(dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	defer cleanUp(tmp, &err)
	if err := os.WriteFile(filepath.Join(tmp, "f"), nil, 0o600); err != nil {
		return err
	}
	fd, err := unix.Open(tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: tmp, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	for {
		n, err := sys.Getdents(fd, buf)
		if err != nil {
			return &os.PathError{Op: "getdents64", Path: tmp, Err: err}
		}
		if n == 0 {
			return nil
		}
		for list := sys.Dirents(buf[:n]); ; {
			e, ok, err := list.Next()
			if err != nil {
				return &os.PathError{Op: "getdents64", Path: tmp, Err: err}
			}
			if !ok {
				break
			}
			if e.Type == unix.DT_UNKNOWN {
				return no(DType, "", "readdir of %s does not tell file types", dir)
			}
		}
	}
}

func probeIDMap(dir string) error {
	tree, err := mount.OpenTreeMapped(dir, someMap())
	switch {
	case err == nil:
		return tree.Close()
	case errors.Is(err, errors.ErrUnsupported):
		return no(IDMap, "Linux 5.12", "%v", err)
	case errors.Is(err, unix.EPERM):
		return no(IDMap, "", "%v", err)
	}
	return err
}

func someMap() *layerfs.IDMap {
	return &layerfs.IDMap{
		UIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
	}
}

// cleanUp removes a temporary directory; its failure counts if nothing else
// went wrong.
func cleanUp(dir string, err *error) {
	if rerr := os.RemoveAll(dir); rerr != nil && *err == nil {
		*err = rerr
	}
}

// FSName returns the name of the file system type of dir under which Docker
// shows it as "Backing Filesystem": extfs for ext2, 3 and 4, xfs, btrfs,
// tmpfs, overlayfs, zfs and so on, or its magic number, such as 0x1234.
func FSName(dir string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return magicName(uint32(st.Type)), nil
}

// magicName names a number of include/uapi/linux/magic.h, or of file systems
// that are not in the kernel (aufs, bcachefs, gpfs, zfs).
func magicName(magic uint32) string {
	switch magic {
	case unix.EXT4_SUPER_MAGIC:
		return "extfs"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.RAMFS_MAGIC:
		return "ramfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	case unix.F2FS_SUPER_MAGIC:
		return "f2fs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.SQUASHFS_MAGIC:
		return "squashfs"
	case unix.EROFS_SUPER_MAGIC_V1:
		return "erofs"
	case unix.ECRYPTFS_SUPER_MAGIC:
		return "ecryptfs"
	case unix.REISERFS_SUPER_MAGIC:
		return "reiserfs"
	case unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC:
		return "smb"
	case unix.CEPH_SUPER_MAGIC:
		return "ceph"
	case 0x2fc12fc1:
		return "zfs"
	case 0x61756673:
		return "aufs"
	case 0xca451a4e:
		return "bcachefs"
	case 0x3153464a:
		return "jfs"
	case 0x47504653:
		return "gpfs"
	case 0x01021997:
		return "9p"
	}
	return fmt.Sprintf("%#x", magic)
}
