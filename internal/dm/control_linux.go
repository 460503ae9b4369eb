package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// controlPath is the node that devtmpfs, or kmod from modules.devname, makes.
const controlPath = "/dev/mapper/control"

// Control is the device mapper of this kernel.
type Control struct {
	f       *os.File
	version Version
}

// Open opens /dev/mapper/control; where there is no such node, one of its own
// that it removes again. The error is a *layerfs.UnsupportedError if the
// kernel has no device mapper, and matches fs.ErrPermission without
// CAP_SYS_ADMIN.
func Open() (*Control, error) {
	f, err := openControl()
	if err != nil {
		return nil, err
	}
	c := &Control{f: f}
	h, err := c.call("dm_version", sys.DMVersionReq(), &request{})
	if err != nil {
		f.Close()
		return nil, err
	}
	c.version = Version{h.head().Version[0], h.head().Version[1], h.head().Version[2]}
	return c, nil
}

func openControl() (*os.File, error) {
	f, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f, nil
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, noDM(err.Error())
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	misc, err := os.ReadFile("/proc/misc")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(misc)) {
		w := strings.Fields(line)
		if len(w) != 2 || w[1] != "device-mapper" {
			continue
		}
		minor, err := strconv.ParseUint(w[0], 10, 20)
		if err != nil {
			return nil, fmt.Errorf("/proc/misc: %w", err)
		}
		const miscMajor = 10 // include/uapi/linux/major.h
		return openNode(unix.S_IFCHR, Device{miscMajor, uint32(minor)}, os.O_RDWR)
	}
	return nil, noDM(controlPath + " does not exist and /proc/misc has no device-mapper")
}

func noDM(why string) error {
	return &layerfs.UnsupportedError{Feature: "device mapper", Reason: why}
}

