package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
)

// mountMapped mounts an overlay all of whose layers are mapped, so that the
// owners stored in the upper directory are the container's like those below.
func (m *mechanism) mountMapped(plan *mount.Overlay, id string, ids *layerfs.IDMap) error {
	files, err := m.mapped(plan, id, ids)
	defer closeAll(files)
	if err != nil {
		return err
	}
	plan.Files = files
	if plan.Upper == "" {
		return plan.Mount(m.Path(id))
	}
	uid, gid, ok := ids.ToHost(0, 0)
	if !ok {
		return fmt.Errorf("the map of owners has no root: %w", errors.ErrUnsupported)
	}
	return asOwner(uid, gid, func() error { return plan.Mount(m.Path(id)) })
}

// mapped opens the layers with their owners mapped. The descriptors of
// detached trees are layers themselves (Linux 6.15). What it opened is
// returned with an error, too.
func (m *mechanism) mapped(plan *mount.Overlay, id string, ids *layerfs.IDMap) (map[string]*os.File, error) {
	files := make(map[string]*os.File)
	ns, err := mount.UserNamespace(ids)
	if err != nil {
		return files, err
	}
	defer ns.Close()
	for _, d := range plan.Lowers {
		if files[d], err = mount.OpenTreeIn(d, ns); err != nil {
			delete(files, d)
			return files, err
		}
	}
	if plan.Upper == "" {
		return files, nil
	}
	// Upper and work must be on one mount.
	layer, err := mount.OpenTreeIn(m.layer(id), ns)
	if err != nil {
		return files, err
	}
	files[m.layer(id)] = layer
	for _, d := range []string{plan.Upper, plan.Work} {
		fd, err := sys.Openat(int(layer.Fd()), filepath.Base(d), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return files, err
		}
		files[d] = os.NewFile(uintptr(fd), d)
	}
	return files, nil
}

func closeAll(files map[string]*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// asOwner runs a function on a thread whose new files belong to somebody else.
// Overlayfs makes its own files, such as work/work, as whoever mounted it, and
// the real root has no id in the mapped layers: it would mount read-only
// (ovl_make_workdir, fs/overlayfs/super.c). The thread keeps all its
// capabilities and is not used for anything afterwards.
func asOwner(uid, gid uint32, run func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var caps [2]unix.CapUserData
			if err := unix.Capget(&header, &caps[0]); err != nil {
				return os.NewSyscallError("capget", err)
			}
			// The raw calls concern this thread only; setfsuid takes
			// capabilities away, and reports errors to nobody.
			unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
			unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
			if now, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, ^uintptr(0), 0, 0); uint32(now) != uid {
				return fmt.Errorf("setfsuid %d: %w", uid, unix.EPERM)
			}
			if err := unix.Capset(&header, &caps[0]); err != nil {
				return os.NewSyscallError("capset", err)
			}
			return run()
		}()
	}()
	return <-done
}
