package devmapper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/thin"
)

// device is metadata/ID: the device of a layer.
type device struct {
	ID          uint32 `json:"device_id"`
	Size        int64  `json:"size"`            // of the device, in bytes
	FSSize      int64  `json:"fs_size"`         // what the file system was made for; it grows at the next writable mount
	Transaction uint64 `json:"transaction_id"`  // in which the number was reserved
	Since       int64  `json:"since"`           // when the snapshot was taken, ns on CLOCK_REALTIME_COARSE
	State       string `json:"state,omitempty"` // of a received layer: the state of the sender it has
}

func (m *mechanism) devicePath(id string) string { return filepath.Join(m.home, "metadata", id) }

// load returns the device of a layer. The error matches fs.ErrNotExist if it
// has none.
func (m *mechanism) load(id string) (device, error) { return loadDevice(m.devicePath(id)) }

func loadDevice(path string) (device, error) {
	var d device
	b, err := os.ReadFile(path)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return d, fmt.Errorf("%s: %w", path, err)
	}
	if d.ID <= baseID || d.ID > dm.MaxThinID || d.Size <= 0 || d.Size%dm.SectorSize != 0 {
		return d, fmt.Errorf("%s: device %d of %d bytes is impossible", path, d.ID, d.Size)
	}
	return d, nil
}

func (m *mechanism) save(path string, d device) error {
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return replace(path, append(b, '\n'), m.opts.Durability != layerfs.DurabilityNone)
}

// rename moves a device's file, which is how one device takes the place of
// another.
func (m *mechanism) rename(from, to string) error {
	if err := unix.Rename(from, to); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	if m.opts.Durability == layerfs.DurabilityNone {
		return nil
	}
	return sys.Fsync(filepath.Dir(to))
}

// exchange swaps two device files in one step.
func (m *mechanism) exchange(a, b string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		return &os.LinkError{Op: "renameat2", Old: a, New: b, Err: err}
	}
	if m.opts.Durability == layerfs.DurabilityNone {
		return nil
	}
	return sys.Fsync(filepath.Dir(b))
}

// deviceName is the name of a layer's device, or of the pool.
func (m *mechanism) deviceName(id string, pool bool) string {
	if pool {
		return m.prefix + "-pool"
	}
	return deviceName(m.prefix, id)
}

// uuidOf is the uuid of a device of this root.
func (m *mechanism) uuidOf(what string) string { return "LAYERFS-" + m.root + "-" + what }

func (m *mechanism) thinUUID(n uint32) string { return m.uuidOf(strconv.FormatUint(uint64(n), 10)) }

// number returns a device number that nothing has.
func (m *mechanism) number(ctx context.Context) (n uint32, transaction uint64, err error) {
	unlock, err := m.numbers.Lock(ctx, "numbers")
	if err != nil {
		return 0, 0, err
	}
	defer unlock()
	if m.next == m.end {
		first, err := m.reserve(ctx)
		if err != nil {
			return 0, 0, err
		}
		m.next, m.end = first, first+batch
	}
	m.next++
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.next - 1, m.state.Transaction, nil
}

// coarse is the clock that the kernel takes change times from, in nanoseconds.
func coarse() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		return time.Now().UnixNano()
	}
	return ts.Nano()
}

// snapshot makes a device that is a snapshot of another, whose file is at path.
// name is that of the origin's device, if it may be active.
func (m *mechanism) snapshot(ctx context.Context, path string, origin uint32, originName string, size, fsSize int64) (device, error) {
	const tries = 1000 // each one is a number that a power failure lost
	for range tries {
		n, transaction, err := m.number(ctx)
		if err != nil {
			return device{}, err
		}
		d := device{ID: n, Size: size, FSSize: fsSize, Transaction: transaction, Since: coarse()}
		m.step("snapshot: file")
		if err := m.save(path, d); err != nil {
			return device{}, err
		}
		m.step("snapshot: message")
		err = m.takeSnapshot(ctx, n, origin, originName)
		if err == nil {
			m.step("snapshot: done")
			return d, nil
		}
		if uerr := os.Remove(path); uerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, uerr)
		}
		if !errors.Is(err, unix.EEXIST) {
			return device{}, err
		}
	}
	return device{}, fmt.Errorf("%d device numbers in a row are taken", tries)
}

