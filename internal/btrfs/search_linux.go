package btrfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// The trees and item types of include/uapi/linux/btrfs_tree.h in use here.
const (
	treeRoot  = 1
	treeChunk = 3
	treeQuota = 8

	itemInodeRef     = 12
	itemInodeExtref  = 13
	itemRoot         = 132
	itemRootBackref  = 144
	itemRootRef      = 156
	itemChunk        = 228
	itemQgroupStatus = 240
	itemQgroupInfo   = 242
	itemQgroupLimit  = 244

	rootItemRefs = 216 // offset of refs in struct btrfs_root_item
)

// Key orders the items of a tree.
type Key struct {
	Objectid uint64
	Type     uint8
	Offset   uint64
}

// Item is an item of a tree. The data is little-endian, as on disk.
type Item struct {
	Key
	Transid uint64 // transaction that wrote the item's leaf
	Data    []byte // valid until the next item
}

// Range selects items from Min to Max, both included, in the order of keys, in
// leaves written in transaction MinTransid or later.
type Range struct {
	Min, Max   Key
	MinTransid uint64
}

// maxSearchBuf is above the largest item of a leaf of 64 KiB, the largest node.
const maxSearchBuf = 128 << 10

// Search yields the items of a tree of the file system that f is on; tree 0 is
// the subvolume of f. It needs CAP_SYS_ADMIN. Cost grows with the items found;
// with MinTransid whole parts of the tree are skipped. What is changed
// meanwhile may be seen or not.
//
// Kernel: BTRFS_IOC_TREE_SEARCH_V2, Linux 3.16.
func Search(f *os.File, tree uint64, r Range) iter.Seq2[Item, error] {
	return search(f, tree, r, 16<<10)
}

func search(f *os.File, tree uint64, r Range, size int) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		head, itemHead := sys.SizeOf[sys.BtrfsSearchArgs](), sys.SizeOf[sys.BtrfsSearchHeader]()
		buf := make([]byte, head+size)
		for next := r.Min; ; {
			a := sys.View[sys.BtrfsSearchArgs](buf)
			*a = sys.BtrfsSearchArgs{
				Key: sys.BtrfsSearchKey{
					Tree: tree, Items: ^uint32(0),
					MinObjectid: next.Objectid, MinType: uint32(next.Type), MinOffset: next.Offset,
					MaxObjectid: r.Max.Objectid, MaxType: uint32(r.Max.Type), MaxOffset: r.Max.Offset,
					MinTransid: r.MinTransid, MaxTransid: ^uint64(0),
				},
				BufSize: uint64(len(buf) - head),
			}
			err := sys.IoctlBytes(f, "ioctl BTRFS_IOC_TREE_SEARCH_V2", sys.BtrfsIocTreeSearchV2, buf)
			if errors.Is(err, unix.EOVERFLOW) && len(buf)-head < maxSearchBuf {
				buf = make([]byte, head+maxSearchBuf)
				continue
			}
			if err != nil {
				yield(Item{}, notBtrfs(err))
				return
			}
			count := sys.View[sys.BtrfsSearchArgs](buf).Key.Items
			if count == 0 {
				return
			}
			rest := buf[head:]
			for range count {
				if len(rest) < itemHead {
					yield(Item{}, fmt.Errorf("tree search: item header cut off"))
					return
				}
				h := sys.View[sys.BtrfsSearchHeader](rest)
				end := itemHead + int(h.Len)
				if end > len(rest) {
					yield(Item{}, fmt.Errorf("tree search: item of %d bytes cut off", h.Len))
					return
				}
				next = Key{h.Objectid, uint8(h.Type), h.Offset}
				if !yield(Item{Key: next, Transid: h.Transid, Data: rest[itemHead:end]}, nil) {
					return
				}
				rest = rest[end:]
			}
			var more bool
			if next, more = next.next(); !more {
				return
			}
		}
	}
}

// next returns the key after k.
func (k Key) next() (Key, bool) {
	if k.Offset++; k.Offset != 0 {
		return k, true
	}
	if k.Type++; k.Type != 0 {
		return k, true
	}
	k.Objectid++
	return k, k.Objectid != 0
}

// searchOne returns the first item of an object with a type, nil if there is
// none.
func searchOne(f *os.File, tree, objectid uint64, typ uint8) (*Item, error) {
	r := Range{Min: Key{objectid, typ, 0}, Max: Key{objectid, typ, ^uint64(0)}}
	for item, err := range search(f, tree, r, 4<<10) {
		if err != nil {
			return nil, err
		}
		return &item, nil
	}
	return nil, nil
}

func le16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
