package devmapper

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Both file systems keep an inode at a place that its number gives, for ever.
// So the inodes that differ between two snapshots are found by comparing the
// parts of the inode tables that lie in blocks that differ. An inode that has
// the same bytes in both is the same file with the same content: whatever
// changes a file changes its change time.

// span is a part of a device that holds inodes, in order of their numbers.
type span struct {
	offset, length int64
	first          uint64 // number of the inode at offset
	all            bool   // it did not hold inodes in the older snapshot
}

// inodeTables knows where a file system keeps its inodes.
type inodeTables interface {
	// spans returns where the inodes are, by offset. r is the newer device.
	// number lists the first inodes of all chunks, for xfs.
	spans(r io.ReaderAt, chunks func() ([]uint64, error)) ([]span, error)
	// inodeSize is the distance of two inodes, in bytes.
	inodeSize() int64
}

// ext4 is the geometry of an ext4 file system.
//
// Source: Documentation/filesystems/ext4, super, group_descr, inode tables.
type ext4 struct {
	blockSize, firstBlock   int64
	groups, perGroup, inode int64
	descSize                int64
	wide                    bool // block numbers of 64 bits
}

func newExt4(sb []byte) (*ext4, error) {
	u16, u32 := binary.LittleEndian.Uint16, binary.LittleEndian.Uint32
	const metaBG, wide = 0x10, 0x80
	if u32(sb[0x18:]) > 6 {
		return nil, fmt.Errorf("ext4 blocks of 2^%d KiB", u32(sb[0x18:]))
	}
	incompat := u32(sb[0x60:])
	e := &ext4{
		blockSize: 1024 << u32(sb[0x18:]), firstBlock: int64(u32(sb[0x14:])),
		perGroup: int64(u32(sb[0x28:])), inode: int64(u16(sb[0x58:])), descSize: 32, wide: incompat&wide != 0,
	}
	if u32(sb[0x4c:]) == 0 {
		e.inode = 128 // revision 0
	}
	blocks := int64(u32(sb[4:]))
	if e.wide {
		e.descSize = int64(u16(sb[0xfe:]))
		blocks |= int64(u32(sb[0x150:])) << 32
	}
	blocksPerGroup := int64(u32(sb[0x20:]))
	switch {
	case incompat&metaBG != 0:
		return nil, fmt.Errorf("ext4 with meta_bg")
	case e.inode < 128 || e.inode > e.blockSize || e.inode&(e.inode-1) != 0:
		return nil, fmt.Errorf("ext4 inodes of %d bytes", e.inode)
	case e.descSize < 32 || e.wide && e.descSize < 64 || e.descSize > 128:
		return nil, fmt.Errorf("ext4 group descriptors of %d bytes", e.descSize)
	case blocksPerGroup == 0 || e.perGroup == 0 || blocks <= e.firstBlock || blocks > 1<<48:
		return nil, fmt.Errorf("ext4 of %d blocks, %d in a group, with %d inodes", blocks, blocksPerGroup, e.perGroup)
	}
	e.groups = (blocks - e.firstBlock + blocksPerGroup - 1) / blocksPerGroup
	if e.groups > 1<<20 { // 128 TiB with the usual blocks
		return nil, fmt.Errorf("ext4 of %d groups", e.groups)
	}
	return e, nil
}

func (e *ext4) inodeSize() int64 { return e.inode }

func (e *ext4) spans(r io.ReaderAt, _ func() ([]uint64, error)) ([]span, error) {
	table := make([]byte, e.groups*e.descSize)
	if err := readFull(r, table, (e.firstBlock+1)*e.blockSize); err != nil {
		return nil, fmt.Errorf("group descriptors: %w", err)
	}
	out := make([]span, e.groups)
	for g := range out {
		d := table[int64(g)*e.descSize:]
		block := int64(binary.LittleEndian.Uint32(d[8:]))
		if e.wide {
			block |= int64(binary.LittleEndian.Uint32(d[0x28:])) << 32
		}
		out[g] = span{offset: block * e.blockSize, length: e.perGroup * e.inode, first: uint64(g)*uint64(e.perGroup) + 1}
	}
	slices.SortFunc(out, func(a, b span) int { return int(min(max(a.offset-b.offset, -1), 1)) })
	return out, nil
}

