package zfs

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/lifecycle"
)

// TestCreateCost: a first child costs no more than the three calls it is made
// of and a tenth. Rounds of both alternate, and the fastest of each
// counts, which other work on the machine spoils least.
func TestCreateCost(t *testing.T) {
	requireOpenZFS(t, "compares the cost of calls, which is the daemon's here")
	if os.Getenv("LAYERFS_IDLE") == "" {
		t.Skip("compares times, which other work on the machine spoils; LAYERFS_IDLE=1 runs it")
	}
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := context.WithoutCancel(t.Context())
	require.NoError(t, d.Create(ctx, "base", "", nil))
	run := func(args ...string) {
		_, err := d.m.tool.run(ctx, args...)
		require.NoError(t, err)
	}
	var bare, ours []time.Duration
	for i := range 21 {
		id, snap := fmt.Sprintf("bare%d", i), fmt.Sprintf("%s@bare%d", d.m.dataset("base"), i)
		props := d.m.properties(&lifecycle.Record{ID: id})
		start := time.Now()
		run("snapshot", snap)
		run(slices.Concat([]string{"clone"}, props, []string{snap, d.m.dataset(id)})...)
		run("destroy", "-d", snap)
		bare = append(bare, time.Since(start))
		run("destroy", d.m.dataset(id))

		id = fmt.Sprintf("ours%d", i)
		start = time.Now()
		require.NoError(t, d.Create(ctx, id, "base", nil))
		ours = append(ours, time.Since(start))
		require.NoError(t, d.Remove(ctx, id))
	}
	require.NoError(t, d.Remove(ctx, "base"))
	slices.Sort(bare)
	slices.Sort(ours)
	x, y := bare[0], ours[0]
	t.Logf("three calls %v (median %v), Create %v (median %v), ratio %.2f", x, bare[len(bare)/2], y, ours[len(ours)/2], float64(y)/float64(x))
	if float64(y) > 1.1*float64(x) {
		t.Errorf("Create takes %v, its calls %v", y, x)
	}
}
