package btrfs

import (
	"fmt"
	"strings"
)

// ChunkType says what a chunk (block group) holds, and in which profile.
type ChunkType uint64

// The bits of BTRFS_BLOCK_GROUP_* in use here.
const (
	ChunkData     ChunkType = 1 << 0
	ChunkSystem   ChunkType = 1 << 1
	ChunkMetadata ChunkType = 1 << 2
	ChunkReserve  ChunkType = 1 << 49 // BTRFS_SPACE_INFO_GLOBAL_RSV

	chunkRAID0  ChunkType = 1 << 3
	chunkRAID1  ChunkType = 1 << 4
	chunkDUP    ChunkType = 1 << 5
	chunkRAID10 ChunkType = 1 << 6
	chunkRAID5  ChunkType = 1 << 7
	chunkRAID6  ChunkType = 1 << 8
	chunkR1C3   ChunkType = 1 << 9
	chunkR1C4   ChunkType = 1 << 10
)

// String returns, for example, "Metadata, DUP", as "btrfs filesystem df" does.
func (t ChunkType) String() string { return t.Kind() + ", " + t.Profile() }

// Kind returns Data, System, Metadata, "Data+Metadata" or GlobalReserve.
func (t ChunkType) Kind() string {
	switch {
	case t&ChunkReserve != 0:
		return "GlobalReserve"
	case t&(ChunkData|ChunkMetadata) == ChunkData|ChunkMetadata:
		return "Data+Metadata"
	case t&ChunkData != 0:
		return "Data"
	case t&ChunkMetadata != 0:
		return "Metadata"
	case t&ChunkSystem != 0:
		return "System"
	}
	return fmt.Sprintf("Type(%#x)", uint64(t))
}

// Profile returns single, DUP or the RAID level.
func (t ChunkType) Profile() string {
	for _, p := range []struct {
		bit  ChunkType
		name string
	}{
		{chunkRAID0, "RAID0"}, {chunkRAID1, "RAID1"}, {chunkDUP, "DUP"}, {chunkRAID10, "RAID10"},
		{chunkRAID5, "RAID5"}, {chunkRAID6, "RAID6"}, {chunkR1C3, "RAID1C3"}, {chunkR1C4, "RAID1C4"},
	} {
		if t&p.bit != 0 {
			return p.name
		}
	}
	return "single"
}

// copies returns how many bytes of devices a byte takes; parity RAID is
// counted as one, so that its need is not overstated.
func (t ChunkType) copies() int64 {
	switch {
	case t&(chunkRAID1|chunkDUP|chunkRAID10) != 0:
		return 2
	case t&chunkR1C3 != 0:
		return 3
	case t&chunkR1C4 != 0:
		return 4
	}
	return 1
}

// Space is the space of one type of chunks, in bytes of content: a mirrored
// byte counts once.
type Space struct {
	Type      ChunkType
	Allocated int64 // in chunks of this type
	Used      int64 // of Allocated
	Chunks    int   // 0 for the global reserve, or if they were not asked for
	OnDevices int64 // bytes the chunks take on all devices; 0 if not asked for
}

// Device is one device of a file system.
type Device struct {
	ID        uint64
	Path      string
	Size      int64
	Allocated int64 // in chunks of any type
}

// Unallocated returns the bytes that can still become chunks.
func (d Device) Unallocated() int64 { return max(0, d.Size-d.Allocated) }

// Usage is how a file system is filled.
type Usage struct {
	Spaces  []Space
	Devices []Device
	Balance string // path for the command in Warning
}

// Unallocated returns the bytes of all devices that are in no chunk.
func (u *Usage) Unallocated() int64 {
	var n int64
	for _, d := range u.Devices {
		n += d.Unallocated()
	}
	return n
}

// of returns the sum of the spaces whose type has a bit.
func (u *Usage) of(bit ChunkType) (s Space) {
	for _, x := range u.Spaces {
		if x.Type&bit == 0 || x.Type&ChunkReserve != 0 {
			continue
		}
		s.Type |= x.Type
		s.Allocated += x.Allocated
		s.Used += x.Used
	}
	return s
}

const (
	// The largest chunks the kernel makes: data 1 GiB, or 10 % of a smaller file
	// system; metadata 256 MiB below 50 GiB, else 1 GiB (fs/btrfs/volumes.c,
	// init_alloc_chunk_ctl_policy_regular, Linux 6.18).
	dataChunk      = 1 << 30
	metaChunk      = 256 << 20
	metaChunkLarge = 1 << 30
	largeFS        = 50 << 30

	// Chunks of a type that are this full will soon need another.
	nearlyFull = 0.80
	// Below this, emptying chunks of the other type frees whole ones.
	worthBalance = 0.75
)

// Exhaustion says that chunks of one type will soon be full although the file
// system is not.
type Exhaustion struct {
	Type    ChunkType // what runs out: ChunkData or ChunkMetadata
	Free    int64     // bytes left in chunks of that type
	Command string    // that gives chunks back; empty if only more space would help
	Text    string    // all of this for people
}

// Exhaustion reports whether writes will soon fail with ENOSPC because no
// further chunk can be allocated: chunks of a type are 80 % full, and what is
// unallocated does not hold another. The second result is false if all is well.
//
// df does not show this, as it counts the free bytes of data chunks even if it
// is metadata that has run out. The remedy is to move the content of chunks
// that are used little into others, if there are any.
func (u *Usage) Exhaustion() (Exhaustion, bool) {
	var size int64
	for _, d := range u.Devices {
		size += d.Size
	}
	for _, t := range []ChunkType{ChunkMetadata, ChunkData} {
		s := u.of(t)
		reserve := int64(0)
		if t == ChunkMetadata {
			// The kernel keeps the global reserve for itself, inside metadata.
			for _, x := range u.Spaces {
				if x.Type&ChunkReserve != 0 {
					reserve = x.Allocated - x.Used
				}
			}
		}
		if s.Allocated == 0 || float64(s.Used+reserve) < nearlyFull*float64(s.Allocated) {
			continue
		}
		// One chunk is at most 10 % of the file system.
		chunk := int64(dataChunk)
		if t == ChunkMetadata {
			if chunk = metaChunk; size > largeFS {
				chunk = metaChunkLarge
			}
		}
		if u.Unallocated() >= min(chunk, size/10)*s.Type.copies() {
			continue
		}
		e := Exhaustion{Type: t, Free: max(0, s.Allocated-s.Used-reserve)}
		name := strings.ToLower(t.Kind())
		e.Text = fmt.Sprintf("%s chunks are nearly full (%d of %d bytes) and only %d bytes are unallocated",
			name, s.Used+reserve, s.Allocated, u.Unallocated())
		for _, o := range []struct {
			t    ChunkType
			flag string
		}{{ChunkData, "-dusage"}, {ChunkMetadata, "-musage"}} {
			other := u.of(o.t)
			if o.t == t || s.Type&o.t != 0 || other.Allocated == 0 {
				continue
			}
			if used := float64(other.Used) / float64(other.Allocated); used < worthBalance {
				e.Command = fmt.Sprintf("btrfs balance start %s=%d %s", o.flag, usageFilter(used), u.Balance)
			}
		}
		if e.Command != "" {
			e.Text += "; this gives chunks back: " + e.Command
		} else {
			e.Text += "; remove files or add a device"
		}
		return e, true
	}
	return Exhaustion{}, false
}

// usageFilter returns how full chunks may be to be moved. Half as much again
// as the average takes most of them and leaves those that are worth little.
func usageFilter(used float64) int { return min(90, max(10, int(used*150))) }
