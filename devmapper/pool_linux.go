package devmapper

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// poolLock is the key under which pool.json, the pool's table and its metadata
// snapshot are used. It is no id of a layer, and is taken after a layer's lock.
const poolLock = ".pool"

// poolState is pool.json.
type poolState struct {
	Root        string `json:"root"`           // identity of the root, in the uuids of its devices
	Pool        string `json:"pool,omitempty"` // ThinPoolDevice, if that is the pool
	FS          string `json:"fs"`
	BlockSize   int64  `json:"block_size"`     // of the pool, in bytes
	BaseSize    int64  `json:"base_size"`      // of the base device, in bytes
	BaseUUID    string `json:"base_uuid"`      // of the file system on it; empty until it is made
	BaseInodes  int64  `json:"base_inodes"`    // inodes an empty file system uses
	Transaction uint64 `json:"transaction_id"` // of the pool, which may be one behind
	Next        uint32 `json:"next_device_id"` // first that was never reserved
	Wrapped     bool   `json:"wrapped,omitempty"`
}

// baseID is the number of the device that base layers are snapshots of.
const baseID = 1

// batch is how many device numbers are reserved at once.
const batch = 64

func (m *mechanism) statePath() string { return filepath.Join(m.home, "pool.json") }

func (m *mechanism) loadState() (poolState, error) {
	var s poolState
	b, err := os.ReadFile(m.statePath())
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("%s: %w", m.statePath(), err)
	}
	return s, nil
}

// saveState writes pool.json. It is always synced: what it says is compared
// with the pool at every start.
func (m *mechanism) saveState(s poolState) error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	return replace(m.statePath(), append(b, '\n'), true)
}

// replace writes a file aside and renames it into place.
func replace(path string, data []byte, sync bool) error {
	dir, base := filepath.Split(path)
	temp := dir + ".new-" + base
	if err := sys.WriteFile(temp, data, 0o600, sync); err != nil {
		return err
	}
	if err := unix.Rename(temp, path); err != nil {
		return &os.LinkError{Op: "rename", Old: temp, New: path, Err: err}
	}
	if sync {
		return sys.Fsync(dir)
	}
	return nil
}

// start makes the pool and the base device if the root is new, activates the
// pool, and checks that it is the root's. On success the driver holds it.
func (m *mechanism) start(ctx context.Context) (err error) {
	unlock, err := m.dir.Lock(ctx, poolLock)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := m.loadState()
	fresh := errors.Is(err, fs.ErrNotExist)
	if err != nil && !fresh {
		return err
	}
	if fresh {
		if s, err = m.newState(); err != nil {
			return err
		}
	}
	if err := m.agree(s); err != nil {
		return err
	}
	m.adopt(s)
	var u undo.Stack
	defer u.Run(&err)
	activated, err := m.activatePool(ctx, &s, fresh)
	if err != nil {
		return err
	}
	if activated {
		u.Push(func() error { return m.deactivatePool(context.WithoutCancel(ctx)) })
	}
	if fresh {
		if err := m.saveState(s); err != nil {
			return err
		}
	}
	if err := m.checkTransaction(s); err != nil {
		return err
	}
	if s.BaseUUID == "" {
		if err := m.makeBase(ctx, &s); err != nil {
			return fmt.Errorf("base device: %w", err)
		}
	} else if err := m.checkBase(ctx, s); err != nil {
		return err
	}
	m.state = s
	return m.dir.Hold(poolLock, layerdir.HeldReadOnly)
}

// newState is the state of a new root.
func (m *mechanism) newState() (poolState, error) {
	s := poolState{
		Root: uuid(), Pool: m.opts.ThinPoolDevice, FS: m.opts.FS, BlockSize: m.opts.BlockSize, BaseSize: m.opts.BaseSize, Next: baseID + 1,
	}
	if s.FS == "" {
		s.FS = defaultFS
	}
	if s.BlockSize == 0 {
		s.BlockSize = defaultBlockSize
	}
	if s.BaseSize == 0 {
		s.BaseSize = defaultBaseSize
	}
	if _, err := mkfsPath(s.FS); err != nil {
		return s, err
	}
	return s, nil
}

