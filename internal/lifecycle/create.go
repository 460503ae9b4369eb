package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/undo"
)

// Create adds a layer.
func (d *Driver) Create(ctx context.Context, id, parent string, opts *layerfs.CreateOptions) (err error) {
	defer d.wrap("create", id, &err)
	if opts == nil {
		opts = new(layerfs.CreateOptions)
	}
	return create(ctx, d, id, parent, opts, func(rec *Record, chain Chain) error {
		if err := d.m.Create(ctx, rec, chain, opts); err != nil {
			return err
		}
		if parent != "" {
			rec.Copied = d.dir.Now()
		}
		return nil
	})
}

// Clone makes a layer whose storage is made by a function, with the same
// commit points as Create. It is for the Cloner of a backend.
func Clone(ctx context.Context, d *Driver, id, from string, opts *layerfs.CreateOptions, build func(rec *Record, from Chain, opts *layerfs.CreateOptions) error) (err error) {
	defer d.wrap("clone", id, &err)
	if opts == nil {
		opts = new(layerfs.CreateOptions)
	}
	chain, unpin, err := d.pin(ctx, from, true)
	if err != nil {
		return err
	}
	defer unpin()
	src := chain.Layer()
	return create(ctx, d, id, src.Parent, opts, func(rec *Record, _ Chain) error {
		if rec.Quota == (layerfs.Quota{}) {
			rec.Quota = src.Quota
		}
		if rec.MountLabel == "" {
			rec.MountLabel = src.MountLabel
		}
		return build(rec, chain, opts)
	})
}

func create(ctx context.Context, d *Driver, id, parent string, opts *layerfs.CreateOptions, build func(*Record, Chain) error) (err error) {
	if opts.Quota.Bytes < 0 || opts.Quota.Inodes < 0 {
		return fmt.Errorf("quota of %d bytes and %d inodes: negative", opts.Quota.Bytes, opts.Quota.Inodes)
	}
	var chain Chain
	var u undo.Stack
	defer u.Run(&err)
	// The child's lock is held to the end, the parent's only until the parent
	// is frozen: a copy of a large parent must not keep others from it. Taking
	// both at once, in sorted order, excludes a deadlock.
	unlock, unlockParent, err := d.lockPair(ctx, id, parent)
	if err != nil {
		return err
	}
	defer unlock()
	defer unlockParent()
	if err := d.vacant(ctx, id); err != nil {
		return err
	}
	if parent != "" {
		if chain, err = d.freeze(id, parent); err != nil {
			return err
		}
	}
	unlockParent()
	rec := &Record{
		ID: id, Parent: parent, Created: time.Now().UTC(), ReadOnly: opts.ReadOnly,
		Labels: opts.Labels, MountLabel: opts.MountLabel, Quota: opts.Quota,
	}
	if err := build(rec, chain); err != nil {
		return err
	}
	gone := true
	u.Push(func() error {
		if !gone {
			return nil // a crash may bring the record back
		}
		return d.m.Delete(context.WithoutCancel(ctx), rec)
	})
	if d.opts.Durability == layerfs.DurabilityFull {
		if err := d.m.Sync(ctx, rec); err != nil {
			return err
		}
	}
	if err := d.dir.Add(rec); err != nil {
		// It may have got its name and failed to be synced.
		u.Push(func() error {
			err := d.dir.Drop(&Record{ID: id}, false)
			gone = err == nil
			return err
		})
		return err
	}
	return nil
}

