package btrfs_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/internal/btrfs/btrfstest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// TestHistories makes random changes in stacks of three layers and compares,
// for each layer against each of its ancestors, the native Changes with a double
// walk, and the tree with what Diff makes of its base elsewhere.
// LAYERFS_SEED=n LAYERFS_HISTORIES=1 repeats history n.
func TestHistories(t *testing.T) {
	mnt := testenv.Btrfs(t, 2048, "-m single", "noatime")
	root := filepath.Join(mnt, "root")
	require.NoError(t, os.Mkdir(root, 0o755))
	d := mustNew(t, root, &btrfs.Options{Durability: layerfs.DurabilityNone})
	first, end := btrfstest.Seeds(t, 200)
	count := map[layerfs.Kind]int{}
	for seed := first; seed < end; seed++ {
		h := &histories{T: t, d: d, seed: seed, count: count}
		if err := h.run(); err != nil {
			t.Fatalf("LAYERFS_SEED=%d LAYERFS_HISTORIES=1: %v\n%s", seed, err, strings.Join(h.log, "\n"))
		}
	}
	t.Log(end-first, "histories with", count)
	for _, k := range []layerfs.Kind{layerfs.Added, layerfs.Modified, layerfs.Deleted} {
		require.NotZero(t, count[k], "no %v in all histories", k)
	}
	noSnapshots(t, root)
}

type histories struct {
	*testing.T
	d     *btrfs.Driver
	seed  uint64
	log   []string
	count map[layerfs.Kind]int
}

// run makes a stack, checks it, and removes it.
func (h *histories) run() error {
	ctx := h.Context()
	ids := []string{"base", "middle", "top"}
	parent := ""
	steps := btrfstest.New(h.seed, "")
	for i, id := range ids {
		if err := h.d.Create(ctx, id, parent, nil); err != nil {
			return err
		}
		if err := h.fill(steps, id, i); err != nil {
			return err
		}
		parent = id
	}
	if steps.N(4) == 0 {
		// Back to the parent, and on: the snapshot is another one now.
		if err := h.d.Rollback(ctx, "top"); err != nil {
			return err
		}
		if err := h.fill(steps, "top", 2); err != nil {
			return err
		}
	}
	for _, c := range []struct{ id, base string }{{"middle", "base"}, {"top", "middle"}, {"top", "base"}} {
		if err := h.check(c.id, c.base); err != nil {
			return fmt.Errorf("%s against %s: %w", c.id, c.base, err)
		}
	}
	for _, id := range []string{"top", "middle", "base"} {
		if err := h.d.Remove(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (h *histories) fill(steps *btrfstest.History, id string, level int) error {
	path, err := h.d.Get(h.Context(), id, nil)
	if err != nil {
		return err
	}
	n := 1 + steps.N(25)
	if level == 0 {
		n += 30
	}
	steps.Log = nil
	steps.Move(path)
	for range n {
		steps.Step()
	}
	h.log = append(append(h.log, id+":"), steps.Log...)
	return errors.Join(removeSockets(path), h.d.Put(h.Context(), id))
}

// removeSockets takes away what tar cannot hold. The tests of internal/btrfs
// leave it.
func removeSockets(root string) error {
	return filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err == nil && e.Type() == os.ModeSocket {
			err = os.Remove(p)
		}
		return err
	})
}

func (h *histories) check(id, base string) error {
	ctx := h.Context()
	info := map[string]string{}
	for _, l := range []string{id, base} {
		i, err := h.d.Stat(ctx, l, nil)
		if err != nil {
			return err
		}
		info[l] = i.Path
	}
	want, err := tree.Changes(info[base], info[id])
	if err != nil {
		return err
	}
	var got []layerfs.Change
	for c, err := range btrfs.Native(ctx, h.d, id, base) {
		if err != nil {
			return err
		}
		h.count[c.Kind]++
		got = append(got, c)
	}
	if w, g := tree.FormatChanges(want), tree.FormatChanges(got); w != g {
		return fmt.Errorf("changes:\n%s\nwant:\n%s", g, w)
	}
	if err := h.d.Create(ctx, "copy", base, nil); err != nil {
		return err
	}
	if err := h.transfer("copy", id, base); err != nil {
		return err
	}
	i, err := h.d.Stat(ctx, "copy", nil)
	if err != nil {
		return err
	}
	hidden, err := btrfstest.HiddenReplacement(info[base], info[id], got)
	if err != nil {
		return err
	}
	diffs, err := tree.Compare(info[id], i.Path, &tree.CompareOptions{IgnoreLinks: hidden})
	if err == nil && len(diffs) > 0 {
		err = fmt.Errorf("diff applied to %s: %v", base, diffs)
	}
	return errors.Join(err, h.d.Remove(ctx, "copy"))
}

func (h *histories) transfer(to, id, base string) (err error) {
	r, err := h.d.Diff(h.Context(), id, base, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	_, err = h.d.Apply(h.Context(), to, r, nil)
	return err
}

func mustNew(tb testing.TB, root string, opts *btrfs.Options) *btrfs.Driver {
	tb.Helper()
	d, err := btrfs.New(root, opts)
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, d.Close()) })
	return d
}

// noSnapshots makes sure that no temporary subvolume is left.
func noSnapshots(tb testing.TB, root string) {
	tb.Helper()
	for _, dir := range []string{"snapshots", "build"} {
		entries, err := os.ReadDir(filepath.Join(root, "btrfs", ".layerfs", dir))
		require.NoError(tb, err)
		require.Empty(tb, entries, dir)
	}
}