// agree refuses options that contradict what the root was made with.
func (m *mechanism) agree(s poolState) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if m.opts.FS != "" && m.opts.FS != s.FS {
		bad("FS is %s, but the root was made with %s", m.opts.FS, s.FS)
	}
	if m.opts.BlockSize != 0 && m.opts.BlockSize != s.BlockSize {
		bad("BlockSize is %d, but the root was made with %d", m.opts.BlockSize, s.BlockSize)
	}
	if m.opts.BaseSize != 0 && m.opts.BaseSize < s.BaseSize {
		bad("BaseSize is %d, but the root was made with %d: a file system cannot shrink", m.opts.BaseSize, s.BaseSize)
	}
	if m.opts.ThinPoolDevice != s.Pool {
		bad("ThinPoolDevice is %q, but the root was made with %q", m.opts.ThinPoolDevice, s.Pool)
	}
	return errors.Join(errs...)
}

// adopt takes over what the root was made with.
func (m *mechanism) adopt(s poolState) {
	m.opts.FS, m.opts.BlockSize = s.FS, s.BlockSize
	m.opts.BaseSize = max(m.opts.BaseSize, s.BaseSize)
	m.root = s.Root
	m.pool = m.deviceName("pool", true)
	if s.Pool != "" {
		m.pool = s.Pool
	}
}

// uuid returns a random identity, RFC 9562 version 4.
func uuid() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// activatePool makes sure that the pool is active and healthy; activated
// reports whether it was not.
func (m *mechanism) activatePool(ctx context.Context, s *poolState, fresh bool) (activated bool, err error) {
	info, err := m.ctl.Info(m.pool)
	switch {
	case s.Pool != "":
		if err != nil {
			return false, fmt.Errorf("ThinPoolDevice: %w", err)
		}
		return false, m.useForeign(s, info, fresh)
	case err == nil && info.UUID != m.uuidOf("pool"):
		return false, fmt.Errorf("a device %s exists that is not the pool of this root (uuid %q)", m.pool, info.UUID)
	case err == nil && !info.Live: // a crash before its table was live
		if err := m.ctl.Remove(m.pool); err != nil {
			return false, err
		}
	case err == nil:
		return false, m.reusePool(info)
	case !errors.Is(err, unix.ENXIO):
		return false, err
	}
	if err := m.bringUp(ctx, fresh); err != nil {
		return false, err
	}
	return true, nil
}

// useForeign looks at a pool that somebody else made.
func (m *mechanism) useForeign(s *poolState, info dm.Info, fresh bool) error {
	ts, err := m.ctl.Table(m.pool, false)
	if err != nil {
		return err
	}
	if len(ts) != 1 {
		return fmt.Errorf("ThinPoolDevice %s is not a thin pool", m.pool)
	}
	p, err := dm.ParseThinPool(ts[0])
	if err != nil {
		return fmt.Errorf("ThinPoolDevice %s: %w", m.pool, err)
	}
	size := int64(p.BlockSectors) * dm.SectorSize
	if fresh {
		s.BlockSize = size
		m.opts.BlockSize = size
	}
	if size != s.BlockSize {
		return fmt.Errorf("ThinPoolDevice %s has blocks of %d bytes, but the root was made with %d", m.pool, size, s.BlockSize)
	}
	m.poolDev, m.metadataPath = info.Device, p.Metadata
	st, err := m.poolStatus(false)
	if err != nil {
		return err
	}
	if fresh && (st.TransactionID != 0 || st.UsedData != 0) {
		return fmt.Errorf("ThinPoolDevice %s is in use: transaction id %d, %d blocks", m.pool, st.TransactionID, st.UsedData)
	}
	return m.healthy(st)
}

