package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/undo"
)

// Get makes the merged tree of a layer available.
func (d *Driver) Get(ctx context.Context, id string, opts *layerfs.GetOptions) (path string, err error) {
	defer d.wrap("get", id, &err)
	if opts == nil {
		opts = new(layerfs.GetOptions)
	}
	err = d.get(ctx, id, opts, nil)
	if err != nil {
		return "", err
	}
	return d.m.Path(id), nil
}

// Plan holds a layer as Get does, but calls plan each time instead of mounting
// it. It is for the Mounter of a backend. A layer is held by Get or by Plan, not
// both: two mounts of one writable layer are not one file system.
func Plan(ctx context.Context, d *Driver, id string, opts *layerfs.GetOptions, plan func(context.Context, Chain, Mode) error) (err error) {
	defer d.wrap("mounts", id, &err)
	if opts == nil {
		opts = new(layerfs.GetOptions)
	}
	return d.get(ctx, id, opts, plan)
}

func (d *Driver) get(ctx context.Context, id string, opts *layerfs.GetOptions, plan func(context.Context, Chain, Mode) error) (err error) {
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	chain, err := d.chain(id)
	if err != nil {
		return err
	}
	mode, err := d.mode(chain.Layer(), opts)
	if err != nil {
		return err
	}
	h := d.holdOf(id)
	defer d.drop(id)
	p, err := d.dir.Persistent(id)
	if err != nil {
		return err
	}
	others, err := d.dir.Others(id)
	if err != nil {
		return err
	}
	if err := compatible(h, p, others, mode, plan != nil); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	switch {
	case plan != nil:
		if opts.Persist {
			return fmt.Errorf("a mount that the caller makes cannot persist: %w", errors.ErrUnsupported)
		}
		if err := d.unmountStale(ctx, chain.Layer()); err != nil {
			return err
		}
		if err := plan(ctx, chain, mode); err != nil {
			return err
		}
	case h.gets == 0 || d.mortal():
		held := h.gets > 0 || p.Count > 0 || others.Got()
		if err := d.mount(ctx, chain, mode, held, p.Mapped, &u); err != nil {
			return err
		}
		if mapped := mode.IDMap != nil; mapped != p.Mapped {
			p.Mapped = mapped
			if err := d.dir.SetPersistent(id, p); err != nil {
				return err
			}
		}
	}
	if opts.Persist {
		p.Count++
		p.ReadOnly = mode.ReadOnly
		return d.dir.SetPersistent(id, p)
	}
	if h.gets == 0 {
		if err := d.dir.Hold(id, holdKind(mode.ReadOnly)); err != nil {
			return err
		}
		if plan != nil {
			if err := d.dir.Hold(id, layerdir.HeldPlanned); err != nil {
				d.dir.Release(id, holdKind(mode.ReadOnly))
				return err
			}
		}
		h.rec, h.readOnly, h.idMap, h.planned = chain.Layer(), mode.ReadOnly, mode.IDMap, plan != nil
	}
	d.setGets(h, h.gets+1)
	return nil
}

// mode decides how a layer is mounted.
func (d *Driver) mode(rec *Record, opts *layerfs.GetOptions) (Mode, error) {
	frozen := rec.ReadOnly
	if !frozen {
		has, err := d.dir.HasChildren(rec.ID)
		if err != nil {
			return Mode{}, err
		}
		frozen = has
	}
	if lb, ok := d.m.(LiveBaser); ok && lb.LiveBase() && !rec.ReadOnly {
		frozen = false
	}
	f := d.m.Features()
	if opts.ReadOnly && !f.ReadOnlyViews {
		return Mode{}, &layerfs.UnsupportedError{Feature: "a read-only tree", Reason: f.Reasons["ReadOnlyViews"]}
	}
	if opts.IDMap != nil && !f.IDMap {
		return Mode{}, &layerfs.UnsupportedError{Feature: "mapping of owners", Reason: f.Reasons["IDMap"]}
	}
	return Mode{ReadOnly: frozen || opts.ReadOnly, IDMap: opts.IDMap}, nil
}

