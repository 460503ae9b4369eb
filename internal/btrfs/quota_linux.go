package btrfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

const (
	quotaEnable       = 1 // BTRFS_QUOTA_CTL_ENABLE
	quotaDisable      = 2 // BTRFS_QUOTA_CTL_DISABLE
	quotaEnableSimple = 4 // BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA, Linux 6.7

	qgroupMaxRfer = 1 << 0 // BTRFS_QGROUP_LIMIT_MAX_RFER
	qgroupMaxExcl = 1 << 1 // BTRFS_QGROUP_LIMIT_MAX_EXCL
	qgroupClear   = ^uint64(0)

	qgroupStatusOn           = 1 << 0
	qgroupStatusRescan       = 1 << 1
	qgroupStatusInconsistent = 1 << 2
	qgroupStatusSimple       = 1 << 3 // BTRFS_QGROUP_STATUS_FLAG_SIMPLE_MODE

	rescanPoll = 20 * time.Millisecond
)

// QuotaMode says how a file system accounts for subvolumes.
type QuotaMode uint8

// The modes.
const (
	QuotaOff    QuotaMode = iota
	QuotaFull             // shared and exclusive bytes are known; deletion of snapshots costs
	QuotaSimple           // bytes count for the subvolume that wrote them; no rescan
)

// String returns off, on or simple.
func (m QuotaMode) String() string {
	switch m {
	case QuotaOff:
		return "off"
	case QuotaFull:
		return "on"
	case QuotaSimple:
		return "simple"
	}
	return fmt.Sprintf("QuotaMode(%d)", uint8(m))
}

// QuotaStatus is the state of quotas on a file system.
type QuotaStatus struct {
	Mode         QuotaMode
	Rescanning   bool
	Inconsistent bool // the numbers are wrong until a rescan
}

// SetQuotaMode turns quotas of the whole file system at path on or off. It
// needs CAP_SYS_ADMIN. Turning on the full mode starts a rescan, see
// [WaitRescan]; the error matches [errors.ErrUnsupported] if the kernel lacks
// the simple mode. A change between both modes goes through QuotaOff, which
// the caller does, because all limits are lost by it.
//
// Kernel: BTRFS_IOC_QUOTA_CTL; the simple mode since Linux 6.7.
func SetQuotaMode(path string, mode QuotaMode) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	now, err := quotaStatus(f)
	if err != nil {
		return err
	}
	if now.Mode == mode {
		return nil
	}
	args := &sys.BtrfsQuotaCtl{Cmd: quotaDisable}
	switch mode {
	case QuotaFull:
		args.Cmd = quotaEnable
	case QuotaSimple:
		args.Cmd = quotaEnableSimple
	}
	if mode != QuotaOff && now.Mode != QuotaOff {
		return &os.PathError{Op: "set quota mode " + mode.String(), Path: path, Err: fmt.Errorf("mode is %v: %w", now.Mode, unix.EBUSY)}
	}
	err = sys.Ioctl(f, "ioctl BTRFS_IOC_QUOTA_CTL", sys.BtrfsIocQuotaCtl, args)
	if errors.Is(err, unix.EINVAL) && mode == QuotaSimple {
		return &layerfs.UnsupportedError{Feature: "btrfs simple quotas", Since: "Linux 6.7", Reason: err.Error()}
	}
	return notBtrfs(err)
}

// ReadQuotaStatus returns the state of quotas. It needs CAP_SYS_ADMIN.
func ReadQuotaStatus(path string) (QuotaStatus, error) {
	f, err := openDir(path)
	if err != nil {
		return QuotaStatus{}, err
	}
	defer f.Close()
	return quotaStatus(f)
}

func quotaStatus(f *os.File) (QuotaStatus, error) {
	item, err := searchOne(f, treeQuota, 0, itemQgroupStatus)
	switch {
	case errors.Is(err, unix.ENOENT):
		return QuotaStatus{}, nil // no quota tree
	case err != nil:
		return QuotaStatus{}, err
	case item == nil:
		return QuotaStatus{}, nil
	case len(item.Data) < 32:
		return QuotaStatus{}, fmt.Errorf("qgroup status item of %d bytes", len(item.Data))
	}
	flags := le64(item.Data[16:]) // struct btrfs_qgroup_status_item: version, generation, flags, rescan
	s := QuotaStatus{
		Rescanning:   flags&qgroupStatusRescan != 0,
		Inconsistent: flags&qgroupStatusInconsistent != 0,
	}
	switch {
	case flags&qgroupStatusSimple != 0:
		s.Mode = QuotaSimple
	case flags&qgroupStatusOn != 0:
		s.Mode = QuotaFull
	}
	return s, nil
}

// Rescan starts a count of all bytes anew, unless one is running. It needs
// CAP_SYS_ADMIN and grows with the file system.
func Rescan(path string) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = sys.Ioctl(f, "ioctl BTRFS_IOC_QUOTA_RESCAN", sys.BtrfsIocRescan, &sys.BtrfsRescan{})
	if errors.Is(err, unix.EINPROGRESS) {
		return nil
	}
	return notBtrfs(err)
}

// WaitRescan waits until no rescan is running.
//
// Kernel: BTRFS_IOC_QUOTA_RESCAN_STATUS, asked every 20 ms, because
// BTRFS_IOC_QUOTA_RESCAN_WAIT cannot be left when ctx ends.
func WaitRescan(ctx context.Context, path string) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		args := &sys.BtrfsRescan{}
		if err := sys.Ioctl(f, "ioctl BTRFS_IOC_QUOTA_RESCAN_STATUS", sys.BtrfsIocRescanStatus, args); err != nil {
			return notBtrfs(err)
		}
		if args.Flags == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("quota rescan at %d: %w", args.Progress, ctx.Err())
		case <-time.After(rescanPoll):
		}
	}
}

