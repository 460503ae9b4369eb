//go:build linux || freebsd

package zfs

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

type frame = lifecycle.Driver

// Driver keeps layers as ZFS file systems. It implements [layerfs.Driver],
// [layerfs.QuotaSetter], [layerfs.LabelSetter], [layerfs.Rollbacker],
// [layerfs.Cloner], [layerfs.Checker] and [layerfs.Repairer], and on Linux
// [layerfs.BlockDiffer].
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

// mechanism is ZFS behind the shared life cycle.
type mechanism struct {
	home     string
	opts     Options
	log      *slog.Logger
	tool     *tool
	dir      *layerdir.Dir
	parent   string // dataset
	root     string // mark of this root in propLayer
	facts    facts
	features layerfs.Features
	views    *views
	serial   atomic.Uint64
	listed   atomic.Pointer[map[string]bool] // layers that Stored found last
}

// name is what errors and Status call the driver.
const name = "zfs"

// New opens the layers below ROOT/zfs, and makes the directory if it is new.
// It finishes or rolls back what a crash left; see Recovered.
//
// What zfs can do here is found out on a dataset that is made for it and
// destroyed again, once per root and boot; that is some twelve calls of zfs.
// Later openings call it once, whatever the number of layers.
//
// The error matches [errors.ErrUnsupported] if there is no zfs program, no
// module or daemon, or no dataset at ROOT; nothing but an empty directory is
// left then. It matches [ErrSuspended] if the pool does not answer. Mounting
// needs root.
func New(root string, opts *Options) (*Driver, error) {
	return open(root, opts, probe)
}

func open(root string, opts *Options, probe prober) (*Driver, error) {
	d, err := openDriver(root, opts, probe)
	if err != nil {
		if _, ok := errors.AsType[*layerfs.Error](err); !ok {
			err = &layerfs.Error{Op: "open", Driver: name, Path: root, Err: err}
		}
		return nil, err
	}
	return d, nil
}

func openDriver(root string, opts *Options, probe prober) (_ *Driver, err error) {
	if opts == nil {
		opts = new(Options)
	}
	if err := opts.validate(); err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	ctx := context.Background()
	m := &mechanism{home: filepath.Join(root, name), opts: *opts, log: opts.Logger}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.tool, err = newTool(opts); err != nil {
		return nil, err
	}
	m.tool.turn = turns()
	common := lifecycle.Options{Durability: opts.Durability, Logger: opts.Logger}
	if err := os.MkdirAll(m.home, 0o711); err != nil {
		return nil, err
	}
	if err := layerdir.Guard(m.home); err != nil {
		return nil, err
	}
	conf, err := m.configure(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(m.graph(), 0o711); err != nil {
		return nil, err
	}
	if m.dir, err = lifecycle.Open(m.home, common); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.dir.Close())
		}
	}()
	if err := m.learn(ctx, conf, probe); err != nil {
		return nil, err
	}
	if m.views, err = openViews(m.state("views")); err != nil {
		return nil, err
	}
	if err := m.clearStage(ctx); err != nil {
		return nil, errors.Join(err, m.views.close())
	}
	f, err := lifecycle.New(ctx, m.home, m.dir, m, common)
	if err != nil {
		m.dir = nil // lifecycle.New has closed it
		return nil, errors.Join(err, m.views.close())
	}
	return &Driver{f, m}, nil
}

func newTool(opts *Options) (*tool, error) {
	t := &tool{patience: 5 * time.Second} // long for a call, short for a person
	var err error
	if t.zfs, err = find("zfs", opts.Zfs); err == nil {
		t.zpool, err = find("zpool", opts.Zpool)
	}
	if err != nil {
		return nil, &layerfs.UnsupportedError{Feature: "zfs", Reason: err.Error()}
	}
	return t, nil
}

// config is what a root keeps: .layerfs/zfs.json.
type config struct {
	Dataset string `json:"dataset"`
	Root    string `json:"root"`
	Facts   facts  `json:"facts,omitzero"`
}

// configure finds the parent dataset and the mark of the root. A new root gets
// its mark here, and the first of several processes gives it.
func (m *mechanism) configure(ctx context.Context) (config, error) {
	conf, err := m.loadConfig()
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		conf, err = config{Dataset: m.opts.Dataset, Root: random() + random()}, nil
		if conf.Dataset == "" {
			conf.Dataset, err = datasetAt(m.home)
		}
	}
	if err != nil {
		return conf, err
	}
	if m.opts.Dataset != "" && m.opts.Dataset != conf.Dataset {
		return conf, &layerfs.UnsupportedError{
			Feature: "zfs with dataset " + m.opts.Dataset + " on this root", Reason: "its layers are below " + conf.Dataset,
		}
	}
	// From the file or from the list of mounts, it becomes an argument.
	if err := checkDataset(conf.Dataset); err != nil {
		return conf, err
	}
	m.parent, m.root, m.tool.pool = conf.Dataset, conf.Root, poolOf(conf.Dataset)
	if err := m.answers(); err != nil {
		return conf, err
	}
	if !made {
		return conf, nil // the list of layers shows whether it is there
	}
	if err := checkParent(conf.Dataset); err != nil {
		return conf, err
	}
	if _, err := m.tool.run(ctx, "list", "-H", "-t", "filesystem", "-o", "name", m.parent); err != nil {
		return conf, unusable(err)
	}
	err = m.saveConfig(conf, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return m.configure(ctx)
	}
	return conf, err
}

