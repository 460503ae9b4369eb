package zfs

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// layerMounts lists where layers are mounted, anywhere.
func layerMounts(tb testing.TB, d *Driver) (at []string) {
	tb.Helper()
	list, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(i.Source, d.m.parent+"/"), false
	})
	require.NoError(tb, err)
	for _, info := range list {
		at = append(at, info.Mountpoint)
	}
	return at
}

// A layer has the properties that the options and this package give it, however
// it was made and whatever it could inherit, and nobody else mounts it.
func TestProperties(t *testing.T) {
	requirePool(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	root := filepath.Join(t.TempDir(), "root")
	require.NoError(t, errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(root, 0o755)))
	giveDataset(t, dir, "-o", "mountpoint="+dir, "-o", "snapdir=visible", "-o", "readonly=on", "-o", "compression=off")
	assign(t, root, datasetOf(dir))
	d := mustOpen(t, root, &Options{
		Quota:      layerfs.Quota{Bytes: 96 << 20},
		RefQuota:   48 << 20,
		Properties: map[string]string{"compression": "gzip-1", "atime": "off", "com.example:of": "a user"},
	})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))

	kernel := kernelMounts()
	for _, c := range []struct {
		id    string
		make  func(ctx context.Context, id string) error
		quota string
	}{
		{"base", func(context.Context, string) error { return nil }, "100663296"},
		{"child", func(ctx context.Context, id string) error { return d.Create(ctx, id, "base", nil) }, "100663296"},
		{"sibling", func(ctx context.Context, id string) error { return d.Create(ctx, id, "base", nil) }, "100663296"},
		{"own-quota", func(ctx context.Context, id string) error {
			return d.Create(ctx, id, "base", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 64 << 20}})
		}, "67108864"},
		{"clone", func(ctx context.Context, id string) error { return d.Clone(ctx, id, "own-quota", nil) }, "67108864"},
		{"rolled-back", func(ctx context.Context, id string) error {
			return errors.Join(d.Create(ctx, id, "base", nil), d.Rollback(ctx, id))
		}, "100663296"},
		{"received", func(ctx context.Context, id string) error {
			var stream bytes.Buffer
			return errors.Join(d.Send(ctx, &stream, "base", "", nil), d.Receive(ctx, &stream, id, "", nil))
		}, "100663296"},
	} {
		t.Run(c.id, func(t *testing.T) {
			if c.id == "received" && !kernel {
				t.Skip("zfs receive of zfs-fuse cannot set properties")
			}
			require.NoError(t, c.make(t.Context(), c.id))
			want := map[string]string{
				"canmount":       "noauto",
				"mountpoint":     "legacy",
				"snapdir":        "hidden",
				"readonly":       "off",
				"quota":          c.quota,
				"refquota":       "50331648",
				"compression":    "gzip-1",
				"atime":          "off",
				"com.example:of": "a user",
				propLayer:        markOf(d.m.root, c.id),
			}
			names := slices.Sorted(maps.Keys(want))
			out := mustCommand(t, "zfs", "get", "-H", "-p", "-o", "property,value,source", strings.Join(names, ","), d.m.dataset(c.id))
			var lines []string
			for _, name := range names {
				lines = append(lines, name+"\t"+want[name]+"\tlocal")
			}
			assert.ElementsMatch(t, lines, strings.Split(strings.TrimSpace(out), "\n"))
			assert.Empty(t, layerMounts(t, d))
		})
	}

	// After use, too: the zfs-fuse daemon mounts what has a mountpoint.
	write(t, d, "child", "f", "text")
	assert.Empty(t, layerMounts(t, d))
	if onlyTestPools(t) {
		if kernel { // a daemon's would be busy for a moment
			mustCommand(t, "zfs", "unmount", dir)
		}
		mustCommand(t, "zfs", "mount", "-a")
		assert.Equal(t, "yes", strings.TrimSpace(mustCommand(t, "zfs", "get", "-H", "-o", "value", "mounted", d.m.parent)))
		assert.Empty(t, layerMounts(t, d))
	}
	list, err := d.List(ctx)
	require.NoError(t, err)
	for _, info := range list {
		if info.ID != "base" {
			require.NoError(t, d.Remove(ctx, info.ID))
		}
	}
	require.NoError(t, d.Remove(ctx, "base"))
	mustCommand(t, "zfs", "unmount", dir)
}

// onlyTestPools reports whether what is done to all datasets of the host is done
// to the tests' alone.
func onlyTestPools(tb testing.TB) bool {
	tb.Helper()
	for pool := range strings.FieldsSeq(mustCommand(tb, "zpool", "list", "-H", "-o", "name")) {
		if !strings.HasPrefix(pool, "layerfs") {
			return false
		}
	}
	return true
}

