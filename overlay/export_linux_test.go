package overlay

import (
	"context"
	"testing"

	"github.com/layerfs/layerfs/internal/lifecycle"
)

// contextOf returns a context for clean-ups, after t.Context has ended.
func contextOf(testing.TB) context.Context { return context.Background() }

// pinned returns the chain of a layer for tests of the mechanism alone.
func pinned(d *Driver, id, base string) (lifecycle.Chain, int, func(), error) {
	var chain lifecycle.Chain
	for at := id; at != ""; {
		rec, err := d.m.dir.Load(at)
		if err != nil {
			return nil, 0, nil, err
		}
		chain = append(chain, rec)
		at = rec.Parent
	}
	return chain, chain.Index(base), func() {}, nil
}
