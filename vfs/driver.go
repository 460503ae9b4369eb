package vfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// Name is what [Driver.Name] returns.
const Name = "vfs"

// frame is a name of its own so that the embedded field is not exported.
type frame = lifecycle.Driver

// Driver keeps layers as full copies. It is safe for concurrent use.
type Driver struct {
	*frame
	m *mechanism
}

var (
	_ layerfs.Driver      = (*Driver)(nil)
	_ layerfs.Mounter     = (*Driver)(nil)
	_ layerfs.QuotaSetter = (*Driver)(nil)
	_ layerfs.LabelSetter = (*Driver)(nil)
	_ layerfs.Rollbacker  = (*Driver)(nil)
	_ layerfs.Cloner      = (*Driver)(nil)
	_ layerfs.Checker     = (*Driver)(nil)
	_ layerfs.Repairer    = (*Driver)(nil)
)

// New opens the layers below root/vfs, which is made if it is new. opts may be
// nil. What a crash left is mended; [Driver.Recovered] tells what that was.
//
// The error matches errors.ErrUnsupported if opts asks for what the file
// system of root lacks.
func New(root string, opts *Options) (*Driver, error) {
	d, err := open(root, opts)
	if err != nil {
		if _, ok := errors.AsType[*layerfs.Error](err); !ok {
			err = &layerfs.Error{Op: "open", Driver: Name, Path: root, Err: err}
		}
		return nil, err
	}
	return d, nil
}

func open(root string, opts *Options) (_ *Driver, err error) {
	if opts == nil {
		opts = &Options{}
	}
	if err := opts.validate(); err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, err
	}
	home := filepath.Join(root, Name)
	common := lifecycle.Options{Durability: opts.Durability, Logger: opts.Logger}
	records, err := lifecycle.Open(home, common)
	if err != nil {
		return nil, err
	}
	m, err := newMechanism(home, records, opts)
	if err != nil {
		return nil, errors.Join(err, records.Close())
	}
	f, err := lifecycle.New(context.Background(), home, records, m, common)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return &Driver{frame: f, m: m}, nil
}

// Mounts holds a layer and returns the bind mount that shows it. It cannot say
// how to map owners.
func (d *Driver) Mounts(ctx context.Context, id string, opts *layerfs.GetOptions) ([]layerfs.Mount, error) {
	var m layerfs.Mount
	err := lifecycle.Plan(ctx, d.frame, id, opts, func(_ context.Context, c lifecycle.Chain, mode lifecycle.Mode) error {
		if mode.IDMap != nil {
			return &layerfs.UnsupportedError{Feature: "a bind mount with mapped owners", Reason: "fstab has no option for it"}
		}
		path := d.m.Path(c.Layer().ID)
		m = layerfs.Mount{Type: "bind", Source: path, Options: []string{"bind", "rw"}}
		if mode.ReadOnly {
			m.Options[1] = "ro"
		}
		_, err := os.Lstat(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return []layerfs.Mount{m}, nil
}

// Rollback copies the parent again. The layer is gone meanwhile: if it fails,
// the layer is incomplete, and Rollback can be tried again.
func (d *Driver) Rollback(ctx context.Context, id string) error {
	return lifecycle.Rollback(ctx, d.frame, id, func(c lifecycle.Chain) error {
		rec := c.Layer()
		// First, because a quota would count both.
		if err := d.m.remove(rec.ID); err != nil {
			return err
		}
		return d.m.build(ctx, rec, c[1:], nil)
	})
}

// Clone copies a layer.
func (d *Driver) Clone(ctx context.Context, id, from string, opts *layerfs.CreateOptions) error {
	return lifecycle.Clone(ctx, d.frame, id, from, opts, func(rec *lifecycle.Record, from lifecycle.Chain, opts *layerfs.CreateOptions) error {
		return d.m.Create(ctx, rec, from, opts)
	})
}

// SetQuota limits a layer by a project quota of ext4, xfs or f2fs: what the
// whole copy takes. The cost grows with the number of files if the layer had
// no limit before; it must not be held for writing then.
//
// ext4 does not stop processes with CAP_SYS_RESOURCE, which containers usually
// lack and root has; xfs stops everybody.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(c lifecycle.Chain, rec *lifecycle.Record) error {
		if q.Bytes < 0 || q.Inodes < 0 {
			return fmt.Errorf("quota of %d bytes and %d inodes: negative", q.Bytes, q.Inodes)
		}
		rec.Quota = q
		return d.m.setQuota(ctx, d.m.Path(rec.ID), q)
	})
}

// syncDir makes the names in a directory durable, where a directory can be
// opened.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && canSyncDir {
		return err
	}
	return nil
}
