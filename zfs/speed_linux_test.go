package zfs

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/testenv"
)

// goal prints a row of the table of scripts/bench and returns whether the goal was
// reached.
func goal(what string, ours time.Duration, against string, theirs time.Duration, ratio float64, wanted string, reached bool) bool {
	const unit = 100 * time.Microsecond
	testenv.Goal(what, ours.Round(unit).String(), fmt.Sprintf("%s: %v", against, theirs.Round(unit)), fmt.Sprintf("%.2f", ratio), wanted, reached)
	return reached
}

// TestCreateCost: a first child costs no more than the three calls it is made
// of and a tenth. Rounds of both alternate, and their medians count.
func TestCreateCost(t *testing.T) {
	requireOpenZFS(t, "compares the cost of calls, which is the daemon's here")
	testenv.RequireIdle(t)
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := context.WithoutCancel(t.Context())
	require.NoError(t, d.Create(ctx, "base", "", nil))
	run := func(args ...string) {
		_, err := d.m.tool.run(ctx, args...)
		require.NoError(t, err)
	}
	var bare, ours []time.Duration
	for i := range 41 {
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
	x, y := bare[len(bare)/2], ours[len(ours)/2]
	ratio := func(x, y time.Duration) float64 { return float64(y) / float64(x) }
	t.Logf("three calls %v (fastest %v), Create %v (fastest %v), ratio %.2f (%.2f)", x, bare[0], y, ours[0], ratio(x, y), ratio(bare[0], ours[0]))
	if !goal("Create of a first child, median of 41", y, "its three calls", x, ratio(x, y), "≤ 1.1", ratio(x, y) <= 1.1) {
		t.Errorf("Create takes %v, its calls %v", y, x)
	}
}