// reusePool takes a pool that is active: another driver has it, or a crash
// left it.
func (m *mechanism) reusePool(info dm.Info) error {
	if info.Suspended {
		// A crash while its table was changed. The resume takes the new table
		// if it was loaded, and the old one if not.
		if _, err := m.ctl.Resume(m.pool, dm.SuspendOptions{NoFlush: true, NoLockFS: true}); err != nil {
			return err
		}
	}
	m.poolDev = info.Device
	ts, err := m.ctl.Table(m.pool, false)
	if err != nil {
		return err
	}
	if len(ts) != 1 {
		return fmt.Errorf("device %s is not a thin pool", m.pool)
	}
	p, err := dm.ParseThinPool(ts[0])
	if err != nil {
		return err
	}
	m.metadataPath = p.Metadata
	if m.opts.files() {
		m.metadataPath = m.metadataFile()
		if n, err := sizeOf(m.dataFile()); err == nil && n < int64(ts[0].Length)*dm.SectorSize {
			return truncated(m.dataFile(), n, int64(ts[0].Length)*dm.SectorSize)
		}
		for path, dev := range map[string]string{m.dataFile(): p.Data, m.metadataFile(): p.Metadata} {
			if err := below(path, dev); err != nil {
				return fmt.Errorf("pool %s is active, but %w", m.pool, err)
			}
		}
		// Not by a status that commits: that would need what was cut off.
		st, err := m.poolStatus(true)
		if err != nil {
			return err
		}
		size := int64(st.TotalMeta) * dm.MetadataBlockSize
		if n, err := sizeOf(m.metadataFile()); err == nil && n < size {
			return truncated(m.metadataFile(), n, size)
		}
	}
	st, err := m.poolStatus(false)
	if err != nil {
		return err
	}
	return m.relieve(st)
}

// below makes sure that a device of a table is a loop device of the file.
func below(path, dev string) error {
	found, err := loop.Find(path)
	if err != nil {
		return err
	}
	var names []string
	for _, f := range found {
		var st unix.Stat_t
		if err := unix.Stat(f, &st); err != nil {
			continue
		}
		number := dm.Device{Major: unix.Major(uint64(st.Rdev)), Minor: unix.Minor(uint64(st.Rdev))}.String()
		if f == dev || number == dev {
			return nil
		}
		names = append(names, f)
	}
	return fmt.Errorf("its device %s is not on %s (which has %s)", dev, path, strings.Join(names, ", "))
}

// healthy tells what is wrong with a pool.
func (m *mechanism) healthy(st dm.PoolStatus) error {
	switch {
	case st.NeedsCheck:
		return errNeedsCheck
	case st.Mode == dm.PoolFail || st.Mode == dm.PoolError:
		return fmt.Errorf("pool %s has failed (%s): see the kernel's log; thin_check and thin_repair work on %s when it is not active", m.pool, st.Mode, m.metadataPath)
	case st.Mode == dm.PoolReadOnly:
		// The kernel sets NeedsCheck if it could not write.
		return fmt.Errorf("pool %s is read-only, because its metadata is full (%d of %d blocks): %s must be larger, or ExtendThreshold set: %w",
			m.pool, st.UsedMeta, st.TotalMeta, m.metadataPath, unix.ENOSPC)
	}
	return nil
}

// relief is what New did to a pool that was full.
type relief struct {
	before, after dm.PoolStatus
	err           error // of a file that could not grow, even if the other did
}

// relieve makes a pool larger that is to be extended and is full already. What
// is no longer full can be used, whatever else failed. The caller has the pool's
// lock.
func (m *mechanism) relieve(st dm.PoolStatus) error {
	err := m.healthy(st)
	if err == nil || st.Mode != dm.PoolReadOnly || st.NeedsCheck || m.opts.ExtendThreshold == 0 {
		return err
	}
	grown, xerr := m.extendPool()
	if xerr != nil && !grown {
		return xerr
	}
	now, err := m.poolStatus(false)
	if err != nil {
		return errors.Join(err, xerr)
	}
	m.relieved = &relief{before: st, after: now, err: xerr}
	if err := m.healthy(now); err != nil {
		return errors.Join(err, xerr)
	}
	return nil
}

