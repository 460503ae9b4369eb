package zfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// newPool makes a pool of its own in a file of a directory, and returns a
// root with a dataset of it. Half of a pool as small as these is kept back for
// removals (spa_slop_shift, zfs(4)).
func newPool(tb testing.TB, dir string, size int64) (pool, root string) {
	tb.Helper()
	pool = requirePool(tb) + random()
	require.NoError(tb, createPool(pool, filepath.Join(dir, "pool"), size, "-O", "compression=off"))
	tb.Cleanup(func() { mustCommand(tb, "zpool", "destroy", "-f", pool) })
	root = filepath.Join(tb.TempDir(), "root")
	require.NoError(tb, os.Mkdir(root, 0o755))
	mustCommand(tb, "zfs", "create", "-o", "mountpoint=none", pool+"/layers")
	assign(tb, root, pool+"/layers")
	return pool, root
}

// smallRoot is for the cases about a full disk.
func smallRoot(tb testing.TB, free int64) string {
	dir, err := os.MkdirTemp(poolDir(), "layerfs-small-")
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, os.RemoveAll(dir)) })
	_, root := newPool(tb, dir, free*5/2)
	return root
}

// layersOf lists the datasets and snapshots of a root, without the parent.
func layersOf(tb testing.TB, d *Driver) []string {
	tb.Helper()
	out := mustCommand(tb, "zfs", "list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name", d.m.parent)
	var names []string
	for name := range strings.FieldsSeq(out) {
		if rest, ok := strings.CutPrefix(name, d.m.parent+"/"); ok {
			names = append(names, rest)
		}
	}
	return names
}

func snapshotOf(tb testing.TB, d *Driver, id string) string {
	tb.Helper()
	rec, err := d.m.dir.Load(id)
	require.NoError(tb, err)
	return backendOf(rec).Snapshot
}

// A dataset in which a file is open after the last Put cannot be destroyed.
func TestBusy(t *testing.T) {
	requirePool(t)
	d := mustOpen(t, newRootDir(t), &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	path, err := d.Get(ctx, "a", nil)
	require.NoError(t, err)
	f, err := os.Create(filepath.Join(path, "open"))
	require.NoError(t, err)
	require.NoError(t, d.Put(ctx, "a"))
	err = d.Remove(ctx, "a")
	require.ErrorIs(t, err, layerfs.ErrInUse)
	assert.ErrorContains(t, err, "busy")
	_, err = d.Stat(ctx, "a", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist, "what Remove has committed stays")
	require.NoError(t, f.Close())
	require.NoError(t, d.Remove(ctx, "a"))
	assert.Empty(t, layersOf(t, d))
}

// crashEnv names the root of TestCrashChild, and zfsEnv the zfs it runs.
const (
	crashEnv = "LAYERFS_TEST_CRASH"
	zfsEnv   = "LAYERFS_TEST_ZFS"
)

// TestCrashChild is run by TestCrash in a process of its own.
func TestCrashChild(t *testing.T) {
	root := os.Getenv(crashEnv)
	if root == "" {
		t.Skip("TestCrash runs it")
	}
	d, err := New(root, &Options{Zfs: os.Getenv(zfsEnv)})
	require.NoError(t, err)
	t.Fatal("Create = ", d.Create(t.Context(), "a", "base", nil))
}

// A process that is killed before or after any call of Create leaves nothing
// behind once the root is opened again.
func TestCrash(t *testing.T) {
	root := newRootDir(t)
	d := mustOpen(t, root, &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	write(t, d, "base", "f", "kept")
	script := filepath.Join(t.TempDir(), "zfs")
	for _, verb := range []string{"snapshot", "clone", "destroy"} {
		for _, when := range []string{"before", "after"} {
			if testing.Short() && kernelMounts() && (verb != "clone" || when != "after") {
				continue // a guest without KVM takes some ten seconds for each; with zfs-fuse it is half a second
			}
			t.Run(when+" "+verb, func(t *testing.T) {
				// The calls for the new layer alone: New may probe with others.
				text := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in %s*%s@*)\n[ %s = before ] || %s \"$@\"\nkill -9 $PPID\nexit\nesac\nexec %[4]s \"$@\"\n",
					verb, d.m.dataset("base"), when, d.m.tool.zfs)
				require.NoError(t, os.WriteFile(script, []byte(text), 0o700))
				cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$")
				cmd.Env = append(os.Environ(), crashEnv+"="+root, zfsEnv+"="+script)
				out, err := cmd.CombinedOutput()
				require.Error(t, err)
				status, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool })
				require.True(t, ok && status.Signaled(), "%v: %s", err, out)
				again := mustOpen(t, root, &Options{})
				assert.NotEmpty(t, again.Recovered())
				assert.Equal(t, []string{"base"}, layersOf(t, again))
				assert.Equal(t, "kept", read(t, again, "base", "f"))
			})
		}
	}
	require.NoError(t, d.Remove(ctx, "base"))
}

