package merged

import (
	"context"
	"errors"
	"iter"
	"path"
	"slices"

	"github.com/layerfs/layerfs"
)

// Difference is a change, and the layer in which what is new lies; 0 for what
// was deleted.
type Difference struct {
	layerfs.Change
	Layer int
}

// Compare yields what a stack of layers, the top one first, changes against the
// stack that begins with layer base, sorted as [layerfs.Driver.Changes] says.
// base may be the number of layers: the empty tree. Files are compared in mode,
// owner, modification time, size, device, xattrs, target of a link and, if all
// else is equal, content. Two merged trees are compared as a double walk does,
// but where both are made of the same places there is nothing to compare. An
// error is yielded once and ends the sequence.
func Compare(ctx context.Context, r Rules, dirs []string, base int) iter.Seq2[Difference, error] {
	return func(yield func(Difference, error) bool) {
		t, err := Open(r, dirs)
		if err != nil {
			yield(Difference{}, err)
			return
		}
		defer t.Close()
		c := &comparison{ctx: ctx, tree: t, base: base, yield: yield}
		if err := c.run(); err != nil && !errors.Is(err, errStop) {
			yield(Difference{}, err)
		}
	}
}

// Changes is [Compare] without the layers.
func Changes(ctx context.Context, r Rules, dirs []string, base int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		Compare(ctx, r, dirs, base)(func(d Difference, err error) bool { return yield(d.Change, err) })
	}
}

// errStop ends a comparison whose consumer has had enough.
var errStop = errors.New("stop")

type comparison struct {
	ctx   context.Context
	tree  *Tree
	base  int // the first layer of the older tree
	yield func(Difference, error) bool
}

func (c *comparison) run() error {
	newer, err := c.tree.Root(0)
	if err != nil {
		return err
	}
	older, err := c.tree.Root(c.base)
	if err != nil {
		return err
	}
	if len(older.Places) == 0 { // the empty tree, whose root has no attributes to differ from
		return c.contents("/", newer, older)
	}
	return c.entry("/", newer, older)
}

func (c *comparison) emit(p string, kind layerfs.Kind, n *Node) error {
	d := Difference{Change: layerfs.Change{Path: p, Kind: kind}}
	if n != nil {
		d.Layer = n.Places[0].Layer
	}
	if !c.yield(d, nil) {
		return errStop
	}
	return nil
}

// entry compares one path of both trees; nil where it is not.
func (c *comparison) entry(p string, newer, older *Node) error {
	switch {
	case newer == nil:
		return c.emit(p, layerfs.Deleted, nil)
	case older == nil:
		if err := c.emit(p, layerfs.Added, newer); err != nil {
			return err
		}
		return c.contents(p, newer, new(Node))
	}
	same, err := c.equal(newer, older)
	if err != nil {
		return err
	}
	if !same {
		if err := c.emit(p, layerfs.Modified, newer); err != nil {
			return err
		}
	}
	if !older.IsDir() {
		older = new(Node)
	}
	return c.contents(p, newer, older)
}

// contents compares what is in a directory; older may have no places.
func (c *comparison) contents(p string, newer, older *Node) error {
	if !newer.IsDir() || slices.Equal(newer.Places, older.Places) {
		return nil
	}
	pairs, err := c.pairs(newer, older)
	if err != nil {
		return err
	}
	for _, e := range pairs {
		if err := c.entry(path.Join(p, e.name), e.newer, e.older); err != nil {
			return err
		}
	}
	return nil
}

// pair is one name in both trees; nil where it is not.
type pair struct {
	name         string
	newer, older *Node
}

// pairs looks up the names that can differ.
func (c *comparison) pairs(newer, older *Node) ([]pair, error) {
	nd, err := c.tree.Dir(newer.Places)
	if err != nil {
		return nil, err
	}
	defer nd.Close()
	od, err := c.tree.Dir(older.Places)
	if err != nil {
		return nil, err
	}
	defer od.Close()
	names, err := c.names(nd, od, newer, older)
	if err != nil {
		return nil, err
	}
	var pairs []pair
	for _, name := range names {
		if err := context.Cause(c.ctx); err != nil {
			return nil, err
		}
		e := pair{name: name}
		if e.newer, err = nd.Lookup(name); err != nil {
			return nil, err
		}
		if e.older, err = od.Lookup(name); err != nil {
			return nil, err
		}
		if e.newer != nil || e.older != nil {
			pairs = append(pairs, e)
		}
	}
	return pairs, nil
}

// names lists the names that can differ. Where the older directory's places are
// all in the newer one too, a name of which the upper layers say nothing is the
// same in both.
func (c *comparison) names(nd, od *Directory, newer, older *Node) ([]string, error) {
	n := len(newer.Places) - len(older.Places)
	if len(older.Places) > 0 && n >= 0 && slices.Equal(newer.Places[n:], older.Places) {
		return nd.names(c.base)
	}
	all := len(c.tree.roots)
	names, err := nd.names(all)
	if err != nil {
		return nil, err
	}
	more, err := od.names(all)
	if err != nil {
		return nil, err
	}
	names = append(names, more...)
	slices.Sort(names)
	return slices.Compact(names), nil
}