// message sends a message to the pool. One that cannot change its metadata
// answers EOPNOTSUPP, which is replaced by the reason.
func (m *mechanism) message(text string) error {
	_, err := m.ctl.Message(m.pool, 0, text)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	st, serr := m.poolStatus(true)
	if serr != nil {
		return fmt.Errorf("%s: %v; its status: %w", text, err, serr)
	}
	if herr := m.healthy(st); herr != nil {
		return fmt.Errorf("%s: %w", text, herr)
	}
	return fmt.Errorf("%s: %v", text, err)
}

// errNeedsCheck says that the kernel found the metadata wanting.
var errNeedsCheck = errors.New("the pool's metadata needs a check: run thin_check --clear-needs-check-flag, or thin_repair if it finds damage")

func (m *mechanism) dataFile() string { return filepath.Join(m.home, "devicemapper", "data") }
func (m *mechanism) metadataFile() string {
	return filepath.Join(m.home, "devicemapper", "metadata")
}

// bringUp activates a pool, mending what can be.
func (m *mechanism) bringUp(ctx context.Context, fresh bool) error {
	if !fresh {
		if err := m.sweepMetadata(); err != nil {
			return err
		}
	}
	err := m.loadPool(ctx, fresh)
	if !errors.Is(err, errNeedsCheck) {
		return err
	}
	if err := m.checkMetadata(ctx); err != nil {
		return err
	}
	m.opts.Logger.Warn("the pool's metadata was checked", "driver", name, "path", m.metadataPath)
	return m.loadPool(ctx, fresh)
}

// loadPool attaches the files, if it is in files, and activates the pool.
func (m *mechanism) loadPool(ctx context.Context, fresh bool) (err error) {
	data, metadata := m.opts.DataDevice, m.opts.MetadataDevice
	m.metadataPath = metadata
	if m.opts.files() {
		d, err := m.attach(ctx, m.dataFile(), m.opts.DataSize, defaultDataSize, fresh)
		if err != nil {
			return err
		}
		defer d.Close()
		md, err := m.attach(ctx, m.metadataFile(), m.opts.MetadataSize, defaultMetadataSize, fresh)
		if err != nil {
			return err
		}
		defer md.Close()
		data, metadata = d.Path(), md.Path()
		m.metadataPath = m.metadataFile()
	} else if fresh {
		if err := wipe(metadata); err != nil {
			return err
		}
	}
	size, err := sizeOf(data)
	if err != nil {
		return err
	}
	target, err := m.poolTable(data, metadata, size).Target()
	if err != nil {
		return err
	}
	info, err := m.ctl.Activate(m.pool, m.uuidOf("pool"), []dm.Target{target}, false)
	if err != nil {
		return fmt.Errorf("activate the pool on %s and %s: %w", data, metadata, err)
	}
	m.poolDev = info.Device
	st, err := m.poolStatus(false)
	if err == nil {
		err = m.relieve(st)
	}
	if err != nil {
		if rerr := m.removeDevice(ctx, m.pool); rerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, rerr)
		}
	}
	return err
}

// poolTable is the pool's table with as many whole blocks as there are.
func (m *mechanism) poolTable(data, metadata string, size int64) dm.ThinPool {
	blocks := size / m.opts.BlockSize
	// Where the kernel makes an event of its own, so that nobody waits for the
	// watch to look.
	low := blocks / 10
	if least := m.opts.MinFreeSpace; least > 0 {
		low = blocks * int64(least) / 100
	}
	if t := m.opts.ExtendThreshold; t > 0 {
		low = blocks * int64(100-t) / 100
	}
	return dm.ThinPool{
		Length: uint64(blocks * m.opts.BlockSize / dm.SectorSize), Metadata: metadata, Data: data,
		BlockSectors: uint32(m.opts.BlockSize / dm.SectorSize), LowWater: uint64(low),
		// The zeroes that a file system reads from a block it has written a
		// part of must not be what another layer had there.
		SkipBlockZeroing: false,
		IgnoreDiscard:    m.opts.IgnoreDiscard, NoDiscardPassdown: m.opts.NoDiscardPassdown,
		ErrorIfNoSpace: m.opts.ErrorIfNoSpace,
	}
}

