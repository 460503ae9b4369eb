package btrfs

import (
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExhaustion(t *testing.T) {
	const g = int64(1) << 30
	u := func(dataAlloc, dataUsed, metaAlloc, metaUsed, size int64) *Usage {
		alloc := dataAlloc + 2*metaAlloc
		return &Usage{
			Balance: "/mnt",
			Spaces: []Space{
				{Type: ChunkData, Allocated: dataAlloc, Used: dataUsed},
				{Type: ChunkMetadata | chunkDUP, Allocated: metaAlloc, Used: metaUsed},
				{Type: ChunkMetadata | ChunkReserve, Allocated: g / 16},
			},
			Devices: []Device{{ID: 1, Size: size, Allocated: alloc}},
		}
	}
	for name, c := range map[string]struct {
		u       *Usage
		near    bool
		typ     ChunkType
		command string
	}{
		"empty":                  {u(g, 0, g, 0, 100*g), false, 0, ""},
		"full but room":          {u(g, g, g, g, 100*g), false, 0, ""},
		"metadata, data empty":   {u(94*g, 20*g, 3*g, 3*g-g/8, 100*g), true, ChunkMetadata, "btrfs balance start -dusage=31 /mnt"},
		"metadata, data full":    {u(94*g, 93*g, 3*g, 3*g-g/8, 100*g), true, ChunkMetadata, ""},
		"data, metadata wasted":  {u(50*g, 49*g, 25*g, 2*g, 100*g), true, ChunkData, "btrfs balance start -musage=12 /mnt"},
		"one chunk of metadata":  {u(98*g, 97*g, g, g/8, 100*g), true, ChunkData, ""},
		"room in both":           {u(94*g, 20*g, 3*g, g, 100*g), false, 0, ""},
		"reserve counts as used": {u(94*g, 20*g, 3*g, 3*g*85/100-g/32, 100*g), true, ChunkMetadata, "btrfs balance start -dusage=31 /mnt"},
	} {
		t.Run(name, func(t *testing.T) {
			e, near := c.u.Exhaustion()
			require.Equal(t, c.near, near, "%+v", e)
			require.Equal(t, c.typ, e.Type)
			require.Equal(t, c.command, e.Command)
			if near {
				require.Contains(t, e.Text, e.Command)
			}
		})
	}
	require.Equal(t, "Metadata, DUP", (ChunkMetadata | chunkDUP).String())
	require.Equal(t, "GlobalReserve, single", (ChunkMetadata | ChunkReserve).String())
	require.Equal(t, "Data+Metadata", (ChunkData | ChunkMetadata).Kind())
}

// TestExhaustionProfiles: what is unallocated counts only where the profile can
// use it. A chunk of data here has 1 GiB, as all file systems have 10 GiB at least.
func TestExhaustionProfiles(t *testing.T) {
	const g = int64(1) << 30
	for _, c := range []struct {
		profile ChunkType
		free    []int64 // on each device of 100 GiB
		near    bool
	}{
		{0, []int64{g}, false},
		{0, []int64{g - 1}, true},
		{0, []int64{g - 1, g - 1, g - 1}, true}, // three holes are no gibibyte in one piece
		{0, []int64{0, 0, g}, false},
		{chunkDUP, []int64{2 * g}, false},
		{chunkDUP, []int64{2*g - 2}, true},
		{chunkDUP, []int64{g, g}, true}, // both copies are on one device
		{chunkRAID0, []int64{g}, false},
		{chunkRAID0, []int64{g / 2, g / 2}, false},
		{chunkRAID0, []int64{g / 2, g / 4}, true},
		{chunkRAID0, []int64{g / 4, g, 0}, false}, // the kernel does without the others
		{chunkRAID1, []int64{g}, true},
		{chunkRAID1, []int64{0, 400 * g}, true},
		{chunkRAID1, []int64{g - 1, 400 * g}, true},
		{chunkRAID1, []int64{g, 400 * g}, false},
		{chunkRAID1, []int64{g, 0, g}, false},
		{chunkR1C3, []int64{400 * g, 0, 400 * g}, true},
		{chunkR1C3, []int64{400 * g, g, 400 * g}, false},
		{chunkR1C4, []int64{400 * g, 400 * g, 400 * g}, true},
		{chunkR1C4, []int64{400 * g, 400 * g, 400 * g, g - 1}, true},
		{chunkR1C4, []int64{400 * g, 400 * g, 400 * g, g}, false},
		{chunkRAID10, []int64{0, 400 * g}, true},
		{chunkRAID10, []int64{g, g}, false}, // two since 5.15
		{chunkRAID10, []int64{g / 2, g / 2, g / 2}, true},
		{chunkRAID10, []int64{g / 2, g / 2, g / 2, g / 2}, false},
		{chunkRAID5, []int64{400 * g}, true},
		{chunkRAID5, []int64{g, g}, false},
		{chunkRAID5, []int64{g / 2, g / 2, g / 2}, false},
		{chunkRAID5, []int64{g / 2, g / 2, 0}, true},
		{chunkRAID6, []int64{400 * g, 400 * g}, true},
		{chunkRAID6, []int64{g, g, g}, false},
		{chunkRAID6, []int64{g / 2, g / 2, g / 2}, true},
		{chunkRAID6, []int64{g / 2, g / 2, g / 2, g / 2}, false},
		{chunkRAID1 | chunkRAID0, []int64{0, g}, true}, // while it is converted, the kernel makes RAID1
	} {
		u := &Usage{Spaces: []Space{
			{Type: ChunkData | c.profile, Allocated: 10 * g, Used: 9 * g},
			{Type: ChunkMetadata | c.profile, Allocated: g, Used: g / 2},
		}}
		for i, free := range c.free {
			u.Devices = append(u.Devices, Device{ID: uint64(i + 1), Size: max(100*g, free), Allocated: max(100*g, free) - free})
		}
		e, near := u.Exhaustion()
		require.Equal(t, c.near, near, "%s %d: %+v", c.profile.Profile(), c.free, e)
		if near {
			require.Equal(t, ChunkData, e.Type)
			if len(c.free) > 1 {
				require.Contains(t, e.Text, c.profile.Profile())
			}
		}
	}
	require.Equal(t, "RAID1", (ChunkData | chunkRAID1 | chunkRAID0).Profile(), "while it is converted")
}

func TestShellWord(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	for _, c := range []struct{ in, want string }{
		{"/var/lib/layers-1", "/var/lib/layers-1"},
		{"", "''"},
		{"/a b", "'/a b'"},
		{"/it's", `'/it'\''s'`},
		{"/$(id)`id`\\;&|*?~#\n\"", "'/$(id)`id`\\;&|*?~#\n\"'"},
		{"~", "'~'"},
		{"/ü", "'/ü'"},
	} {
		require.Equal(t, c.want, shellWord(c.in))
		out, err := exec.Command(sh, "-c", "printf %s. "+c.want).Output()
		require.NoError(t, err)
		require.Equal(t, c.in+".", string(out))
	}
}