// openNode opens a device by its number through a node that exists only for
// the moment.
func openNode(typ uint32, d Device, flag int) (f *os.File, err error) {
	dir, err := os.MkdirTemp("", "layerfs-dm-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	name := filepath.Join(dir, "node")
	if err := unix.Mknod(name, typ|0o600, int(unix.Mkdev(d.Major, d.Minor))); err != nil {
		return nil, &os.PathError{Op: "mknod", Path: name, Err: err}
	}
	return os.OpenFile(name, flag, 0)
}

// Close closes the control node. Devices stay.
func (c *Control) Close() error { return c.f.Close() }

// Version returns the version of the kernel's interface.
func (c *Control) Version() Version { return c.version }

// request is what an ioctl is asked.
type request struct {
	name, uuid string
	flags      uint32
	targets    uint32
	event      uint32
	data       []byte
	expect     int // bytes of answer that are likely
}

// answer is the buffer that the kernel wrote.
type answer []byte

func (a answer) head() *sys.DMIoctl { return sys.View[sys.DMIoctl](a) }

// data returns what follows the head.
func (a answer) data() ([]byte, error) {
	h := a.head()
	if h.DataStart < uint32(sys.SizeOf[sys.DMIoctl]()) || h.DataSize < h.DataStart || int64(h.DataSize) > int64(len(a)) {
		return nil, badRecord("answer")
	}
	return a[h.DataStart:h.DataSize], nil
}

// maxAnswer bounds the buffer for an answer: 8 MiB hold tens of thousands of
// devices.
const maxAnswer = 8 << 20

// call makes one ioctl, with a larger buffer as long as the kernel says that
// the answer did not fit. Only requests that change nothing have large
// answers, but for a message, whose answer is small.
func (c *Control) call(op string, req uint, r *request) (answer, error) {
	if len(r.name) >= sys.DMNameLen || len(r.uuid) >= sys.DMUUIDLen || strings.ContainsRune(r.name+r.uuid, 0) {
		return nil, &os.PathError{Op: op, Path: r.name, Err: unix.EINVAL}
	}
	head := sys.SizeOf[sys.DMIoctl]()
	for size := max(r.expect, 2<<10); ; size *= 4 {
		a := make(answer, head+max(size, len(r.data)))
		h := a.head()
		h.Version = [3]uint32{4, 0, 0} // the kernel refuses only a newer one
		h.DataSize, h.DataStart = uint32(len(a)), uint32(head)
		h.Flags, h.TargetCount, h.EventNr = r.flags, r.targets, r.event
		copy(h.Name[:], r.name)
		copy(h.UUID[:], r.uuid)
		copy(a[head:], r.data)
		if err := sys.IoctlBytes(c.f, op, req, a); err != nil {
			var pe *os.PathError
			if errors.As(err, &pe) && r.name != "" {
				pe.Path = r.name
			}
			return nil, err
		}
		if h.Flags&sys.DMBufferFull == 0 {
			return a, nil
		}
		if size > maxAnswer {
			return nil, &os.PathError{Op: op, Path: r.name, Err: errors.New("answer does not fit")}
		}
	}
}

// Info is the state of a device.
type Info struct {
	Name, UUID       string
	Device           Device
	Opens            int    // how many hold it open, mounts and tables included
	Targets          int    // of the live table
	Event            uint32 // number of the last event
	ReadOnly         bool
	Suspended        bool
	Live             bool // it has a live table
	Inactive         bool // a table is loaded that the next resume makes live
	DeferredRemove   bool // it goes away with the last opener
	InternalSuspends bool // the kernel has suspended it, for a pool's sake
}

func (a answer) info() Info {
	h := a.head()
	name, _ := cstring(h.Name[:])
	uuid, _ := cstring(h.UUID[:])
	has := func(f uint32) bool { return h.Flags&f != 0 }
	return Info{
		Name: name, UUID: uuid, Device: decodeDevice(h.Dev),
		Opens: int(h.OpenCount), Targets: int(h.TargetCount), Event: h.EventNr,
		ReadOnly: has(sys.DMReadOnly), Suspended: has(sys.DMSuspend), Live: has(sys.DMActivePresent),
		Inactive: has(sys.DMInactivePresent), DeferredRemove: has(sys.DMDeferredRemove),
		InternalSuspends: has(sys.DMInternalSuspend),
	}
}

func (c *Control) infoOf(op string, req uint, r *request) (Info, error) {
	a, err := c.call(op, req, r)
	if err != nil {
		return Info{}, err
	}
	return a.info(), nil
}

// Create makes a device without a table. The uuid may be empty. It fails with
// EBUSY if the name or the uuid is taken.
func (c *Control) Create(name, uuid string) (Info, error) {
	return c.infoOf("dm_dev_create", sys.DMDevCreateReq(), &request{name: name, uuid: uuid})
}

// Load loads a table, which the next [Control.Resume] makes live.
func (c *Control) Load(name string, table []Target, readOnly bool) (Info, error) {
	data, err := encodeTargets(table)
	if err != nil {
		return Info{}, err
	}
	r := &request{name: name, data: data, targets: uint32(len(table))}
	if readOnly {
		r.flags = sys.DMReadOnly
	}
	return c.infoOf("dm_table_load", sys.DMTableLoadReq(), r)
}

// Clear drops a loaded table that is not live.
func (c *Control) Clear(name string) error {
	_, err := c.call("dm_table_clear", sys.DMTableClearReq(), &request{name: name})
	return err
}

// SuspendOptions says how a device is suspended.
type SuspendOptions struct {
	// NoFlush keeps I/O that has not started for after the resume, and does
	// not wait for it. A pool out of space needs it, or it waits for ever.
	NoFlush bool
	// NoLockFS does not freeze the file system on the device.
	NoLockFS bool
}

func (o SuspendOptions) flags() uint32 {
	var f uint32
	if o.NoFlush {
		f |= sys.DMNoFlush
	}
	if o.NoLockFS {
		f |= sys.DMSkipLockFS
	}
	return f
}

// Suspend holds back I/O to the device, having frozen the file system on it
// unless opts says otherwise. A suspended device stays so, which is no error.
func (c *Control) Suspend(name string, opts SuspendOptions) error {
	_, err := c.call("dm_dev_suspend", sys.DMDevSuspendReq(), &request{name: name, flags: sys.DMSuspend | opts.flags()})
	return err
}

// Resume makes a loaded table live and lets I/O go on. If it replaces a table,
// the kernel suspends the device for the change, as opts says.
func (c *Control) Resume(name string, opts SuspendOptions) (Info, error) {
	return c.infoOf("dm_dev_resume", sys.DMDevSuspendReq(), &request{name: name, flags: opts.flags()})
}

// Activate creates a device with a table: create, load, resume. If a step
// fails nothing is left.
func (c *Control) Activate(name, uuid string, table []Target, readOnly bool) (Info, error) {
	if _, err := c.Create(name, uuid); err != nil {
		return Info{}, err
	}
	_, err := c.Load(name, table, readOnly)
	if err == nil {
		var info Info
		if info, err = c.Resume(name, SuspendOptions{}); err == nil {
			return info, nil
		}
	}
	if rerr := c.Remove(name); rerr != nil {
		err = fmt.Errorf("%w (rollback: %v)", err, rerr)
	}
	return Info{}, err
}

// Remove removes a device. It fails with EBUSY if it is open, with ENXIO if
// there is none.
func (c *Control) Remove(name string) error {
	_, err := c.call("dm_dev_remove", sys.DMDevRemoveReq(), &request{name: name})
	return err
}

// RemoveDeferred removes a device now or, if it is open, when its last opener
// closes it; deferred reports which. Linux 3.13.
func (c *Control) RemoveDeferred(name string) (deferred bool, err error) {
	i, err := c.infoOf("dm_dev_remove", sys.DMDevRemoveReq(), &request{name: name, flags: sys.DMDeferredRemove})
	return i.DeferredRemove, err
}

// CancelDeferred takes a deferred removal back.
func (c *Control) CancelDeferred(name string) error {
	_, err := c.Message(name, 0, "@cancel_deferred_remove")
	return err
}

// Rename gives a device another name.
func (c *Control) Rename(name, to string) error {
	if to == "" || len(to) >= sys.DMNameLen {
		return &os.PathError{Op: "dm_dev_rename", Path: to, Err: unix.EINVAL}
	}
	_, err := c.call("dm_dev_rename", sys.DMDevRenameReq(), &request{name: name, data: append([]byte(to), 0)})
	return err
}

// SetUUID gives a device that has none a uuid. Linux 3.0.
func (c *Control) SetUUID(name, uuid string) error {
	if uuid == "" || len(uuid) >= sys.DMUUIDLen {
		return &os.PathError{Op: "dm_dev_rename", Path: name, Err: unix.EINVAL}
	}
	_, err := c.call("dm_dev_rename", sys.DMDevRenameReq(), &request{name: name, flags: sys.DMUUID, data: append([]byte(uuid), 0)})
	return err
}

// Message sends a message to the target at the sector and returns what it
// answers, mostly nothing.
func (c *Control) Message(name string, sector uint64, msg string) (string, error) {
	if strings.ContainsRune(msg, 0) {
		return "", &os.PathError{Op: "dm_target_msg", Path: name, Err: unix.EINVAL}
	}
	data := make([]byte, sys.SizeOf[sys.DMTargetMsg](), 64)
	sys.View[sys.DMTargetMsg](data).Sector = sector
	data = append(append(data, msg...), 0)
	a, err := c.call("dm_target_msg", sys.DMTargetMsgReq(), &request{name: name, data: data})
	if err != nil {
		return "", err
	}
	if a.head().Flags&sys.DMDataOut == 0 {
		return "", nil
	}
	out, err := a.data()
	if err != nil {
		return "", err
	}
	s, ok := cstring(out)
	if !ok {
		return "", badRecord("answer to a message")
	}
	return s, nil
}

// Info returns the state of a device. It fails with ENXIO if there is none.
func (c *Control) Info(name string) (Info, error) {
	return c.infoOf("dm_dev_status", sys.DMDevStatusReq(), &request{name: name})
}

// Table returns the live table, or the loaded one that is not live yet.
func (c *Control) Table(name string, inactive bool) ([]Target, error) {
	r := &request{name: name, flags: sys.DMStatusTable}
	if inactive {
		r.flags |= sys.DMQueryInactiveTable
	}
	return c.targets(r)
}

// Status returns the status of each target of the live table, in Params. The
// status of a thin pool writes its metadata first, unless noFlush is set.
func (c *Control) Status(name string, noFlush bool) ([]Target, error) {
	r := &request{name: name}
	if noFlush {
		r.flags = sys.DMNoFlush
	}
	return c.targets(r)
}

func (c *Control) targets(r *request) ([]Target, error) {
	a, err := c.call("dm_table_status", sys.DMTableStatusReq(), r)
	if err != nil {
		return nil, err
	}
	data, err := a.data()
	if err != nil {
		return nil, err
	}
	return decodeTargets(data, a.head().TargetCount)
}

// PoolStatus returns the status of a thin pool.
func (c *Control) PoolStatus(name string) (PoolStatus, error) {
	t, err := c.one(name, "thin-pool")
	if err != nil {
		return PoolStatus{}, err
	}
	return ParsePoolStatus(t.Params)
}

// ThinStatus returns the status of a thin device.
func (c *Control) ThinStatus(name string) (ThinStatus, error) {
	t, err := c.one(name, "thin")
	if err != nil {
		return ThinStatus{}, err
	}
	return ParseThinStatus(t.Params)
}

// one returns the status of the only target, which must be of the type.
func (c *Control) one(name, typ string) (Target, error) {
	ts, err := c.Status(name, false)
	if err != nil {
		return Target{}, err
	}
	if len(ts) != 1 || ts[0].Type != typ {
		return Target{}, fmt.Errorf("device %s: not a %s: %v", name, typ, ts)
	}
	return ts[0], nil
}

// Deps returns the devices that the live table of a device uses.
func (c *Control) Deps(name string) ([]Device, error) {
	a, err := c.call("dm_table_deps", sys.DMTableDepsReq(), &request{name: name})
	if err != nil {
		return nil, err
	}
	if !a.info().Live {
		return nil, nil // the kernel writes no list then
	}
	data, err := a.data()
	if err != nil {
		return nil, err
	}
	return decodeDeps(data)
}

// List returns all devices of this kernel, in no order.
func (c *Control) List() ([]Entry, error) {
	a, err := c.call("dm_list_devices", sys.DMListDevicesReq(), &request{expect: 16 << 10})
	if err != nil {
		return nil, err
	}
	data, err := a.data()
	if err != nil {
		return nil, err
	}
	return decodeNames(data)
}

// Versions returns the targets that are loaded.
func (c *Control) Versions() ([]TargetVersion, error) {
	a, err := c.call("dm_list_versions", sys.DMListVersionsReq(), &request{})
	if err != nil {
		return nil, err
	}
	data, err := a.data()
	if err != nil {
		return nil, err
	}
	return decodeVersions(data)
}

// TargetVersion returns the version of a target, whose module the kernel loads
// if need be. The error is a *layerfs.UnsupportedError if it has no such
// target. Before Linux 5.4 only what is loaded is found.
func (c *Control) TargetVersion(target string) (Version, error) {
	missing := &layerfs.UnsupportedError{Feature: "device mapper target " + target, Reason: "the kernel does not have it"}
	a, err := c.call("dm_get_target_version", sys.DMGetTargetVersionReq(), &request{name: target})
	var list []TargetVersion
	switch {
	case err == nil:
		data, err := a.data()
		if err != nil {
			return Version{}, err
		}
		if list, err = decodeVersions(data); err != nil {
			return Version{}, err
		}
	case errors.Is(err, unix.ENOTTY):
		if list, err = c.Versions(); err != nil {
			return Version{}, err
		}
	case errors.Is(err, unix.EINVAL):
		return Version{}, missing
	default:
		return Version{}, err
	}
	for _, v := range list {
		if v.Name == target {
			return v.Version, nil
		}
	}
	return Version{}, missing
}
