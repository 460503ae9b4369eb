package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

type frame = lifecycle.Driver

// Driver keeps layers as btrfs subvolumes. It implements [layerfs.Driver],
// [layerfs.Mounter], [layerfs.QuotaSetter], [layerfs.LabelSetter],
// [layerfs.Rollbacker], [layerfs.Cloner], [layerfs.BlockDiffer],
// [layerfs.Checker] and [layerfs.Repairer], and streams of btrfs's own format
// by Send and Receive.
type Driver struct {
	*frame
	m *mechanism
}

var (
	_ layerfs.Driver      = (*Driver)(nil)
	_ layerfs.Mounter     = (*Driver)(nil)
	_ layerfs.QuotaSetter = (*Driver)(nil)
	_ layerfs.LabelSetter = (*Driver)(nil)
	_ layerfs.Rollbacker  = (*Driver)(nil)
	_ layerfs.Cloner      = (*Driver)(nil)
	_ layerfs.BlockDiffer = (*Driver)(nil)
	_ layerfs.Checker     = (*Driver)(nil)
	_ layerfs.Repairer    = (*Driver)(nil)

	_ lifecycle.Mechanism     = (*mechanism)(nil)
	_ lifecycle.NativeChanger = (*mechanism)(nil)
	_ lifecycle.Finder        = (*mechanism)(nil)
	_ lifecycle.IDDeleter     = (*mechanism)(nil)
)

// mechanism is immutable after New, but for its counter.
type mechanism struct {
	home     string
	opts     Options
	log      *slog.Logger
	dir      *layerdir.Dir
	features layerfs.Features
	native   error // why the kernel is not asked for changes; nil if it is
	removal  error // why a subvolume cannot be removed in one step; nil if it can
	quotas   error // why there are no quotas; nil if there are

	subvolumes btrfs.Dir // of the layers

	fsid    btrfs.UUID    // of the file system
	removed atomic.Uint64 // subvolumes, where there are qgroups
	hooks
}

// hooks are for tests.
type hooks struct {
	noExchange bool         // as on kernels that cannot exchange subvolumes
	fault      func(string) // called at the points of fault; may kill the process
}

// at marks a point where a crash leaves something that New has to mend.
func (m *mechanism) at(point string) {
	if m.fault != nil {
		m.fault(point)
	}
}

// name is what errors and Status call the driver.
const name = "btrfs"

// New opens the layers below ROOT/btrfs, and makes the directory if it is new.
// It finishes or rolls back what a crash left; see Recovered.
//
// It makes and removes a subvolume to find out what works here, and may turn
// quotas on; see [Options.Quotas]. The error matches [errors.ErrUnsupported] if
// root is not on btrfs, and names the file system it is on; nothing but an
// empty directory is left then.
func New(root string, opts *Options) (*Driver, error) { return open(root, opts, hooks{}) }

func open(root string, opts *Options, tests hooks) (_ *Driver, err error) {
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
	m := &mechanism{home: filepath.Join(root, name), opts: *opts, log: opts.Logger, hooks: tests}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(m.home, 0o711); err != nil {
		return fail(err)
	}
	if err := onBtrfs(m.home); err != nil {
		return fail(err)
	}
	common := lifecycle.Options{Durability: opts.Durability, Logger: opts.Logger}
	m.dir, err = lifecycle.Open(m.home, common)
	if err != nil {
		return fail(err)
	}
	if err := m.prepare(); err != nil {
		m.dir.Close()
		return fail(err)
	}
	f, err := lifecycle.New(context.Background(), m.home, m.dir, m, common)
	if err != nil {
		return nil, err
	}
	return &Driver{f, m}, nil
}

func onBtrfs(dir string) error {
	is, err := btrfs.IsBtrfs(dir)
	if err != nil || is {
		return err
	}
	fsname, err := feature.FSName(dir)
	if err != nil {
		return err
	}
	return &layerfs.UnsupportedError{Feature: "btrfs", Reason: dir + " is on " + fsname}
}