// New refuses a dataset below which a layer with the longest id has no room, and a
// root that has one all the same works for what has.
func TestLongNames(t *testing.T) {
	pool := requirePool(t)
	longest := strings.Repeat("i", layerfs.MaxIDLength)
	parent := func(t *testing.T, length int) (root, ds string) {
		root = filepath.Join(t.TempDir(), "root")
		require.NoError(t, os.Mkdir(root, 0o755))
		ds = pool + "/" + random()
		ds += strings.Repeat("p", length-len(ds))
		mustCommand(t, "zfs", "create", "-o", "mountpoint=none", ds)
		t.Cleanup(func() { mustDestroy(t, ds) })
		assign(t, root, ds)
		return root, ds
	}
	ctx := t.Context()
	t.Run("longest", func(t *testing.T) {
		root, _ := parent(t, maxParent)
		d := mustOpen(t, root, &Options{})
		require.NoError(t, d.Create(ctx, longest, "", nil))
		write(t, d, longest, "f", "base")
		child := longest[1:] + "c"
		require.NoError(t, d.Create(ctx, child, longest, nil))
		require.Len(t, d.m.dataset(longest)+"@"+snapshotOf(t, d, child), maxName)
		write(t, d, child, "f", "changed")
		var changes []string
		for c, err := range d.Changes(ctx, child, longest) {
			require.NoError(t, err)
			changes = append(changes, c.String())
		}
		assert.Equal(t, []string{"C /f"}, changes)
		require.NoError(t, d.Rollback(ctx, child))
		assert.Equal(t, "base", read(t, d, child, "f"))
		require.NoError(t, errors.Join(d.Remove(ctx, child), d.Remove(ctx, longest)))
	})
	t.Run("too long", func(t *testing.T) {
		root, ds := parent(t, maxParent+1)
		_, err := New(root, &Options{Dataset: ds})
		require.ErrorContains(t, err, "more than 96")
		left, err := os.ReadDir(filepath.Join(root, "zfs"))
		require.NoError(t, err)
		require.Empty(t, left)
	})
	t.Run("a root of before", func(t *testing.T) {
		root, ds := parent(t, maxParent+1)
		state := filepath.Join(root, "zfs", ".layerfs")
		require.NoError(t, os.MkdirAll(state, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(state, "zfs.json"), []byte(`{"dataset":"`+ds+`","root":"0123456789abcdef"}`), 0o600))
		d := mustOpen(t, root, &Options{})
		require.NoError(t, d.Create(ctx, longest, "", nil))
		require.ErrorContains(t, d.Create(ctx, "child", longest, nil), "more than 255")
		require.NoError(t, errors.Join(d.Create(ctx, "short", "", nil), d.Create(ctx, "child", "short", nil)))
		for _, id := range []string{"child", "short", longest} {
			require.NoError(t, d.Remove(ctx, id))
		}
		assert.Empty(t, layersOf(t, d))
	})
}

// With WalkChanges zfs is not asked what changed.
func TestWalkChanges(t *testing.T) {
	const why = "Options.WalkChanges is set"
	root := newRootDir(t)
	opts, calls := counted(t, root)
	opts.WalkChanges = true
	d, err := New(root, opts)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	ctx := t.Context()
	assert.False(t, d.Features().NativeChanges)
	assert.Equal(t, why, d.Features().Reasons["NativeChanges"])
	status, err := d.Status(ctx)
	require.NoError(t, err)
	assert.Contains(t, status, layerfs.StatusItem{Key: "Changes By", Value: "walk: " + why})

	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "base")
	require.NoError(t, d.Create(ctx, "a", "base", nil))
	write(t, d, "a", "f", "other")
	calls()
	var changes []string
	for c, err := range d.Changes(ctx, "a", "base") {
		require.NoError(t, err)
		changes = append(changes, c.String())
	}
	if kernelMounts() {
		assert.Zero(t, calls())
	}
	assert.Equal(t, []string{"C /f"}, changes)
	require.NoError(t, errors.Join(d.Remove(ctx, "a"), d.Remove(ctx, "base")))
}

// A mount label is an option of the mount, or refused; it is never ignored.
func TestMountLabel(t *testing.T) {
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	assert.Equal(t, []string{"context=" + label}, mountOptions(&lifecycle.Record{MountLabel: label}))
	assert.Empty(t, mountOptions(new(lifecycle.Record)))

	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	err := d.Create(ctx, "a", "", &layerfs.CreateOptions{MountLabel: label})
	if _, serr := os.Stat("/sys/fs/selinux/enforce"); serr != nil || !kernelMounts() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, "mount label")
		require.Empty(t, layersOf(t, d))
		return
	}
	require.NoError(t, err)
	path, err := d.Get(ctx, "a", nil)
	require.NoError(t, err)
	list, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(path))
	require.NoError(t, err)
	require.Len(t, list, 1)
	assert.Contains(t, list[0].VFSOptions, `context="`+label+`"`)
	require.NoError(t, errors.Join(d.Put(ctx, "a"), d.Remove(ctx, "a")))
}
