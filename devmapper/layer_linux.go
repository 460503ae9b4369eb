package devmapper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// origin is what a new device is a snapshot of.
type origin struct {
	device
	name string // of its active device, if it may have one
}

// originOf returns the device of the nearest layer of a chain, or the base
// device for an empty chain.
func (m *mechanism) originOf(chain lifecycle.Chain) (origin, error) {
	if len(chain) == 0 {
		m.mu.Lock()
		defer m.mu.Unlock()
		return origin{device{ID: baseID, Size: m.state.BaseSize, FSSize: m.state.BaseSize}, ""}, nil
	}
	id := chain.Layer().ID
	d, err := m.load(id)
	if err != nil {
		return origin{}, fmt.Errorf("device of %s: %w", id, err)
	}
	return origin{d, m.deviceName(id, false)}, nil
}

// sizeFor returns the size of a layer's device with a quota.
func (m *mechanism) sizeFor(o origin, q layerfs.Quota, based bool) (int64, error) {
	if q.Inodes != 0 {
		return 0, &layerfs.UnsupportedError{Feature: "a quota of inodes", Reason: m.features.Reasons["InodeQuota"]}
	}
	size := o.Size
	if !based {
		size = max(size, m.opts.BaseSize)
	}
	if q.Bytes == 0 {
		return size, nil
	}
	if q.Bytes < size {
		return 0, fmt.Errorf("quota of %d bytes: the layer has %d already, and a file system cannot shrink", q.Bytes, size)
	}
	const unit = 4096 // a block of the file system, at most
	return (q.Bytes + unit - 1) / unit * unit, nil
}

// Create takes a snapshot of the parent.
func (m *mechanism) Create(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, _ *layerfs.CreateOptions) error {
	if in := incomingOf(ctx); in != nil {
		return m.receive(ctx, rec, parent, in)
	}
	return m.make(ctx, rec, parent, len(parent) > 0)
}

func (m *mechanism) make(ctx context.Context, rec *lifecycle.Record, from lifecycle.Chain, based bool) error {
	o, err := m.originOf(from)
	if err != nil {
		return err
	}
	size, err := m.sizeFor(o, rec.Quota, based)
	if err != nil {
		return err
	}
	if err := m.guard(); err != nil {
		return err
	}
	if err := m.reapDeferred(ctx); err != nil {
		m.opts.Logger.Warn("deferred deletion", "driver", name, "error", err)
	}
	if err := m.discard(ctx, m.devicePath(rec.ID)); err != nil { // left by a crash
		return err
	}
	_, err = m.snapshot(ctx, m.devicePath(rec.ID), o.ID, o.name, size, o.FSSize)
	return err
}

// Delete deletes the device of a layer.
func (m *mechanism) Delete(ctx context.Context, rec *lifecycle.Record) error {
	if err := os.RemoveAll(m.dir.BuildPath(rec.ID)); err != nil {
		return err
	}
	if err := m.drop(ctx, m.deviceName(rec.ID, false)); err != nil {
		return err
	}
	for _, path := range []string{m.applyPath(rec.ID), m.devicePath(rec.ID)} {
		if err := m.discard(ctx, path); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(m.Path(rec.ID)); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: m.Path(rec.ID), Err: err}
	}
	return nil
}

// Apply fills a snapshot of the layer and puts it in the layer's place.
func (m *mechanism) Apply(ctx context.Context, chain lifecycle.Chain, r io.Reader, opts *layerfs.ApplyOptions, _ func() error) (res layerfs.ApplyResult, err error) {
	if in := incomingOf(ctx); in != nil {
		return res, m.update(ctx, chain, in)
	}
	rec := chain.Layer()
	err = m.replaceDevice(ctx, rec, chain, func(dir string) error {
		res, err = archive.Apply(ctx, dir, r, &archive.ApplyOptions{ApplyOptions: *opts, Form: archive.Merged})
		return err
	})
	return res, err
}

