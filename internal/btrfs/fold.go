package btrfs

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Delta is what the commands of an incremental stream touch: a superset of
// what differs between the two trees. It is made by [Fold] and holds memory in
// proportion to the commands, not to the trees.
type Delta struct {
	root  *node
	nodes []*node // all that were met, the root first
}

// node is an inode as the receiver of a stream would see it, or one name of
// an inode of the old tree (a second name of it is another node).
type node struct {
	inOld    bool   // the inode is in the old tree, at oldPath
	oldPath  string // without a leading slash; the root's is empty
	touched  bool   // attributes or content may differ
	data     bool   // content may differ
	ranges   []span // of the content that may differ, unordered
	whole    bool   // too many ranges: all of it may differ
	linked   bool   // has more than one name here, so it is no directory
	children map[string]*entry
}

// entry is what the stream says or implies about one name in a directory.
type entry struct {
	node  *node // nil if the name is gone
	event bool  // a command made, removed or replaced the name
}

// span is a range of bytes in a file.
type span struct{ off, end int64 }

// maxSpans bounds the ranges kept for one file. Beyond it the whole file is
// taken as changed, which is allowed but not precise.
const maxSpans = 1 << 20

// Fold replays the names of a stream from a [Decoder] without a file system.
//
// The receiver's view has temporary names (o<inode>-<generation>-<number>),
// deletions and renames in an order that suits the receiver. Fold follows each
// node through them, so that what was touched can be named as it is called in
// the old tree and in the new one. Content does not matter, so a stream made
// with NoFileData is enough. The error is a [*StreamError] if the commands
// contradict each other, for example rename what they have removed.
func Fold(dec *Decoder) (*Delta, error) {
	d := &Delta{root: &node{inOld: true}}
	d.nodes = []*node{d.root}
	for first := true; ; first = false {
		at := dec.Offset()
		c, err := dec.Next()
		if err == io.EOF {
			return d, nil
		}
		if err != nil {
			return nil, err
		}
		if first != (c.Op == OpSnapshot || c.Op == OpSubvol) {
			return nil, &StreamError{Offset: at, Op: c.Op, Reason: "out of place"}
		}
		if c.Op == OpSubvol {
			d.root.inOld = false // a full stream: there is no old tree
		}
		if err := d.apply(c); err != nil {
			return nil, &StreamError{Offset: at, Op: c.Op, Reason: err.Error()}
		}
	}
}

func (d *Delta) apply(c *Command) error {
	switch c.Op {
	case OpSubvol, OpSnapshot, OpEnd:
		return nil
	case OpMkfile, OpMkdir, OpMknod, OpMkfifo, OpMksock, OpSymlink:
		n := &node{touched: true, data: true, whole: true}
		d.nodes = append(d.nodes, n)
		return d.bind(c.Str(AttrPath), n)
	case OpRename:
		return d.rename(c.Str(AttrPath), c.Str(AttrPathTo))
	case OpLink:
		n, err := d.lookup(c.Str(AttrPathLink))
		if err != nil {
			return err
		}
		if len(n.children) > 0 || n == d.root {
			return fmt.Errorf("%q is a directory", c.Str(AttrPathLink))
		}
		n.touched, n.linked = true, true
		return d.bind(c.Str(AttrPath), n)
	case OpUnlink, OpRmdir:
		e, err := d.slot(c.Str(AttrPath))
		if err != nil {
			return err
		}
		if e.node != nil {
			e.node.touched = true // another name of it may remain
		}
		e.node, e.event = nil, true
		return nil
	}
	n, err := d.lookup(c.Str(AttrPath))
	if err != nil {
		return err
	}
	n.touched = true
	switch c.Op {
	case OpWrite:
		n.add(c.Uint(AttrFileOffset), uint64(len(c.Bytes(AttrData))))
	case OpEncodedWrite:
		n.add(c.Uint(AttrFileOffset), c.Uint(AttrUnencodedFileLen))
	case OpClone:
		n.add(c.Uint(AttrFileOffset), c.Uint(AttrCloneLen))
	case OpUpdateExtent, OpFallocate:
		n.add(c.Uint(AttrFileOffset), c.Uint(AttrSize))
	case OpTruncate:
		n.add(c.Uint(AttrSize), 1<<63-1-c.Uint(AttrSize))
	}
	return nil
}