// compatible reports why a layer cannot be mounted in another mode than it is.
func compatible(h *hold, p layerdir.Persistent, o layerdir.Others, mode Mode, planned bool) error {
	inUse := func(how string) error { return fmt.Errorf("held %s: %w", how, layerfs.ErrInUse) }
	switch {
	case h.gets > 0 && h.readOnly != mode.ReadOnly:
		return inUse(access(h.readOnly))
	case h.gets > 0 && !reflect.DeepEqual(h.idMap, mode.IDMap):
		return inUse("with other owners")
	case h.gets > 0 && h.planned != planned, h.gets == 0 && o.Got() && o.Planned != planned, p.Count > 0 && planned:
		return inUse("by " + map[bool]string{true: "Get, and Mounts was called", false: "Mounts, and Get was called"}[planned])
	case h.gets > 0:
		return nil
	case p.Count > 0 && p.ReadOnly != mode.ReadOnly:
		return inUse(access(p.ReadOnly) + " by a persistent get")
	case o.Writable && mode.ReadOnly, o.ReadOnly && !mode.ReadOnly:
		return inUse(access(o.ReadOnly) + " by another driver or process")
	case (p.Count > 0 || o.Got()) && (p.Mapped || mode.IDMap != nil):
		// Which owners the other one sees cannot be told.
		return inUse("with other owners by another driver or process")
	}
	return nil
}

func access(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "for writing"
}

func holdKind(readOnly bool) layerdir.Hold {
	if readOnly {
		return layerdir.HeldReadOnly
	}
	return layerdir.HeldWritable
}

// mount makes the tree available unless it is. A mount that nobody holds was
// left by a process that died: it is used again if it is what is wanted, since
// two mounts of one writable layer are not the same file system.
func (d *Driver) mount(ctx context.Context, chain Chain, mode Mode, held, mapped bool, u *undo.Stack) error {
	rec := chain.Layer()
	st, err := d.m.State(rec.ID)
	if err != nil {
		return err
	}
	if st.Mounted {
		if held || st.ReadOnly == mode.ReadOnly && !mapped && mode.IDMap == nil {
			return nil
		}
		if err := d.m.Unmount(ctx, rec); err != nil {
			return err
		}
	}
	if err := d.m.Mount(ctx, chain, mode); err != nil {
		return err
	}
	u.Push(func() error { return d.m.Unmount(context.WithoutCancel(ctx), rec) })
	return nil
}

// mortal reports whether what is mounted may have ended by itself.
func (d *Driver) mortal() bool {
	m, ok := d.m.(Mortal)
	return ok && m.Mortal()
}

// Put releases one Get.
func (d *Driver) Put(ctx context.Context, id string) (err error) {
	defer d.wrap("put", id, &err)
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	h := d.holdOf(id)
	defer d.drop(id)
	rec := h.rec // what is held cannot have been removed
	if h.gets == 0 {
		if rec, err = d.dir.Load(id); err != nil {
			return err
		}
	}
	p, err := d.dir.Persistent(id)
	if err != nil {
		return err
	}
	switch {
	case h.gets > 1:
		d.setGets(h, h.gets-1)
		return nil
	case h.gets == 0 && p.Count == 0:
		return layerfs.ErrNotHeld
	case h.gets == 0:
		p.Count--
	}
	others, err := d.dir.Others(id)
	if err != nil {
		return err
	}
	if p.Count == 0 && !others.Got() {
		if err := d.m.Unmount(ctx, rec); err != nil {
			return err
		}
		p.Mapped = false
	}
	if h.gets == 1 {
		d.setGets(h, 0)
		d.dir.Release(id, holdKind(h.readOnly))
		if h.planned {
			d.dir.Release(id, layerdir.HeldPlanned)
		}
		if !p.Mapped && h.idMap == nil {
			return nil
		}
	}
	return d.dir.SetPersistent(id, p)
}

// pin keeps a layer from being removed or applied to until unpin, and returns
// its chain. With still set it fails if the layer is held for writing.
func (d *Driver) pin(ctx context.Context, id string, still bool) (_ Chain, unpin func(), err error) {
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	chain, err := d.chain(id)
	if err != nil {
		return nil, nil, err
	}
	if still {
		writable, err := d.heldWritable(id)
		if err != nil {
			return nil, nil, err
		}
		if writable {
			return nil, nil, fmt.Errorf("%s is held for writing: %w", id, layerfs.ErrInUse)
		}
	}
	h := d.holdOf(id)
	defer d.drop(id)
	if h.pins == 0 {
		if err := d.dir.Hold(id, layerdir.HeldPinned); err != nil {
			return nil, nil, err
		}
	}
	h.pins++
	return chain, func() { d.unpin(id) }, nil
}

// unpin waits for the layer's lock whatever the caller's context says: the
// lock is held briefly by all but Apply and Remove, which a pin excludes.
func (d *Driver) unpin(id string) {
	unlock, err := d.dir.Lock(context.Background(), id)
	if err != nil {
		d.opts.Logger.Error("unpin", "driver", d.m.Name(), "layer", id, "error", err)
		return
	}
	defer unlock()
	h := d.holdOf(id)
	defer d.drop(id)
	if h.pins--; h.pins == 0 {
		d.dir.Release(id, layerdir.HeldPinned)
	}
}
