package btrfs

import (
	"cmp"
	"fmt"
	"slices"
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
func (t ChunkType) Profile() string { return t.profile().name }

// profile is how chunks lie on devices.
type profile struct {
	bit        ChunkType
	name       string
	perDevice  int64 // stripes of a chunk on each device
	least, all int   // devices a chunk takes: at least, and at most or 0 for any number
	step       int   // that number is a multiple of it
	copies     int64
	parity     int64 // stripes
}

// profile returns that of new chunks of a type. While a balance converts them
// there are chunks of several: the kernel then takes the first of these.
//
// Source: btrfs_raid_array and btrfs_reduce_alloc_profile (fs/btrfs/volumes.c,
// block-group.c, Linux 6.18). Before 5.15, RAID10 took four devices and RAID0 two.
func (t ChunkType) profile() profile {
	for _, p := range []profile{
		{chunkR1C4, "RAID1C4", 1, 4, 4, 4, 4, 0},
		{chunkRAID6, "RAID6", 1, 3, 0, 1, 1, 2},
		{chunkR1C3, "RAID1C3", 1, 3, 3, 3, 3, 0},
		{chunkRAID5, "RAID5", 1, 2, 0, 1, 1, 1},
		{chunkRAID10, "RAID10", 1, 2, 0, 2, 2, 0},
		{chunkRAID1, "RAID1", 1, 2, 2, 2, 2, 0},
		{chunkDUP, "DUP", 2, 1, 1, 1, 2, 0},
		{chunkRAID0, "RAID0", 1, 1, 0, 1, 1, 0},
	} {
		if t&p.bit != 0 {
			return p
		}
	}
	return profile{0, "single", 1, 1, 1, 1, 1, 0}
}

// largest returns how many bytes of content one chunk can have, at most, given
// what is free on each device, the most first. The size of a stripe is what the
// fullest of its devices has.
func (p profile) largest(free []int64) (most int64) {
	for n := p.least; n <= len(free) && (p.all == 0 || n <= p.all); n += p.step {
		stripe := free[n-1] / p.perDevice
		most = max(most, stripe*((int64(n)*p.perDevice-p.parity)/p.copies))
	}
	return most
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
	Balance string // path for the command of Exhaustion
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
// further chunk can be allocated: chunks of a type are 80 % full, and there are
// not as many devices with room for another as its profile takes. The second
// result is false if all is well. What is unallocated on a device counts as one
// piece; holes between chunks, into which a chunk fits only in part, are not known.
//
// df does not show this, as it counts the free bytes of data chunks even if it
// is metadata that has run out. The remedy is to move the content of chunks
// that are used little into others, if there are any.
func (u *Usage) Exhaustion() (Exhaustion, bool) {
	var size int64
	free := make([]int64, len(u.Devices))
	for i, d := range u.Devices {
		size += d.Size
		free[i] = d.Unallocated()
	}
	slices.SortFunc(free, func(a, b int64) int { return cmp.Compare(b, a) })
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
		p := s.Type.profile()
		if p.largest(free) >= chunkSize(t, size) {
			continue
		}
		e := Exhaustion{Type: t, Free: max(0, s.Allocated-s.Used-reserve)}
		name := strings.ToLower(t.Kind())
		e.Text = fmt.Sprintf("%s chunks are nearly full (%d of %d bytes) and only %d bytes are unallocated",
			name, s.Used+reserve, s.Allocated, u.Unallocated())
		if len(u.Devices) > 1 {
			e.Text = fmt.Sprintf("%s chunks are nearly full (%d of %d bytes), and another in %s, which takes %d or more devices, does not fit into the %d bytes that are unallocated on %d",
				name, s.Used+reserve, s.Allocated, p.name, p.least, u.Unallocated(), len(u.Devices))
		}
		for _, o := range []struct {
			t    ChunkType
			flag string
		}{{ChunkData, "-dusage"}, {ChunkMetadata, "-musage"}} {
			other := u.of(o.t)
			if o.t == t || s.Type&o.t != 0 || other.Allocated == 0 {
				continue
			}
			// The content of less than a chunk is moved into a new chunk.
			used := float64(other.Used) / float64(other.Allocated)
			if used < worthBalance && other.Allocated-other.Used >= chunkSize(o.t, size) {
				e.Command = fmt.Sprintf("btrfs balance start %s=%d %s", o.flag, usageFilter(used), shellWord(u.Balance))
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

// chunkSize returns how much a new chunk holds on a file system of a size: at
// most 10 % of that.
func chunkSize(t ChunkType, size int64) int64 {
	chunk := int64(dataChunk)
	if t == ChunkMetadata {
		if chunk = metaChunk; size > largeFS {
			chunk = metaChunkLarge
		}
	}
	return min(chunk, size/10)
}

// usageFilter returns how full chunks may be to be moved. Half as much again
// as the average takes most of them and leaves those that are worth little.
func usageFilter(used float64) int { return min(90, max(10, int(used*150))) }

// shellWord quotes what a POSIX shell would not take as one word.
func shellWord(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+:@%,"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
