package vfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/copyup"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/quota"
	"github.com/layerfs/layerfs/internal/undo"
)

// mechanism is immutable after newMechanism.
type mechanism struct {
	dir      string // where the layers are
	records  *layerdir.Dir
	opts     Options
	log      *slog.Logger
	features layerfs.Features
	status   []layerfs.StatusItem
	projects *quota.Projects // nil if the file system has no project quota
}

var (
	_ lifecycle.Mechanism = (*mechanism)(nil)
	_ lifecycle.Finder    = (*mechanism)(nil)
)

func newMechanism(home string, records *layerdir.Dir, opts *Options) (*mechanism, error) {
	m := &mechanism{dir: filepath.Join(home, "dir"), records: records, opts: *opts, log: opts.Logger}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if err := os.Mkdir(m.dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	scratch := filepath.Dir(records.BuildPath("x"))
	reflink := new(feature.Prober).Probe(feature.Reflink, scratch)
	backing, err := feature.FSName(home)
	if err != nil {
		return nil, err
	}
	m.status = []layerfs.StatusItem{
		{Key: "Backing Filesystem", Value: backing},
		{Key: "Root Dir", Value: home},
		{Key: "Reflinks", Value: reflinkStatus(reflink, opts.NoReflink)},
	}
	m.features = layerfs.Features{Rename: true, Reasons: make(map[string]string)}
	m.probe(scratch)
	qerr := m.openQuota(home)
	if opts.Quota != (layerfs.Quota{}) && qerr != nil {
		return nil, qerr
	}
	return m, nil
}

func reflinkStatus(probe error, off bool) string {
	switch {
	case off:
		return "false (turned off)"
	case probe != nil:
		return "false (" + probe.Error() + ")"
	}
	return "true"
}

// fact notes what a probe has found.
func (m *mechanism) fact(name string, field *bool, err error) {
	*field = err == nil
	if err != nil {
		m.features.Reasons[name] = err.Error()
	}
}

func (m *mechanism) openQuota(home string) (err error) {
	m.projects, err = quota.Open(home, nil)
	m.fact("Quota", &m.features.Quota, err)
	m.fact("InodeQuota", &m.features.InodeQuota, err)
	return err
}

func (m *mechanism) Name() string               { return Name }
func (m *mechanism) Path(id string) string      { return filepath.Join(m.dir, id) }
func (m *mechanism) Features() layerfs.Features { return m.features }

// Create copies the parent.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, opts *layerfs.CreateOptions) error {
	if rec.Quota == (layerfs.Quota{}) {
		rec.Quota = m.opts.Quota
	}
	return m.build(ctx, rec, parent, opts.Progress)
}

func (m *mechanism) build(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, progress layerfs.ProgressFunc) (err error) {
	var u undo.Stack
	defer u.Run(&err)
	build, err := m.newTree(ctx, rec, &u)
	if err != nil {
		return err
	}
	if len(parent) > 0 {
		if err := m.copyTree(ctx, build, m.Path(parent.Layer().ID), progress); err != nil {
			return quotaError(rec, err)
		}
	}
	if err := label(ctx, build, rec); err != nil {
		return err
	}
	if err := move(build, m.Path(rec.ID)); err != nil {
		return err
	}
	return m.syncNames()
}

// newTree makes the empty directory of a layer in the build directory, with
// its quota.
func (m *mechanism) newTree(ctx context.Context, rec *lifecycle.Record, u *undo.Stack) (string, error) {
	build, err := m.records.Build(rec.ID, removeTree)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(build, 0o755); err != nil {
		return "", err
	}
	u.Push(func() error { return m.removeAt(build) })
	if err := os.Chmod(build, 0o755); err != nil { // whatever the umask
		return "", err
	}
	if rec.Quota != (layerfs.Quota{}) {
		return build, m.setQuota(ctx, build, rec.Quota)
	}
	return build, nil
}

func (m *mechanism) copyTree(ctx context.Context, dst, src string, progress layerfs.ProgressFunc) error {
	opts := &copyup.Options{
		IgnoreOwners: m.opts.IgnoreOwners, NoReflink: m.opts.NoReflink,
		Workers: m.opts.Workers, Progress: progress,
	}
	if m.opts.BestEffortXattrs {
		opts.XattrError = func(path, name string, err error) error {
			m.log.Warn("xattr is lost", "driver", Name, "path", path, "xattr", name, "error", err)
			return nil
		}
	}
	_, err := copyup.Tree(ctx, dst, src, opts)
	return err
}

