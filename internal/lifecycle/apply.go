package lifecycle

import (
	"context"
	"fmt"
	"io"

	"github.com/layerfs/layerfs"
)

// Apply adds a tar stream to a layer.
func (d *Driver) Apply(ctx context.Context, id string, r io.Reader, opts *layerfs.ApplyOptions) (res layerfs.ApplyResult, err error) {
	defer d.wrap("apply", id, &err)
	if opts == nil {
		opts = new(layerfs.ApplyOptions)
	}
	err = d.change(ctx, id, "apply", func(chain Chain, touch func() error) error {
		res, err = d.m.Apply(ctx, chain, r, opts, touch)
		return err
	})
	return res, err
}

// change runs something that changes the content of a layer that is neither
// held nor frozen, with the commit points of Apply.
func (d *Driver) change(ctx context.Context, id, what string, run func(chain Chain, touch func() error) error) error {
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	chain, err := d.chain(id)
	if err != nil {
		return err
	}
	rec := chain.Layer()
	if err := d.writable(rec); err != nil {
		return err
	}
	if _, err := d.unheld(rec); err != nil {
		return err
	}
	if err := d.unmountStale(ctx, rec); err != nil {
		return err
	}
	touched := false
	touch := func() error {
		if touched {
			return nil
		}
		touched = true
		mark := rec.Clone()
		mark.Incomplete = what + " did not finish"
		return d.dir.Save(mark)
	}
	if err := run(chain, touch); err != nil {
		return err
	}
	if d.opts.Durability == layerfs.DurabilityFull {
		if err := d.m.Sync(ctx, rec); err != nil {
			return err
		}
	}
	if !touched && !rec.ReadOnly {
		return nil
	}
	done := rec.Clone()
	done.Sealed = rec.ReadOnly
	return d.dir.Save(done)
}

// writable makes sure that a layer whose lock is held is not frozen. A layer
// created read-only takes one Apply, which fills it.
func (d *Driver) writable(rec *Record) error {
	if rec.ReadOnly && rec.Sealed {
		return fmt.Errorf("created read-only and filled: %w", layerfs.ErrReadOnly)
	}
	if lb, ok := d.m.(LiveBaser); ok && lb.LiveBase() && !rec.ReadOnly {
		return nil
	}
	has, err := d.dir.HasChildren(rec.ID)
	if err != nil {
		return err
	}
	if has {
		return fmt.Errorf("it has children: %w", layerfs.ErrReadOnly)
	}
	return nil
}

// Rollback sets a layer back to its state at creation by a function that gets
// the chain. It is for the Rollbacker of a backend.
func Rollback(ctx context.Context, d *Driver, id string, reset func(Chain) error) (err error) {
	defer d.wrap("rollback", id, &err)
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	rec, err := d.dir.Load(id)
	if err != nil {
		return err
	}
	chain := Chain{rec}
	if rec.Parent != "" {
		below, err := d.chain(rec.Parent)
		if err != nil {
			return fmt.Errorf("parent %s: %w", rec.Parent, err)
		}
		chain = append(chain, below...)
	}
	has, err := d.dir.HasChildren(id)
	if err != nil {
		return err
	}
	if has {
		return fmt.Errorf("it has children: %w", layerfs.ErrReadOnly)
	}
	if _, err := d.unheld(rec); err != nil {
		return err
	}
	if err := d.unmountStale(ctx, rec); err != nil {
		return err
	}
	mark := rec.Clone()
	mark.Incomplete = "rollback did not finish"
	if err := d.dir.Save(mark); err != nil {
		return err
	}
	if err := reset(chain); err != nil {
		return err
	}
	done := rec.Clone()
	done.Incomplete, done.Sealed = "", false
	return d.dir.Save(done)
}

// Update changes the record of a layer by a function, under its lock. It is
// for SetQuota and SetLabels; the function gets the chain and a copy to change.
func Update(ctx context.Context, d *Driver, op, id string, change func(Chain, *Record) error) (err error) {
	defer d.wrap(op, id, &err)
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	rec, err := d.dir.Load(id)
	if err != nil {
		return err
	}
	c := rec.Clone()
	if err := change(Chain{rec}, c); err != nil {
		return err
	}
	return d.dir.Save(c)
}

// SetLabels replaces all labels of a layer.
func (d *Driver) SetLabels(ctx context.Context, id string, labels map[string]string) error {
	return Update(ctx, d, "set labels", id, func(_ Chain, rec *Record) error {
		rec.Labels = labels
		return nil
	})
}
