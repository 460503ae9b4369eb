package devmapper

import (
	"context"
	"errors"
	"os"
	"sync"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

var _ layerfs.Mounter = (*Driver)(nil)

// plans are the layers that callers of Mounts mount themselves. Each has a mount
// of this driver's that is nowhere: it keeps the device active until the caller
// has mounted it, and the file system as the options say, since a device has
// one file system however often it is mounted.
type plans struct {
	mu  sync.Mutex
	ids map[string]*plan // guarded by mu
}

type plan struct {
	tree   *os.File
	mounts []layerfs.Mount
	count  int
}

// again counts one more call for a layer that has a plan.
func (p *plans) again(id string) ([]layerfs.Mount, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	have, ok := p.ids[id]
	if !ok {
		return nil, false
	}
	have.count++
	return have.mounts, true
}

func (p *plans) add(id string, fresh *plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ids == nil {
		p.ids = make(map[string]*plan)
	}
	p.ids[id] = fresh
}

// done ends one call, if there is any, and gives the device up with the last.
func (p *plans) done(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	have, ok := p.ids[id]
	if !ok {
		return nil
	}
	if have.count--; have.count > 0 {
		return nil
	}
	delete(p.ids, id)
	return have.tree.Close()
}

// last reports whether the next done is the last.
func (p *plans) last(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	have, ok := p.ids[id]
	return ok && have.count == 1
}

func (p *plans) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, have := range p.ids {
		errs = append(errs, have.tree.Close())
	}
	p.ids = nil
	return errors.Join(errs...)
}

// Mounts makes the layer's device active and returns how to mount it. The source
// is a path in the driver's mount namespace. The device stays active until the
// caller's mount is gone and Put was called, or the driver was closed, or its
// process died.
//
// A layer that can be written cannot be had read-only: the kernel has one file
// system for a device, and does not mount it read-only as long as the driver, in
// Changes for instance, may have it writable. Such a mount can be made read-only
// with MS_BIND|MS_REMOUNT|MS_RDONLY.
func (d *Driver) Mounts(ctx context.Context, id string, opts *layerfs.GetOptions) (mounts []layerfs.Mount, err error) {
	planned := false
	err = lifecycle.Plan(ctx, d.frame, id, opts, func(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
		if mode.IDMap != nil {
			return &layerfs.UnsupportedError{Feature: "mapping of owners without mounting", Reason: "mount(2) has no option for it"}
		}
		frozen, err := d.m.frozen(chain.Layer())
		if err != nil {
			return err
		}
		if mode.ReadOnly && !frozen {
			return &layerfs.UnsupportedError{Feature: "a read-only mount by the caller", Reason: "the layer can be written, and its device has one file system"}
		}
		if mounts, planned = d.plans.again(id); planned {
			return nil
		}
		p, err := d.m.planMount(ctx, chain.Layer(), mode.ReadOnly)
		if err != nil {
			return err
		}
		d.plans.add(id, p)
		mounts, planned = p.mounts, true
		return nil
	})
	if err != nil && planned {
		err = errors.Join(err, d.plans.done(id))
	}
	return mounts, err
}

// planMount mounts a layer, whose lock the caller has, nowhere, and says how to
// mount it again.
func (m *mechanism) planMount(ctx context.Context, rec *lifecycle.Record, readOnly bool) (_ *plan, err error) {
	tree, err := m.open(ctx, rec, readOnly)
	if err != nil {
		return nil, err
	}
	name := m.deviceName(rec.ID, false)
	defer func() {
		if err != nil {
			err = errors.Join(err, tree.Close(), m.drop(context.WithoutCancel(ctx), name))
		}
	}()
	info, err := m.ctl.Info(name)
	if err != nil {
		return nil, err
	}
	path, err := m.nodes.Path(info.Device)
	if err != nil {
		return nil, err
	}
	options := []string{"rw"}
	if readOnly {
		options[0] = "ro"
	}
	switch m.opts.FS {
	case "xfs":
		options = append(options, "nouuid")
	case "ext4":
		options = append(options, "noinit_itable")
	}
	options = append(options, m.opts.MountOptions...)
	if rec.MountLabel != "" {
		options = append(options, "context="+rec.MountLabel)
	}
	return &plan{tree, []layerfs.Mount{{Type: m.opts.FS, Source: path, Options: options}}, 1}, nil
}

// Put releases a Get or a call of Mounts; see [layerfs.Driver].
func (d *Driver) Put(ctx context.Context, id string) error {
	last := d.plans.last(id)
	if last { // first, or the device would be in use by this driver
		if err := d.plans.done(id); err != nil {
			return d.fail("put", id, err)
		}
	}
	err := d.frame.Put(ctx, id)
	if err == nil && !last {
		err = d.fail("put", id, d.plans.done(id))
	}
	return err
}

// Close releases what the driver holds itself; see [layerfs.Driver]. A layer of
// Mounts that the caller has not mounted by then can no longer be mounted.
func (d *Driver) Close() error {
	return errors.Join(d.fail("close", "", d.plans.close()), d.frame.Close())
}
