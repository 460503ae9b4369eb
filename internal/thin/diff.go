package thin

import (
	"errors"
	"iter"
)

// Kind says how a range differs.
type Kind byte

// The kinds of a [Range].
const (
	// LeftOnly is mapped by the first device only: by the second one it was
	// discarded.
	LeftOnly Kind = iota + 1
	// RightOnly is mapped by the second device only.
	RightOnly
	// Different is mapped by both, to different blocks of the pool.
	Different
)

// String returns the name that thin_delta uses.
func (k Kind) String() string {
	switch k {
	case LeftOnly:
		return "left_only"
	case RightOnly:
		return "right_only"
	case Different:
		return "different"
	}
	return "unknown"
}

// Range is blocks [Begin, Begin+Length) of a device.
type Range struct {
	Begin, Length uint64
	Kind          Kind
}

// Diff returns the blocks in which two devices of the pool may differ, in
// order and without gaps inside a range. What is not returned is the same
// block of the pool in both, or mapped in neither, and so has the same
// content. A returned range may still have equal content: a block written with
// what it had, or one written to both.
//
// The cost grows with the blocks that were changed since the devices had a
// common ancestor, in either of them. Devices without one are read whole.
func (m *Metadata) Diff(left, right uint32) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		var run Range
		stop := false
		err := m.diff(left, right, func(key uint64, k Kind) bool {
			if run.Length > 0 && run.Kind == k && key == run.Begin+run.Length {
				run.Length++
				return true
			}
			if run.Length > 0 && !yield(run, nil) {
				stop = true
				return false
			}
			run = Range{key, 1, k}
			return true
		})
		switch {
		case stop:
		case err != nil:
			yield(Range{}, err)
		case run.Length > 0:
			yield(run, nil)
		}
	}
}

// diff calls emit for each block that differs, until it returns false.
func (m *Metadata) diff(left, right uint32, emit func(uint64, Kind) bool) error {
	var cs [2]*cursor
	for i, id := range []uint32{left, right} {
		d, err := m.Device(id)
		if err != nil {
			return err
		}
		if cs[i], err = m.newCursor(d.root, 8); err != nil {
			return err
		}
		if i == 1 && cs[0].valid() && cs[1].valid() && cs[0].stack[0].block == d.root {
			return nil // nothing was changed since the snapshot
		}
	}
	a, b := cs[0], cs[1]
	for a.valid() || b.valid() {
		var err error
		switch order(a, b) {
		case 0:
			err = both(a, b, emit)
		case -1:
			err = single(a, LeftOnly, emit)
		case 1:
			err = single(b, RightOnly, emit)
		}
		if err == errStop {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// errStop ends a walk that the caller has seen enough of.
var errStop = errors.New("stop")

// order tells whose item comes first: -1 for a, 1 for b, 0 for both together.
func order(a, b *cursor) int {
	switch {
	case !b.valid():
		return -1
	case !a.valid():
		return 1
	case a.level() > 0 && b.level() > 0 && a.subtree() == b.subtree():
		// Also under different keys: a parent's key is only a lower bound.
		return 0
	case a.key() < b.key():
		return -1
	case a.key() > b.key():
		return 1
	}
	return 0
}

// single handles an item that starts before the other side's: an entry is on
// this side only, a subtree may reach into the other side's and is opened.
func single(c *cursor, k Kind, emit func(uint64, Kind) bool) error {
	if c.level() > 0 {
		return c.descend()
	}
	key, _ := c.entry()
	c.skip()
	if !emit(key, k) {
		return errStop
	}
	return nil
}

// both handles two items that start together. The higher one is opened, so
// that shared subtrees meet at the same level.
func both(a, b *cursor, emit func(uint64, Kind) bool) error {
	la, lb := a.level(), b.level()
	switch {
	case la > 0 && lb > 0 && a.subtree() == b.subtree():
		if la != lb {
			return corrupt(a.subtree(), "at levels %d and %d", la, lb)
		}
		a.skip()
		b.skip()
		return nil
	case la > lb:
		return a.descend()
	case lb > la:
		return b.descend()
	case la > 0:
		if err := a.descend(); err != nil {
			return err
		}
		return b.descend()
	}
	key, va := a.entry()
	_, vb := b.entry()
	same := mapped(va)>>24 == mapped(vb)>>24
	a.skip()
	b.skip()
	if !same && !emit(key, Different) {
		return errStop
	}
	return nil
}
