package aufs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
)

// A process that is killed while one of its own threads waits for an answer of
// a union it serves cannot end: the thread waits for the connection to end, and
// that waits for the thread to close its files. Somebody else has to abort the
// connection. The source of a mount, which everybody sees in mountinfo, tells
// which process serves it.

// sourceOf returns the source of the mounts of this process.
func sourceOf(pid int) (string, error) {
	ns, err := pidNamespace()
	return serverSource(ns, pid), err
}

func pidNamespace() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: "/proc/self/ns/pid", Err: err}
	}
	return st.Ino, nil
}

// endDead aborts the connection of the FUSE mount at a path if the process that
// serves it is dead or cannot but die, and reports whether it did.
func endDead(target string) (bool, error) {
	infos, err := mount.Under(target)
	if err != nil {
		return false, err
	}
	ended := false
	for _, info := range infos {
		ns, pid, ok := parseSource(info.Source)
		if !ok || info.FSType != "fuse.layerfs" || info.Major != 0 {
			continue
		}
		dead, err := isDead(ns, pid)
		if err != nil {
			return ended, err
		}
		if !dead {
			continue
		}
		if err := abort(info.Minor); err != nil {
			return ended, err
		}
		ended = true
	}
	return ended, nil
}

// isDead reports whether a process has ended or was killed. One in another
// namespace cannot be judged.
func isDead(ns uint64, pid int) (bool, error) {
	mine, err := pidNamespace()
	if err != nil || mine != ns {
		return false, err
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return statusDead(string(status)), nil
}

// abort ends a FUSE connection, which frees whoever waits for an answer
// (Documentation/filesystems/fuse.rst, "Control filesystem"). The control file
// system is mounted nowhere for that, since it may be missing in /sys.
func abort(connection int) error {
	ctx, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen fusectl", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return os.NewSyscallError("fsconfig fusectl", err)
	}
	root, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fsmount fusectl", err)
	}
	defer unix.Close(root)
	fd, err := sys.Openat(root, strconv.Itoa(connection)+"/abort", unix.O_WRONLY, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // it has ended
	}
	if err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", connection, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("1")); err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", connection, err)
	}
	return nil
}
