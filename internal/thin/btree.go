package thin

import "encoding/binary"

// The head of a node, struct node_header.
const (
	nodeHead     = 32
	internalNode = 1
	leafNode     = 2
)

// maxHeight bounds a tree. 2^64 keys at 126 a node, the least that the kernel
// keeps in one, are ten levels.
const maxHeight = 16

// node is a checked node.
type node struct {
	block     uint64
	b         []byte
	n         int // entries
	max       int
	valueSize int
	leaf      bool
}

func (n *node) key(i int) uint64 { return binary.LittleEndian.Uint64(n.b[nodeHead+8*i:]) }

func (n *node) value(i int) []byte {
	off := nodeHead + 8*n.max + n.valueSize*i
	return n.b[off : off+n.valueSize]
}

// child returns the block of an internal node's entry.
func (n *node) child(i int) uint64 { return binary.LittleEndian.Uint64(n.value(i)) }

// node reads a node whose keys must be in [lo, hi]. A leaf's values have
// valueSize bytes.
func (m *Metadata) node(block uint64, valueSize int, lo, hi uint64) (*node, error) {
	b, err := m.block(block, nodeXOR)
	if err != nil {
		return nil, err
	}
	u32 := func(i int) uint32 { return binary.LittleEndian.Uint32(b[i:]) }
	n := &node{block: block, b: b}
	switch u32(4) {
	case leafNode:
		n.leaf = true
	case internalNode:
		valueSize = 8
	default:
		return nil, corrupt(block, "flags %#x", u32(4))
	}
	if int64(u32(24)) != int64(valueSize) {
		return nil, corrupt(block, "values of %d bytes, not %d", u32(24), valueSize)
	}
	n.valueSize = valueSize
	if u32(20) > uint32((BlockSize-nodeHead)/(8+valueSize)) || u32(16) > u32(20) {
		return nil, corrupt(block, "%d of %d entries", u32(16), u32(20))
	}
	n.n, n.max = int(u32(16)), int(u32(20))
	for i := range n.n {
		k := n.key(i)
		if k < lo || k > hi || i > 0 && k <= n.key(i-1) {
			return nil, corrupt(block, "key %d out of order", k)
		}
	}
	return n, nil
}

// cursor goes through a tree in order. It stands on an item: the entry of a
// leaf, or a subtree that was not read yet and may be skipped.
type cursor struct {
	m         *Metadata
	valueSize int
	height    int // of the tree: a lone leaf has 0
	stack     []frame
}

type frame struct {
	*node
	i  int
	hi uint64 // largest key that may be below the node
}

// newCursor stands on the first item of the root.
func (m *Metadata) newCursor(root uint64, valueSize int) (*cursor, error) {
	c := &cursor{m: m, valueSize: valueSize}
	const all = 1<<64 - 1
	n, err := m.node(root, valueSize, 0, all)
	if err != nil {
		return nil, err
	}
	if !n.leaf && n.n == 0 {
		return nil, corrupt(root, "internal node without entries")
	}
	// All leaves are equally deep, so the leftmost tells how deep.
	lo, hi := uint64(0), uint64(all)
	for at := n; !at.leaf; c.height++ {
		if c.height == maxHeight {
			return nil, corrupt(root, "tree is too high")
		}
		lo = at.key(0)
		if at.n > 1 {
			hi = at.key(1) - 1
		}
		if at, err = m.node(at.child(0), valueSize, lo, hi); err != nil {
			return nil, err
		}
		if at.n == 0 {
			return nil, corrupt(at.block, "empty node")
		}
	}
	if n.n > 0 {
		c.stack = append(c.stack, frame{n, 0, all})
	}
	return c, nil
}

func (c *cursor) valid() bool { return len(c.stack) > 0 }

func (c *cursor) top() *frame { return &c.stack[len(c.stack)-1] }

// level is the height of the item: 0 is an entry, 1 a leaf and so on.
func (c *cursor) level() int { return c.height - len(c.stack) + 1 }

// key is the key of the item: the least that may be below a subtree.
func (c *cursor) key() uint64 { f := c.top(); return f.key(f.i) }

// subtree returns the block of the item, which must be a subtree.
func (c *cursor) subtree() uint64 { f := c.top(); return f.child(f.i) }

// entry returns the item, which must be an entry.
func (c *cursor) entry() (uint64, []byte) { f := c.top(); return f.key(f.i), f.value(f.i) }

// descend goes from a subtree to the first item in it.
func (c *cursor) descend() error {
	f := c.top()
	hi := f.hi
	if f.i+1 < f.n {
		hi = f.key(f.i+1) - 1
	}
	n, err := c.m.node(f.child(f.i), c.valueSize, f.key(f.i), hi)
	if err != nil {
		return err
	}
	if n.n == 0 || n.leaf != (c.level() == 1) {
		return corrupt(n.block, "%d entries, leaf %t, at level %d of the tree", n.n, n.leaf, c.level())
	}
	c.stack = append(c.stack, frame{n, 0, hi})
	return nil
}

// toLeaf goes down to the next entry, if there is one.
func (c *cursor) toLeaf() error {
	for c.valid() && c.level() > 0 {
		if err := c.descend(); err != nil {
			return err
		}
	}
	return nil
}

// skip goes to the item after this one, which is not read.
func (c *cursor) skip() {
	for c.valid() {
		f := c.top()
		if f.i++; f.i < f.n {
			return
		}
		c.stack = c.stack[:len(c.stack)-1]
	}
}

// lookup returns the value of a key, or [ErrNoDevice].
func (m *Metadata) lookup(root uint64, valueSize int, key uint64) ([]byte, error) {
	lo, hi := uint64(0), uint64(1<<64-1)
	for range maxHeight + 1 {
		n, err := m.node(root, valueSize, lo, hi)
		if err != nil {
			return nil, err
		}
		i := n.find(key)
		switch {
		case i < 0 || n.leaf && n.key(i) != key:
			return nil, ErrNoDevice
		case n.leaf:
			return n.value(i), nil
		}
		lo, root = n.key(i), n.child(i)
		if i+1 < n.n {
			hi = n.key(i+1) - 1
		}
	}
	return nil, corrupt(root, "tree is too high")
}

// find returns the last entry whose key is not above, or -1.
func (n *node) find(key uint64) int {
	lo, hi := -1, n.n
	for hi-lo > 1 {
		mid := (lo + hi) / 2
		if n.key(mid) <= key {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}
