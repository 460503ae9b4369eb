package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/layerfs/layerfs"
)

// Stat describes one layer.
func (d *Driver) Stat(ctx context.Context, id string, opts *layerfs.StatOptions) (_ layerfs.Info, err error) {
	defer d.wrap("stat", id, &err)
	if opts != nil && opts.Usage {
		return d.statUsage(ctx, id)
	}
	if err := d.begin(ctx); err != nil {
		return layerfs.Info{}, err
	}
	rec, err := d.dir.Load(id)
	if err != nil {
		return layerfs.Info{}, err
	}
	children, err := d.dir.Children(id)
	if err != nil {
		return layerfs.Info{}, err
	}
	return d.info(rec, len(children))
}

func (d *Driver) statUsage(ctx context.Context, id string) (layerfs.Info, error) {
	chain, unpin, err := d.pin(ctx, id, false)
	if err != nil {
		return layerfs.Info{}, err
	}
	defer unpin()
	children, err := d.dir.Children(id)
	if err != nil {
		return layerfs.Info{}, err
	}
	info, err := d.info(chain.Layer(), len(children))
	if err != nil {
		return info, err
	}
	u, err := d.m.Usage(ctx, chain)
	info.Usage = &u
	return info, err
}

func (d *Driver) info(rec *Record, children int) (layerfs.Info, error) {
	info := layerfs.Info{
		ID: rec.ID, Parent: rec.Parent, Created: rec.Created, ReadOnly: rec.ReadOnly,
		Children: children, Incomplete: rec.Incomplete, Path: d.m.Path(rec.ID), Labels: rec.Labels, Quota: rec.Quota,
	}
	d.mu.Lock()
	if h := d.held[rec.ID]; h != nil && h.gets > 0 {
		info.Mounted = true
	}
	d.mu.Unlock()
	if info.Mounted {
		return info, nil
	}
	p, err := d.dir.Persistent(rec.ID)
	if err != nil {
		return info, err
	}
	o, err := d.dir.Others(rec.ID)
	info.Mounted = p.Count > 0 || o.Got()
	return info, err
}

// List describes every layer, parents first and otherwise by id.
func (d *Driver) List(ctx context.Context) (_ []layerfs.Info, err error) {
	defer d.wrap("list", "", &err)
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	recs, _, err := d.records()
	if err != nil {
		return nil, err
	}
	children := make(map[string]int)
	for _, r := range recs {
		children[r.Parent]++
	}
	infos := make([]layerfs.Info, 0, len(recs))
	for _, r := range inOrder(recs) {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		info, err := d.info(r, children[r.ID])
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// records loads every record; those that cannot be read come with the reason,
// as a layer that is incomplete.
func (d *Driver) records() (map[string]*Record, []layerfs.Problem, error) {
	ids, err := d.dir.IDs()
	if err != nil {
		return nil, nil, err
	}
	recs := make(map[string]*Record, len(ids))
	var bad []layerfs.Problem
	for _, id := range ids {
		rec, err := d.dir.Load(id)
		if errors.Is(err, layerfs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			bad = append(bad, layerfs.Problem{ID: id, Reason: err.Error()})
			rec = &Record{ID: id, Incomplete: err.Error()}
		}
		recs[id] = rec
	}
	return recs, bad, nil
}

// inOrder sorts parents before children and otherwise by id.
func inOrder(recs map[string]*Record) []*Record {
	depths := make(map[string]int, len(recs))
	var depth func(id string, seen int) int
	depth = func(id string, seen int) int {
		rec := recs[id]
		if rec == nil || seen > len(recs) { // a missing parent, or a cycle
			return 0
		}
		if n, ok := depths[id]; ok {
			return n
		}
		n := 1 + depth(rec.Parent, seen+1)
		depths[id] = n
		return n
	}
	out := make([]*Record, 0, len(recs))
	for id, r := range recs {
		depth(id, 0)
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *Record) int {
		return cmp.Or(cmp.Compare(depths[a.ID], depths[b.ID]), cmp.Compare(a.ID, b.ID))
	})
	return out
}
