package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/sys"
)

// growFS makes a mounted file system as large as its device, and notes it.
func (m *mechanism) growFS(tree *os.File, id string, d device) error {
	dir, err := os.Open(procPath(tree) + "/.") // the mount itself is an O_PATH descriptor
	if err != nil {
		return err
	}
	defer dir.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return &os.PathError{Op: "statfs", Path: tree.Name(), Err: err}
	}
	blocks := uint64(d.Size / int64(st.Bsize))
	m.step("grow: file system")
	switch m.opts.FS {
	case "xfs":
		err = growXFS(dir, blocks)
	default:
		// EXT4_IOC_RESIZE_FS, include/uapi/linux/ext4.h: _IOW('f', 16, __u64).
		err = sys.Ioctl(dir, "EXT4_IOC_RESIZE_FS", sys.IOW[uint64]('f', 16), &blocks)
	}
	if err != nil {
		return fmt.Errorf("grow the file system to %d bytes: %w", d.Size, err)
	}
	m.step("grow: note")
	d.FSSize = d.Size
	return m.save(m.devicePath(id), d)
}

// xfsGrowData is struct xfs_growfs_data, fs/xfs/libxfs/xfs_fs.h.
type xfsGrowData struct {
	Blocks uint64
	IMax   uint32 // share of the space for inodes, in percent
	_      uint32
}

// xfsGeometry is struct xfs_fsop_geom, fs/xfs/libxfs/xfs_fs.h, Linux 5.2; its
// older forms have other sizes on other machines.
type xfsGeometry struct {
	BlockSize, ExtentSize, AGBlocks, AGCount   uint32
	LogBlocks, SectorSize, InodeSize, IMax     uint32
	DataBlocks, RTBlocks, RTExtents, LogStart  uint64
	UUID                                       [16]byte
	SUnit, SWidth                              uint32
	Version                                    int32
	Flags, LogSectorSize, RTSectorSize, DirBlk uint32
	LogSUnit, Sick, Checked                    uint32
	_                                          [17]uint64
}

func growXFS(dir *os.File, blocks uint64) error {
	var g xfsGeometry
	// XFS_IOC_FSGEOMETRY: _IOR('X', 126, struct xfs_fsop_geom), 256 bytes.
	if err := sys.Ioctl(dir, "XFS_IOC_FSGEOMETRY", 2<<30|256<<16|'X'<<8|126, &g); err != nil {
		return err
	}
	if g.DataBlocks >= blocks {
		return nil
	}
	// XFS_IOC_FSGROWFSDATA: _IOW('X', 110, struct xfs_growfs_data), which
	// alone on i386 has no padding at its end.
	size := uint(16)
	if runtime.GOARCH == "386" {
		size = 12
	}
	return sys.Ioctl(dir, "XFS_IOC_FSGROWFSDATA", 1<<30|size<<16|'X'<<8|110, &xfsGrowData{Blocks: blocks, IMax: g.IMax})
}

// SetQuota sets the size of a layer, which can only grow: at once if it is
// mounted for writing, else when it next is. A quota of zero keeps the size.
// Both file systems have room for growing by a factor of some hundred. The
// error matches [errors.ErrUnsupported] if the layer would shrink.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(chain lifecycle.Chain, rec *lifecycle.Record) error {
		if q.Bytes < 0 || q.Inodes < 0 {
			return fmt.Errorf("quota of %d bytes and %d inodes is negative", q.Bytes, q.Inodes)
		}
		if err := d.m.grow(chain.Layer(), q); err != nil {
			return err
		}
		rec.Quota = q
		return nil
	})
}

// grow makes the device of a layer larger, and its file system if it is
// mounted for writing.
func (m *mechanism) grow(rec *lifecycle.Record, q layerfs.Quota) error {
	dev, err := m.load(rec.ID)
	if err != nil {
		return err
	}
	size, err := m.sizeFor(origin{device: dev}, q, true)
	if err != nil {
		return err
	}
	if size == dev.Size {
		return nil
	}
	frozen, err := m.frozen(rec)
	if err != nil {
		return err
	}
	if frozen {
		return fmt.Errorf("it cannot grow: %w", layerfs.ErrReadOnly)
	}
	dev.Size = size
	m.step("grow: save")
	if err := m.save(m.devicePath(rec.ID), dev); err != nil {
		return err
	}
	m.step("grow: device")
	st, err := m.State(rec.ID)
	if err != nil || !st.Mounted {
		return err
	}
	name := m.deviceName(rec.ID, false)
	if err := m.stretch(name, dev, false); err != nil {
		return err
	}
	if st.ReadOnly {
		return nil
	}
	tree, err := os.Open(m.Path(rec.ID))
	if err != nil {
		return err
	}
	return errors.Join(m.growFS(tree, rec.ID, dev), tree.Close())
}
