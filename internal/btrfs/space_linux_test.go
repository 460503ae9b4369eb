package btrfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
)

// mountDevices returns the root of a new file system on several loop devices of
// sizes in MiB.
func mountDevices(tb testing.TB, mkfsArgs []string, sizes ...int) string {
	tb.Helper()
	testenv.RequireRoot(tb)
	mkfs := testenv.RequireTool(tb, "mkfs.btrfs", "btrfs")
	tool := testenv.RequireTool(tb, "btrfs", "btrfs")
	dir := filepath.Join(tb.TempDir(), "fs")
	check(tb, os.Mkdir(dir, 0o755))
	var devices, opts []string
	for i, mib := range sizes {
		image := filepath.Join(filepath.Dir(dir), fmt.Sprint("image", i))
		check(tb, os.WriteFile(image, nil, 0o600))
		check(tb, os.Truncate(image, int64(mib)<<20))
		d, err := loop.Attach(tb.Context(), image, nil)
		testenv.SkipUnsupported(tb, err, "btrfs")
		check(tb, err)
		tb.Cleanup(func() { check(tb, d.Detach()) })
		devices = append(devices, d.Path())
		opts = append(opts, "device="+d.Path())
	}
	args := append(append([]string{"-q", "-f"}, mkfsArgs...), devices...)
	if out, err := exec.Command(mkfs, args...).CombinedOutput(); err != nil {
		tb.Fatalf("mkfs.btrfs %q: %v\n%s", args, err, out)
	}
	// The kernel would remember the devices of a file system that is gone.
	tb.Cleanup(func() {
		for _, d := range devices {
			out, err := exec.Command(tool, "device", "scan", "--forget", d).CombinedOutput()
			require.NoError(tb, err, "%s", out)
		}
	})
	check(tb, mount.Mount("btrfs", devices[0], dir, 0, opts))
	tb.Cleanup(func() { check(tb, mount.UnmountNow(dir)) })
	return dir
}

// usageOf returns what "btrfs filesystem usage" says: allocated and used bytes of
// each type and profile, the bytes it takes on each device, and what is
// unallocated there.
func usageOf(tb testing.TB, mnt string) (spaces map[string][2]int64, onDevices map[string]int64, unallocated map[string]int64) {
	tb.Helper()
	tool := testenv.RequireTool(tb, "btrfs", "btrfs")
	out, err := exec.CommandContext(tb.Context(), tool, "filesystem", "usage", "-b", mnt).Output()
	check(tb, err)
	spaces, onDevices, unallocated = map[string][2]int64{}, map[string]int64{}, map[string]int64{}
	head := regexp.MustCompile(`^(\w+),(\w+): Size:(\d+), Used:(\d+)`)
	device := regexp.MustCompile(`^\s+(/dev/\S+)\s+(\d+)$`)
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		check(tb, err)
		return n
	}
	section := ""
	for line := range bytes.Lines(out) {
		line := strings.TrimRight(string(line), "\n")
		if m := head.FindStringSubmatch(line); m != nil {
			section = m[1] + ", " + m[2]
			spaces[section] = [2]int64{number(m[3]), number(m[4])}
		} else if m := device.FindStringSubmatch(line); m != nil && section == "" {
			unallocated[m[1]] = number(m[2])
		} else if m != nil {
			onDevices[section] += number(m[2])
		} else if strings.HasPrefix(line, "Unallocated:") {
			section = ""
		}
	}
	require.NotEmpty(tb, spaces, "%s", out)
	require.NotEmpty(tb, unallocated, "%s", out)
	return spaces, onDevices, unallocated
}

// TestUsageProfiles compares with the btrfs program what chunks take on devices.
func TestUsageProfiles(t *testing.T) {
	const kernelOfRAID10 = 4 // devices, before 5.15
	for _, c := range []struct {
		data, meta string
		devices    int
	}{
		{"single", "dup", 1},
		{"dup", "single", 1},
		{"raid0", "raid1", 3},
		{"raid1", "raid1", 2},
		{"raid10", "raid10", kernelOfRAID10},
		{"raid1c3", "raid1c4", 4},
		{"raid5", "raid6", 4},
	} {
		t.Run(c.data+"-"+c.meta, func(t *testing.T) {
			sizes := make([]int, c.devices)
			for i := range sizes {
				sizes[i] = 300 + 100*i
			}
			mnt := mountDevices(t, []string{"-d", c.data, "-m", c.meta}, sizes...)
			check(t, fill(filepath.Join(mnt, "f"), 20<<20))
			check(t, Sync(mnt))
			u, err := ReadUsage(mnt, true)
			check(t, err)
			require.True(t, u.agrees(), "chunk tree against device tree: %+v", u)
			spaces, onDevices, unallocated := usageOf(t, mnt)
			seen := 0
			for _, s := range u.Spaces {
				if s.Type&ChunkReserve != 0 {
					continue
				}
				seen++
				name := s.Type.String()
				require.Equal(t, spaces[name], [2]int64{s.Allocated, s.Used}, "%s of %v", name, spaces)
				require.Equal(t, onDevices[name], s.OnDevices, "%s of %v", name, onDevices)
			}
			require.Len(t, spaces, seen)
			require.Len(t, u.Devices, c.devices)
			for _, d := range u.Devices {
				require.Equal(t, unallocated[d.Path], d.Unallocated(), "%v", unallocated)
			}
		})
	}
}

// TestExhaustionRAID1: a small device that is full stops a large one that is not.
func TestExhaustionRAID1(t *testing.T) {
	mnt := mountDevices(t, []string{"-d", "raid1", "-m", "raid1"}, 300, 1500)
	var e Exhaustion
	written, near := 0, false
	for ; !near; written++ {
		require.NoError(t, fill(fmt.Sprint(mnt, "/", written), 4<<20), "no warning before that")
		check(t, Sync(mnt))
		u, err := ReadUsage(mnt, false)
		check(t, err)
		e, near = u.Exhaustion()
		if near {
			require.Greater(t, u.Unallocated(), int64(1<<30), "on the large device")
		}
	}
	require.Equal(t, ChunkData, e.Type)
	require.Contains(t, e.Text, "RAID1, which takes 2 or more devices")
	require.Empty(t, e.Command, "one chunk of metadata cannot become fewer")
	require.Greater(t, written, 4, "there was room for another chunk")
	// It was right: no further chunk is made.
	before, err := ReadUsage(mnt, false)
	check(t, err)
	for err = error(nil); err == nil; written++ {
		err = fill(fmt.Sprint(mnt, "/", written), 4<<20)
	}
	require.True(t, errors.Is(err, unix.ENOSPC), "%v", err)
	after, err := ReadUsage(mnt, false)
	check(t, err)
	require.Less(t, after.of(ChunkData).Allocated-before.of(ChunkData).Allocated, int64(150<<20))
}