// attach makes a loop device of a file of the pool.
func (m *mechanism) attach(ctx context.Context, path string, size, def int64, fresh bool) (*loop.Device, error) {
	if size == 0 {
		size = def
	}
	st, err := os.Stat(path)
	switch {
	case fresh:
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		if err := sys.WriteFile(path, nil, 0o600, false); err != nil {
			return nil, err
		}
		if err := os.Truncate(path, size); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("a file of the pool is missing, and with it all layers: %w", err)
	case st.Size() < minFile:
		return nil, fmt.Errorf("%s has %d bytes: it was truncated", path, st.Size())
	}
	if err := m.detached(ctx, path); err != nil {
		return nil, err
	}
	return loop.Attach(ctx, path, &loop.Options{AutoClear: true, DirectIOIfPossible: true})
}

// minFile is the smallest file a pool can have, in bytes.
const minFile = 2 << 20

// detached waits until no loop device has the file: two pools on one file would
// destroy it. The kernel detaches a device a moment after its last user.
func (m *mechanism) detached(ctx context.Context, path string) error {
	for wait := time.Millisecond; ; wait *= 2 {
		found, err := loop.Find(path)
		if err != nil || len(found) == 0 {
			return err
		}
		if wait > time.Second {
			return fmt.Errorf("%s is attached to %s, but the pool is not active: %w", path, strings.Join(found, ", "), unix.EBUSY)
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// wipe makes a metadata device one of a new pool: the kernel formats it if its
// first block is zero.
func wipe(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_EXCL, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, dm.MetadataBlockSize), 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// sizeOf returns the size of a file or block device in bytes.
func sizeOf(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	n, err := f.Seek(0, io.SeekEnd)
	return n, errors.Join(err, f.Close())
}

// checkMetadata runs thin_check on the metadata of a pool that is not active.
func (m *mechanism) checkMetadata(ctx context.Context) error {
	tool, err := tool("thin_check")
	if err != nil {
		return fmt.Errorf("%w: %w", errNeedsCheck, err)
	}
	path := m.metadataPath
	if m.opts.files() {
		// It reads with O_DIRECT, which some file systems do not have.
		d, err := loop.Attach(ctx, path, &loop.Options{AutoClear: true})
		if err != nil {
			return err
		}
		defer d.Close()
		path = d.Path()
	}
	cmd := exec.CommandContext(ctx, tool, "--clear-needs-check-flag", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("the pool's metadata is damaged: thin_check: %w: %s; run thin_repair on %s", err, strings.TrimSpace(string(out)), m.metadataPath)
	}
	return nil
}

// tool finds a program of the administrator, also outside of PATH.
func tool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p, nil
		}
	}
	return "", err
}

// poolStatus asks for the pool's status, which is a commit of its metadata
// unless noFlush is set.
func (m *mechanism) poolStatus(noFlush bool) (dm.PoolStatus, error) {
	ts, err := m.ctl.Status(m.pool, noFlush)
	if err != nil {
		return dm.PoolStatus{}, err
	}
	if len(ts) != 1 || ts[0].Type != "thin-pool" {
		return dm.PoolStatus{}, fmt.Errorf("device %s is not a thin pool", m.pool)
	}
	return dm.ParsePoolStatus(ts[0].Params)
}

