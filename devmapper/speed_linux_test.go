package devmapper

import (
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestSpeed measures what this package promises about time, prints it, and
// fails if it is not so. On a machine that does something else it says nothing:
//
//	LAYERFS_IDLE=1 go test -v -run TestSpeed ./devmapper
//
// Lines that begin with "goal:" are rows of the table of scripts/bench.
func TestSpeed(t *testing.T) {
	testenv.RequireIdle(t)
	ctx := t.Context()
	t.Run("create", func(t *testing.T) {
		d := benchDriver(t, small())
		create(t, d, "base", "")
		s := newSnapshotter(t, d, "base")
		n := 0
		took := measure(12, func() {
			require.NoError(t, d.Create(ctx, "c"+strconv.Itoa(n), "base", nil))
			n++
		}, s.create)
		faster(t, "Create", "dmsetup, in the order of containerd", took[0], took[1], 5)
	})
	// The kernel's own removal is later than Put. What waits for it, as the
	// bare sequence does, is the fair pair.
	for _, waits := range []bool{true, false} {
		what := "Get and Put, the kernel removes the device later"
		if waits {
			what = "Get and Put, NoDeferredRemoval"
		}
		t.Run(fmt.Sprintf("get-put/waits=%t", waits), func(t *testing.T) {
			o := small()
			o.NoDeferredRemoval, o.NoDeferredDeletion = waits, waits
			d := benchDriver(t, o)
			create(t, d, "a", "")
			took := measure(40, func() {
				_, err := d.Get(ctx, "a", nil)
				require.NoError(t, err)
				require.NoError(t, d.Put(ctx, "a"))
			}, bareMount(t, d, "a"))
			asLong(t, what, "bare activation, mount, unmount, removal", took[0], took[1], 1.3)
		})
	}
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run("changes-"+fs, func(t *testing.T) {
			x := newManyFiles(t, fs, 60000)
			// One walk takes as long as many native rounds, which are before
			// and after it.
			before := measure(3, x.native)[0]
			walk := measure(1, x.walk)[0]
			after := measure(3, x.native)[0]
			faster(t, "Changes, 3 of 60,000 files, "+fs, "double walk", (before+after)/2, walk, 10)
		})
	}
	t.Run("blocks", func(t *testing.T) {
		x := newLargeLayer(t)
		reads := make(map[int]int64)
		for _, changed := range []int{1, 100, 1000} {
			id := x.child(changed)
			took := measure(10, func() { x.diff(id, changed) })[0]
			reads[changed] = x.reads(id)
			const wanted = 50 * time.Millisecond
			what, against := fmt.Sprintf("BlockDiff of 10 GiB, %d changed", changed), fmt.Sprintf("%d metadata reads", reads[changed])
			if changed == 100 {
				testenv.Goal(what, milliseconds(took), against, "", "< 50 ms", took < wanted)
				require.Less(t, took, wanted)
			} else {
				fmt.Printf("goal: | %s | %s | %s | | | |\n", what, milliseconds(took), against)
			}
		}
		require.Less(t, reads[1], reads[100]/4)
		require.Less(t, reads[100], reads[1000])
	})
}

// faster prints and tests how many times faster one is than the other.
func faster(t *testing.T, what, against string, took, other time.Duration, wanted float64) {
	t.Helper()
	r := ratio(other, took)
	testenv.Goal(what, milliseconds(took), against+": "+milliseconds(other), fmt.Sprintf("%.1f faster", r), fmt.Sprintf("≥ %g", wanted), r >= wanted)
	require.GreaterOrEqual(t, r, wanted)
}

// asLong prints and tests how many times as long one takes as the other.
func asLong(t *testing.T, what, against string, took, other time.Duration, wanted float64) {
	t.Helper()
	r := ratio(took, other)
	testenv.Goal(what, milliseconds(took), against+": "+milliseconds(other), fmt.Sprintf("%.2f", r), fmt.Sprintf("≤ %g", wanted), r <= wanted)
	require.LessOrEqual(t, r, wanted)
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1000) }

// measure returns the median time of each function. They take turns, so that
// what else the machine does meets them all.
func measure(rounds int, fns ...func()) []time.Duration {
	all := make([][]time.Duration, len(fns))
	for range rounds {
		for i, fn := range fns {
			start := time.Now()
			fn()
			all[i] = append(all[i], time.Since(start))
		}
	}
	medians := make([]time.Duration, len(fns))
	for i, took := range all {
		slices.Sort(took)
		medians[i] = took[len(took)/2].Round(10 * time.Microsecond)
	}
	return medians
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }
