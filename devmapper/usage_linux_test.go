package devmapper

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// TestBlockUsage compares with what thin_ls says of the same metadata.
func TestBlockUsage(t *testing.T) {
	d, err := New(t.TempDir(), small()) // thin_ls reads around the page cache, which a tmpfs does not let it
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	defer d.Close()
	tool := testenv.RequireTool(t, "thin_ls", "devmapper")
	ctx := t.Context()
	create(t, d, "a", "")
	with(t, d, "a", func(path string) {
		for i := range 8 {
			write(t, fmt.Sprintf("%s/f%d", path, i), 1<<20, uint64(i))
		}
	})
	for i, id := range []string{"b", "c"} {
		create(t, d, id, "a")
		with(t, d, id, func(path string) {
			write(t, path+"/"+id, 2<<20, 1)
			require.NoError(t, os.Remove(fmt.Sprintf("%s/f%d", path, i)))
			_, err := d.Trim(ctx, id)
			require.NoError(t, err)
		})
	}
	create(t, d, "d", "c")
	with(t, d, "d", func(path string) {
		write(t, path+"/d", 3<<20, 1)
		u, err := d.BlockUsage(ctx, "d")
		require.NoError(t, err)
		require.GreaterOrEqual(t, u.Exclusive, int64(3<<20), "what is in memory counts")
	})
	got := make(map[uint32]BlockUsage)
	for _, id := range []string{"a", "b", "c", "d"} {
		u, err := d.BlockUsage(ctx, id)
		require.NoError(t, err)
		require.Positive(t, u.Exclusive)
		require.Greater(t, u.Mapped, u.Exclusive)
		dev, err := d.m.load(id)
		require.NoError(t, err)
		got[dev.ID] = u
	}
	_, err = d.BlockUsage(ctx, "none")
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	// thin_ls does not count exclusive blocks while the pool is active.
	require.NoError(t, d.Close())
	out, err := exec.Command(tool, "--no-headers", "-o", "DEV,MAPPED_BYTES,EXCLUSIVE_BYTES", d.m.metadataFile()).CombinedOutput()
	require.NoError(t, err, "%s", out)
	for line := range strings.Lines(string(out)) {
		var n uint32
		var want BlockUsage
		_, err := fmt.Sscan(line, &n, &want.Mapped, &want.Exclusive)
		require.NoError(t, err, "%s", out)
		if u, ok := got[n]; ok {
			require.Equal(t, want, u, "device %d", n)
			delete(got, n)
		}
	}
	require.Empty(t, got, "%s", out)
}

// TestIntersect compares with sets of single blocks.
func TestIntersect(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func() (list []blockRange, set map[uint64]bool) {
		set = make(map[uint64]bool)
		for at := uint64(r.IntN(4)); at < 60; {
			end := at + 1 + uint64(r.IntN(6))
			list = append(list, blockRange{at, end})
			for i := at; i < end; i++ {
				set[i] = true
			}
			at = end + uint64(r.IntN(5))
		}
		return list, set
	}
	for range 1000 {
		a, inA := random()
		b, inB := random()
		got := make(map[uint64]bool)
		last := uint64(0)
		for _, x := range intersect(a, b) {
			require.Less(t, x.begin, x.end)
			require.GreaterOrEqual(t, x.begin, last)
			last = x.end
			for i := x.begin; i < x.end; i++ {
				got[i] = true
			}
		}
		want := make(map[uint64]bool)
		for i := range inA {
			if inB[i] {
				want[i] = true
			}
		}
		require.Equal(t, want, got, "%v %v", a, b)
	}
}