// add marks a range of the content as changed.
func (n *node) add(off, length uint64) {
	n.data = true
	if n.whole || length == 0 {
		return
	}
	s := span{int64(off), int64(off + length)}
	if k := len(n.ranges); k > 0 && n.ranges[k-1].end == s.off {
		n.ranges[k-1].end = s.end
		return
	}
	if len(n.ranges) == maxSpans {
		n.ranges, n.whole = nil, true
		return
	}
	n.ranges = append(n.ranges, s)
}

// lookup returns the node at a path of the receiver.
func (d *Delta) lookup(path string) (*node, error) {
	if path == "" {
		return d.root, nil
	}
	e, err := d.slot(path)
	if err != nil {
		return nil, err
	}
	if e.node == nil {
		return nil, fmt.Errorf("%q does not exist", path)
	}
	return e.node, nil
}

// slot returns the entry of a path; its node is nil if nothing is there.
func (d *Delta) slot(path string) (*entry, error) {
	if path == "" {
		return nil, fmt.Errorf("the root cannot be renamed or removed")
	}
	n := d.root
	for rest, more := path, true; ; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		e := n.children[name]
		if e == nil {
			e = &entry{}
			if n.inOld {
				// Not mentioned yet, so it is what the old tree has here. If it has
				// nothing, the comparison finds nothing either.
				e.node = &node{inOld: true, oldPath: join(n.oldPath, name)}
				d.nodes = append(d.nodes, e.node)
			}
			if n.children == nil {
				n.children = map[string]*entry{}
			}
			n.children[name] = e
		}
		if !more {
			return e, nil
		}
		if e.node == nil {
			return nil, fmt.Errorf("%q: %q does not exist", path, name)
		}
		if n = e.node; n.linked {
			return nil, fmt.Errorf("%q: %q is not a directory", path, name)
		}
	}
}

func (d *Delta) bind(path string, n *node) error {
	e, err := d.slot(path)
	if err != nil {
		return err
	}
	if e.node != nil {
		e.node.touched = true
	}
	e.node, e.event = n, true
	return nil
}

func (d *Delta) rename(from, to string) error {
	if strings.HasPrefix(to, from+"/") {
		return fmt.Errorf("%q into itself", from)
	}
	src, err := d.slot(from)
	if err != nil {
		return err
	}
	n := src.node
	if n == nil {
		return fmt.Errorf("%q does not exist", from)
	}
	dst, err := d.slot(to)
	if err != nil {
		return err
	}
	if dst.node != nil {
		dst.node.touched = true
	}
	n.touched = true
	src.node, src.event = nil, true
	dst.node, dst.event = n, true
	return nil
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// touch is an inode whose attributes or content may differ.
type touch struct {
	n     *node
	paths []string // names in the new tree that the stream knows
}

// paths returns every place at which the trees may differ, named as in either
// tree, and the nodes that were touched. Neither is in a particular order, and
// places may be there twice.
func (d *Delta) paths() (places []string, touched []touch) {
	index := map[*node]int{}
	type item struct {
		n    *node
		path string
	}
	for todo := []item{{d.root, ""}}; len(todo) > 0; {
		it := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if it.n.touched {
			places = append(places, it.path)
			i, ok := index[it.n]
			if !ok {
				i = len(touched)
				index[it.n] = i
				touched = append(touched, touch{n: it.n})
			}
			touched[i].paths = append(touched[i].paths, it.path)
		}
		for name, e := range it.n.children {
			p := join(it.path, name)
			if e.event {
				places = append(places, p)
			}
			if e.node != nil {
				todo = append(todo, item{e.node, p})
			}
		}
	}
	for _, n := range d.nodes {
		if !n.inOld {
			continue
		}
		if n.touched { // also if it is gone
			places = append(places, n.oldPath)
			if _, ok := index[n]; !ok {
				touched = append(touched, touch{n: n})
			}
		}
	}
	return places, touched
}

// spans returns the changed ranges in order, without overlap.
func (n *node) spans() []span {
	if n.whole {
		return []span{{0, 1<<63 - 1}}
	}
	return mergeSpans(slices.Clone(n.ranges))
}

func mergeSpans(s []span) []span {
	slices.SortFunc(s, func(a, b span) int {
		switch {
		case a.off < b.off:
			return -1
		case a.off > b.off:
			return 1
		}
		return 0
	})
	out := s[:0]
	for _, x := range s {
		if k := len(out); k > 0 && x.off <= out[k-1].end {
			out[k-1].end = max(out[k-1].end, x.end)
			continue
		}
		out = append(out, x)
	}
	return out
}