// prepare makes the directories and finds out what works here.
func (m *mechanism) prepare() error {
	for path, mode := range map[string]os.FileMode{m.layers(): 0o711, m.snapshots(): 0o700} {
		if err := os.Mkdir(path, mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	f, err := m.dir.KeepOpen(m.layers())
	if err != nil {
		return err
	}
	m.subvolumes = btrfs.Dir{F: f}
	info, err := btrfs.ReadFSInfo(m.home)
	if err != nil {
		return err
	}
	m.fsid = info.UUID
	if err := m.enableQuotas(); err != nil {
		return err
	}
	if err := m.sweep(); err != nil {
		return err
	}
	if m.quotas == nil {
		m.collectQgroups(manyQgroups)
	}
	return m.describe()
}

// describe fills in the features.
func (m *mechanism) describe() error {
	probe := new(feature.Prober)
	f := layerfs.Features{ConstantCreate: true, ReadOnlyViews: true, Rename: true, Reasons: make(map[string]string)}
	fact := func(field *bool, name string, err error) {
		*field = err == nil
		if err != nil {
			f.Reasons[name] = err.Error()
		}
	}
	if m.opts.MountLabel != "" {
		fact(&f.ConstantCreate, "ConstantCreate", errors.New("every file of a new layer is labelled"))
	}
	m.native = probe.Probe(feature.SysAdmin, m.home)
	fact(&f.NativeChanges, "NativeChanges", m.native)
	fact(&f.NativeDiff, "NativeDiff", m.native)
	fact(&f.SharedPageCache, "SharedPageCache", errors.New("each subvolume has inodes, and so cached pages, of its own"))
	fact(&f.LiveBase, "LiveBase", errors.New("a snapshot does not follow its source"))
	fact(&f.Quota, "Quota", m.quotas)
	fact(&f.InodeQuota, "InodeQuota", errNoInodeQuota)
	fact(&f.IDMap, "IDMap", probe.Probe(feature.IDMap, m.home))
	fact(&f.DeviceNodes, "DeviceNodes", probe.Probe(feature.Mknod, m.home))
	err := m.trial(func(path string) error {
		fact(&f.AllXattrs, "AllXattrs", probeXattrs(path))
		return nil
	})
	if err != nil {
		return err
	}
	m.features = f
	return nil
}

// trial makes a subvolume for a function, and learns from its removal whether
// that is allowed in one step.
func (m *mechanism) trial(fn func(path string) error) error {
	path, unlock, err := m.temporary("trial")
	if err != nil {
		return err
	}
	defer unlock()
	if err := btrfs.Create(path); err != nil {
		return err
	}
	err = fn(path)
	// With a file in it, it takes the ioctl and not just rmdir(2).
	if werr := os.WriteFile(filepath.Join(path, "file"), nil, 0o600); werr != nil {
		err = errors.Join(err, werr)
	}
	if m.quotas == nil {
		info, ierr := btrfs.Info(path)
		if ierr == nil {
			ierr = m.noteQgroups(context.Background(), []uint64{info.ID})
		}
		err = errors.Join(err, ierr)
	}
	m.removal = btrfs.Destroy(path)
	if m.removal == nil {
		return err
	}
	if !errors.Is(m.removal, errors.ErrUnsupported) {
		return errors.Join(err, m.removal)
	}
	return errors.Join(err, m.destroy(context.Background(), path))
}

func probeXattrs(dir string) error {
	for _, x := range []string{"user.layerfs", "trusted.layerfs", "security.layerfs"} {
		if err := unix.Setxattr(dir, x, []byte("1"), 0); err != nil {
			return fmt.Errorf("setxattr %s: %w", x, err)
		}
	}
	return nil
}

func (m *mechanism) Name() string               { return name }
func (m *mechanism) Features() layerfs.Features { return m.features }
func (m *mechanism) Close() error               { return nil }

func (m *mechanism) layers() string    { return filepath.Join(m.home, "subvolumes") }
func (m *mechanism) snapshots() string { return filepath.Join(m.home, ".layerfs", "snapshots") }

// Path returns the subvolume of a layer, which is where Get shows it.
func (m *mechanism) Path(id string) string { return filepath.Join(m.home, "subvolumes", id) }
