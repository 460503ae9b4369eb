package btrfs

import (
	"context"
	"iter"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// Native is Changes without the walk that takes over where the kernel cannot
// tell.
func Native(ctx context.Context, d *Driver, id, base string) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		err := lifecycle.Between(ctx, d.frame, "changes", id, base, func(chain lifecycle.Chain, at int) error {
			for c, err := range d.m.NativeChanges(ctx, chain, at) {
				if err != nil {
					return err
				}
				if !yield(c, nil) {
					return nil
				}
			}
			return nil
		})
		if err != nil {
			yield(layerfs.Change{}, err)
		}
	}
}

// NewNoExchange is New as on a kernel that cannot exchange subvolumes.
func NewNoExchange(root string, opts *Options) (*Driver, error) {
	return open(root, opts, hooks{noExchange: true})
}

// NewFault is New of a driver that calls a function at each point where a crash
// leaves something to mend.
func NewFault(root string, noExchange bool, fault func(point string)) (*Driver, error) {
	return open(root, &Options{Durability: layerfs.DurabilityNone}, hooks{noExchange, fault})
}
