package aufs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/quota"
	"github.com/layerfs/layerfs/union"
)

type frame = lifecycle.Driver

// Driver keeps layers as branches of AUFS. It implements [layerfs.Driver],
// [layerfs.QuotaSetter], [layerfs.LabelSetter], [layerfs.Rollbacker],
// [layerfs.Cloner], [layerfs.Checker] and [layerfs.Repairer].
type Driver struct {
	*frame
	m *mechanism
}

var (
	_ layerfs.Driver      = (*Driver)(nil)
	_ layerfs.QuotaSetter = (*Driver)(nil)
	_ layerfs.LabelSetter = (*Driver)(nil)
	_ layerfs.Rollbacker  = (*Driver)(nil)
	_ layerfs.Cloner      = (*Driver)(nil)
	_ layerfs.Checker     = (*Driver)(nil)
	_ layerfs.Repairer    = (*Driver)(nil)
)

// mechanism is AUFS behind the shared life cycle.
type mechanism struct {
	home     string
	opts     Options
	log      *slog.Logger
	dir      *layerdir.Dir
	probe    *feature.Prober
	features layerfs.Features
	projects *quota.Projects // nil without project quotas
	engine   engine
	ordered  bool // the file system writes metadata back in order
}

// name is what errors and Status call the driver.
const name = "aufs"

// New opens the layers below ROOT/aufs, and makes the directory if it is new.
// It finishes or rolls back what a crash left, which includes mounts whose
// server has died; see Recovered.
//
// It mounts a union in a temporary directory to find out what works here,
// which takes some milliseconds. The error matches [errors.ErrUnsupported] if
// the engine that is asked for does not, or if it lacks what an option needs.
func New(root string, opts *Options) (*Driver, error) {
	fail := func(err error) (*Driver, error) {
		return nil, &layerfs.Error{Op: "open", Driver: name, Path: root, Err: err}
	}
	if opts == nil {
		opts = new(Options)
	}
	if err := opts.validate(); err != nil {
		return fail(err)
	}
	abs, err := filepath.Abs(root)
	if err != nil {
		return fail(err)
	}
	m := &mechanism{home: filepath.Join(abs, name), opts: *opts, log: opts.Logger, probe: new(feature.Prober)}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.opts.UDBA == "" {
		m.opts.UDBA = union.None
		if m.opts.LiveBase {
			m.opts.UDBA = union.Notify
		}
	}
	if err := os.MkdirAll(m.home, 0o711); err != nil {
		return fail(err)
	}
	// Before anything is made in the home.
	if err := m.choose(); err != nil {
		return fail(err)
	}
	common := lifecycle.Options{Durability: opts.Durability, Logger: opts.Logger}
	if m.dir, err = lifecycle.Open(m.home, common); err != nil {
		return fail(errors.Join(err, m.Close()))
	}
	if err := m.prepare(); err != nil {
		m.dir.Close()
		return fail(errors.Join(err, m.Close()))
	}
	f, err := lifecycle.New(context.Background(), m.home, m.dir, m, common)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return &Driver{f, m}, nil
}

