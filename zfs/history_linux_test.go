package zfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/btrfs/btrfstest"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// Calls of zfs are what a history costs, so some have the same base, and a layer
// is compared some times while it changes.
const (
	perBase  = 16
	perLayer = 4
)

// TestRandomHistories makes random changes in layers, and compares what zfs tells
// with a double walk, and the tree with what Diff makes of its base in a
// directory elsewhere. A quarter of the histories goes on in a second layer, a
// quarter goes back to the base and begins anew. LAYERFS_SEED=n
// LAYERFS_HISTORIES=1 repeats history n.
func TestRandomHistories(t *testing.T) {
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{Durability: layerfs.DurabilityNone})
	requireNative(t, d)
	h := &histories{T: t, d: d, elsewhere: testenv.Tmpfs(t, "size=512m"), count: map[layerfs.Kind]int{}}
	const few = 8
	first, end := btrfstest.Seeds(t, few)
	defer func() { t.Logf("%d comparisons, %d of them declined, with %v", h.compared, h.declined, h.count) }()
	for seed := first; seed < end; seed++ {
		h.log = nil
		if err := h.run(seed); err != nil {
			t.Fatalf("LAYERFS_SEED=%d LAYERFS_HISTORIES=1: %v\n%s", seed, err, strings.Join(append(h.baseLog, h.log...), "\n"))
		}
		if done := seed - first + 1; done%25 == 0 {
			t.Logf("%d histories: %d comparisons, %d declined", done, h.compared, h.declined)
		}
	}
	require.NoError(t, h.setBase(""))
	require.Empty(t, layersOf(t, d))
	if end-first < few {
		return // one alone can have any outcome
	}
	require.Less(t, h.declined, h.compared, "all comparisons were declined")
	for _, k := range []layerfs.Kind{layerfs.Added, layerfs.Modified, layerfs.Deleted} {
		require.NotZero(t, h.count[k], "no %v in all histories", k)
	}
}

type histories struct {
	*testing.T
	d                  *Driver
	elsewhere          string // a directory of another file system
	base               string
	content            []byte // of the base, as a tar stream, once it was needed
	baseLog, log       []string
	compared, declined int
	count              map[layerfs.Kind]int
}

// setBase makes the layer that histories begin with, and removes the former one.
func (h *histories) setBase(id string) error {
	if h.base == id {
		return nil
	}
	if h.base != "" {
		if err := h.d.Remove(h.Context(), h.base); err != nil {
			return err
		}
	}
	h.base, h.content, h.log = id, nil, nil
	if id == "" {
		return nil
	}
	var n uint64
	if _, err := fmt.Sscanf(id, "base%d", &n); err != nil {
		return err
	}
	if err := h.d.Create(h.Context(), id, "", nil); err != nil {
		return err
	}
	err := h.fill(btrfstest.New(n+1<<32, ""), id, 30)
	h.baseLog, h.log = h.log, nil
	return err
}

// run makes one history, checks it, and removes it.
func (h *histories) run(seed uint64) error {
	ctx := h.Context()
	if err := h.setBase(fmt.Sprint("base", seed/perBase)); err != nil {
		return err
	}
	steps := btrfstest.New(seed, "")
	if err := h.d.Create(ctx, "layer", h.base, nil); err != nil {
		return err
	}
	for i := range perLayer {
		if err := h.change(steps, "layer", i == 0, h.base); err != nil {
			return err
		}
	}
	switch steps.N(4) {
	case 0:
		if err := h.d.Rollback(ctx, "layer"); err != nil {
			return err
		}
		if err := h.change(steps, "layer", true, h.base); err != nil {
			return err
		}
	case 1:
		if err := h.d.Create(ctx, "top", "layer", nil); err != nil {
			return err
		}
		if err := h.change(steps, "top", true, "layer", h.base); err != nil {
			return err
		}
		if err := h.d.Remove(ctx, "top"); err != nil {
			return err
		}
	}
	return h.d.Remove(ctx, "layer")
}

// change changes a layer and compares it with its ancestors.
func (h *histories) change(steps *btrfstest.History, id string, diff bool, bases ...string) error {
	if err := h.fill(steps, id, 1); err != nil {
		return err
	}
	for _, base := range bases {
		if err := h.check(id, base, diff); err != nil {
			return fmt.Errorf("%s against %s: %w", id, base, err)
		}
	}
	return nil
}

// fill changes a layer by some steps, without what tar cannot hold.
func (h *histories) fill(steps *btrfstest.History, id string, least int) error {
	path, err := h.d.Get(h.Context(), id, nil)
	if err != nil {
		return err
	}
	steps.Log = nil
	steps.Move(path)
	for range least + steps.N(25) {
		steps.Step()
	}
	h.log = append(append(h.log, id+":"), steps.Log...)
	err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type() == fs.ModeSocket {
			err = os.Remove(p)
		}
		return err
	})
	return errors.Join(err, h.d.Put(h.Context(), id))
}

