//go:build !layerfs_portable

package copyup

import (
	"os"

	"golang.org/x/sys/unix"
)

// The flags of FS_IOC_GETFLAGS, linux/fs.h, that users set and that mean the
// same on every file system.
const (
	flagSync      = 0x8
	flagImmutable = 0x10
	flagAppend    = 0x20
	flagNoDump    = 0x40
	flagNoAtime   = 0x80
	flagDirSync   = 0x10000
	flagNoCOW     = 0x800000 // can be set while a file is empty only

	flagsCopied = flagSync | flagImmutable | flagAppend | flagNoDump | flagNoAtime | flagDirSync | flagNoCOW
)

// getFlags returns the flags to copy; none where the file system has none.
func getFlags(fd int) (int, error) {
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	switch err {
	case nil:
		return flags, nil
	case unix.ENOTTY, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS:
		return 0, nil
	}
	return 0, os.NewSyscallError("ioctl FS_IOC_GETFLAGS", err)
}

func setFlags(fd, want, mask int) error {
	have, err := getFlags(fd)
	if err != nil || (have^want)&mask == 0 {
		return err
	}
	return os.NewSyscallError("ioctl FS_IOC_SETFLAGS", unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, have&^mask|want&mask))
}

// earlyFlags copies those that must be set before a file has data.
func earlyFlags(dst, src int) error {
	flags, err := getFlags(src)
	if err != nil || flags&flagNoCOW == 0 {
		return err
	}
	return setFlags(dst, flags, flagNoCOW)
}

// copyFlags copies all flags. Nothing can be changed after.
func copyFlags(dst, src int) error {
	flags, err := getFlags(src)
	if err != nil {
		return err
	}
	return setFlags(dst, flags, flagsCopied)
}
