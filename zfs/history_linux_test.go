package zfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/btrfs/btrfstest"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// perBatch is how many histories take place in the same layers, each in a
// directory of its own: calls of zfs are what layers cost.
const perBatch = 256

// TestRandomHistories makes random changes in layers, and compares what zfs tells
// with a double walk, and the tree with what Diff makes of its base in a
// directory elsewhere. LAYERFS_SEED=n LAYERFS_HISTORIES=1 repeats history n.
func TestRandomHistories(t *testing.T) {
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{Durability: layerfs.DurabilityNone})
	requireNative(t, d)
	const few = 24
	number := few
	if testing.Short() {
		number = 10 * few // of which Seeds takes a tenth: all of a plot share their layers
	}
	first, end := btrfstest.Seeds(t, number)
	all, start := newTally(), time.Now()
	seeds := map[plot][]uint64{}
	for seed := first; seed < end; seed++ {
		p := plot(seed % plots)
		seeds[p] = append(seeds[p], seed)
	}
	elsewhere := testenv.Tmpfs(t, "size=768m")
	for p := range plot(plots) {
		for part := range slices.Chunk(seeds[p], perBatch) {
			b := newBatch(t, d, elsewhere, part, all)
			if err := b.run(p); err != nil {
				b.fail(err)
			}
			t.Logf("%v: %d histories, %v", time.Since(start).Round(time.Second), all.histories, all)
		}
	}
	require.Empty(t, layersOf(t, d))
	require.NotZero(t, all.compared)
	require.Zero(t, all.declined, "comparisons that zfs was of no use for: %v", all.reasons)
	if end-first < few {
		return // a few alone can have any kinds of changes
	}
	for _, k := range []layerfs.Kind{layerfs.Added, layerfs.Modified, layerfs.Deleted} {
		require.NotZero(t, all.kinds[k], "no %v in all histories", k)
	}
}

// plot is what happens to the layers of a batch.
type plot int

const (
	goesOn     plot = iota // a layer is compared twice
	secondOne              // a second layer is compared with both below
	rolledBack             // a layer goes back to its base and begins anew
	plots      = iota
)

// tally counts what was compared, and what time went by where.
type tally struct {
	histories                   int
	compared, applied, declined int
	reasons                     map[string]int
	kinds                       map[layerfs.Kind]int
	took                        map[string]time.Duration
}

func newTally() *tally {
	return &tally{reasons: map[string]int{}, kinds: map[layerfs.Kind]int{}, took: map[string]time.Duration{}}
}

func (y *tally) String() string {
	s := fmt.Sprintf("%d comparisons, %d declined, %d diffs applied, %v;", y.compared, y.declined, y.applied, y.kinds)
	for _, what := range slices.Sorted(maps.Keys(y.took)) {
		s += fmt.Sprintf(" %s %v", what, y.took[what].Round(100*time.Millisecond))
	}
	return s
}

// timed adds the time since start to a kind of work.
func (y *tally) timed(what string, start time.Time) { y.took[what] += time.Since(start) }

// batch is some histories that take place in the same layers.
type batch struct {
	*testing.T
	d         *Driver
	elsewhere string // a directory of another file system
	all       *tally
	histories []*history
}

// history is one of a batch.
type history struct {
	seed  uint64
	dir   string // its directory in each layer: "/" and the seed
	steps *btrfstest.History
	log   []string
}

func newBatch(t *testing.T, d *Driver, elsewhere string, seeds []uint64, all *tally) *batch {
	b := &batch{T: t, d: d, elsewhere: elsewhere, all: all}
	for _, seed := range seeds {
		b.histories = append(b.histories, &history{seed: seed, dir: "/" + strconv.FormatUint(seed, 10), steps: btrfstest.New(seed, "")})
	}
	return b
}

