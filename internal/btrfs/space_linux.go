package btrfs

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// ReadUsage returns how the file system at path is filled. Spaces and devices
// need no privileges; the number of chunks, which costs a read of the chunk
// tree, is only asked for with chunks and needs CAP_SYS_ADMIN. The kernel is asked
// several things one after the other; with chunks they are asked again, a few
// times, if a chunk was added or removed meanwhile.
//
// Kernel: BTRFS_IOC_SPACE_INFO, BTRFS_IOC_FS_INFO, BTRFS_IOC_DEV_INFO.
func ReadUsage(path string, chunks bool) (*Usage, error) {
	f, err := openDir(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 7 // looks; the pauses between them are 63 ms in sum
	for look := 1; ; look++ {
		u := &Usage{Balance: path}
		if u.Spaces, err = spaces(f); err != nil {
			return nil, err
		}
		if u.Devices, err = devices(f); err != nil || !chunks {
			return u, err
		}
		if err = countChunks(f, u); err != nil || u.agrees() || look == most {
			return u, err
		}
		// A new chunk counts on its device before it is in the tree, for as long as
		// the operation takes that needed it (btrfs_create_pending_block_groups).
		time.Sleep(time.Millisecond << (look - 1))
	}
}

// agrees reports whether the chunks are all that is allocated on the devices.
func (u *Usage) agrees() bool {
	var chunks, devices int64
	for _, s := range u.Spaces {
		chunks += s.OnDevices
	}
	for _, d := range u.Devices {
		devices += d.Allocated
	}
	return chunks == devices
}

func spaces(f *os.File) ([]Space, error) {
	head, size := sys.SizeOf[sys.BtrfsSpaceArgs](), sys.SizeOf[sys.BtrfsSpaceInfo]()
	for slots := 16; ; slots *= 2 {
		buf := make([]byte, head+slots*size)
		a := sys.View[sys.BtrfsSpaceArgs](buf)
		a.Slots = uint64(slots)
		if err := sys.IoctlBytes(f, "ioctl BTRFS_IOC_SPACE_INFO", sys.BtrfsIocSpaceInfo, buf); err != nil {
			return nil, notBtrfs(err)
		}
		n := int(min(a.Total, uint64(slots)))
		if n == slots && slots < 1024 {
			continue // there may be more
		}
		out := make([]Space, n)
		for i := range out {
			s := sys.View[sys.BtrfsSpaceInfo](buf[head+i*size:])
			out[i] = Space{Type: ChunkType(s.Flags), Allocated: int64(s.Total), Used: int64(s.Used)}
		}
		return out, nil
	}
}

// FSInfo describes a file system.
type FSInfo struct {
	UUID       UUID
	Devices    int
	NodeSize   int
	SectorSize int
}

// ReadFSInfo returns what file system path is on.
func ReadFSInfo(path string) (FSInfo, error) {
	f, err := openDir(path)
	if err != nil {
		return FSInfo{}, err
	}
	defer f.Close()
	a, err := fsInfo(f)
	if err != nil {
		return FSInfo{}, err
	}
	return FSInfo{UUID: a.Fsid, Devices: int(a.NumDevices), NodeSize: int(a.Nodesize), SectorSize: int(a.Sectorsize)}, nil
}

func fsInfo(f *os.File) (*sys.BtrfsFsInfo, error) {
	a := &sys.BtrfsFsInfo{}
	if err := sys.Ioctl(f, "ioctl BTRFS_IOC_FS_INFO", sys.BtrfsIocFsInfo, a); err != nil {
		return nil, notBtrfs(err)
	}
	return a, nil
}

func devices(f *os.File) ([]Device, error) {
	info, err := fsInfo(f)
	if err != nil {
		return nil, err
	}
	var out []Device
	for id := uint64(0); id <= info.MaxID && len(out) < int(info.NumDevices); id++ {
		a := &sys.BtrfsDevInfo{Devid: id}
		err := sys.Ioctl(f, "ioctl BTRFS_IOC_DEV_INFO", sys.BtrfsIocDevInfo, a)
		if errors.Is(err, unix.ENODEV) {
			continue // ids of removed devices are not used again
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Device{ID: id, Path: cstring(a.Path[:]), Size: int64(a.Total), Allocated: int64(a.Used)})
	}
	return out, nil
}

// countChunks adds from the chunk tree how many chunks there are of each type.
func countChunks(f *os.File, u *Usage) error {
	const (
		firstChunkTree = 256 // BTRFS_FIRST_CHUNK_TREE_OBJECTID
		sizeOfChunk    = 80  // struct btrfs_chunk with one stripe
		sizeOfStripe   = 32
		offType        = 24
		offStripes     = 44
		offSubStripes  = 46
	)
	r := Range{Min: Key{firstChunkTree, itemChunk, 0}, Max: Key{firstChunkTree, itemChunk, ^uint64(0)}}
	for item, err := range Search(f, treeChunk, r) {
		if err != nil {
			return err
		}
		d := item.Data
		if len(d) < sizeOfChunk {
			return fmt.Errorf("chunk item of %d bytes", len(d))
		}
		length, typ := int64(le64(d)), ChunkType(le64(d[offType:]))
		stripes, sub := int64(le16(d[offStripes:])), int64(le16(d[offSubStripes:]))
		// What each device gives is the length over the number of stripes that
		// hold different data.
		distinct := stripes
		switch {
		case typ&chunkRAID10 != 0:
			distinct = stripes / max(1, sub)
		case typ&chunkRAID5 != 0:
			distinct = stripes - 1
		case typ&chunkRAID6 != 0:
			distinct = stripes - 2
		case typ&chunkRAID0 == 0:
			distinct = 1
		}
		for i := range u.Spaces {
			if u.Spaces[i].Type == typ {
				u.Spaces[i].Chunks++
				u.Spaces[i].OnDevices += length / max(1, distinct) * stripes
			}
		}
	}
	return nil
}
