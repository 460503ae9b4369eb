package devmapper

import (
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSpeed measures what this package promises about time, prints it, and
// fails if it is not so. On a machine that does something else it says nothing:
//
//	LAYERFS_IDLE=1 go test -v -run TestSpeed ./devmapper
func TestSpeed(t *testing.T) {
	if os.Getenv("LAYERFS_IDLE") == "" {
		t.Skip("compares times, which other work on the machine spoils; LAYERFS_IDLE=1 runs it")
	}
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
		t.Logf("create: %v; by dmsetup, as containerd does it: %v; %.1f times faster", took[0], took[1], ratio(took[1], took[0]))
		require.GreaterOrEqual(t, ratio(took[1], took[0]), 5.0)
	})
	t.Run("get-put", func(t *testing.T) {
		d := benchDriver(t, small())
		create(t, d, "a", "")
		took := measure(40, func() {
			_, err := d.Get(ctx, "a", nil)
			require.NoError(t, err)
			require.NoError(t, d.Put(ctx, "a"))
		}, bareMount(t, d, "a"))
		t.Logf("get and put: %v; activate, mount, unmount and remove: %v; %.2f times as long", took[0], took[1], ratio(took[0], took[1]))
		require.LessOrEqual(t, ratio(took[0], took[1]), 1.3)
	})
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run("changes-"+fs, func(t *testing.T) {
			const files = 60000
			x := newManyFiles(t, fs, files)
			native := measure(5, x.native)[0]
			walk := measure(1, x.walk)[0]
			t.Logf("three changed files of %d on %s: %v; by a walk over both trees: %v; %.0f times faster", files, fs, native, walk, ratio(walk, native))
			require.GreaterOrEqual(t, ratio(walk, native), 10.0)
		})
	}
	t.Run("blocks", func(t *testing.T) {
		x := newLargeLayer(t)
		reads := make(map[int]int64)
		for _, changed := range []int{1, 100, 1000} {
			id := x.child(changed)
			took := measure(10, func() { x.diff(id, changed) })[0]
			reads[changed] = x.reads(id)
			t.Logf("%d changed blocks of a layer of 10 GiB: %v, %d blocks of metadata read", changed, took, reads[changed])
			if changed == 100 {
				require.Less(t, took, 50*time.Millisecond)
			}
		}
		require.Less(t, reads[1], reads[100]/4)
		require.Less(t, reads[100], reads[1000])
	})
}

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
