package aufs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/union"
)

// AddBranch puts a directory into the union of a layer that is mounted, at an
// index, 0 being above the layer's own branch; -1 is below all others. What is
// looked up from then on shows it, open files stay what they are.
//
// The branch belongs to the mount, not to the layer: it is gone after the last
// Put, and neither Diff nor Changes see it. The error matches
// [layerfs.ErrNotHeld] if the layer is not mounted, [errors.ErrUnsupported] for
// a base layer, which is no union, and if another driver or process serves it,
// EINVAL for a directory that is a branch already or contains one, and EDOM for
// an index out of range.
func (d *Driver) AddBranch(ctx context.Context, id string, b union.Branch, at int) error {
	v := verb{op: "add", at: at, Branch: b}
	if at < 0 {
		v.op = "append"
	}
	return d.alter(ctx, "add branch", id, v)
}

// DeleteBranch takes a directory that AddBranch added out of the union again.
// Its files stay. The error matches EBUSY while a file of it is open through
// the mount; see also [Driver.AddBranch].
func (d *Driver) DeleteBranch(ctx context.Context, id, path string) error {
	return d.alter(ctx, "delete branch", id, verb{op: "del", Branch: union.Branch{Path: path}})
}

// SetBranchMode changes what a branch that AddBranch added may be used for. The
// error matches EBUSY if it is to become read-only while a file of it is open
// for writing; see also [Driver.AddBranch].
func (d *Driver) SetBranchMode(ctx context.Context, id, path string, perm union.Perm) error {
	return d.alter(ctx, "set branch mode", id, verb{op: "mod", Branch: union.Branch{Path: path, Perm: perm}})
}

// alter changes the branches of a mounted layer under its lock.
func (d *Driver) alter(ctx context.Context, op, id string, v verb) error {
	return lifecycle.Update(ctx, d.frame, op, id, func(lifecycle.Chain, *lifecycle.Record) error {
		chain, err := d.m.chain(id)
		if err != nil {
			return err
		}
		if len(chain) == 1 {
			return &layerfs.UnsupportedError{Feature: "changing the branches of a base layer", Reason: "it is a bind mount"}
		}
		if v.Path, err = filepath.Abs(v.Path); err != nil {
			return err
		}
		if err := checkPerm(v.Perm); err != nil {
			return err
		}
		if v.op != "add" && v.op != "append" {
			for _, r := range chain {
				if v.Path == d.m.branch(r.ID) {
					return &layerfs.UnsupportedError{Feature: op, Reason: "the branch is that of layer " + r.ID}
				}
			}
		}
		mounted, err := mount.IsMountPoint(d.m.Path(id))
		if err != nil {
			return err
		}
		if !mounted {
			return fmt.Errorf("it is not mounted: %w", layerfs.ErrNotHeld)
		}
		return d.m.engine.alter(ctx, d.m.Path(id), v)
	})
}

// checkPerm refuses what AUFS would silently take for ro.
func checkPerm(p union.Perm) error {
	switch p {
	case "", union.RW, union.RO, union.ROWH, union.RR:
		return nil
	}
	return fmt.Errorf("branch permission %q is unknown", string(p))
}

// Branches returns the branches of a mounted layer, top first. The error matches
// [errors.ErrUnsupported] where AddBranch's does.
func (d *Driver) Branches(ctx context.Context, id string) (branches []union.Branch, err error) {
	fail := func(err error) ([]union.Branch, error) {
		return nil, &layerfs.Error{Op: "branches", Driver: name, ID: id, Err: err}
	}
	if err := layerfs.CheckID(id); err != nil {
		return fail(err)
	}
	rec, err := d.m.dir.Load(id)
	if err != nil {
		return fail(err)
	}
	if rec.Parent == "" {
		return fail(&layerfs.UnsupportedError{Feature: "the branches of a base layer", Reason: "it is a bind mount"})
	}
	if err := context.Cause(ctx); err != nil {
		return fail(err)
	}
	branches, err = d.m.engine.branches(d.m.Path(id))
	if errors.Is(err, mount.ErrNotMounted) {
		err = fmt.Errorf("it is not mounted: %w", layerfs.ErrNotHeld)
	}
	if err != nil {
		return fail(err)
	}
	return branches, nil
}

// SyncBranches returns when every change that was made directly on a branch
// before the call shows in the mounted layer. With the kernel's AUFS and
// [union.Notify] a change always does at the next access; then it does nothing.
func (d *Driver) SyncBranches(ctx context.Context, id string) error {
	err := layerfs.CheckID(id)
	if err == nil {
		err = d.m.engine.sync(ctx, d.m.Path(id))
	}
	if err != nil {
		return &layerfs.Error{Op: "sync branches", Driver: name, ID: id, Err: err}
	}
	return nil
}