// unusable is the error of New if zfs does not even list the parent: no module,
// no daemon or no dataset. None can be told from another by the exit status.
func unusable(err error) error {
	if c, ok := errors.AsType[*CommandError](err); ok && !errors.Is(err, ErrSuspended) {
		return &layerfs.UnsupportedError{Feature: name, Reason: c.Error()}
	}
	return err
}

func (m *mechanism) loadConfig() (conf config, err error) {
	path := m.state("zfs.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return conf, err
	}
	if err := json.Unmarshal(b, &conf); err != nil {
		return conf, fmt.Errorf("%s: %w", path, err)
	}
	if conf.Dataset == "" || conf.Root == "" {
		return conf, fmt.Errorf("%s: the dataset or the mark of the root is missing", path)
	}
	return conf, nil
}

// saveConfig writes the configuration aside and puts it in place.
func (m *mechanism) saveConfig(c config, place func(temp, path string) error) error {
	b, err := json.MarshalIndent(c, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.state(), 0o700); err != nil {
		return err
	}
	temp := m.state(".zfs.json." + random())
	defer os.Remove(temp) // it is gone after a rename
	if err := os.WriteFile(temp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return place(temp, m.state("zfs.json"))
}

// learn finds out what works here. What was found is kept until the next boot
// where the file system is the kernel's; a daemon can be another one any time.
func (m *mechanism) learn(ctx context.Context, conf config, probe prober) (err error) {
	boot := layerdir.BootID()
	if boot == "" || conf.Facts.Boot != boot || !conf.Facts.Kernel {
		if conf.Facts, err = probe(ctx, m); err != nil {
			return err
		}
		conf.Facts.Boot = boot
		if err := m.saveConfig(conf, os.Rename); err != nil {
			return err
		}
	}
	m.facts = conf.Facts
	m.describe()
	return nil
}

// describe fills in the features.
func (m *mechanism) describe() {
	f := layerfs.Features{
		ConstantCreate: true,
		ReadOnlyViews:  true,
		Quota:          true,
		Rename:         true,
		Reasons: map[string]string{
			"InodeQuota":      inodeQuota().Error(),
			"LiveBase":        "a clone keeps what its parent was",
			"SharedPageCache": "file systems share blocks in the ARC only, not in the page cache",
		},
	}
	have := func(field *bool, name, why string) {
		*field = why == ""
		if why != "" {
			f.Reasons[name] = why
		}
	}
	diff := cmp.Or(withoutDiff(), m.facts.Diff)
	if m.opts.WalkChanges {
		diff = "Options.WalkChanges is set"
	}
	have(&f.NativeChanges, "NativeChanges", diff)
	have(&f.NativeDiff, "NativeDiff", diff)
	have(&f.AllXattrs, "AllXattrs", m.facts.Xattrs)
	have(&f.DeviceNodes, "DeviceNodes", m.facts.Devices)
	have(&f.IDMap, "IDMap", m.facts.IDMap)
	m.features = f
}

func (m *mechanism) Name() string               { return name }
func (m *mechanism) Features() layerfs.Features { return m.features }
func (m *mechanism) Close() error               { return m.views.close() }

// Paths and names of a layer.
func (m *mechanism) graph() string            { return filepath.Join(m.home, "graph") }
func (m *mechanism) Path(id string) string    { return filepath.Join(m.home, "graph", id) }
func (m *mechanism) stage(id string) string   { return m.state("stage", id) }
func (m *mechanism) dataset(id string) string { return m.parent + "/" + id }
func (m *mechanism) state(elem ...string) string {
	return filepath.Join(append([]string{m.home, ".layerfs"}, elem...)...)
}

// Status tells about the pool and the parent dataset, under the keys Docker
// made known. Sizes are in bytes. It costs two calls. Of a suspended pool it
// tells the health, and what is known without asking.
func (m *mechanism) Status(ctx context.Context) ([]layerfs.StatusItem, error) {
	health, space, err := m.poolStatus(ctx)
	switch {
	case errors.Is(err, ErrSuspended):
		health, space = stateSuspended, nil
	case err != nil:
		return nil, err
	}
	items := []layerfs.StatusItem{
		{Key: "Zpool", Value: m.tool.pool},
		{Key: "Zpool Health", Value: health},
		{Key: "Parent Dataset", Value: m.parent},
	}
	changes := "zfs diff"
	if !m.features.NativeChanges {
		changes = "walk: " + m.features.Reasons["NativeChanges"]
	}
	return slices.Concat(items, space, []layerfs.StatusItem{{Key: "Changes By", Value: changes}}), nil
}

// poolStatus asks for what Status tells.
func (m *mechanism) poolStatus(ctx context.Context) (health string, space []layerfs.StatusItem, err error) {
	if err := m.answers(); err != nil {
		return "", nil, err
	}
	rows, err := m.tool.rows(ctx, 2, "get", "-H", "-p", "-o", "property,value", "used,available,quota,compression", m.parent)
	if err != nil {
		return "", nil, err
	}
	value := map[string]string{}
	for _, r := range rows {
		value[r[0]] = r[1]
	}
	quota := value["quota"]
	if quota == "0" || quota == "none" {
		quota = "no"
	}
	var out strings.Builder
	if err := m.tool.pipe(ctx, nil, &out, m.tool.zpool, "list", "-H", "-o", "health", m.tool.pool); err != nil {
		return "", nil, err
	}
	return strings.TrimSpace(out.String()), []layerfs.StatusItem{
		{Key: "Space Used By Parent", Value: value["used"]},
		{Key: "Space Available", Value: value["available"]},
		{Key: "Parent Quota", Value: quota},
		{Key: "Compression", Value: value["compression"]},
	}, nil
}
