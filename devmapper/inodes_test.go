package devmapper

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestExt4Inodes compares where inodes are with what debugfs says.
func TestExt4Inodes(t *testing.T) {
	mkfs := testenv.RequireTool(t, "mkfs.ext4")
	debugfs := testenv.RequireTool(t, "debugfs")
	for _, args := range []string{"", "-b 1024", "-b 2048 -I 128", "-O ^64bit", "-O ^flex_bg,^resize_inode", "-b 4096 -I 512 -N 5000", "-O ^metadata_csum"} {
		t.Run(args, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			require.NoError(t, os.WriteFile(image, nil, 0o600))
			require.NoError(t, os.Truncate(image, 300<<20))
			out, err := exec.Command(mkfs, append(strings.Fields("-q -F "+args), image)...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			f, err := os.Open(image)
			require.NoError(t, err)
			defer f.Close()
			s, err := parseSuper(f, "ext4")
			require.NoError(t, err)
			require.Empty(t, s.why)
			uuid, err := exec.Command(debugfs, "-R", "show_super_stats -h", image).Output()
			require.NoError(t, err)
			require.Contains(t, string(uuid), s.uuid)
			spans, err := s.fs.spans(f, nil)
			require.NoError(t, err)
			size, e := s.fs.inodeSize(), s.fs.(*ext4)
			for _, ino := range []int64{1, 2, 11, e.perGroup, e.perGroup + 1, e.perGroup * (e.groups - 1), e.perGroup * e.groups} {
				out, err := exec.Command(debugfs, "-R", fmt.Sprintf("imap <%d>", ino), image).Output()
				require.NoError(t, err)
				m := regexp.MustCompile(`located at block (\d+), offset 0x([0-9a-f]+)`).FindSubmatch(out)
				require.NotNil(t, m, "%s", out)
				block, _ := strconv.ParseInt(string(m[1]), 10, 64)
				within, _ := strconv.ParseInt(string(m[2]), 16, 64)
				i := slices.IndexFunc(spans, func(s span) bool { return uint64(ino) >= s.first && uint64(ino) < s.first+uint64(s.length/size) })
				require.GreaterOrEqual(t, i, 0, "inode %d", ino)
				require.Equal(t, block*e.blockSize+within, spans[i].offset+(ino-int64(spans[i].first))*size, "inode %d", ino)
			}
		})
	}
}

func TestExt4Refuses(t *testing.T) {
	good := make([]byte, 1024)
	put := func(b []byte, off int, v uint32) []byte {
		c := bytes.Clone(b)
		binary.LittleEndian.PutUint32(c[off:], v)
		return c
	}
	good = put(good, 4, 100000)      // blocks
	good = put(good, 0x18, 2)        // 4 KiB
	good = put(good, 0x20, 32768)    // blocks of a group
	good = put(good, 0x28, 8192)     // inodes of a group
	good = put(good, 0x4c, 1)        // revision
	good = put(good, 0x58, 256)      // size of an inode
	good = put(good, 0x60, 0x80)     // 64bit
	good = put(good, 0xfe-2, 64<<16) // size of a descriptor
	e, err := newExt4(good)
	require.NoError(t, err)
	require.Equal(t, int64(4), e.groups)
	for name, b := range map[string][]byte{
		"meta-bg": put(good, 0x60, 0x90), "block": put(good, 0x18, 40), "inode": put(good, 0x58, 100), "inode-large": put(good, 0x58, 8192),
		"descriptor": put(good, 0xfe-2, 32<<16), "no-groups": put(good, 0x20, 0), "no-inodes": put(good, 0x28, 0),
		"no-blocks": put(good, 4, 0), "huge": put(good, 0x150, 1<<20), "many": put(put(good, 0x150, 1<<10), 0x20, 8),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newExt4(b)
			require.Error(t, err)
		})
	}
}

func FuzzSuper(f *testing.F) {
	f.Add([]byte("XFSB"))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = append(b, make([]byte, 8192)...)
		for _, fs := range []string{"ext4", "xfs"} {
			s, err := parseSuper(bytes.NewReader(b), fs)
			if err != nil || s.fs == nil {
				continue
			}
			require.Positive(t, s.fs.inodeSize())
			_, _ = s.fs.spans(bytes.NewReader(b), func() ([]uint64, error) { return []uint64{0, 64, 1 << 40}, nil })
		}
	})
}

// TestChangedInodes: ranges that cut inodes and spans, and devices that differ
// in size.
func TestChangedInodes(t *testing.T) {
	const inode = 256
	older := make([]byte, 64<<10)
	newer := make([]byte, 96<<10)
	spans := []span{{offset: 4096, length: 16 * inode, first: 1}, {offset: 32768, length: 16 * inode, first: 17}, {offset: 80 << 10, length: 16 * inode, first: 33}}
	newer[4096+3*inode+5] = 1 // inode 4
	newer[4096+9*inode] = 1   // inode 10, in no range
	newer[32768+15*inode] = 1 // inode 32
	newer[20000] = 1          // no inode
	got, err := changedInodes(bytes.NewReader(older), bytes.NewReader(newer), int64(len(older)), inode, spans,
		[]extent{{0, 4096 + 3*inode + 6}, {20000, 8}, {32768 + 15*inode + 100, 300}, {80<<10 + inode, inode}})
	require.NoError(t, err)
	require.Equal(t, map[uint64]struct{}{4: {}, 32: {}, 34: {}}, got)
	spans[0].all = true
	got, err = changedInodes(bytes.NewReader(older), bytes.NewReader(newer), int64(len(older)), inode, spans, []extent{{4096, inode + 1}})
	require.NoError(t, err)
	require.Equal(t, map[uint64]struct{}{1: {}, 2: {}}, got)
	_, err = changedInodes(bytes.NewReader(older), bytes.NewReader(newer[:4096]), int64(len(older)), inode, spans, []extent{{4096, inode}})
	require.Error(t, err)
}