// replaceDevice gives a layer a new device, a snapshot of another's, whose tree
// a function may fill first. Until it is done the layer is as it was.
func (m *mechanism) replaceDevice(ctx context.Context, rec *lifecycle.Record, from lifecycle.Chain, fill func(dir string) error) error {
	o, err := m.originOf(from)
	if err != nil {
		return err
	}
	old, err := m.load(rec.ID)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return m.swap(ctx, rec, from, max(o.Size, old.Size), o.FSSize, func(d device) (device, error) {
		if fill == nil {
			return d, nil
		}
		return d, m.fill(ctx, rec, d, fill)
	})
}

// swap takes a snapshot of the nearest layer of a chain, has it filled, and puts
// it in the place of a layer's device.
func (m *mechanism) swap(ctx context.Context, rec *lifecycle.Record, from lifecycle.Chain, size, fsSize int64, fill func(device) (device, error)) (err error) {
	o, err := m.originOf(from)
	if err != nil {
		return err
	}
	if err := m.guard(); err != nil {
		return err
	}
	path := m.applyPath(rec.ID)
	if err := m.discard(ctx, path); err != nil { // left by a crash
		return err
	}
	fresh, err := m.snapshot(ctx, path, o.ID, o.name, size, fsSize)
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.discard(context.WithoutCancel(ctx), path) })
	d, err := fill(fresh)
	if err != nil {
		return err
	}
	if d != fresh {
		if err := m.save(path, d); err != nil {
			return err
		}
	}
	m.step("apply: filled")
	target := m.devicePath(rec.ID)
	if _, err := os.Lstat(target); errors.Is(err, fs.ErrNotExist) {
		return m.rename(path, target)
	}
	if err := m.exchange(path, target); err != nil {
		return err
	}
	m.step("apply: swapped")
	if err := m.discard(ctx, path); err != nil { // the layer is whole; New tries again
		m.opts.Logger.Warn("delete the former device", "driver", name, "layer", rec.ID, "error", err)
	}
	return nil
}

// fill mounts a new device for a function.
func (m *mechanism) fill(ctx context.Context, rec *lifecycle.Record, d device, fill func(dir string) error) (err error) {
	dev := deviceName(m.prefix, "+apply-"+rec.ID)
	if err := m.removeDevice(ctx, dev); err != nil {
		return err
	}
	tree, err := m.openDevice(ctx, dev, d, false, false, rec.MountLabel)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, tree.Close(), m.removeDevice(context.WithoutCancel(ctx), dev))
	}()
	if err := m.tick(ctx, d); err != nil {
		return err
	}
	err = fill(procPath(tree) + "/.")
	if err == nil {
		// What the pool has no room for must be told here, and not get lost.
		err = sys.Syncfs(procPath(tree) + "/.")
	}
	return m.noSpace(err)
}

// noSpace says of an error that it comes from a pool that is full: a file system
// may have ended over it, and answer anything from then on.
func (m *mechanism) noSpace(err error) error {
	if err == nil || errors.Is(err, unix.ENOSPC) {
		return err
	}
	if st, serr := m.poolStatus(true); serr == nil && st.Mode == dm.PoolOutOfSpace {
		err = fmt.Errorf("the pool is full: %w: %w", unix.ENOSPC, err)
	}
	return err
}

// Clone takes a snapshot of a layer.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, _ *layerfs.CreateOptions) error {
		return d.m.make(ctx, rec, from, true)
	})
}

// Rollback gives a layer a new snapshot of its parent.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	return lifecycle.Rollback(ctx, d.frame, id, func(chain lifecycle.Chain) error {
		return d.m.replaceDevice(ctx, chain.Layer(), chain[1:], nil)
	})
}

// Sync makes a layer durable: its file system, the pool's metadata, and the
// files of the pool.
func (m *mechanism) Sync(ctx context.Context, rec *lifecycle.Record) error {
	if st, err := m.State(rec.ID); err != nil {
		return err
	} else if st.Mounted {
		if err := sys.Syncfs(m.Path(rec.ID)); err != nil {
			return err
		}
	}
	if _, err := m.poolStatus(false); err != nil {
		return err
	}
	if !m.opts.files() {
		return nil
	}
	for _, path := range []string{m.dataFile(), m.metadataFile()} {
		if err := sys.Fsync(path); err != nil {
			return err
		}
	}
	return nil
}
