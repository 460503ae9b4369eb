package zfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// The tests of this file run with OpenZFS and with zfs-fuse.

func read(tb testing.TB, d *Driver, id, name string) string {
	tb.Helper()
	var text string
	fill(tb, d, id, func(path string) {
		b, err := os.ReadFile(filepath.Join(path, name))
		if err == nil {
			text = string(b)
		}
	})
	return text
}

func write(tb testing.TB, d *Driver, id, name, text string) {
	tb.Helper()
	fill(tb, d, id, func(path string) {
		require.NoError(tb, os.WriteFile(filepath.Join(path, name), []byte(text), 0o644))
	})
}

func TestLifeCycle(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "base")
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	require.NoError(t, d.Create(ctx, "b", "base", nil))
	write(t, d, "a", "f", "a")
	assert.Equal(t, "base", read(t, d, "b", "f"))
	assert.Equal(t, "base", read(t, d, "base", "f"))

	path, err := d.Get(ctx, "base", nil)
	require.NoError(t, err)
	assert.Error(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o644), "a frozen layer is read-only")
	require.NoError(t, d.Put(ctx, "base"))

	var changes []string
	for c, err := range d.Changes(ctx, "a", "base") {
		require.NoError(t, err)
		changes = append(changes, c.String())
	}
	assert.Contains(t, changes, "C /f")

	require.NoError(t, d.Rollback(ctx, "a"))
	assert.Equal(t, "base", read(t, d, "a", "f"))
	require.ErrorIs(t, d.Remove(ctx, "base"), layerfs.ErrInUse)

	rec, err := d.m.dir.Load("b")
	require.NoError(t, err)
	snap := datasetOf(filepath.Dir(d.m.home)) + "/base@" + backendOf(rec).Snapshot
	_, err = command("zfs", "list", "-H", "-t", "snapshot", snap)
	require.NoError(t, err)
	require.NoError(t, errors.Join(d.Remove(ctx, "a"), d.Remove(ctx, "b")))
	_, err = command("zfs", "list", "-H", "-t", "snapshot", snap)
	assert.ErrorContains(t, err, "does not exist", "the snapshot goes with its last clone")

	write(t, d, "base", "f", "changed again")
	require.NoError(t, d.Create(ctx, "c", "base", nil))
	assert.Equal(t, "changed again", read(t, d, "c", "f"), "not from an old snapshot")
	require.NoError(t, errors.Join(d.Remove(ctx, "c"), d.Remove(ctx, "base")))
}

// A layer that was cloned from another outlives it.
func TestClonePromoted(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	write(t, d, "a", "f", "one")
	require.NoError(t, d.Clone(ctx, "x", "a", nil))
	write(t, d, "a", "f", "two")
	require.NoError(t, d.Clone(ctx, "y", "a", nil))
	require.NoError(t, d.Remove(ctx, "a"))
	assert.Equal(t, "one", read(t, d, "x", "f"))
	assert.Equal(t, "two", read(t, d, "y", "f"))
	require.NoError(t, errors.Join(d.Remove(ctx, "y"), d.Remove(ctx, "x"), d.Remove(ctx, "base")))
	out := mustCommand(t, "zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", d.m.parent)
	assert.Equal(t, d.m.parent, strings.TrimSpace(out))
}

// Datasets of somebody else are neither used nor destroyed.
func TestForeignDatasets(t *testing.T) {
	root := newRootDir(t)
	ds := datasetOf(root)
	mustCommand(t, "zfs", "create", "-o", "canmount=off", "-o", "mountpoint=none", ds+"/foreign")
	mustCommand(t, "zfs", "create", "-o", "canmount=off", "-o", propLayer+"=otherroot:other", ds+"/other")
	d := mustOpen(t, root, &Options{})
	assert.Empty(t, d.Recovered())
	ctx := t.Context()
	for _, id := range []string{"foreign", "other"} {
		err := d.Create(ctx, id, "", nil)
		require.ErrorIs(t, err, layerfs.ErrExist)
		require.ErrorIs(t, err, errForeign)
	}
	mustCommand(t, "zfs", "list", ds+"/foreign", ds+"/other")

	// Below a layer there may be one, too.
	require.NoError(t, d.Create(ctx, "a", "", nil))
	mustCommand(t, "zfs", "create", "-o", "canmount=off", "-o", "mountpoint=none", ds+"/a/mine")
	err := d.Remove(ctx, "a")
	require.ErrorIs(t, err, errForeign)
	mustCommand(t, "zfs", "list", ds+"/a/mine")
	mustCommand(t, "zfs", "destroy", ds+"/a/mine")
	require.NoError(t, d.Remove(ctx, "a"))
}