// failure is the error of one history.
type failure struct {
	*history
	err error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// fail tells which history went wrong and what it did. Where the error is not of
// one, the path in it tells.
func (b *batch) fail(err error) {
	b.Helper()
	of := func(h *history) {
		b.Helper()
		b.Fatalf("LAYERFS_SEED=%d LAYERFS_HISTORIES=1: %v\n%s", h.seed, err, strings.Join(h.log, "\n"))
	}
	if f, ok := errors.AsType[*failure](err); ok {
		of(f.history)
	}
	for _, h := range b.histories {
		if strings.Contains(err.Error()+"/", h.dir+"/") {
			of(h)
		}
	}
	b.Fatalf("%d histories from %d on: %v", len(b.histories), b.histories[0].seed, err)
}

// each calls fn for all histories, two at a time.
func (b *batch) each(fn func(h *history) error) error {
	var g errgroup.Group
	g.SetLimit(2)
	for _, h := range b.histories {
		g.Go(func() error {
			if err := fn(h); err != nil {
				return &failure{h, err}
			}
			return nil
		})
	}
	return g.Wait()
}

// run makes the layers, checks and removes them.
func (b *batch) run(p plot) error {
	b.all.histories += len(b.histories)
	if err := b.layer(func(ctx context.Context) error { return b.d.Create(ctx, "base", "", nil) }); err != nil {
		return err
	}
	if err := b.fillBase(); err != nil {
		return err
	}
	if err := b.layer(func(ctx context.Context) error { return b.d.Create(ctx, "layer", "base", nil) }); err != nil {
		return err
	}
	if err := b.fill("layer", 1); err != nil {
		return err
	}
	last, err := b.play(p)
	if err != nil {
		return err
	}
	if err := b.checkDiff(last, "base"); err != nil {
		return err
	}
	for _, id := range []string{"top", "layer", "base"} {
		if id == "top" && last != id {
			continue
		}
		if err := b.layer(func(ctx context.Context) error { return b.d.Remove(ctx, id) }); err != nil {
			return err
		}
	}
	return nil
}

// play goes on after the first changes, and returns the layer that was made
// last.
func (b *batch) play(p plot) (last string, err error) {
	switch p {
	case goesOn:
		if err := b.checkChanges("layer", "base"); err != nil {
			return "", err
		}
	case secondOne:
		if err := b.layer(func(ctx context.Context) error { return b.d.Create(ctx, "top", "layer", nil) }); err != nil {
			return "", err
		}
		if err := b.fill("top", 1); err != nil {
			return "", err
		}
		return "top", b.checkChanges("top", "layer", "base")
	case rolledBack:
		if err := b.layer(func(ctx context.Context) error { return b.d.Rollback(ctx, "layer") }); err != nil {
			return "", err
		}
	}
	if err := b.fill("layer", 1); err != nil {
		return "", err
	}
	return "layer", b.checkChanges("layer", "base")
}

// layer calls fn, which makes or removes a layer.
func (b *batch) layer(fn func(context.Context) error) error {
	defer b.all.timed("layers", time.Now())
	return fn(b.Context())
}

// fillBase makes what the histories begin with.
func (b *batch) fillBase() error {
	path, err := b.d.Get(b.Context(), "base", nil)
	if err != nil {
		return err
	}
	for _, h := range b.histories {
		if err := os.Mkdir(path+h.dir, 0o755); err != nil {
			return err
		}
	}
	if err := b.d.Put(b.Context(), "base"); err != nil {
		return err
	}
	return b.fill("base", 10)
}

// fill changes a layer by some steps of each history, without what tar cannot
// hold.
func (b *batch) fill(id string, least int) error {
	defer b.all.timed("steps", time.Now())
	path, err := b.d.Get(b.Context(), id, nil)
	if err != nil {
		return err
	}
	err = b.each(func(h *history) error {
		h.steps.Log = nil
		h.steps.Move(path + h.dir)
		for range least + h.steps.N(16) {
			h.steps.Step()
		}
		h.log = append(append(h.log, id+":"), h.steps.Log...)
		return filepath.WalkDir(path+h.dir, func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.Type() == fs.ModeSocket {
				err = os.Remove(p)
			}
			return err
		})
	})
	return errors.Join(err, b.d.Put(b.Context(), id))
}

// viewed calls fn with two layers shown.
func (b *batch) viewed(id, base string, fn func(older, newer string) error) (err error) {
	var paths []string
	for _, l := range []string{base, id} {
		rec, err := b.d.m.dir.Load(l)
		if err != nil {
			return err
		}
		v, err := b.d.m.View(b.Context(), lifecycle.Chain{rec})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, v.Release()) }()
		paths = append(paths, v.Path)
	}
	return fn(paths[0], paths[1])
}

// checkChanges compares what zfs tells of a layer against each of its ancestors,
// from the nearest on, with double walks.
func (b *batch) checkChanges(id string, ancestors ...string) error {
	for i, base := range ancestors {
		list, err := b.native(append([]string{id}, ancestors[:i+1]...))
		if err == nil {
			err = b.viewed(id, base, func(older, newer string) error {
				defer b.all.timed("walks", time.Now())
				return b.checkList(list, older, newer)
			})
		}
		if err != nil {
			return fmt.Errorf("changes of %s against %s: %w", id, base, err)
		}
	}
	return nil
}

