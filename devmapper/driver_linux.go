package devmapper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/keylock"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

type frame = lifecycle.Driver

// Driver keeps layers as thin devices. It implements [layerfs.Driver],
// [layerfs.QuotaSetter], [layerfs.LabelSetter], [layerfs.Rollbacker],
// [layerfs.Cloner], [layerfs.BlockDiffer], [layerfs.Trimmer],
// [layerfs.Mounter], [layerfs.Checker] and [layerfs.Repairer].
type Driver struct {
	*frame
	m     *mechanism
	plans plans
}

var (
	_ layerfs.Driver      = (*Driver)(nil)
	_ layerfs.QuotaSetter = (*Driver)(nil)
	_ layerfs.LabelSetter = (*Driver)(nil)
	_ layerfs.Rollbacker  = (*Driver)(nil)
	_ layerfs.Cloner      = (*Driver)(nil)
	_ layerfs.Trimmer     = (*Driver)(nil)
	_ layerfs.Checker     = (*Driver)(nil)
	_ layerfs.Repairer    = (*Driver)(nil)
)

// mechanism is a thin pool behind the shared life cycle.
type mechanism struct {
	home     string           // immutable
	prefix   string           // immutable: of the names of all devices
	opts     Options          // immutable after start, with defaults
	ctl      *dm.Control      // immutable
	dir      *layerdir.Dir    // immutable
	nodes    *dm.Nodes        // immutable
	features layerfs.Features // immutable
	fault    func(string)     // immutable; of tests

	// What start finds out; immutable after it.
	root         string    // identity of the root
	pool         string    // name of the pool's device
	poolDev      dm.Device // its number
	metadataPath string    // file or device with the pool's metadata
	relieved     *relief   // set if New made a full pool larger, which the watch tells

	numbers   keylock.Set // its one key guards next and end, across system calls
	next, end uint32      // device numbers reserved for this driver

	mu    sync.Mutex // never held across a system call
	state poolState  // guarded by mu after start

	deferred atomic.Bool // a deletion waits for its device
	watch    *watch      // nil until New is done
}

const (
	name    = "devmapper"    // what errors and Status call the driver
	homeDir = "devicemapper" // what people know from Docker
)

// step is where a test can end the process.
func (m *mechanism) step(what string) {
	if m.fault != nil {
		m.fault(what)
	}
}

// New opens the layers below ROOT/devicemapper, and makes pool and base device
// if it is new, which runs mkfs. It finishes or rolls back what a crash left;
// see Recovered.
//
// The error matches [errors.ErrUnsupported] if this kernel has no device mapper
// or no thin pools, or mkfs is missing; nothing is left then. A pool that is
// active but of another root, whose transaction or base device is not what the
// root says, or that has failed is refused with an error that says so, and is
// not changed.
func New(root string, opts *Options) (*Driver, error) { return open(root, opts, nil) }

func open(root string, opts *Options, fault func(string)) (_ *Driver, err error) {
	fail := func(err error) (*Driver, error) {
		return nil, &layerfs.Error{Op: "open", Driver: name, Path: root, Err: err}
	}
	if opts == nil {
		opts = new(Options)
	}
	if err := opts.validate(); err != nil {
		return fail(err)
	}
	root, err = filepath.Abs(root)
	if err != nil {
		return fail(err)
	}
	m := &mechanism{home: filepath.Join(root, homeDir), opts: opts.withDefaults(), fault: fault}
	if m.opts.Logger == nil {
		m.opts.Logger = slog.New(slog.DiscardHandler)
	}
	if m.ctl, err = dm.Open(); err != nil {
		return fail(err)
	}
	common := lifecycle.Options{Durability: m.opts.Durability, Logger: opts.Logger}
	if err := m.prepare(common); err != nil {
		return fail(errors.Join(err, m.ctl.Close()))
	}
	ctx := context.Background()
	if err := m.start(ctx); err != nil {
		return fail(errors.Join(err, m.dir.Close(), m.ctl.Close()))
	}
	err = m.sweep(ctx)
	var f *frame
	if err == nil {
		f, err = lifecycle.New(ctx, m.home, m.dir, m, common)
	}
	if err != nil {
		return fail(errors.Join(err, m.Close(), m.dir.Close()))
	}
	if m.watch, err = m.startWatch(); err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	return &Driver{frame: f, m: m}, nil
}

// prepare finds out what works, and makes the directories if it is enough.
func (m *mechanism) prepare(common lifecycle.Options) error {
	for _, target := range []string{"thin-pool", "thin"} {
		if _, err := m.ctl.TargetVersion(target); err != nil {
			return err
		}
	}
	if _, err := os.Stat(m.statePath()); err != nil { // new
		fs := m.opts.FS
		if fs == "" {
			fs = defaultFS
		}
		if _, err := mkfsPath(fs); err != nil {
			return err
		}
	}
	dir, err := lifecycle.Open(m.home, common)
	if err != nil {
		return err
	}
	m.dir = dir
	for _, sub := range []string{"metadata", "mnt"} {
		if err := os.Mkdir(filepath.Join(m.home, sub), 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return errors.Join(err, dir.Close())
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(m.home, &st); err != nil {
		return errors.Join(&os.PathError{Op: "stat", Path: m.home, Err: err}, dir.Close())
	}
	m.prefix = fmt.Sprintf("%s-%d:%d-%d", m.opts.Prefix, unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	m.nodes = dm.NewNodes(filepath.Join("/run", m.prefix))
	m.describe()
	return nil
}

// describe fills in the features.
func (m *mechanism) describe() {
	f := layerfs.Features{
		ConstantCreate: true,
		ReadOnlyViews:  true,
		NativeChanges:  true,
		NativeDiff:     true,
		Quota:          true,
		Rename:         true,
		AllXattrs:      true,
		Reasons: map[string]string{
			"SharedPageCache": "each layer is a file system of its own",
			"InodeQuota":      "a layer has the inodes of its file system",
			"LiveBase":        "a layer is a snapshot of its parent",
		},
	}
	var probe feature.Prober
	err := probe.Probe(feature.Mknod, m.home)
	if f.DeviceNodes = err == nil; err != nil {
		f.Reasons["DeviceNodes"] = err.Error()
	}
	err = probe.Probe(feature.MountSetattr, m.home)
	if f.IDMap = err == nil; err != nil {
		f.Reasons["IDMap"] = err.Error()
	}
	m.features = f
}

func (m *mechanism) Name() string               { return name }
func (m *mechanism) Features() layerfs.Features { return m.features }

// Close takes the pool down if this driver is the last one and no layer is in
// use.
func (m *mechanism) Close() error {
	var errs []error
	if m.watch != nil {
		errs = append(errs, m.watch.close())
	}
	errs = append(errs, m.leave(context.Background()), m.ctl.Close())
	return errors.Join(errs...)
}

func (m *mechanism) leave(ctx context.Context) error {
	unlock, err := m.dir.Lock(ctx, poolLock)
	if err != nil {
		return err
	}
	defer unlock()
	// Last: with the last hold the file of the locks may be closed.
	defer m.dir.Release(poolLock, layerdir.HeldReadOnly)
	others, err := m.dir.Others(poolLock)
	if err != nil || others.Any() {
		return err
	}
	if err := m.reapDeferred(ctx); err != nil {
		return err
	}
	return m.deactivatePool(ctx)
}