// xfs is the geometry of an xfs file system. Where its inodes are is in a tree
// of each group; the kernel lists it.
//
// Source: fs/xfs/libxfs/xfs_format.h, struct xfs_dsb and XFS_INO_TO_*.
type xfs struct {
	blockSize, groupBlocks, inode int64
	perBlockLog, groupLog         uint
}

func newXFS(b []byte) (*xfs, error) {
	x := &xfs{
		blockSize: int64(binary.BigEndian.Uint32(b[4:])), groupBlocks: int64(binary.BigEndian.Uint32(b[84:])),
		inode: int64(binary.BigEndian.Uint16(b[104:])), perBlockLog: uint(b[123]), groupLog: uint(b[124]),
	}
	if x.blockSize < 512 || x.blockSize > 65536 || x.inode < 256 || x.inode > 2048 || x.inode<<x.perBlockLog != x.blockSize ||
		x.groupBlocks == 0 || x.groupLog > 31 || x.groupBlocks > 1<<x.groupLog {
		return nil, fmt.Errorf("xfs of an unknown geometry")
	}
	return x, nil
}

func (x *xfs) inodeSize() int64 { return x.inode }

// chunkInodes is the number of inodes of a chunk, XFS_INODES_PER_CHUNK.
const chunkInodes = 64

func (x *xfs) spans(_ io.ReaderAt, chunks func() ([]uint64, error)) ([]span, error) {
	list, err := chunks()
	if err != nil {
		return nil, err
	}
	out := make([]span, len(list))
	for i, ino := range list {
		group := int64(ino >> (x.groupLog + x.perBlockLog))
		block := int64(ino>>x.perBlockLog) & (1<<x.groupLog - 1)
		within := int64(ino & (1<<x.perBlockLog - 1))
		out[i] = span{
			offset: (group*x.groupBlocks+block)*x.blockSize + within*x.inode,
			length: chunkInodes * x.inode, first: ino,
		}
	}
	slices.SortFunc(out, func(a, b span) int { return int(min(max(a.offset-b.offset, -1), 1)) })
	return out, nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// extent is a range of a device, in bytes.
type extent struct{ offset, length int64 }

// changedInodes returns the inodes whose bytes differ, all of which lie in the
// ranges, which are in order. olderSize is the size of the older device:
// nothing behind it is compared.
func changedInodes(older, newer io.ReaderAt, olderSize, inode int64, spans []span, ranges []extent) (map[uint64]struct{}, error) {
	changed := make(map[uint64]struct{})
	const piece = 1 << 18
	a, b := make([]byte, piece), make([]byte, piece)
	i := 0
	for _, r := range ranges {
		for i < len(spans) && spans[i].offset+spans[i].length <= r.offset {
			i++
		}
		for _, s := range spans[i:] {
			if s.offset >= r.offset+r.length {
				break
			}
			// Whole inodes: those at the edges of the range too.
			from := max(s.offset, s.offset+(r.offset-s.offset)/inode*inode)
			to := min(s.offset+s.length, r.offset+r.length)
			for ; from < to; from += piece {
				n := (min(piece, to-from) + inode - 1) / inode * inode
				if err := readFull(newer, b[:n], from); err != nil {
					return nil, err
				}
				known := !s.all && from+n <= olderSize
				if known {
					if err := readFull(older, a[:n], from); err != nil {
						return nil, err
					}
					if bytes.Equal(a[:n], b[:n]) {
						continue
					}
				}
				for at := int64(0); at < n; at += inode {
					if !known || !bytes.Equal(a[at:at+inode], b[at:at+inode]) {
						changed[s.first+uint64((from-s.offset+at)/inode)] = struct{}{}
					}
				}
			}
		}
	}
	return changed, nil
}
