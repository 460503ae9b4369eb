package lifecycle

import (
	"context"

	"github.com/layerfs/layerfs"
)

// Between holds a layer as Changes does, finds base among its ancestors, and
// calls a function with the chain and the base's place in it (len of the chain
// for the empty base). It is for what a backend reads besides Changes and
// Diff, such as the BlockDiffer.
func Between(ctx context.Context, d *Driver, op, id, base string, read func(chain Chain, at int) error) (err error) {
	defer d.wrap(op, id, &err)
	chain, at, unpin, err := d.between(ctx, id, base)
	if err != nil {
		return err
	}
	defer unpin()
	return read(chain, at)
}

// Import makes a layer on a parent like Create, with storage made by a function
// in place of Mechanism.Create. It is for streams of a backend's own format.
func Import(ctx context.Context, d *Driver, op, id, parent string, opts *layerfs.CreateOptions, build func(rec *Record, parent Chain) error) (err error) {
	defer d.wrap(op, id, &err)
	if opts == nil {
		opts = new(layerfs.CreateOptions)
	}
	return create(ctx, d, id, parent, opts, build)
}
