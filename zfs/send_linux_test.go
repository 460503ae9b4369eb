package zfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/tree"
)

// snapshotsOf lists what there is below a root's dataset that is no layer.
func snapshotsOf(tb testing.TB, d *Driver) []string {
	tb.Helper()
	return strings.Fields(mustCommand(tb, "zfs", "list", "-H", "-r", "-t", "snapshot", "-o", "name", d.m.parent))
}

func blockDiff(tb testing.TB, d *Driver, id, base string) (list []layerfs.BlockRange) {
	tb.Helper()
	for r, err := range d.BlockDiff(tb.Context(), id, base) {
		require.NoError(tb, err)
		list = append(list, r)
	}
	return list
}

// patch makes a copy of the files of an older tree into those of a newer one by
// nothing but the ranges and the sizes.
func patch(tb testing.TB, older, newer string, list []layerfs.BlockRange, names ...string) {
	tb.Helper()
	last := layerfs.BlockRange{}
	for _, r := range list {
		if c := layerfs.ComparePaths(last.Path, r.Path); c > 0 || c == 0 && r.Offset < last.Offset+last.Length {
			tb.Errorf("%+v comes after %+v", r, last)
		}
		last = r
	}
	for _, name := range names {
		want, err := os.ReadFile(filepath.Join(newer, name))
		require.NoError(tb, err)
		got, err := os.ReadFile(filepath.Join(older, name))
		if !errors.Is(err, os.ErrNotExist) {
			require.NoError(tb, err)
		}
		got = append(got, make([]byte, max(len(want)-len(got), 0))...)
		for _, r := range list {
			if r.Path != "/"+name {
				continue
			}
			part := got[min(r.Offset, int64(len(got))):min(r.Offset+r.Length, int64(len(got)))]
			if from := want[min(r.Offset, int64(len(want))):min(r.Offset+r.Length, int64(len(want)))]; r.Unmapped {
				assert.Equal(tb, make([]byte, len(from)), from, "%+v has data", r)
				clear(part)
			} else {
				copy(part, from)
			}
		}
		assert.True(tb, bytes.Equal(want, got[:len(want)]), "%s is not what the ranges make of it: %+v", name, list)
	}
}