// check compares a layer with an ancestor. With diff, the stream is what Diff
// gives, and else the same made of the changes that were found already.
func (h *histories) check(id, base string, diff bool) (err error) {
	newer, err := h.view(id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, newer.Release()) }()
	older, err := h.view(base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, older.Release()) }()
	list, err := h.checkChanges(id, base, older.Path, newer.Path)
	if err != nil {
		return err
	}
	stream := func() (io.ReadCloser, error) { return h.d.Diff(h.Context(), id, base, nil) }
	if !diff {
		stream = func() (io.ReadCloser, error) {
			var b bytes.Buffer
			_, err := archive.WriteChanges(h.Context(), &b, newer.Path, each(list), nil)
			return io.NopCloser(&b), err
		}
	}
	return h.checkDiff(base, older.Path, newer.Path, list, stream)
}

func each(list []layerfs.Change) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		for _, c := range list {
			if !yield(c, nil) {
				return
			}
		}
	}
}

func (h *histories) view(id string) (lifecycle.View, error) {
	rec, err := h.d.m.dir.Load(id)
	if err != nil {
		return lifecycle.View{}, err
	}
	return h.d.m.View(h.Context(), lifecycle.Chain{rec})
}

// checkChanges compares what zfs tells with a double walk. Where the driver
// declines, its own walk must be right.
func (h *histories) checkChanges(id, base, older, newer string) (list []layerfs.Change, err error) {
	want, err := tree.Changes(older, newer)
	if err != nil {
		return nil, err
	}
	ids := []string{id, base}
	if id == "top" && base == h.base {
		ids = []string{id, "layer", base}
	}
	h.compared++
	list, err = h.d.m.nativeChanges(h.Context(), chainOf(h, h.d, ids...), len(ids)-1)
	how := "zfs diff"
	if errors.Is(err, lifecycle.ErrDecline) {
		h.declined++
		how, list, err = "walk", nil, nil
		for c, err := range h.d.Changes(h.Context(), id, base) {
			if err != nil {
				return nil, err
			}
			list = append(list, c)
		}
	}
	if err != nil {
		return nil, err
	}
	for _, c := range list {
		h.count[c.Kind]++
	}
	if w, g := tree.FormatChanges(want), tree.FormatChanges(list); w != g {
		return nil, fmt.Errorf("changes by %s:\n%s\nwant:\n%s", how, g, w)
	}
	return list, nil
}

// checkDiff applies a diff to a copy of the base, which no zfs has made.
func (h *histories) checkDiff(base, older, newer string, list []layerfs.Change, stream func() (io.ReadCloser, error)) (err error) {
	full := h.content
	if base != h.base || full == nil {
		var b bytes.Buffer
		if _, err := archive.Write(h.Context(), &b, older, nil); err != nil {
			return err
		}
		if full = b.Bytes(); base == h.base {
			h.content = full
		}
	}
	dir, err := os.MkdirTemp(h.elsewhere, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := h.apply(dir, bytes.NewReader(full)); err != nil {
		return fmt.Errorf("copy of %s: %w", base, err)
	}
	r, err := stream()
	if err != nil {
		return err
	}
	if err := errors.Join(h.apply(dir, r), r.Close()); err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	hidden, err := hiddenReplacement(older, newer, list)
	if err != nil {
		return err
	}
	diffs, err := tree.Compare(newer, dir, &tree.CompareOptions{IgnoreLinks: hidden})
	if err == nil && len(diffs) > 0 {
		err = fmt.Errorf("diff applied to %s: %v", base, diffs)
	}
	return err
}

func (h *histories) apply(dir string, r io.Reader) error {
	_, err := archive.Apply(h.Context(), dir, r, &archive.ApplyOptions{Form: archive.Merged})
	return err
}

// hiddenReplacement reports whether a file was replaced by an equal one. That is
// no change by the rules of layerfs.Change, so a diff cannot have it, and the
// names that were links of the file may be others than before.
func hiddenReplacement(older, newer string, list []layerfs.Change) (found bool, err error) {
	changed := map[string]bool{}
	for _, c := range list {
		changed[c.Path] = true
	}
	err = filepath.WalkDir(newer, func(p string, e fs.DirEntry, err error) error {
		path := strings.TrimPrefix(p, newer)
		if err != nil || e.IsDir() || changed[path] {
			return err
		}
		var was, is unix.Stat_t
		if unix.Lstat(older+path, &was) == nil && unix.Lstat(p, &is) == nil && was.Ino != is.Ino {
			found = true
		}
		return nil
	})
	return found, err
}
