package transfer

import (
	"context"
	"errors"
	"iter"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
)

// Compare yields what differs in the merged tree of layer bID of b from that
// of layer aID of a, by a walk through both that looks at everything. Both
// are held meanwhile, read-only where the driver can.
func Compare(ctx context.Context, a, b layerfs.Driver, aID, bID string) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		if err := compare(ctx, a, b, aID, bID, yield); err != nil {
			yield(layerfs.Change{}, err)
		}
	}
}

func compare(ctx context.Context, a, b layerfs.Driver, aID, bID string, yield func(layerfs.Change, error) bool) (err error) {
	pathA, err := a.Get(ctx, aID, view(a))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Put(context.WithoutCancel(ctx), aID)) }()
	pathB, err := b.Get(ctx, bID, view(b))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Put(context.WithoutCancel(ctx), bID)) }()
	for c, err := range archive.Compare(ctx, pathA, pathB, nil) {
		if err != nil {
			return err
		}
		if !yield(c, nil) {
			return nil
		}
	}
	return nil
}

// view asks for a read-only tree where there is one.
func view(d layerfs.Driver) *layerfs.GetOptions {
	return &layerfs.GetOptions{ReadOnly: d.Features().ReadOnlyViews}
}