func TestBlockDiff(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	requireNative(t, d)
	ctx := t.Context()
	rnd := rand.NewChaCha8([32]byte{})
	noise := func(n int) []byte {
		b := make([]byte, n)
		rnd.Read(b)
		return b
	}
	put := func(path string, at int64, data []byte) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
		require.NoError(t, err)
		_, err = f.WriteAt(data, at)
		require.NoError(t, errors.Join(err, f.Close()))
	}
	const block = 128 << 10
	require.NoError(t, d.Create(ctx, "base", "", nil))
	names := []string{"one", "small", "cut", "grown", "punched", "replaced", "moved/f", "linked", "linked2", "new", "again"}
	fill(t, d, "base", func(p string) {
		for _, name := range []string{"same", "one", "cut", "punched", "replaced", "dir/f", "linked", "again"} {
			require.NoError(t, os.MkdirAll(filepath.Dir(p+"/"+name), 0o755))
			put(p+"/"+name, 0, noise(10*block))
		}
		put(p+"/small", 0, noise(700))
		put(p+"/grown", 0, noise(1000))
		require.NoError(t, os.Link(p+"/linked", p+"/linked2"))
	})
	require.NoError(t, d.Create(ctx, "mid", "base", nil))
	fill(t, d, "mid", func(p string) {
		put(p+"/one", 3*block+5, noise(10))
		put(p+"/again", 0, noise(5))
	})
	require.NoError(t, d.Create(ctx, "top", "mid", nil))
	fill(t, d, "top", func(p string) {
		put(p+"/one", 7*block, noise(block))
		put(p+"/small", 100, noise(1))
		put(p+"/again", 0, noise(5))
		put(p+"/linked", 2*block, noise(1))
		put(p+"/new", 4*block, noise(10))
		require.NoError(t, os.Truncate(p+"/cut", 2*block+3))
		require.NoError(t, os.Truncate(p+"/grown", 5*block))
		f, err := os.OpenFile(p+"/punched", os.O_WRONLY, 0)
		require.NoError(t, err)
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4*block, 2*block)
		require.NoError(t, errors.Join(err, f.Close()))
		require.NoError(t, errors.Join(os.Remove(p+"/replaced"), os.Rename(p+"/dir", p+"/moved")))
		put(p+"/replaced", 0, noise(3*block))
	})
	list := blockDiff(t, d, "top", "base")
	base, err := d.m.View(ctx, chainOf(t, d, "base"))
	require.NoError(t, err)
	top, err := d.m.View(ctx, chainOf(t, d, "top"))
	require.NoError(t, err)
	patch(t, base.Path, top.Path, list, names...)
	patch(t, t.TempDir(), top.Path, blockDiff(t, d, "top", ""), append(names, "same")...)
	require.NoError(t, errors.Join(base.Release(), top.Release()))

	// No more than the records that were written, and of both steps.
	of := func(list []layerfs.BlockRange, path string) (out []layerfs.BlockRange) {
		for _, r := range list {
			if r.Path == path {
				r.Path = ""
				out = append(out, r)
			}
		}
		return out
	}
	assert.Equal(t, []layerfs.BlockRange{{Offset: 3 * block, Length: block}, {Offset: 7 * block, Length: block}}, of(list, "/one"))
	assert.Equal(t, []layerfs.BlockRange{{Offset: 2 * block, Length: block}}, of(list, "/linked"))
	assert.Equal(t, of(list, "/linked"), of(list, "/linked2"))
	assert.Equal(t, []layerfs.BlockRange{{Offset: 4 * block, Length: 2 * block, Unmapped: true}}, of(list, "/punched"))
	assert.Equal(t, []layerfs.BlockRange{{Offset: 0, Length: 3 * block}, {Offset: 3 * block, Length: 7 * block, Unmapped: true}}, of(list, "/replaced"))
	assert.Empty(t, of(list, "/same"))
	assert.Equal(t, []layerfs.BlockRange{{Offset: 7 * block, Length: block}}, of(blockDiff(t, d, "top", "mid"), "/one"))

	// A clone of another layer is not a clone of its parent.
	require.NoError(t, d.Clone(ctx, "copy", "top", nil))
	assert.Equal(t, []layerfs.BlockRange{{Offset: 0, Length: 10 * block}}, of(blockDiff(t, d, "copy", "mid"), "/one"))
	var unsupported *layerfs.UnsupportedError
	require.ErrorAs(t, d.Send(ctx, io.Discard, "copy", "mid", nil), &unsupported)
	for _, err := range d.BlockDiff(ctx, "base", "top") {
		require.ErrorIs(t, err, layerfs.ErrNotAncestor)
	}
	require.NoError(t, errors.Join(d.Remove(ctx, "copy"), d.Remove(ctx, "top"), d.Remove(ctx, "mid")))
	assert.Empty(t, snapshotsOf(t, d))
	require.NoError(t, d.Remove(ctx, "base"))
}

// TestOldStreams: programs that lack options say so, and nothing is left.
func TestOldStreams(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	if d.Features().NativeChanges {
		t.Skip("this program has all options: TestSendReceive")
	}
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	var stream bytes.Buffer
	require.NoError(t, d.Send(ctx, &stream, "base", "", nil))
	require.ErrorIs(t, d.Send(ctx, io.Discard, "base", "", &SendOptions{Compressed: true}), errors.ErrUnsupported)
	require.ErrorIs(t, d.Receive(ctx, &stream, "copy", "", nil), errors.ErrUnsupported)
	require.Equal(t, []string{"base"}, layersOf(t, d))
	require.NoError(t, d.Remove(ctx, "base"))
	require.Empty(t, layersOf(t, d))
}