// checkTransaction compares pool and root.
func (m *mechanism) checkTransaction(s poolState) error {
	st, err := m.poolStatus(false)
	if err != nil {
		return err
	}
	switch st.TransactionID {
	case s.Transaction:
		return nil
	case s.Transaction - 1: // a crash between the two
		return m.message(dm.SetTransactionID(st.TransactionID, s.Transaction))
	}
	return fmt.Errorf("the pool %s has transaction id %d, but pool.json says %d: pool and root are not of the same time", m.pool, st.TransactionID, s.Transaction)
}

// reserve returns the first of a batch of device numbers. It is one
// transaction.
func (m *mechanism) reserve(ctx context.Context) (first uint32, err error) {
	unlock, err := m.dir.Lock(ctx, poolLock)
	if err != nil {
		return 0, err
	}
	defer unlock()
	s, err := m.loadState() // another process may have been here
	if err != nil {
		return 0, err
	}
	if s.Next > dm.MaxThinID-batch {
		s.Next, s.Wrapped = baseID+1, true
	}
	if s.Wrapped {
		if s.Next, err = m.unclaimed(s.Next); err != nil {
			return 0, err
		}
	}
	first = s.Next
	s.Next += batch
	s.Transaction++
	m.step("reserve: write")
	if err := m.saveState(s); err != nil {
		return 0, err
	}
	m.step("reserve: message")
	if err := m.message(dm.SetTransactionID(s.Transaction-1, s.Transaction)); err != nil {
		return 0, fmt.Errorf("transaction %d of the pool: %w", s.Transaction, err)
	}
	m.step("reserve: done")
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Transaction, m.state.Next, m.state.Wrapped = s.Transaction, s.Next, s.Wrapped
	return first, nil
}

// unclaimed returns the first number from which on a batch is claimed by no
// file.
func (m *mechanism) unclaimed(from uint32) (uint32, error) {
	claims, err := m.claims()
	if err != nil {
		return 0, err
	}
	run := uint32(0)
	for n := from; n <= dm.MaxThinID; n++ {
		if claims[n] {
			run = 0
			continue
		}
		if run++; run == batch {
			return n - batch + 1, nil
		}
	}
	return 0, errors.New("no device numbers are left")
}

// guard refuses new devices if space is low.
func (m *mechanism) guard() error {
	least := m.opts.MinFreeSpace
	if least < 0 {
		return nil
	}
	st, err := m.poolStatus(true)
	if err != nil {
		return err
	}
	if st.Mode != dm.PoolReadWrite {
		return fmt.Errorf("pool %s is in mode %s: %w", m.pool, st.Mode, layerfs.ErrQuota)
	}
	for _, p := range []struct {
		what        string
		used, total uint64
	}{{"data", st.UsedData, st.TotalData}, {"metadata", st.UsedMeta, st.TotalMeta}} {
		if (p.total-p.used)*100 < p.total*uint64(least) {
			return fmt.Errorf("%d of %d blocks of the pool's %s are free, less than %d percent: %w", p.total-p.used, p.total, p.what, least, layerfs.ErrQuota)
		}
	}
	if !m.opts.files() {
		return nil
	}
	var vfs unix.Statfs_t
	if err := unix.Statfs(m.dataFile(), &vfs); err != nil {
		return &os.PathError{Op: "statfs", Path: m.dataFile(), Err: err}
	}
	if vfs.Bavail*100 < vfs.Blocks*uint64(least) && int64(vfs.Bavail)*int64(vfs.Bsize) < int64(st.TotalData-st.UsedData)*m.opts.BlockSize*int64(least)/100 {
		return fmt.Errorf("%d bytes are free below the pool's files, less than %d percent: %w", int64(vfs.Bavail)*int64(vfs.Bsize), least, layerfs.ErrQuota)
	}
	return nil
}

// deactivatePool takes the pool down if nobody uses it.
func (m *mechanism) deactivatePool(ctx context.Context) error {
	if m.opts.ThinPoolDevice != "" {
		return nil
	}
	err := m.removeDevice(ctx, m.pool)
	if errors.Is(err, unix.EBUSY) { // a layer is in use
		return nil
	}
	return err
}
