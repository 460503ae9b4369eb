package mount

import (
	"errors"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// OpenTreeMapped returns a detached copy of the mount at path in which the
// files of a container's id belong to its host id. It can be a layer of an
// [Overlay] by way of its Files, or be attached with [Attach]; closing it
// dissolves it otherwise. Mounts below path are not in it.
//
// The error matches [errors.ErrUnsupported] if the kernel or the file system
// cannot map owners. CAP_SYS_ADMIN is needed in the user namespace of the file
// system. A process is started and killed for each call; see [UserNamespace].
//
// Kernel: MOUNT_ATTR_IDMAP of mount_setattr(2), Linux 5.12 (commit
// 9caccd41541a); overlayfs takes such layers since 5.19 (commit bc70682a497c).
func OpenTreeMapped(path string, m *layerfs.IDMap) (*os.File, error) {
	ns, err := UserNamespace(m)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return OpenTreeIn(path, ns)
}

// OpenTreeIn is [OpenTreeMapped] with a user namespace that was made before,
// for several trees of one container.
func OpenTreeIn(path string, ns *os.File) (*os.File, error) {
	f, err := openTree(path, false)
	if err != nil {
		return nil, idmapUnsupported(err)
	}
	err = setAttr(f, false, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	runtime.KeepAlive(ns)
	if err != nil {
		f.Close()
		return nil, idmapUnsupported(err)
	}
	return f, nil
}

// idmapUnsupported tells a missing ability from other errors: EINVAL is what
// can_idmap_mount in fs/namespace.c says of a file system without FS_ALLOW_IDMAP.
func idmapUnsupported(err error) error {
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		return &layerfs.UnsupportedError{Feature: "idmapped mount", Reason: err.Error()}
	}
	return err
}

// UserNamespace returns a new user namespace with the mappings of m, without
// any process in it.
//
// A kernel makes one only for a process. Ours is a copy of this program that
// is traced, so that it stops before its first instruction, and killed as soon
// as the namespace is open.
func UserNamespace(m *layerfs.IDMap) (ns *os.File, err error) {
	if m == nil || len(m.UIDs) == 0 || len(m.GIDs) == 0 {
		return nil, errors.New("user namespace needs mappings of users and groups")
	}
	// The thread is the tracer and what Pdeathsig watches.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"userns"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER,
			UidMappings: procMap(m.UIDs),
			GidMappings: procMap(m.GIDs),
			Ptrace:      true,
			Pdeathsig:   unix.SIGKILL,
		},
	})
	if err != nil {
		return nil, &os.PathError{Op: "fork in user namespace", Path: "/proc/self/exe", Err: err}
	}
	// It is not reaped before that, so that the number cannot be another's.
	ns, err = os.Open("/proc/" + strconv.Itoa(pid) + "/ns/user")
	if rerr := killAndReap(pid); rerr != nil && err == nil {
		ns.Close()
		return nil, rerr
	}
	return ns, err
}

func killAndReap(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return os.NewSyscallError("kill", err)
	}
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return os.NewSyscallError("wait4", err)
		case status.Exited() || status.Signaled():
			return nil // and not the stop of a traced process
		}
	}
}

func procMap(ranges []layerfs.IDRange) []syscall.SysProcIDMap {
	out := make([]syscall.SysProcIDMap, len(ranges))
	for i, r := range ranges {
		out[i] = syscall.SysProcIDMap{ContainerID: int(r.ContainerID), HostID: int(r.HostID), Size: int(r.Size)}
	}
	return out
}