// prepare makes the directories of the home and learns about its file system.
func (m *mechanism) prepare() error {
	for _, d := range []string{"diff", "layers", "mnt"} {
		if err := os.Mkdir(filepath.Join(m.home, d), 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := m.clearScratch(context.Background()); err != nil {
		return err
	}
	fsname, err := feature.FSName(m.home)
	if err != nil {
		return err
	}
	// ext4's journal and xfs's log commit operations in the order they were
	// made, so the sync of a later record makes an earlier rename durable:
	// Documentation/filesystems/ext4/journal.rst; xfs-delayed-logging-design.rst.
	m.ordered = fsname == "extfs" || fsname == "xfs"
	m.describe()
	return nil
}

// choose finds the engine.
func (m *mechanism) choose() error {
	wanted := m.opts.Engine
	var refused error
	if wanted != FUSE {
		e, err := m.kernel()
		if err == nil {
			m.engine = e
			return nil
		}
		if wanted == Kernel || !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		refused = err
	}
	err := m.opts.excludes(FUSE)
	if err == nil {
		err = m.probeFUSE()
	}
	if err != nil {
		return errors.Join(refused, err)
	}
	set := settings{udba: m.opts.UDBA, dio: true, noPlink: m.opts.NoPlink, dirPerm1: true, sum: m.opts.Sum}
	if m.opts.InProcess {
		m.engine, err = newFUSE(set, m.log)
		return err
	}
	m.engine, err = newHelper(set, filepath.Join(m.home, "serve"), m.opts.Helper, m.log)
	return err
}

// kernel returns the kernel's AUFS if it works for the options.
func (m *mechanism) kernel() (engine, error) {
	if err := m.opts.excludes(Kernel); err != nil {
		return nil, err
	}
	if err := homeFits(m.home); err != nil {
		return nil, err
	}
	s := settings{
		udba: m.opts.UDBA, xino: xinoPath(m.opts.XIno, m.home), dio: m.opts.Dio, noPlink: m.opts.NoPlink, sum: m.opts.Sum,
	}
	dirPerm1, err := m.probeKernel(s)
	if err != nil {
		return nil, err
	}
	if m.opts.DirPerm1 == "on" && !dirPerm1 {
		return nil, &layerfs.UnsupportedError{Feature: "dirperm1", Reason: "this AUFS refuses it"}
	}
	s.dirPerm1 = dirPerm1 && m.opts.DirPerm1 != "off"
	return newKernel(s), nil
}

// The most branches of a union: AUFS's limit as it is usually built
// (CONFIG_AUFS_BRANCH_MAX_127), and what package union is tested with.
const (
	maxKernel = 127
	maxFUSE   = 500
)

// describe fills in the features.
func (m *mechanism) describe() {
	f := layerfs.Features{
		MaxDepth:        maxFUSE,
		ConstantCreate:  true,
		SharedPageCache: true,
		ReadOnlyViews:   true,
		NativeChanges:   true,
		NativeDiff:      true,
		LiveBase:        m.opts.LiveBase,
		Reasons: map[string]string{
			"Rename": "AUFS gives EXDEV for a directory that has something on a lower branch",
			"IDMap":  "neither AUFS nor the union over FUSE can be mounted with mapped owners",
		},
	}
	if m.engine.name() == Kernel {
		f.MaxDepth = maxKernel
	}
	if !f.LiveBase {
		f.Reasons["LiveBase"] = "Options.LiveBase is off"
	}
	have := func(field *bool, name string, err error) {
		*field = err == nil
		if err != nil {
			f.Reasons[name] = err.Error()
		}
	}
	have(&f.DeviceNodes, "DeviceNodes", m.probe.Probe(feature.Mknod, m.home))
	trusted := m.probe.Probe(feature.SysAdmin, m.home)
	if inside, err := feature.InUserNamespace(); err == nil && inside {
		trusted = errors.New("trusted.* xattrs need the first user namespace")
	}
	have(&f.AllXattrs, "AllXattrs", trusted)
	var quotas error
	m.projects, quotas = quota.Open(m.home, nil)
	have(&f.Quota, "Quota", quotas)
	have(&f.InodeQuota, "InodeQuota", quotas)
	m.features = f
}

func (m *mechanism) Name() string               { return name }
func (m *mechanism) Features() layerfs.Features { return m.features }

// LiveBase reports whether layers with children may be held for writing.
func (m *mechanism) LiveBase() bool { return m.opts.LiveBase }

// Close releases what the mechanism holds itself.
func (m *mechanism) Close() error {
	var errs []error
	if m.engine != nil {
		errs = append(errs, m.engine.close())
	}
	if m.projects != nil {
		errs = append(errs, m.projects.Close())
	}
	return errors.Join(errs...)
}

// The paths of a layer.
func (m *mechanism) branch(id string) string   { return filepath.Join(m.home, "diff", id) }
func (m *mechanism) ancestry(id string) string { return filepath.Join(m.home, "layers", id) }

// Path returns where a layer is mounted.
func (m *mechanism) Path(id string) string { return filepath.Join(m.home, "mnt", id) }

// branches returns the branches of a chain.
func (m *mechanism) branches(chain lifecycle.Chain) []string {
	dirs := make([]string, len(chain))
	for i, r := range chain {
		dirs[i] = m.branch(r.ID)
	}
	return dirs
}

// SetQuota replaces the quota of a layer, in the form of a project quota on
// its branch.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(_ lifecycle.Chain, rec *lifecycle.Record) error {
		if q.Bytes < 0 || q.Inodes < 0 {
			return fmt.Errorf("quota of %d bytes and %d inodes is negative", q.Bytes, q.Inodes)
		}
		if err := d.m.quotas().Limit(ctx, d.m.branch(id), q); err != nil {
			return err
		}
		rec.Quota = q
		return nil
	})
}

// Get makes the merged tree of a layer available; see [layerfs.Driver]. With
// [Options.InProcess], [layerfs.GetOptions.Persist] is for base layers alone.
func (d *Driver) Get(ctx context.Context, id string, opts *layerfs.GetOptions) (string, error) {
	if _, here := d.m.engine.(*fuseEngine); here && opts != nil && opts.Persist && layerfs.CheckID(id) == nil {
		if rec, err := d.m.dir.Load(id); err == nil && rec.Parent != "" {
			return "", &layerfs.Error{Op: "get", Driver: name, ID: id, Err: &layerfs.UnsupportedError{
				Feature: "a persistent get with InProcess", Reason: "the mount is served by this process and ends with it",
			}}
		}
	}
	return d.frame.Get(ctx, id, opts)
}