// A crash between the clone and the record leaves a dataset without a record,
// and one between snapshot and clone a snapshot.
func TestRecoverOrphan(t *testing.T) {
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "kept")
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	require.NoError(t, os.Remove(d.m.state("records", "a")))
	require.NoError(t, os.Mkdir(d.m.Path("b"), 0o700))
	lost, err := newSnapshot(d.m.dataset("base"), "b")
	require.NoError(t, err)
	mustCommand(t, "zfs", "snapshot", lost)

	again := mustOpen(t, root, &Options{})
	var ids []string
	for _, p := range again.Recovered() {
		ids = append(ids, p.ID)
	}
	assert.ElementsMatch(t, []string{"a", "b"}, ids)
	out := mustCommand(t, "zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", again.m.parent)
	assert.Equal(t, []string{again.m.parent, again.m.dataset("base")}, strings.Fields(out))
	assert.Equal(t, "kept", read(t, again, "base", "f"))
	require.NoError(t, again.Remove(ctx, "base"))
}

func TestQuota(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "a", "", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 32 << 20}}))
	value := func() string {
		return strings.TrimSpace(mustCommand(t, "zfs", "get", "-H", "-p", "-o", "value", "quota", d.m.dataset("a")))
	}
	assert.Equal(t, "33554432", value())
	require.NoError(t, d.SetQuota(ctx, "a", layerfs.Quota{Bytes: 64 << 20}))
	assert.Equal(t, "67108864", value())
	require.NoError(t, d.SetQuota(ctx, "a", layerfs.Quota{}))
	assert.Equal(t, "0", value())
	require.ErrorIs(t, d.SetQuota(ctx, "a", layerfs.Quota{Inodes: 1}), errors.ErrUnsupported)
	require.ErrorIs(t, d.Create(ctx, "b", "", &layerfs.CreateOptions{Quota: layerfs.Quota{Inodes: 1}}), errors.ErrUnsupported)
	require.NoError(t, d.Remove(ctx, "a"))
}

// What exceeds RefQuota is refused, and what is removed can be used again. It
// counts what a layer shares with its parents.
func TestRefQuotaExceeded(t *testing.T) {
	requirePool(t)
	const mib = 1 << 20
	d := mustOpen(t, newRootDir(t), &Options{RefQuota: 24 * mib, Properties: map[string]string{"compression": "off"}})
	ctx := t.Context()
	data := make([]byte, 32*mib)
	rand.NewChaCha8([32]byte{}).Read(data)
	put := func(id, name string, size int) error {
		path, err := d.Get(ctx, id, nil)
		require.NoError(t, err)
		return errors.Join(os.WriteFile(filepath.Join(path, name), data[:size], 0o644), d.Put(ctx, id))
	}
	remove := func(id, name string) {
		fill(t, d, id, func(path string) { require.NoError(t, os.Remove(filepath.Join(path, name))) })
		require.NoError(t, d.m.flush(ctx, id))
	}

	require.NoError(t, d.Create(ctx, "base", "", nil))
	value := mustCommand(t, "zfs", "get", "-H", "-p", "-o", "value", "refquota", d.m.dataset("base"))
	assert.Equal(t, fmt.Sprint(24*mib), strings.TrimSpace(value))
	require.ErrorIs(t, put("base", "f", 32*mib), unix.EDQUOT)
	remove("base", "f")
	require.NoError(t, put("base", "f", 16*mib))

	require.NoError(t, d.Create(ctx, "child", "base", nil))
	require.ErrorIs(t, put("child", "g", 16*mib), unix.EDQUOT, "the parent's 16 MiB count")
	remove("child", "g")
	remove("child", "f")
	require.NoError(t, put("child", "g", 16*mib), "what is removed does not")

	require.NoError(t, d.Create(ctx, "applied", "base", nil))
	_, err := d.Apply(ctx, "applied", tarOf(t, data), nil)
	require.ErrorIs(t, err, layerfs.ErrQuota)
	require.NoError(t, errors.Join(d.Remove(ctx, "applied"), d.Remove(ctx, "child"), d.Remove(ctx, "base")))
	assert.Empty(t, layersOf(t, d))
}

