package aufs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strconv"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/merged"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

// Apply unpacks straight into the branch. An empty layer, the usual case, gets
// a new branch in one step, unless a child may be mounted that would not see
// it.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (res layerfs.ApplyResult, err error) {
	rec := chain.Layer()
	aside, err := isEmpty(m.branch(rec.ID))
	if err == nil && aside && m.opts.LiveBase {
		var parent bool
		parent, err = m.dir.HasChildren(rec.ID)
		aside = !parent
	}
	if err != nil {
		return res, err
	}
	if !aside {
		if err := touch(); err != nil {
			return res, err
		}
		if err := m.settle(ctx, chain); err != nil {
			return res, err
		}
		return m.unpack(ctx, m.branch(rec.ID), chain, r, opts)
	}
	// The chain itself in place of the parent: the root keeps the attributes
	// it has now.
	err = m.replace(rec, chain, func(dir string) (err error) {
		if res, err = m.unpack(ctx, dir, chain, r, opts); err != nil {
			return err
		}
		if m.opts.Durability == layerfs.DurabilityFull {
			return m.Sync(ctx, rec)
		}
		return nil
	})
	return res, err
}

func (m *mechanism) unpack(ctx context.Context, dir string, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	lowers := m.branches(chain[1:])
	res, err := archive.Apply(ctx, dir, r, &archive.ApplyOptions{
		ApplyOptions:  *opts,
		Form:          whiteout.AUFS,
		Lowers:        lowers,
		DropWhiteouts: true,
	})
	if err != nil {
		return res, err
	}
	return res, cover(ctx, dir, lowers)
}

// isEmpty reports whether a branch holds nothing but AUFS's own files.
func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	const own = 8 // more names than AUFS has of its own in a root
	names, err := f.Readdirnames(own)
	for _, n := range names {
		if !whiteout.IsMeta(n) || whiteout.IsOpaque(n) {
			return false, nil
		}
	}
	return len(names) < own, ignoreEnd(err)
}

func ignoreEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// NativeChanges reads the branches.
func (m *mechanism) NativeChanges(ctx context.Context, chain lifecycle.Chain, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		if err := m.ready(ctx, chain); err != nil {
			yield(layerfs.Change{}, err)
			return
		}
		merged.Changes(ctx, rules{}, m.branches(chain), base)(yield)
	}
}

// NativeDiff writes a layer from its own branch: all that it changes against
// its parent is there. It declines in the one case in which it is not: where a
// directory of the layer stands for something else in the parent, it uncovers
// what that hides further below.
func (m *mechanism) NativeDiff(ctx context.Context, w io.Writer, chain lifecycle.Chain, base int, opts *layerfs.DiffOptions) error {
	if base != 1 || len(chain) == 1 {
		return lifecycle.ErrDecline
	}
	if err := m.ready(ctx, chain); err != nil {
		return err
	}
	var changes []layerfs.Change
	for d, err := range merged.Compare(ctx, rules{}, m.branches(chain), base) {
		if err != nil {
			return err
		}
		if d.Kind != layerfs.Deleted && d.Layer != 0 {
			return fmt.Errorf("%s is uncovered by the layer: %w", d.Path, lifecycle.ErrDecline)
		}
		changes = append(changes, d.Change)
	}
	list := func(yield func(layerfs.Change, error) bool) {
		for _, c := range changes {
			if !yield(c, nil) {
				return
			}
		}
	}
	_, err := archive.WriteChanges(ctx, w, m.branch(chain.Layer().ID), list, &archive.WriteOptions{DiffOptions: *opts})
	return err
}

// Usage counts the files of the branch.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (layerfs.Usage, error) {
	return tree.Usage(ctx, m.branch(chain.Layer().ID))
}

// Status gives the keys of Docker's aufs, the engine, and what is mounted.
func (m *mechanism) Status(context.Context) ([]layerfs.StatusItem, error) {
	fsname, err := feature.FSName(m.home)
	if err != nil {
		return nil, err
	}
	dirs, err := os.ReadDir(m.home + "/diff")
	if err != nil {
		return nil, err
	}
	dirPerm1 := true // of the FUSE engine
	udba := m.opts.UDBA
	if k, ok := m.engine.(*kernelEngine); ok {
		dirPerm1 = k.set.dirPerm1
	}
	items := []layerfs.StatusItem{
		{Key: "Root Dir", Value: m.home},
		{Key: "Backing Filesystem", Value: fsname},
		{Key: "Dirs", Value: strconv.Itoa(len(dirs))},
		{Key: "Dirperm1 Supported", Value: strconv.FormatBool(dirPerm1)},
		{Key: "Engine", Value: string(m.engine.name())},
		{Key: "UDBA", Value: string(udba)},
		{Key: "Live Base", Value: strconv.FormatBool(m.opts.LiveBase)},
		{Key: "Project Quota", Value: strconv.FormatBool(m.features.Quota)},
	}
	ids, err := m.Mounted()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		items = append(items, layerfs.StatusItem{Key: "Branches of " + id, Value: m.mountedBranches(id)})
	}
	return items, nil
}

// mountedBranches tells the branches of a mounted layer to people.
func (m *mechanism) mountedBranches(id string) string {
	if rec, err := m.dir.Load(id); err == nil && rec.Parent == "" {
		return m.branch(id) + " (bind mount)"
	}
	branches, err := m.engine.branches(m.Path(id))
	if err != nil {
		return "unknown: " + err.Error()
	}
	return branchesText(branches)
}