// counted returns options with a zfs that counts its calls.
func counted(tb testing.TB, root string) (opts *Options, calls func() int) {
	tb.Helper()
	zfs, err := find("zfs", "")
	require.NoError(tb, err)
	dir := tb.TempDir()
	log, script := filepath.Join(dir, "log"), filepath.Join(dir, "zfs")
	require.NoError(tb, os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\necho \"$1\" >>%s\nexec %s \"$@\"\n", log, zfs), 0o700))
	return &Options{Dataset: datasetOf(root), Zfs: script}, func() int {
		b, err := os.ReadFile(log)
		if !errors.Is(err, os.ErrNotExist) {
			require.NoError(tb, err)
		}
		require.NoError(tb, os.WriteFile(log, nil, 0o600))
		return bytes.Count(b, []byte("\n"))
	}
}

// TestCalls: no operation takes more calls of zfs because there are more
// layers. LAYERFS_DATASETS is how many.
func TestCalls(t *testing.T) {
	layers := 24
	if n, err := strconv.Atoi(os.Getenv("LAYERFS_DATASETS")); err == nil {
		layers = n
	}
	root := newRootDir(t)
	opts, calls := counted(t, root)
	ctx := t.Context()
	d, err := New(root, opts)
	require.NoError(t, err)
	count := func(op string, fn func() error) {
		t.Helper()
		calls()
		start := time.Now()
		require.NoError(t, fn(), op)
		most := map[string]int{"create base": 1, "create first": 3, "create more": 1, "get": 0, "list": 0, "open": 1, "changes": 4, "remove": 1}[op]
		if !d.m.facts.Kernel {
			// The daemon mounts by calls, is probed each time, and has no programs.
			most = map[string]int{"create base": 1, "create first": 3, "create more": 1, "get": 2, "list": 0, "open": 20, "changes": 9, "remove": 2}[op]
		}
		n := calls()
		assert.LessOrEqual(t, n, most, "%s with %d layers", op, layers)
		took := time.Since(start).Round(100 * time.Microsecond)
		t.Logf("%-12s %d calls, %v", op, n, took)
		if testenv.Idle() {
			fmt.Printf("goal: | %s, %d layers | %v | %d calls | | | |\n", op, layers, took, n)
		}
	}
	count("create base", func() error { return d.Create(ctx, "base", "", nil) })
	count("create first", func() error { return d.Create(ctx, "first", "base", nil) })
	for i := range layers - 3 {
		require.NoError(t, d.Create(ctx, fmt.Sprintf("l%d", i), "base", nil))
	}
	count("create more", func() error { return d.Create(ctx, "more", "base", nil) })
	require.NoError(t, d.Close())
	count("open", func() error { d, err = New(root, opts); return err })
	defer func() { require.NoError(t, d.Close()) }()
	count("list", func() error {
		list, err := d.List(ctx)
		assert.Len(t, list, layers)
		return err
	})
	count("get", func() error { _, err := d.Get(ctx, "more", nil); return err })
	require.NoError(t, d.Put(ctx, "more"))
	count("changes", func() error {
		for _, err := range d.Changes(ctx, "more", "base") {
			return err
		}
		return nil
	})
	count("remove", func() error { return d.Remove(ctx, "more") })
	list, err := d.List(ctx)
	require.NoError(t, err)
	for _, info := range slices.Backward(list) {
		require.NoError(t, d.Remove(ctx, info.ID))
	}
	assert.Empty(t, layersOf(t, d))
}