func TestSendReceive(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	requireNative(t, d)
	other := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	fill(t, d, "base", func(p string) {
		tree.Build(t, p, "dir d 0750 3:4", "file d/f hello", "file g 1", "link h g", "symlink s d/f", "char null 1 3 0666")
		require.NoError(t, unix.Setxattr(p+"/g", "user.x", []byte("y"), 0))
	})
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	fill(t, d, "a", func(p string) {
		require.NoError(t, errors.Join(os.WriteFile(p+"/d/f", []byte("other"), 0o600), os.Remove(p+"/g"), os.WriteFile(p+"/new", bytes.Repeat([]byte("n"), 1<<20), 0o644)))
	})
	require.NoError(t, d.Create(ctx, "b", "a", nil))
	write(t, d, "b", "b", "b")

	var full, incr, two bytes.Buffer
	require.NoError(t, d.Send(ctx, &full, "base", "", nil))
	require.NoError(t, d.Send(ctx, &incr, "a", "base", &SendOptions{Compressed: true}))
	require.NoError(t, d.Send(ctx, &two, "b", "base", nil))
	for _, s := range snapshotsOf(t, d) {
		assert.NotContains(t, s, momentPrefix, "snapshots of a call go with it")
	}

	same := func(id, as string) {
		t.Helper()
		x, err := d.m.View(ctx, chainOf(t, d, id))
		require.NoError(t, err)
		y, err := other.m.View(ctx, chainOf(t, other, as))
		require.NoError(t, err)
		changes, err := tree.Changes(x.Path, y.Path)
		require.NoError(t, errors.Join(err, x.Release(), y.Release()))
		assert.Empty(t, changes, "%s as %s", id, as)
	}
	bytesOf := func(b *bytes.Buffer) io.Reader { return bytes.NewReader(b.Bytes()) }
	require.ErrorIs(t, other.Receive(ctx, bytesOf(&incr), "a", "", nil), layerfs.ErrNotAncestor)
	require.NoError(t, other.Receive(ctx, bytesOf(&full), "base2", "", &layerfs.CreateOptions{Labels: map[string]string{"k": "v"}}))
	same("base", "base2")
	require.NoError(t, other.Receive(ctx, iotest.OneByteReader(bytesOf(&incr)), "a2", "base2", nil))
	same("a", "a2")
	require.NoError(t, other.Receive(ctx, bytesOf(&two), "b2", "base2", nil))
	same("b", "b2")
	info, err := other.Stat(ctx, "base2", nil)
	require.NoError(t, err)
	assert.Equal(t, "v", info.Labels["k"])

	// What was received is a layer like others, with changes by zfs diff.
	chain := chainOf(t, other, "a2", "base2")
	want := oracle(t, other, chain[1:], chain)
	got, err := other.m.nativeChanges(ctx, chain, 1)
	require.NoError(t, err)
	assert.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got))
	require.NoError(t, other.Create(ctx, "c2", "a2", nil))
	assert.Equal(t, "other", read(t, other, "c2", "d/f"))

	// It can be sent on, and what was made of it, too.
	var again bytes.Buffer
	require.NoError(t, other.Send(ctx, &again, "a2", "base2", nil))
	require.NoError(t, other.Receive(ctx, &again, "a3", "base2", nil))
	same("a", "a3")

	// A layer that was written is not what a stream builds on.
	require.NoError(t, errors.Join(other.Remove(ctx, "c2"), other.Remove(ctx, "a2"), other.Remove(ctx, "a3"), other.Remove(ctx, "b2")))
	require.NoError(t, other.Receive(ctx, bytesOf(&incr), "a2", "base2", nil), "it still is as it was received")
	require.NoError(t, other.Remove(ctx, "a2"))
	write(t, other, "base2", "g", "changed")
	require.ErrorIs(t, other.Receive(ctx, bytesOf(&incr), "a2", "base2", nil), layerfs.ErrNotAncestor)
	require.NoError(t, other.Rollback(ctx, "base2"))
	assert.Empty(t, read(t, other, "base2", "g"))
	require.NoError(t, other.Remove(ctx, "base2"))
	assert.Empty(t, snapshotsOf(t, other))
}