// takeSnapshot sends the message. The origin's file system is frozen meanwhile
// if it can be written: the snapshot is then one of a file system that was
// unmounted.
func (m *mechanism) takeSnapshot(ctx context.Context, n, origin uint32, originName string) error {
	message := func() error {
		err := m.message(dm.CreateSnap(n, origin))
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("device %d is not in the pool: %w", origin, err)
		}
		return err
	}
	if originName == "" {
		return message()
	}
	unlock, err := m.dir.Lock(ctx, ".origin-"+originName)
	if err != nil {
		return err
	}
	defer unlock()
	info, err := m.ctl.Info(originName)
	if errors.Is(err, unix.ENXIO) || err == nil && (info.ReadOnly || !info.Live) {
		return message()
	}
	if err != nil {
		return err
	}
	if err := m.ctl.Suspend(originName, dm.SuspendOptions{}); err != nil {
		if errors.Is(err, unix.ENXIO) { // its last user went
			return message()
		}
		return err
	}
	m.step("snapshot: suspended")
	err = message()
	if _, rerr := m.ctl.Resume(originName, dm.SuspendOptions{}); rerr != nil && !errors.Is(rerr, unix.ENXIO) {
		err = errors.Join(err, rerr)
	}
	return err
}

// deleteThin deletes a device of the pool, which may not be there.
func (m *mechanism) deleteThin(n uint32) error {
	err := m.message(dm.DeleteThin(n))
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	return err
}

// activateThin activates a device of the pool.
func (m *mechanism) activateThin(name, uuid string, n uint32, size int64, readOnly bool) (dm.Info, error) {
	t, err := dm.Thin{Length: uint64(size) / dm.SectorSize, Pool: m.poolDev.String(), ID: n}.Target()
	if err != nil {
		return dm.Info{}, err
	}
	return m.ctl.Activate(name, uuid, []dm.Target{t}, readOnly)
}

// patience is how long a device that is busy for a moment is waited for: udev
// looks at each new device, and the kernel closes some files late.
const patience = 3 * time.Second