// syncNames makes the renames of layers durable.
func (m *mechanism) syncNames() error {
	if m.opts.Durability == layerfs.DurabilityNone {
		return nil
	}
	return syncDir(m.dir)
}

// Delete removes what there is of a layer.
func (m *mechanism) Delete(_ context.Context, rec *lifecycle.Record) error {
	return errors.Join(m.remove(rec.ID), m.removeAt(m.records.BuildPath(rec.ID)))
}

func (m *mechanism) remove(id string) error { return m.removeAt(m.Path(id)) }

// removeAt removes a tree and the limits of its project.
func (m *mechanism) removeAt(path string) error {
	var project uint32
	if m.projects != nil {
		var err error
		if project, err = m.ownProject(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := removeTree(path); err != nil {
		return err
	}
	if project == 0 {
		return nil
	}
	return m.projects.Clear(project)
}

// Stored lists what is in the directories.
func (m *mechanism) Stored(context.Context) ([]string, error) {
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return nil, err
	}
	ids, err := m.records.Builds()
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids, err
}

// Find tells whether the directory of a layer is there.
func (m *mechanism) Find(_ context.Context, rec *lifecycle.Record) error {
	fi, err := os.Lstat(m.Path(rec.ID))
	if err == nil && !fi.IsDir() {
		err = &fs.PathError{Op: "find layer", Path: m.Path(rec.ID), Err: errors.New("no directory")}
	}
	return err
}

// Apply unpacks into the layer itself, unless that is empty.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (layerfs.ApplyResult, error) {
	rec := chain.Layer()
	o := &archive.ApplyOptions{ApplyOptions: *opts, Form: archive.Merged, Workers: m.opts.Workers}
	o.IgnoreOwners = o.IgnoreOwners || m.opts.IgnoreOwners
	if m.opts.BestEffortXattrs {
		o.Lost = func(err *archive.EntryError) {
			m.log.Warn("attribute is lost", "driver", Name, "layer", rec.ID, "error", err)
		}
	}
	// A stream that cannot even be begun must not spoil the layer.
	br := bufio.NewReaderSize(r, 4096)
	if _, err := br.Peek(1); err != nil && err != io.EOF {
		return layerfs.ApplyResult{}, err
	}
	path := m.Path(rec.ID)
	empty, err := isEmpty(path)
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	if empty && replacesEmptyDir {
		return m.applyAside(ctx, rec, br, o)
	}
	if err := touch(); err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := archive.Apply(ctx, path, br, o)
	if err == nil {
		err = label(ctx, path, rec)
	}
	return res, quotaError(rec, err)
}

// label gives a tree the label of its layer, if that has one.
func label(ctx context.Context, path string, rec *lifecycle.Record) error {
	if rec.MountLabel == "" {
		return nil
	}
	return relabel(ctx, path, rec.MountLabel)
}

// applyAside unpacks into a copy of an empty layer, which then takes its
// place: rename(2) replaces an empty directory.
func (m *mechanism) applyAside(ctx context.Context, rec *lifecycle.Record, r io.Reader, opts *archive.ApplyOptions) (res layerfs.ApplyResult, err error) {
	var u undo.Stack
	defer u.Run(&err)
	path := m.Path(rec.ID)
	build, err := m.newTree(ctx, &lifecycle.Record{ID: rec.ID}, &u)
	if err != nil {
		return res, err
	}
	if m.projects != nil {
		project, err := m.ownProject(path)
		if err == nil && project != 0 {
			err = m.projects.Assign(project, build)
		}
		if err != nil {
			return res, err
		}
		// The layer goes on to use the project, also if this fails.
		u = undo.Stack{}
		u.Push(func() error { return removeTree(build) })
	}
	if err := m.copyTree(ctx, build, path, nil); err != nil { // its attributes
		return res, err
	}
	if res, err = archive.Apply(ctx, build, r, opts); err == nil {
		err = label(ctx, build, rec)
	}
	if err != nil {
		return res, quotaError(rec, err)
	}
	if err := move(build, path); err != nil {
		return res, err
	}
	return res, m.syncNames()
}