// native returns the changes by zfs diff. Where the driver declines, its own walk
// must be right.
func (b *batch) native(ids []string) (list []layerfs.Change, err error) {
	defer b.all.timed("native", time.Now())
	b.all.compared += len(b.histories)
	list, err = b.d.m.nativeChanges(b.Context(), chainOf(b, b.d, ids...), len(ids)-1)
	if errors.Is(err, lifecycle.ErrDecline) {
		b.all.declined += len(b.histories)
		b.all.reasons[err.Error()]++
		list, err = nil, nil
		for c, err := range b.d.Changes(b.Context(), ids[0], ids[len(ids)-1]) {
			if err != nil {
				return nil, err
			}
			list = append(list, c)
		}
	}
	for _, c := range list {
		b.all.kinds[c.Kind]++
	}
	return list, err
}

// checkList compares the changes of each history with those of two trees.
func (b *batch) checkList(list []layerfs.Change, older, newer string) error {
	for i, c := range list {
		if i > 0 && layerfs.ComparePaths(list[i-1].Path, c.Path) >= 0 {
			return fmt.Errorf("%v comes before %v", list[i-1], c)
		}
	}
	mine := make(map[*history][]layerfs.Change)
	found := 0
	for _, h := range b.histories {
		mine[h] = h.of(list)
		found += len(mine[h])
	}
	if found != len(list) {
		return fmt.Errorf("%d of %d changes are in no history's directory: %v", len(list)-found, len(list), list)
	}
	return b.each(func(h *history) error {
		want, err := tree.Changes(older+h.dir, newer+h.dir)
		if err != nil {
			return err
		}
		if w, g := tree.FormatChanges(want), tree.FormatChanges(mine[h]); w != g {
			return fmt.Errorf("changes:\n%s\nwant:\n%s", g, w)
		}
		return nil
	})
}

// of returns the changes in the directory of a history, with paths below it.
func (h *history) of(list []layerfs.Change) (mine []layerfs.Change) {
	for _, c := range list {
		if rest, ok := strings.CutPrefix(c.Path, h.dir); ok && (rest == "" || rest[0] == '/') {
			c.Path = cmp.Or(rest, "/")
			mine = append(mine, c)
		}
	}
	return mine
}

// checkDiff applies a diff to a copy of its base, in a directory that no zfs has
// made, and compares that with the layer.
func (b *batch) checkDiff(id, base string) (err error) {
	dir, err := os.MkdirTemp(b.elsewhere, "")
	if err != nil {
		return err
	}
	defer func() {
		defer b.all.timed("copies", time.Now())
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	start := time.Now()
	if err := b.apply(dir, base, ""); err != nil {
		return fmt.Errorf("copy of %s: %w", base, err)
	}
	b.all.timed("copies", start)
	start = time.Now()
	if err := b.apply(dir, id, base); err != nil {
		return fmt.Errorf("diff of %s against %s: %w", id, base, err)
	}
	b.all.timed("diffs", start)
	defer b.all.timed("compares", time.Now())
	b.all.applied += len(b.histories)
	return b.viewed(id, base, func(older, newer string) error {
		return b.each(func(h *history) error {
			diffs, err := compareTree(older+h.dir, newer+h.dir, dir+h.dir)
			if err == nil && len(diffs) > 0 {
				err = fmt.Errorf("diff of %s against %s applied elsewhere: %v", id, base, diffs)
			}
			return err
		})
	})
}

func (b *batch) apply(dir, id, base string) error {
	r, err := b.d.Diff(b.Context(), id, base, nil)
	if err != nil {
		return err
	}
	_, err = archive.Apply(b.Context(), dir, r, &archive.ApplyOptions{Form: archive.Merged})
	return errors.Join(err, r.Close())
}

// compareTree compares a tree with a copy that a diff was applied to.
func compareTree(older, newer, dir string) ([]tree.Difference, error) {
	diffs, err := tree.Compare(newer, dir, nil)
	if err != nil || len(diffs) == 0 {
		return nil, err
	}
	list, err := tree.Changes(older, newer)
	if err != nil {
		return nil, err
	}
	hidden, err := btrfstest.HiddenReplacement(older, newer, list)
	if err != nil || !hidden {
		return diffs, err
	}
	return tree.Compare(newer, dir, &tree.CompareOptions{IgnoreLinks: true})
}