// removeDevice removes a device that is no longer used. The error matches EBUSY
// if it is.
func (m *mechanism) removeDevice(ctx context.Context, name string) error {
	for wait, start := 100*time.Microsecond, time.Now(); ; wait = min(2*wait, 50*time.Millisecond) {
		err := m.ctl.Remove(name)
		if err == nil || errors.Is(err, unix.ENXIO) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		// A pool is busy as long as a layer is; that is not a matter of time.
		if name == m.pool && !m.passing() || time.Since(start) > patience {
			return err
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// passing reports whether some device of the root is about to go away.
func (m *mechanism) passing() bool {
	list, err := m.ctl.List()
	if err != nil {
		return false
	}
	n := 0
	for _, e := range list {
		if !strings.HasPrefix(e.Name, m.prefix+"-") || e.Name == m.pool {
			continue
		}
		n++
		info, err := m.ctl.Info(e.Name)
		if errors.Is(err, unix.ENXIO) || err == nil && info.Opens == 0 {
			return true
		}
	}
	return n == 0 // then it is the pool itself that is looked at
}

// drop takes a layer's device away if nobody uses it. With deferred removal it
// goes later if somebody does.
func (m *mechanism) drop(ctx context.Context, name string) error {
	if m.opts.NoDeferredRemoval {
		err := m.removeDevice(ctx, name)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("files of the layer are open: %w: %w", err, layerfs.ErrInUse)
		}
		return err
	}
	err := m.ctl.Remove(name)
	if errors.Is(err, unix.EBUSY) {
		_, err = m.ctl.RemoveDeferred(name)
	}
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	return err
}

// The files of devices that are on their way.
func (m *mechanism) applyPath(id string) string { return m.devicePath(".apply-" + id) }

func (m *mechanism) deletePath(n uint32) string { return m.devicePath(deleteKey(n)) }

// deleteKey is the name of the file of a device that is to be deleted, and the
// key of the lock of who has it active under its probeName.
func deleteKey(n uint32) string { return ".delete-" + strconv.FormatUint(uint64(n), 10) }

// probeName is the name of a device that is active for the driver's own sake.
func (m *mechanism) probeName(n uint32) string {
	return m.deviceName("+"+strconv.FormatUint(uint64(n), 10), false)
}

// discard deletes the device whose file is at path, now or, if it is in use,
// later.
func (m *mechanism) discard(ctx context.Context, path string) error {
	d, err := loadDevice(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		// A power failure took what was in the file: the device, if there is
		// one, is found by its lack of a file.
		m.opts.Logger.Warn("unreadable device file removed", "driver", name, "path", path, "error", err)
		return os.Remove(path)
	}
	m.step("delete: rename")
	if err := m.rename(path, m.deletePath(d.ID)); err != nil {
		return err
	}
	m.step("delete: renamed")
	return m.reap(ctx, d)
}

// reap deletes a device that has a delete file. It may find that another process
// has done so.
func (m *mechanism) reap(ctx context.Context, d device) error {
	unlock, err := m.dir.Lock(ctx, deleteKey(d.ID))
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Lstat(m.deletePath(d.ID)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if m.opts.discards() {
		if err := m.blkDiscard(ctx, d); err != nil && !errors.Is(err, unix.EBUSY) {
			m.opts.Logger.Warn("discard", "driver", name, "device", d.ID, "error", err)
		}
	}
	m.step("delete: message")
	for start := time.Now(); ; {
		err := m.deleteThin(d.ID)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("delete device %d: %w", d.ID, err)
		}
		if m.opts.NoDeferredDeletion && time.Since(start) > patience {
			return fmt.Errorf("delete device %d: %w: %w", d.ID, err, layerfs.ErrInUse)
		}
		if !m.opts.NoDeferredDeletion {
			m.deferred.Store(true)
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	m.step("delete: forget")
	if err := os.Remove(m.deletePath(d.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// blkDiscard gives the blocks that only this device has back to what is below
// the pool: deleting a device frees them in the pool alone.
func (m *mechanism) blkDiscard(ctx context.Context, d device) error {
	name := m.probeName(d.ID)
	if err := m.removeDevice(ctx, name); err != nil {
		return err
	}
	// Under another uuid an active device would not be told.
	info, err := m.activateThin(name, m.thinUUID(d.ID), d.ID, d.Size, false)
	if err != nil {
		if errors.Is(err, unix.ENODATA) {
			return nil // was deleted
		}
		return err
	}
	m.step("delete: discard")
	f, err := dm.OpenDevice(info.Device, os.O_WRONLY)
	if err == nil {
		err = errors.Join(dm.Discard(f, 0, uint64(d.Size)), f.Close())
	}
	return errors.Join(err, m.removeDevice(context.WithoutCancel(ctx), name))
}

// reapDeferred deletes the devices whose deletion had to wait.
func (m *mechanism) reapDeferred(ctx context.Context) error {
	if !m.deferred.Swap(false) {
		return nil
	}
	return m.reapAll(ctx)
}

func (m *mechanism) reapAll(ctx context.Context) error {
	files, err := filepath.Glob(globEscape(m.devicePath("")) + "/.delete-*")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range files {
		d, err := loadDevice(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, os.Remove(path))
		default:
			err := m.reap(ctx, d)
			if errors.Is(err, layerfs.ErrInUse) { // some process has it from before a crash
				m.deferred.Store(true)
				m.opts.Logger.Warn("a device cannot be deleted yet", "driver", name, "device", d.ID, "error", err)
				err = nil
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// globEscape makes a path match itself.
func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(filepath.Clean(path))
}

// claims returns the devices that some file has.
func (m *mechanism) claims() (map[uint32]bool, error) {
	entries, err := os.ReadDir(m.devicePath(""))
	if err != nil {
		return nil, err
	}
	claims := map[uint32]bool{baseID: true}
	for _, e := range entries {
		if d, err := loadDevice(m.devicePath(e.Name())); err == nil {
			claims[d.ID] = true
		}
	}
	return claims, nil
}

// sweepMetadata looks at the metadata of a pool that is not active, for devices
// that no file claims: those that a power failure cut off from their files.
// They are given a file by which they are deleted.
func (m *mechanism) sweepMetadata() error {
	path := m.opts.MetadataDevice
	if path == "" {
		path = m.metadataFile()
	}
	r, err := thin.OpenDevice(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // told by attach
	}
	if err != nil {
		return err
	}
	defer r.Close()
	md, err := thin.Open(r, 0)
	if errors.Is(err, thin.ErrCorrupt) {
		return nil // the kernel judges: it can say more
	}
	if err != nil {
		return err
	}
	if err := m.whole(md, path); err != nil {
		return err
	}
	claims, err := m.claims()
	if err != nil {
		return err
	}
	for d, err := range md.Devices() {
		if errors.Is(err, thin.ErrCorrupt) {
			return nil
		}
		if err != nil {
			return err
		}
		if claims[d.ID] {
			continue
		}
		lost := device{ID: d.ID, Size: m.opts.BaseSize, Transaction: d.TransactionID}
		if err := m.save(m.deletePath(d.ID), lost); err != nil {
			return err
		}
	}
	return nil
}

// whole makes sure that what the pool is on is as large as its metadata says.
// The kernel says so too, but in its log alone.
func (m *mechanism) whole(md *thin.Metadata, metadata string) error {
	data := m.opts.DataDevice
	if data == "" {
		data = m.dataFile()
	}
	for _, p := range []struct {
		path string
		size int64
	}{
		{data, int64(md.DataBlocks) * int64(md.BlockSectors) * dm.SectorSize},
		{metadata, int64(md.MetadataBlocks) * thin.BlockSize},
	} {
		n, err := sizeOf(p.path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // told by attach
		}
		if err != nil {
			return err
		}
		if n < p.size {
			return truncated(p.path, n, p.size)
		}
	}
	return nil
}

func truncated(path string, size, want int64) error {
	return fmt.Errorf("%s has %d bytes, but the pool has %d: it was truncated, and what was in the rest is lost; with its former size the pool can be opened", path, size, want)
}

// sweep mends what a crash left, apart from layers, which the shared life cycle
// looks after. Active devices go first: a device that is active cannot be
// deleted.
func (m *mechanism) sweep(ctx context.Context) error {
	entries, err := os.ReadDir(m.devicePath(""))
	if err != nil {
		return err
	}
	if err := m.sweepDevices(ctx, m.owners(entries)); err != nil {
		return err
	}
	for _, e := range entries {
		file := e.Name()
		switch {
		case strings.HasPrefix(file, ".apply-"):
			err = m.withLock(file[len(".apply-"):], func() error { return m.discardLeft(ctx, file) })
		case strings.HasPrefix(file, ".new-"):
			id := strings.TrimPrefix(strings.TrimPrefix(file, ".new-"), ".apply-")
			err = m.withLock(id, func() error { return removeFile(m.devicePath(file)) })
		case strings.HasPrefix(file, ".snap-"):
			err = m.withLock(file, func() error { return m.discardLeft(ctx, file) }) // its process is gone
		}
		if err != nil {
			return err
		}
	}
	return m.reapAll(ctx)
}

// discardLeft deletes a device that a crash left. What still has it must not
// keep the root from being opened: reapAll tries again.
func (m *mechanism) discardLeft(ctx context.Context, file string) error {
	return ignore(m.discard(ctx, m.devicePath(file)), layerfs.ErrInUse)
}

// owners returns, by the names of devices, the keys whose lock their users
// have.
func (m *mechanism) owners(entries []os.DirEntry) map[string]string {
	owners := map[string]string{m.deviceName("+base", false): poolLock}
	for _, e := range entries {
		file := e.Name()
		id := strings.TrimPrefix(file, ".apply-")
		switch {
		case strings.HasPrefix(file, ".snap-"):
			owners[m.deviceName("+"+file[1:], false)] = file
		case layerfs.CheckID(id) == nil:
			owners[m.deviceName(id, false)] = id
			owners[m.deviceName("+apply-"+id, false)] = id
		}
	}
	return owners
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// withLock runs fn under a lock, or not at all if somebody has it.
func (m *mechanism) withLock(key string, fn func() error) error {
	unlock, ok, err := m.dir.TryLock(key)
	if err != nil || !ok {
		return err
	}
	defer unlock()
	return fn()
}

// sweepDevices resumes devices that a crash left suspended, and removes those
// that nobody uses.
func (m *mechanism) sweepDevices(ctx context.Context, owners map[string]string) error {
	list, err := m.ctl.List()
	if err != nil {
		return err
	}
	for _, e := range list {
		if !strings.HasPrefix(e.Name, m.prefix+"-") || e.Name == m.pool {
			continue
		}
		key, ok := owners[e.Name]
		if n, err := strconv.ParseUint(strings.TrimPrefix(e.Name, m.prefix+"-+"), 10, 32); err == nil {
			key = deleteKey(uint32(n))
		} else if !ok {
			key = ".device-" + e.Name
		}
		err := m.withLock(key, func() error {
			info, err := m.ctl.Info(e.Name)
			if errors.Is(err, unix.ENXIO) {
				return nil
			}
			if err != nil || !strings.HasPrefix(info.UUID, m.uuidOf("")) {
				return err
			}
			if info.Suspended && info.Live {
				if err := m.resumeLeft(e.Name); err != nil {
					return err
				}
			}
			if info.Opens > 0 {
				return nil
			}
			return m.drop(ctx, e.Name)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// resumeLeft resumes a device unless somebody is just taking a snapshot of it.
func (m *mechanism) resumeLeft(device string) error {
	return m.withLock(".origin-"+device, func() error {
		info, err := m.ctl.Info(device)
		if err == nil && info.Suspended {
			_, err = m.ctl.Resume(device, dm.SuspendOptions{})
		}
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		return err
	})
}

// Stored lists the layers that have a device.
func (m *mechanism) Stored(context.Context) ([]string, error) {
	entries, err := os.ReadDir(m.devicePath(""))
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if layerfs.CheckID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	builds, err := m.dir.Builds()
	return append(ids, builds...), err
}

// Find reports what of a layer is missing.
func (m *mechanism) Find(_ context.Context, rec *lifecycle.Record) error {
	d, err := m.load(rec.ID)
	if err != nil {
		return err
	}
	info, err := m.ctl.Info(m.deviceName(rec.ID, false))
	if err == nil {
		if st, err := m.ctl.ThinStatus(info.Name); err == nil && st.Failed != "" {
			return fmt.Errorf("its device has failed (%s): see the kernel's log", st.Failed)
		}
		return nil
	}
	if !errors.Is(err, unix.ENXIO) {
		return err
	}
	// Activating it is the only question the pool answers about one device.
	return m.withLock(deleteKey(d.ID), func() error {
		probe := m.probeName(d.ID)
		if _, err := m.activateThin(probe, m.thinUUID(d.ID), d.ID, d.Size, true); err != nil {
			if errors.Is(err, unix.EBUSY) {
				return nil // it is just being used
			}
			return fmt.Errorf("device %d: %w", d.ID, err)
		}
		return m.removeDevice(context.Background(), probe)
	})
}
