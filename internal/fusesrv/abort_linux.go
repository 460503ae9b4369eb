package fusesrv

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Abort ends a FUSE connection, given as the minor number of the device that
// its files are on, which frees whoever waits for an answer
// (Documentation/filesystems/fuse.rst, "Control filesystem"). One that has
// ended is no error. The control file system is mounted nowhere for that,
// since it may be missing in /sys.
func Abort(connection int) error {
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
	fd, err := unix.Openat(root, strconv.Itoa(connection)+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("1"))
	}
	if err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", connection, err)
	}
	return nil
}