// Qgroup is the accounting of a subvolume (level 0, the id is the
// subvolume's) or of a group of them. Bytes.
type Qgroup struct {
	ID            uint64
	Referenced    int64 // all that can be reached; in the simple mode, all that it wrote
	Exclusive     int64 // what removal of the subvolume would free
	MaxReferenced int64 // 0 means no limit
	MaxExclusive  int64
}

// QgroupID returns the id of a group above subvolumes, such as 1/100.
func QgroupID(level uint16, id uint64) uint64 { return uint64(level)<<48 | id }

// ReadQgroup returns the accounting of a group, of subvolume id if the level is
// 0. It needs CAP_SYS_ADMIN. Numbers are those of the last commit: call
// [Commit] or [Sync] before to have them exact. The error matches
// fs.ErrNotExist if the group is not there, as when quotas are off.
func ReadQgroup(path string, id uint64) (Qgroup, error) {
	f, err := openDir(path)
	if err != nil {
		return Qgroup{}, err
	}
	defer f.Close()
	q := Qgroup{ID: id}
	found := false
	for _, typ := range []uint8{itemQgroupInfo, itemQgroupLimit} {
		key := Key{0, typ, id}
		for item, err := range search(f, treeQuota, Range{Min: key, Max: key}, 4<<10) {
			if err != nil {
				return Qgroup{}, err
			}
			d := item.Data
			if len(d) < 40 {
				return Qgroup{}, fmt.Errorf("qgroup item of %d bytes", len(d))
			}
			if typ == itemQgroupInfo {
				// generation, rfer, rfer_cmpr, excl, excl_cmpr
				found = true
				q.Referenced, q.Exclusive = int64(le64(d[8:])), int64(le64(d[24:]))
				continue
			}
			// flags, max_rfer, max_excl, rsv_rfer, rsv_excl
			if le64(d)&qgroupMaxRfer != 0 {
				q.MaxReferenced = int64(le64(d[8:]))
			}
			if le64(d)&qgroupMaxExcl != 0 {
				q.MaxExclusive = int64(le64(d[16:]))
			}
		}
	}
	if !found {
		return Qgroup{}, &os.PathError{Op: fmt.Sprintf("read qgroup %d/%d", id>>48, id&(1<<48-1)), Path: path, Err: unix.ENOENT}
	}
	return q, nil
}

// CreateQgroup makes a group; those of subvolumes come by themselves. The error
// matches fs.ErrExist if it is there. It needs CAP_SYS_ADMIN.
func CreateQgroup(path string, id uint64) error { return qgroupCtl(path, id, 1) }

// DestroyQgroup removes a group. That of a removed subvolume stays until then,
// and only since Linux 6.12 the kernel removes it itself, in the simple mode
// not at once.
func DestroyQgroup(path string, id uint64) error { return qgroupCtl(path, id, 0) }

func qgroupCtl(path string, id, create uint64) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	args := &sys.BtrfsQgroupCreate{Create: create, Qgroup: id}
	return quotaOff(sys.Ioctl(f, "ioctl BTRFS_IOC_QGROUP_CREATE", sys.BtrfsIocQgroupCreate, args))
}

// AssignQgroup puts a group into a higher one, or takes it out. With assign the
// kernel may need a rescan to know the sums; it then says so, and one is
// started. It needs CAP_SYS_ADMIN.
func AssignQgroup(path string, member, group uint64, assign bool) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	args := &sys.BtrfsQgroupAssign{Src: member, Dst: group}
	if assign {
		args.Assign = 1
	}
	if err := quotaOff(sys.Ioctl(f, "ioctl BTRFS_IOC_QGROUP_ASSIGN", sys.BtrfsIocQgroupAssign, args)); err != nil {
		return err
	}
	st, err := quotaStatus(f)
	if err != nil || !st.Inconsistent {
		return err
	}
	return Rescan(path)
}

// LimitQgroup limits the bytes of a group; 0 lifts a limit. Id 0 means the
// subvolume that path is in. Writes beyond the limit fail with EDQUOT. It needs
// CAP_SYS_ADMIN. The error matches [errors.ErrUnsupported] if quotas are off.
//
// Kernel: BTRFS_IOC_QGROUP_LIMIT.
func LimitQgroup(path string, id uint64, maxReferenced, maxExclusive int64) error {
	if maxReferenced < 0 || maxExclusive < 0 {
		return &os.PathError{Op: "limit qgroup", Path: path, Err: unix.EINVAL}
	}
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	limit := sys.BtrfsQgroupLimit{Flags: qgroupMaxRfer | qgroupMaxExcl, MaxRfer: qgroupClear, MaxExcl: qgroupClear}
	if maxReferenced > 0 {
		limit.MaxRfer = uint64(maxReferenced)
	}
	if maxExclusive > 0 {
		limit.MaxExcl = uint64(maxExclusive)
	}
	return quotaOff(sys.Ioctl(f, "ioctl BTRFS_IOC_QGROUP_LIMIT", sys.BtrfsIocQgroupLimit, &sys.BtrfsQgroupLimitArgs{Qgroup: id, Limit: limit}))
}

// quotaOff explains the error the kernel gives while quotas are off.
func quotaOff(err error) error {
	if errors.Is(err, unix.ENOTCONN) {
		return &layerfs.UnsupportedError{Feature: "btrfs qgroups", Reason: "quotas are off on this file system: " + err.Error()}
	}
	return notBtrfs(err)
}