// tarOf returns a layer of one file.
func tarOf(tb testing.TB, data []byte) *bytes.Buffer {
	tb.Helper()
	stream := new(bytes.Buffer)
	w := tar.NewWriter(stream)
	require.NoError(tb, w.WriteHeader(&tar.Header{Name: "g", Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}))
	_, err := w.Write(data)
	require.NoError(tb, errors.Join(err, w.Close()))
	return stream
}

// Apply tells the quota of a layer from a pool that is full.
func TestApplyTooMuch(t *testing.T) {
	requirePool(t)
	// Little room, as each of the last writes waits for a transaction group.
	const mib, room = 1 << 20, 2 << 20
	data := make([]byte, 8*mib)
	rand.NewChaCha8([32]byte{}).Read(data)
	for name, c := range map[string]struct {
		quota int64
		full  bool
	}{
		"quota":                        {quota: room},
		"full pool and a larger quota": {quota: 1024 * mib, full: true},
	} {
		t.Run(name, func(t *testing.T) {
			if c.full && !kernelMounts() {
				t.Skip("zfs-fuse ends at a write of which the pool has room for a part")
			}
			root := smallRoot(t, 32*mib)
			d := mustOpen(t, root, &Options{Quota: layerfs.Quota{Bytes: c.quota}})
			ctx := t.Context()
			require.NoError(t, d.Create(ctx, "a", "", nil))
			if c.full {
				pool := poolOf(datasetOf(root))
				free, err := strconv.ParseInt(strings.TrimSpace(mustCommand(t, "zfs", "get", "-H", "-p", "-o", "value", "available", pool)), 10, 64)
				require.NoError(t, err)
				mustCommand(t, "zfs", "create", "-o", fmt.Sprintf("reservation=%d", free-room), pool+"/others")
			}
			_, err := d.Apply(ctx, "a", tarOf(t, data), nil)
			if c.full {
				require.ErrorIs(t, err, unix.ENOSPC)
				require.NotErrorIs(t, err, layerfs.ErrQuota)
			} else {
				require.ErrorIs(t, err, layerfs.ErrQuota)
				require.ErrorIs(t, err, unix.EDQUOT)
			}
			require.NoError(t, d.Remove(ctx, "a"))
		})
	}
}

func TestStatus(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	items, err := d.Status(t.Context())
	require.NoError(t, err)
	got := map[string]string{}
	for _, i := range items {
		got[i.Key] = i.Value
	}
	assert.Equal(t, poolOf(d.m.parent), got["Zpool"])
	assert.Equal(t, "ONLINE", got["Zpool Health"])
	assert.Equal(t, d.m.parent, got["Parent Dataset"])
	assert.Equal(t, "no", got["Parent Quota"])
	for _, key := range []string{"Space Used By Parent", "Space Available", "Compression"} {
		assert.NotEmpty(t, got[key], key)
	}
}

// The dataset is found from the mount above the root, and a root keeps it.
func TestDatasetOfMount(t *testing.T) {
	requirePool(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	require.NoError(t, os.Mkdir(dir, 0o755))
	giveDataset(t, dir, "-o", "mountpoint="+dir)
	root := filepath.Join(dir, "sub", "root")
	require.NoError(t, os.MkdirAll(root, 0o755))
	found, err := datasetAt(root)
	require.NoError(t, err)
	assert.Equal(t, datasetOf(dir), found)
	mustCommand(t, "zfs", "unmount", dir)
	_, err = New(filepath.Join(t.TempDir(), "elsewhere"), nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	assert.ErrorContains(t, err, "no dataset is given")
}

func TestCommandErrors(t *testing.T) {
	d := mustOpen(t, newRootDir(t), &Options{})
	_, err := d.m.tool.run(t.Context(), "list", "-H", d.m.parent+"/none")
	assert.True(t, says(err, textMissing), "%v", err)
	var c *CommandError
	require.ErrorAs(t, err, &c)
	assert.Equal(t, "zfs", c.Args[0])
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	cancel(why)
	_, err = d.m.tool.run(ctx, "list")
	require.ErrorIs(t, err, why)
	sleeping := *d.m.tool
	sleeping.zfs = "/bin/sleep"
	sleeping.turn = nil // with one it is not killed: TestTurns
	ctx2, cancel2 := context.WithTimeout(t.Context(), 50e6)
	defer cancel2()
	_, err = sleeping.run(ctx2, "60")
	require.ErrorIs(t, err, context.DeadlineExceeded)
}
