package sys

import (
	"os"
	"runtime"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FSXattr is struct fsxattr, include/uapi/linux/fs.h.
type FSXattr struct {
	_          structs.HostLayout
	XFlags     uint32
	ExtSize    uint32
	NExtents   uint32
	ProjectID  uint32
	CowExtSize uint32
	_          [8]byte
}

// FSXFlagProjInherit is FS_XFLAG_PROJINHERIT: what is made in the directory
// gets its project id.
const FSXFlagProjInherit = 0x200

// GetFSXattr calls FS_IOC_FSGETXATTR.
func GetFSXattr(f *os.File) (FSXattr, error) {
	var a FSXattr
	err := Ioctl(f, "FS_IOC_FSGETXATTR", IOR[FSXattr]('X', 31), &a)
	return a, err
}

// SetFSXattr calls FS_IOC_FSSETXATTR.
func SetFSXattr(f *os.File, a FSXattr) error {
	return Ioctl(f, "FS_IOC_FSSETXATTR", IOW[FSXattr]('X', 32), &a)
}

// DiskQuota is struct fs_disk_quota, include/uapi/linux/dqblk_xfs.h. Space is
// counted in units of 512 bytes.
type DiskQuota struct {
	_            structs.HostLayout
	Version      int8
	Flags        int8
	FieldMask    uint16
	ID           uint32
	BlockHard    uint64
	BlockSoft    uint64
	InodeHard    uint64
	InodeSoft    uint64
	Blocks       uint64
	Inodes       uint64
	InodeTimer   int32
	BlockTimer   int32
	InodeWarns   uint16
	BlockWarns   uint16
	InodeTimerHi int8
	BlockTimerHi int8
	RTTimerHi    int8
	_            int8
	RTBlockHard  uint64
	RTBlockSoft  uint64
	RTBlocks     uint64
	RTTimer      int32
	RTWarns      uint16
	_            int16
	_            [8]byte
}

// Values of [DiskQuota].
const (
	DiskQuotaVersion = 1      // FS_DQUOT_VERSION
	ProjectQuotaFlag = 1 << 1 // FS_PROJ_QUOTA
	FieldInodeSoft   = 1 << 0 // FS_DQ_ISOFT
	FieldInodeHard   = 1 << 1 // FS_DQ_IHARD
	FieldBlockSoft   = 1 << 2 // FS_DQ_BSOFT
	FieldBlockHard   = 1 << 3 // FS_DQ_BHARD
)

// QuotaFile is struct fs_qfilestatv.
type QuotaFile struct {
	_       structs.HostLayout
	Inode   uint64
	Blocks  uint64
	Extents uint32
	_       uint32
}

// QuotaState is struct fs_quota_statv.
type QuotaState struct {
	_              structs.HostLayout
	Version        int8
	_              uint8
	Flags          uint16
	InCore         uint32
	User           QuotaFile
	Group          QuotaFile
	Project        QuotaFile
	BlockTimeLimit int32
	InodeTimeLimit int32
	RTTimeLimit    int32
	BlockWarnLimit uint16
	InodeWarnLimit uint16
	RTWarnLimit    uint16
	_              uint16
	_              uint32
	_              [7]uint64
}

// Values of [QuotaState].
const (
	QuotaStateVersion   = 1      // FS_QSTATV_VERSION1
	ProjectQuotaCounted = 1 << 4 // FS_QUOTA_PDQ_ACCT
	ProjectQuotaLimited = 1 << 5 // FS_QUOTA_PDQ_ENFD
)

// Commands of quotactl(2) for project quotas, QCMD(command, PRJQUOTA). Those of
// XFS work on every file system since Linux 2.6.36 (fs/quota/quota.c).
const (
	QuotaGet      = ('X'<<8+3)<<8 | 2 // Q_XGETQUOTA
	QuotaSet      = ('X'<<8+4)<<8 | 2 // Q_XSETQLIM
	QuotaGetState = ('X'<<8+8)<<8 | 2 // Q_XGETQSTATV
)

// QuotactlFd calls quotactl_fd(2), Linux 5.14, for the file system of f.
func QuotactlFd[T any](f *os.File, cmd int, id uint32, arg *T) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(cmd), uintptr(id), uintptr(unsafe.Pointer(arg)), 0, 0)
		runtime.KeepAlive(f)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return &os.PathError{Op: "quotactl_fd", Path: f.Name(), Err: errno}
	}
}

// Quotactl calls quotactl(2) for the file system on a block device.
func Quotactl[T any](device string, cmd int, id uint32, arg *T) error {
	name, err := unix.BytePtrFromString(device)
	if err != nil {
		return &os.PathError{Op: "quotactl", Path: device, Err: err}
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL, uintptr(cmd), uintptr(unsafe.Pointer(name)), uintptr(id), uintptr(unsafe.Pointer(arg)), 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return &os.PathError{Op: "quotactl", Path: device, Err: errno}
	}
}