// lockPair locks a layer and its parent, if it has one; each is unlocked on
// its own.
func (d *Driver) lockPair(ctx context.Context, id, parent string) (unlock, unlockParent func(), err error) {
	first, second := id, parent
	if parent == "" {
		unlock, err := d.lock(ctx, id)
		return unlock, func() {}, err
	}
	if id == parent {
		if err := layerfs.CheckID(id); err != nil {
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("parent of %s is itself: %w", id, layerfs.ErrNotExist)
	}
	if second < first {
		first, second = second, first
	}
	a, err := d.lock(ctx, first)
	if err != nil {
		return nil, nil, err
	}
	b, err := d.lock(ctx, second)
	if err != nil {
		a()
		return nil, nil, err
	}
	if first == id {
		return a, b, nil
	}
	return b, a, nil
}

// vacant makes sure that an id is free, finishing a removal that crashed.
func (d *Driver) vacant(ctx context.Context, id string) error {
	switch _, err := d.dir.Load(id); {
	case err == nil:
		return layerfs.ErrExist
	case err != layerfs.ErrNotExist: //nolint:errorlint // Load returns it bare; anything else is a record that cannot be read
		return fmt.Errorf("%w: %w", layerfs.ErrExist, err)
	}
	rec, err := d.dir.LoadRemoved(id)
	if errors.Is(err, layerfs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("an earlier layer of this id is being removed: %w", err)
	}
	return d.finishRemove(ctx, rec, everything())
}

// freeze notes a child of a parent whose lock is held.
func (d *Driver) freeze(id, parent string) (Chain, error) {
	chain, err := d.chain(parent)
	if err != nil {
		return nil, fmt.Errorf("parent %s: %w", parent, err)
	}
	if most := d.m.Features().MaxDepth; most > 0 && len(chain)+1 > most {
		return nil, fmt.Errorf("stack of %d layers on parent %s: %w", len(chain)+1, parent, &layerfs.UnsupportedError{
			Feature: fmt.Sprintf("a stack of more than %d layers", most),
		})
	}
	if lb, ok := d.m.(LiveBaser); !ok || !lb.LiveBase() {
		writable, err := d.heldWritable(parent)
		if err != nil {
			return nil, err
		}
		if writable {
			return nil, fmt.Errorf("parent %s is held for writing: %w", parent, layerfs.ErrInUse)
		}
	}
	return chain, d.dir.AddChild(parent, id)
}

// heldWritable reports whether anybody can write a layer now.
func (d *Driver) heldWritable(id string) (bool, error) {
	d.mu.Lock()
	h := d.held[id]
	d.mu.Unlock()
	if h != nil && h.gets > 0 && !h.readOnly {
		return true, nil
	}
	p, err := d.dir.Persistent(id)
	if err != nil {
		return false, err
	}
	if p.Count > 0 && !p.ReadOnly {
		return true, nil
	}
	o, err := d.dir.Others(id)
	return o.Writable, err
}

// holder names who holds a layer, for the text of an error.
func (d *Driver) holder(id string, h *hold) (held bool, who string, p layerdir.Persistent, err error) {
	if h.gets > 0 || h.pins > 0 {
		return true, "this driver", p, nil
	}
	p, err = d.dir.Persistent(id)
	if err != nil {
		return false, "", p, err
	}
	if p.Count > 0 {
		return true, "a persistent get", p, nil
	}
	o, err := d.dir.Others(id)
	return o.Any(), "another driver or process", p, err
}

// unheld makes sure that a layer, whose lock is held, is not held by a Get or a
// reader. It returns what is noted of its persistent gets.
func (d *Driver) unheld(rec *Record) (layerdir.Persistent, error) {
	held, who, p, err := d.holder(rec.ID, d.holdOf(rec.ID))
	d.drop(rec.ID)
	if err != nil {
		return p, err
	}
	if held {
		return p, fmt.Errorf("held by %s: %w", who, layerfs.ErrInUse)
	}
	return p, nil
}

// unmountStale unmounts a layer that nobody holds: its process died. Then nobody
// uses it any more.
func (d *Driver) unmountStale(ctx context.Context, rec *Record) error {
	st, err := d.m.State(rec.ID)
	if err != nil {
		return err
	}
	if st.Mounted {
		if err := d.m.Unmount(ctx, rec); err != nil {
			return err
		}
		if err := d.dir.SetPersistent(rec.ID, layerdir.Persistent{}); err != nil {
			return err
		}
	}
	if r, ok := d.m.(Releaser); ok {
		return r.Released(ctx, rec.ID)
	}
	return nil
}
