package overlay

import (
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/merged"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

// Apply unpacks straight into the upper directory. An empty layer, the usual
// case, gets a new upper directory in one step.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (layerfs.ApplyResult, error) {
	rec := chain.Layer()
	upper := m.upper(rec.ID)
	empty, err := isEmpty(upper)
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	if !empty {
		if err := touch(); err != nil {
			return layerfs.ApplyResult{}, err
		}
		return m.unpack(ctx, upper, chain, r, opts)
	}
	dir, err := m.dir.Build(rec.ID, os.RemoveAll)
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := m.applyAside(ctx, dir, chain, r, opts)
	return res, errors.Join(err, os.RemoveAll(dir))
}

func (m *mechanism) applyAside(ctx context.Context, dir string, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	rec := chain.Layer()
	if err := os.Mkdir(dir, 0o711); err != nil {
		return layerfs.ApplyResult{}, err
	}
	if err := m.quotas().Share(rec, m.layer(rec.ID), dir); err != nil {
		return layerfs.ApplyResult{}, err
	}
	fresh := filepath.Join(dir, "upper")
	// The chain itself in place of the parent: the root keeps the attributes
	// it has now.
	if err := m.makeUpper(fresh, chain); err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := m.unpack(ctx, fresh, chain, r, opts)
	if err != nil {
		return res, err
	}
	if m.opts.Durability == layerfs.DurabilityFull {
		if err := m.Sync(ctx, rec); err != nil {
			return res, err
		}
	}
	return res, replace(fresh, m.upper(rec.ID))
}

func (m *mechanism) unpack(ctx context.Context, dir string, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions) (_ layerfs.ApplyResult, err error) {
	form := whiteout.Overlay
	if m.conf.Xattrs == "user" {
		form = whiteout.OverlayUser
	}
	var lowers []string
	if len(chain) > 1 {
		// What is below is asked of the kernel, which knows redirects and
		// metacopy, and is as fast for many layers as for one.
		below, err := m.View(ctx, chain[1:])
		if err != nil {
			return layerfs.ApplyResult{}, err
		}
		defer func() { err = errors.Join(err, below.Release()) }()
		lowers = []string{below.Path}
	}
	return archive.Apply(ctx, dir, r, &archive.ApplyOptions{
		ApplyOptions:  *opts,
		Form:          form,
		Lowers:        lowers,
		DropWhiteouts: true,
	})
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// NativeChanges reads the upper directories.
func (m *mechanism) NativeChanges(ctx context.Context, chain lifecycle.Chain, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		if err := m.still(ctx, chain.Layer().ID); err != nil {
			yield(layerfs.Change{}, err)
			return
		}
		merged.Changes(ctx, m.rules(), m.uppers(chain), base)(yield)
	}
}

func (m *mechanism) rules() rules {
	return rules{prefix: m.prefix(), aufs: m.conf.AUFS, union: m.conf.Union}
}

// Usage counts the files of the upper directory; a project quota knows it.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (layerfs.Usage, error) {
	return tree.Usage(ctx, m.upper(chain.Layer().ID))
}

// Status gives the keys of Docker's overlay2, and where the layers are.
func (m *mechanism) Status(context.Context) ([]layerfs.StatusItem, error) {
	fsname, err := feature.FSName(m.home)
	if err != nil {
		return nil, err
	}
	yes := func(b bool) string {
		if b {
			return "true"
		}
		return "false"
	}
	items := []layerfs.StatusItem{
		{Key: "Root Dir", Value: m.home},
		{Key: "Backing Filesystem", Value: fsname},
		{Key: "Supports d_type", Value: yes(m.probe.Has(feature.DType, m.home))},
		{Key: "Using metacopy", Value: yes(m.conf.Metacopy)},
		{Key: "Native Overlay Diff", Value: "true"},
		{Key: "userxattr", Value: yes(m.opts.UserXattr == "on")},
		{Key: "Supports shifting", Value: yes(m.features.IDMap)},
		{Key: "Supports volatile", Value: yes(m.probe.Has(feature.Volatile, m.home))},
		{Key: "Project Quota", Value: yes(m.features.Quota)},
	}
	if m.opts.MountProgram != "" {
		items = append(items, layerfs.StatusItem{Key: "Mount Program", Value: m.opts.MountProgram})
	}
	return items, nil
}