func TestReceiveErrors(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	requireNative(t, d)
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", strings.Repeat("content", 10000))
	var full bytes.Buffer
	require.NoError(t, d.Send(ctx, &full, "base", "", nil))
	data := full.Bytes()
	spoilt := bytes.Clone(data)
	spoilt[len(spoilt)/2] ^= 1
	why := errors.New("why")
	for name, c := range map[string]struct {
		r      io.Reader
		target error
	}{
		"empty":     {bytes.NewReader(nil), layerfs.ErrMalformed},
		"text":      {strings.NewReader(strings.Repeat("text ", 100)), layerfs.ErrMalformed},
		"truncated": {bytes.NewReader(data[:len(data)-2000]), layerfs.ErrMalformed},
		"spoilt":    {bytes.NewReader(spoilt), layerfs.ErrMalformed},
		"reader":    {io.MultiReader(bytes.NewReader(data[:1000]), iotest.ErrReader(why)), why},
	} {
		t.Run(name, func(t *testing.T) {
			err := d.Receive(ctx, c.r, "x", "", nil)
			require.ErrorIs(t, err, c.target)
			_, err = d.Stat(ctx, "x", nil)
			require.ErrorIs(t, err, layerfs.ErrNotExist)
			assert.NoFileExists(t, d.m.state("received", "x"))
			out := mustCommand(t, "zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", d.m.parent)
			assert.Equal(t, []string{d.m.parent, d.m.dataset("base")}, strings.Fields(out))
		})
	}
	require.ErrorIs(t, d.Send(ctx, failingWriter{why}, "base", "", nil), why)
	assert.Empty(t, snapshotsOf(t, d))
	require.NoError(t, d.Remove(ctx, "base"))
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// A process that dies while it reads a layer's blocks leaves a snapshot and the
// note that names it.
func TestRecoverMoment(t *testing.T) {
	root := newRootDir(t)
	d, err := New(root, &Options{Dataset: datasetOf(root)})
	require.NoError(t, err)
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	rec, err := d.m.dir.Load("a")
	require.NoError(t, err)
	full, _, err := d.m.moment(ctx, rec)
	require.NoError(t, err)
	assert.Equal(t, []string{full}, snapshotsOf(t, d))
	mustOpen(t, root, &Options{})
	assert.Equal(t, []string{full}, snapshotsOf(t, d), "its driver lives")
	require.NoError(t, errors.Join(d.m.views.lock.Close(), d.m.dir.Close())) // as at the end of its process
	again := mustOpen(t, root, &Options{})
	assert.Empty(t, snapshotsOf(t, again))
	require.NoError(t, again.Remove(ctx, "a"))
}

// A crash within Rollback leaves an incomplete layer. Rollback mends it, and
// Remove leaves no snapshot either.
func TestRollbackCrash(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "base")
	crash := func(id string) {
		rec, err := d.m.dir.Load(id)
		require.NoError(t, err)
		mark := rec.Clone()
		mark.Incomplete = "rollback did not finish"
		require.NoError(t, d.m.dir.Save(mark))
		require.NoError(t, d.m.destroy(ctx, id))
		mustCommand(t, "zfs", "snapshot", d.m.dataset("base")+"@"+backendOf(rec).Snapshot)
	}
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	write(t, d, "a", "f", "a")
	crash("a")
	_, err := d.Get(ctx, "a", nil)
	require.ErrorIs(t, err, layerfs.ErrIncomplete)
	require.NoError(t, d.Rollback(ctx, "a"))
	assert.Equal(t, "base", read(t, d, "a", "f"))
	require.NoError(t, d.Remove(ctx, "a"))
	assert.Empty(t, snapshotsOf(t, d))

	require.NoError(t, d.Create(ctx, "b", "base", nil))
	crash("b")
	require.NoError(t, d.Remove(ctx, "b"))
	assert.Empty(t, snapshotsOf(t, d))
	require.NoError(t, d.Remove(ctx, "base"))
}

// After Rollback the record names the snapshot the layer is a clone of.
func TestRollbackOrigin(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	for i := range 2 {
		id := fmt.Sprintf("c%d", i)
		require.NoError(t, d.Create(ctx, id, "base", nil))
		require.NoError(t, d.Rollback(ctx, id))
		rec, err := d.m.dir.Load(id)
		require.NoError(t, err)
		origin := strings.TrimSpace(mustCommand(t, "zfs", "get", "-H", "-o", "value", "origin", d.m.dataset(id)))
		assert.Equal(t, d.m.since(lifecycle.Chain{rec, {ID: "base"}}, 1), origin)
	}
	require.NoError(t, errors.Join(d.Remove(ctx, "c0"), d.Remove(ctx, "c1"), d.Remove(ctx, "base")))
}
