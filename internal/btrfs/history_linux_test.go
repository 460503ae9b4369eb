package btrfs

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/btrfs/btrfstest"
	"github.com/layerfs/layerfs/internal/tree"
)

// TestChangesRandom compares Changes with the double walk over random
// histories. LAYERFS_SEED=n LAYERFS_HISTORIES=1 repeats history n.
func TestChangesRandom(t *testing.T) {
	mnt := mountBtrfs(t, 1024, "noatime")
	count := map[layerfs.Kind]int{}
	first, end := btrfstest.Seeds(t, 400)
	for s := first; s < end; s++ {
		root := filepath.Join(mnt, fmt.Sprint("h", s))
		oldSnap, newSnap := root+".old", root+".new"
		check(t, Create(root))
		h := btrfstest.New(s, root)
		for range 5 + h.N(60) {
			h.Step()
		}
		check(t, Snapshot(oldSnap, root, true))
		h.Log = nil
		for range 1 + h.N(25) {
			h.Step()
		}
		check(t, Snapshot(newSnap, root, true))
		want, err := tree.Changes(oldSnap, newSnap)
		check(t, err)
		got := collect(t, oldSnap, newSnap)
		require.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got), "seed %d:\n%s", s, strings.Join(h.Log, "\n"))
		require.True(t, slices.IsSortedFunc(got, func(a, b layerfs.Change) int { return layerfs.ComparePaths(a.Path, b.Path) }), "seed %d: %v", s, got)
		for _, c := range got {
			count[c.Kind]++
		}
		for _, p := range []string{root, oldSnap, newSnap} {
			check(t, Destroy(p))
		}
	}
	t.Log(count)
	for _, k := range []layerfs.Kind{layerfs.Added, layerfs.Modified, layerfs.Deleted} {
		require.NotZero(t, count[k], "no %v in all histories", k)
	}
}
