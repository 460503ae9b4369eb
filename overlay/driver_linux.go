package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/quota"
)

type frame = lifecycle.Driver

// Driver keeps layers with overlayfs. It implements [layerfs.Driver],
// [layerfs.Mounter], [layerfs.QuotaSetter], [layerfs.LabelSetter],
// [layerfs.Rollbacker], [layerfs.Cloner], [layerfs.Checker] and
// [layerfs.Repairer].
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
	_ layerfs.Checker     = (*Driver)(nil)
	_ layerfs.Repairer    = (*Driver)(nil)
)

// mechanism is overlayfs behind the shared life cycle.
type mechanism struct {
	home     string
	opts     Options
	conf     config
	dir      *layerdir.Dir
	probe    *feature.Prober
	features layerfs.Features
	projects *quota.Projects // nil without project quotas
	method   mount.Method

	answerWithin time.Duration // of who serves a mount; tests shorten it
}

// name is what errors and Status call the driver.
const name = "overlay"

// New opens the layers below ROOT/overlay, and makes the directory if it is
// new. It finishes or rolls back what a crash left; see Recovered.
//
// It mounts a few overlays in a temporary directory to find out what the
// kernel and the file system can do, which takes about a millisecond. The
// error matches [errors.ErrUnsupported] if overlayfs does not work here or an
// option needs what is missing; nothing but an empty directory is left then.
func New(root string, opts *Options) (*Driver, error) {
	return open(root, opts, new(feature.Prober), mount.Auto)
}

func open(root string, opts *Options, probe *feature.Prober, method mount.Method) (_ *Driver, err error) {
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
	m := &mechanism{
		home: filepath.Join(root, name), opts: *opts, probe: probe, method: method, answerWithin: mount.AnswerWithin,
	}
	common := lifecycle.Options{Durability: opts.Durability, Logger: opts.Logger}
	if err := os.MkdirAll(m.home, 0o711); err != nil {
		return fail(err)
	}
	if err := m.learn(); err != nil {
		return fail(err)
	}
	m.dir, err = lifecycle.Open(m.home, common)
	if err != nil {
		return fail(err)
	}
	if m.conf, err = loadConfig(m.home, m.wanted()); err != nil {
		m.dir.Close()
		return fail(err)
	}
	if err := m.recoverVolatile(); err != nil {
		m.dir.Close()
		return fail(err)
	}
	if err := m.clearViews(); err != nil {
		m.dir.Close()
		return fail(err)
	}
	f, err := lifecycle.New(context.Background(), m.home, m.dir, m, common)
	if err != nil {
		return nil, err
	}
	return &Driver{f, m}, nil
}

// wanted is the configuration the options ask for.
func (m *mechanism) wanted() config {
	c := config{
		Xattrs:   "trusted",
		Redirect: m.opts.RedirectDir == "on",
		Metacopy: m.opts.Metacopy == "on",
		Volatile: m.opts.Volatile,
		AUFS:     m.opts.MountProgram != "" && !m.opts.union(),
		Union:    m.opts.union(),
	}
	if m.opts.UserXattr == "on" {
		c.Xattrs = "user"
	}
	return c
}

// learn finds out what works here, and fails if too little does.
func (m *mechanism) learn() error {
	if m.opts.UserXattr == "" {
		inside, err := feature.InUserNamespace()
		if err != nil {
			return err
		}
		m.opts.UserXattr = "off"
		if inside || m.opts.MountProgram != "" && os.Geteuid() != 0 {
			m.opts.UserXattr = "on"
		}
	}
	needs := m.needs()
	if m.opts.MountProgram != "" {
		if err := checkProgram(m.opts.MountProgram); err != nil {
			return err
		}
		needs = nil
	}
	for _, f := range needs {
		if err := m.probe.Probe(f, m.home); err != nil {
			return err
		}
	}
	m.describe()
	return nil
}

