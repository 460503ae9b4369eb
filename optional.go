package layerfs

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Each optional operation is a one-method interface. The function of the same
// verb looks through wrappers that have an Unwrap() Driver method and fails
// with an error matching [errors.ErrUnsupported] if no driver implements it.

// Mount is one mount that a caller makes itself, as fstab(5) would say it.
type Mount struct {
	Type    string // "overlay", "bind", "btrfs"
	Source  string
	Options []string // in fstab form; paths in them are escaped for mount(2)
}

// Mounter is implemented by drivers that can say how to mount a layer instead
// of mounting it, for callers with a mount namespace of their own.
type Mounter interface {
	// Mounts holds the layer like Get and returns the mounts that show it, to
	// be made one after another on the same target. Put releases it; the
	// caller unmounts before. The error matches [ErrInUse] if the layer is held
	// by Get: one writable layer must not be mounted twice. GetOptions.Persist
	// and IDMap are not supported.
	Mounts(ctx context.Context, id string, opts *GetOptions) ([]Mount, error)
}

// Mounts calls the [Mounter] of d.
func Mounts(ctx context.Context, d Driver, id string, opts *GetOptions) ([]Mount, error) {
	m, err := find[Mounter](d, "mounts", id)
	if err != nil {
		return nil, err
	}
	return m.Mounts(ctx, id, opts)
}

// QuotaSetter is implemented by drivers that can limit the size of a layer.
type QuotaSetter interface {
	// SetQuota replaces the quota of a layer; zero fields lift the limit.
	// What the layer holds already is kept even if it is more. The error
	// matches [errors.ErrUnsupported] if the file system cannot limit.
	SetQuota(ctx context.Context, id string, q Quota) error
}

// SetQuota calls the [QuotaSetter] of d.
func SetQuota(ctx context.Context, d Driver, id string, q Quota) error {
	s, err := find[QuotaSetter](d, "set quota", id)
	if err != nil {
		return err
	}
	return s.SetQuota(ctx, id, q)
}

// LabelSetter is implemented by drivers whose layers' labels can change.
type LabelSetter interface {
	// SetLabels replaces all labels of a layer.
	SetLabels(ctx context.Context, id string, labels map[string]string) error
}

// SetLabels calls the [LabelSetter] of d.
func SetLabels(ctx context.Context, d Driver, id string, labels map[string]string) error {
	s, err := find[LabelSetter](d, "set labels", id)
	if err != nil {
		return err
	}
	return s.SetLabels(ctx, id, labels)
}

// Rollbacker is implemented by drivers that can undo all changes of a layer.
type Rollbacker interface {
	// Rollback sets a layer that is neither held nor frozen back to its
	// state right after Create. It also mends an incomplete layer.
	Rollback(ctx context.Context, id string) error
}

// Rollback calls the [Rollbacker] of d.
func Rollback(ctx context.Context, d Driver, id string) error {
	r, err := find[Rollbacker](d, "rollback", id)
	if err != nil {
		return err
	}
	return r.Rollback(ctx, id)
}

// Cloner is implemented by drivers that can copy a writable layer.
type Cloner interface {
	// Clone makes layer id with the parent and the content of layer from,
	// which must not be held for writing. It has the quota and the mount label
	// of from unless opts says otherwise. All or nothing.
	Clone(ctx context.Context, id, from string, opts *CreateOptions) error
}

// Clone calls the [Cloner] of d.
func Clone(ctx context.Context, d Driver, id, from string, opts *CreateOptions) error {
	c, err := find[Cloner](d, "clone", id)
	if err != nil {
		return err
	}
	return c.Clone(ctx, id, from, opts)
}

// Problem is something [Checker] found.
type Problem struct {
	ID     string // layer, if any
	Path   string // file or device, if any
	Reason string // what is wrong
	Repair string // what Repair would do; empty if nothing but removing the layer helps
}

// Checker is implemented by drivers that can verify their root.
type Checker interface {
	// Check compares the records with what is on disk and mounted, and
	// changes nothing. A finding is a Problem; the error is for checks that
	// could not be made.
	Check(ctx context.Context) ([]Problem, error)
}

// Check calls the [Checker] of d.
func Check(ctx context.Context, d Driver) ([]Problem, error) {
	c, err := find[Checker](d, "check", "")
	if err != nil {
		return nil, err
	}
	return c.Check(ctx)
}

// Repairer is implemented by drivers that can mend their root.
type Repairer interface {
	// Repair mends what Check finds and returns what it mended. It never
	// removes a layer that is in the list.
	Repair(ctx context.Context) ([]Problem, error)
}

// Repair calls the [Repairer] of d.
func Repair(ctx context.Context, d Driver) ([]Problem, error) {
	r, err := find[Repairer](d, "repair", "")
	if err != nil {
		return nil, err
	}
	return r.Repair(ctx)
}

// BlockRange is a range of bytes that differs between two layers.
type BlockRange struct {
	Path     string // file in the layer, or empty where the layer is a block device
	Offset   int64
	Length   int64
	Unmapped bool // the range has no data in the newer layer
}

// BlockDiffer is implemented by drivers that know which blocks changed.
type BlockDiffer interface {
	// BlockDiff yields the ranges in which id differs from its ancestor base,
	// by path and offset. A range may be larger than what was written, never
	// smaller. Cost grows with the changes, not with the layer.
	BlockDiff(ctx context.Context, id, base string) iter.Seq2[BlockRange, error]
}

// BlockDiff calls the [BlockDiffer] of d.
func BlockDiff(ctx context.Context, d Driver, id, base string) iter.Seq2[BlockRange, error] {
	b, err := find[BlockDiffer](d, "block diff", id)
	if err != nil {
		return func(yield func(BlockRange, error) bool) { yield(BlockRange{}, err) }
	}
	return b.BlockDiff(ctx, id, base)
}

// Trimmer is implemented by drivers whose layers give unused blocks back only
// when told to.
type Trimmer interface {
	// Trim discards the unused blocks of a held layer and returns the bytes
	// that were discarded.
	Trim(ctx context.Context, id string) (int64, error)
}

// Trim calls the [Trimmer] of d.
func Trim(ctx context.Context, d Driver, id string) (int64, error) {
	t, err := find[Trimmer](d, "trim", id)
	if err != nil {
		return 0, err
	}
	return t.Trim(ctx, id)
}

// find looks for T in d and in what d wraps.
func find[T any](d Driver, op, id string) (T, error) {
	for inner := d; inner != nil; {
		if t, ok := inner.(T); ok {
			return t, nil
		}
		w, ok := inner.(interface{ Unwrap() Driver })
		if !ok {
			break
		}
		inner = w.Unwrap()
	}
	var none T
	return none, &Error{Op: op, Driver: d.Name(), ID: id, Err: fmt.Errorf("%w by this driver", errors.ErrUnsupported)}
}
