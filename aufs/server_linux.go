package aufs

import (
	"errors"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/mount"
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
		if err := fusesrv.Abort(info.Minor); err != nil {
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