// needs lists what must work for the options.
func (m *mechanism) needs() []feature.Feature {
	needs := []feature.Feature{feature.Overlay}
	if m.opts.UserXattr == "on" {
		needs[0] = feature.OverlayUserXattr
	}
	for f, wanted := range map[feature.Feature]bool{
		feature.RedirectDir: m.opts.RedirectDir == "on",
		feature.Metacopy:    m.opts.Metacopy == "on",
		feature.XIno:        m.opts.XIno == "on",
		feature.Volatile:    m.opts.Volatile,
	} {
		if wanted {
			needs = append(needs, f)
		}
	}
	return needs
}

// describe fills in the features.
func (m *mechanism) describe() {
	f := layerfs.Features{
		MaxDepth:        mount.MaxLowers,
		ConstantCreate:  true,
		SharedPageCache: m.opts.MountProgram == "",
		ReadOnlyViews:   true,
		NativeChanges:   true,
		NativeDiff:      true,
		Rename:          m.opts.RedirectDir == "on",
		Reasons:         make(map[string]string),
	}
	have := func(field *bool, name string, err error) {
		*field = err == nil
		if err != nil {
			f.Reasons[name] = err.Error()
		}
	}
	if !f.SharedPageCache {
		f.Reasons["SharedPageCache"] = "the mount program reads the files itself"
	}
	if !f.Rename {
		f.Reasons["Rename"] = "redirect_dir is off"
	}
	f.Reasons["LiveBase"] = "lower directories of a mounted overlay must not change (overlayfs.rst)"
	have(&f.DeviceNodes, "DeviceNodes", m.probe.Probe(feature.Mknod, m.home))
	trusted := m.probe.Probe(feature.SysAdmin, m.home)
	if inside, err := feature.InUserNamespace(); err == nil && inside {
		trusted = errors.New("trusted.* xattrs need the first user namespace")
	}
	have(&f.AllXattrs, "AllXattrs", trusted)
	idmap := m.probe.Probe(feature.OverlayIDMap, m.home)
	if m.opts.MountProgram != "" {
		idmap = errors.New("the mount program cannot map owners")
	}
	have(&f.IDMap, "IDMap", idmap)
	var quotas error
	m.projects, quotas = quota.Open(m.home, nil)
	have(&f.Quota, "Quota", quotas)
	have(&f.InodeQuota, "InodeQuota", quotas)
	m.features = f
}

func (m *mechanism) Name() string               { return name }
func (m *mechanism) Features() layerfs.Features { return m.features }
func (m *mechanism) Close() error {
	if m.projects != nil {
		return m.projects.Close()
	}
	return nil
}

// The paths of a layer.
func (m *mechanism) layer(id string) string { return filepath.Join(m.home, id) }
func (m *mechanism) upper(id string) string { return filepath.Join(m.home, id, "upper") }
func (m *mechanism) work(id string) string  { return filepath.Join(m.home, id, "work") }

// Path returns where a layer is mounted.
func (m *mechanism) Path(id string) string { return filepath.Join(m.home, id, "merged") }

// uppers returns the upper directories of a chain.
func (m *mechanism) uppers(chain lifecycle.Chain) []string {
	dirs := make([]string, len(chain))
	for i, r := range chain {
		dirs[i] = m.upper(r.ID)
	}
	return dirs
}

// prefix is what the names of overlayfs's xattrs start with.
func (m *mechanism) prefix() string { return m.conf.Xattrs + ".overlay." }

// SetQuota replaces the quota of a layer, in the form of a project quota on
// its upper and work directories.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(_ lifecycle.Chain, rec *lifecycle.Record) error {
		if q.Bytes < 0 || q.Inodes < 0 {
			return fmt.Errorf("quota of %d bytes and %d inodes is negative", q.Bytes, q.Inodes)
		}
		if err := d.m.quotas().Limit(ctx, d.m.layer(id), q); err != nil {
			return err
		}
		rec.Quota = q
		return nil
	})
}