// move renames a directory, also over an empty one, which os.Rename refuses.
// Without privilege it needs the right to write in the directory itself, whose
// ".." changes, and the root of a tree may deny that.
func move(from, to string) error {
	err := syscall.Rename(from, to)
	if !errors.Is(err, fs.ErrPermission) {
		return linkError(from, to, err)
	}
	fi, serr := os.Lstat(from)
	if serr != nil {
		return linkError(from, to, err)
	}
	const owner = 0o700
	if err := os.Chmod(from, fi.Mode()|owner); err != nil {
		return err
	}
	if err := syscall.Rename(from, to); err != nil {
		return linkError(from, to, err)
	}
	return os.Chmod(to, fi.Mode())
}

func linkError(from, to string, err error) error {
	if err == nil {
		return nil
	}
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}

// View is the tree itself: nothing that is done to it can change it.
func (m *mechanism) View(_ context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	return lifecycle.View{Path: m.Path(chain.Layer().ID), Release: func() error { return nil }}, nil
}

// Usage walks. Blocks that are shared with other layers count for each.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (layerfs.Usage, error) {
	return usage(ctx, m.Path(chain.Layer().ID))
}

// Sync writes the files of a layer back.
func (m *mechanism) Sync(ctx context.Context, rec *lifecycle.Record) error {
	return syncTree(ctx, m.Path(rec.ID))
}

// Status tells what was found when the driver was opened.
func (m *mechanism) Status(context.Context) ([]layerfs.StatusItem, error) { return m.status, nil }

// Close closes the file system of the quotas.
func (m *mechanism) Close() error {
	if m.projects == nil {
		return nil
	}
	return m.projects.Close()
}

// quotaError tells a full layer from a full disk.
func quotaError(rec *lifecycle.Record, err error) error {
	if err != nil && rec.Quota != (layerfs.Quota{}) && isFull(err) {
		return fmt.Errorf("%w: %w", layerfs.ErrQuota, err)
	}
	return err
}

// projectLock is a name that no layer can have, for the lock on project ids.
const projectLock = ".projects"

// setQuota limits a tree. A tree without a project of its own gets one.
func (m *mechanism) setQuota(ctx context.Context, path string, q layerfs.Quota) error {
	if m.projects == nil {
		return &layerfs.UnsupportedError{Feature: "a quota of vfs", Reason: m.features.Reasons["Quota"]}
	}
	project, err := m.ownProject(path)
	if err != nil {
		return err
	}
	if project != 0 {
		return m.projects.SetLimits(project, q)
	}
	unlock, err := m.records.Lock(ctx, projectLock)
	if err != nil {
		return err
	}
	defer unlock()
	if project, err = m.projects.Allocate(m.dir, filepath.Dir(m.records.BuildPath("x"))); err != nil {
		return err
	}
	if err := m.projects.AssignTree(project, path); err != nil {
		return err
	}
	return m.projects.SetLimits(project, q)
}

// ownProject returns the project of a tree unless it comes from the directory
// above, where an administrator may have set one for all layers.
func (m *mechanism) ownProject(path string) (uint32, error) {
	project, err := m.projects.ID(path)
	if err != nil || project < quota.DefaultFirst {
		return 0, err
	}
	above, err := m.projects.ID(m.dir)
	if project == above {
		return 0, err
	}
	return project, err
}

// removeTree removes a tree, also with directories that its owner may not
// enter.
func removeTree(path string) error {
	err := os.RemoveAll(path)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	root, oerr := os.OpenRoot(filepath.Dir(path))
	if oerr != nil {
		return err
	}
	defer root.Close()
	openUp(root, filepath.Base(path))
	return os.RemoveAll(path)
}

// openUp lets the owner into a directory and all below it. What fails shows
// when the tree is removed.
func openUp(root *os.Root, name string) {
	if fi, err := root.Lstat(name); err != nil || !fi.IsDir() {
		return
	}
	_ = root.Chmod(name, 0o700)
	dir, err := root.OpenRoot(name)
	if err != nil {
		return
	}
	defer dir.Close()
	f, err := dir.Open(".")
	if err != nil {
		return
	}
	defer f.Close()
	entries, _ := f.ReadDir(-1)
	for _, e := range entries {
		if e.IsDir() {
			openUp(dir, e.Name())
		}
	}
}
