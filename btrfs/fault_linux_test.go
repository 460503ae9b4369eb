package btrfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// A process that is killed at a named point of a verb, and what New makes of it.
type fault struct {
	verb, point string
	noExchange  bool // as on kernels before 5.16
	torn        bool // a record was begun, too

	layers []string // that there are afterwards
	top    []string // what is in layer top, if it is whole
	repeat bool     // top is incomplete, and the verb again mends it
	lost   bool     // top is incomplete, and can only be removed
}

var (
	both   = []string{"base", "top"}
	before = []string{"f", "g"}
	after  = []string{"f", "g", "h"}
)

var faults = []fault{
	{verb: "create", point: "create: nothing but the note with the parent", layers: both, top: before},
	{verb: "create", point: "create: subvolume, no record", layers: both, top: before},
	{verb: "create", point: "create: subvolume, no record", torn: true, layers: both, top: before},
	{verb: "clone", point: "create: subvolume, no record", layers: both, top: before},
	{verb: "remove", point: "remove: no record, subvolume", layers: both[:1]},
	{verb: "remove", point: "remove: neither", layers: both[:1]},
	{verb: "changes", point: "changes: snapshot taken", layers: both, top: before},
	{verb: "apply", point: "aside: made", layers: both, top: before},
	{verb: "apply", point: "replace: the new one is whole", layers: both, top: before},
	{verb: "apply", point: "replace: exchanged", layers: both, top: after},
	{verb: "apply", point: "replace: done, no record", layers: both, top: after},
	{verb: "apply", point: "replace: the new one is whole", noExchange: true, layers: both, top: before},
	{verb: "apply", point: "replace: the old one is gone", noExchange: true, layers: both, lost: true},
	{verb: "apply", point: "replace: done, no record", noExchange: true, layers: both, lost: true},
	{verb: "rollback", point: "aside: made", layers: both, repeat: true},
	{verb: "rollback", point: "replace: the new one is whole", layers: both, repeat: true},
	{verb: "rollback", point: "replace: exchanged", layers: both, repeat: true},
	{verb: "rollback", point: "replace: the old one is gone", noExchange: true, layers: both, repeat: true},
	{verb: "rollback", point: "replace: done, no record", layers: both, repeat: true},
}

const faultEnv = "LAYERFS_BTRFS_FAULT"

// faultChild is the process that TestFaults has killed.
func faultChild() {
	n, root, ok := strings.Cut(os.Getenv(faultEnv), " ")
	if !ok {
		return
	}
	var at int
	if _, err := fmt.Sscan(n, &at); err != nil {
		panic(err)
	}
	fmt.Fprintln(os.Stderr, "not killed:", faults[at].run(root))
	os.Exit(3)
}

func (f *fault) run(root string) error {
	ctx := context.Background()
	reached := func(point string) {
		if point != f.point {
			return
		}
		if f.torn {
			if err := os.WriteFile(filepath.Join(root, "btrfs/.layerfs/records/new"), []byte(`{"id":"n`), 0o700); err != nil {
				panic(err)
			}
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	d, err := btrfs.NewFault(root, f.noExchange, reached)
	if err != nil {
		return err
	}
	switch f.verb {
	case "create":
		return d.Create(ctx, "new", "base", nil)
	case "clone":
		return d.Clone(ctx, "new", "top", nil)
	case "remove":
		return d.Remove(ctx, "top")
	case "changes":
		for _, err := range d.Changes(ctx, "top", "base") {
			if err != nil {
				return err
			}
		}
		return nil
	case "apply":
		stream, err := tarWith("h", 100)
		if err == nil {
			_, err = d.Apply(ctx, "top", bytes.NewReader(stream), nil)
		}
		return err
	case "rollback":
		return d.Rollback(ctx, "top")
	}
	return errors.New("no such verb")
}

// TestFaults kills a process at each named point of each verb: every layer that
// was finished is there and whole, and nothing is left that is no layer.
func TestFaults(t *testing.T) {
	mnt := testenv.Btrfs(t, 512, "-m single")
	for i, f := range faults {
		t.Run(strings.ReplaceAll(fmt.Sprintf("%s %s,exchange=%v,torn=%v", f.verb, f.point, !f.noExchange, f.torn), " ", "-"), func(t *testing.T) {
			root := filepath.Join(mnt, fmt.Sprint(i))
			require.NoError(t, os.Mkdir(root, 0o755))
			d := mustNew(t, root, &btrfs.Options{Durability: layerfs.DurabilityNone})
			fill(t, d, "base", "", "file f 1")
			fill(t, d, "top", "base", "file g 2")
			require.NoError(t, d.Close())

			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", faultEnv, i, root))
			out, _ := cmd.CombinedOutput()
			status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
			require.True(t, ok && status.Signaled() && status.Signal() == syscall.SIGKILL, "%v: %s", status, out)
			f.check(t, root)
		})
	}
}

func (f *fault) check(t *testing.T, root string) {
	d := mustNew(t, root, nil)
	ctx := t.Context()
	noSnapshots(t, root)
	records, err := os.ReadDir(filepath.Join(root, "btrfs/.layerfs/records"))
	require.NoError(t, err)
	require.Equal(t, f.layers, namesOf(records))
	infos, err := d.List(ctx)
	require.NoError(t, err)
	require.Len(t, infos, len(f.layers))
	found, err := d.Check(ctx)
	require.NoError(t, err)
	stored, err := os.ReadDir(filepath.Join(root, "btrfs/subvolumes"))
	require.NoError(t, err)
	switch {
	case f.repeat:
		require.Len(t, found, 1)
		require.NoError(t, d.Rollback(ctx, "top"))
		f.top = []string{"f"}
	case f.lost:
		require.Len(t, found, 1)
		require.ErrorIs(t, errorOf(d.Get(ctx, "top", nil)), layerfs.ErrIncomplete)
	default:
		require.Empty(t, found)
		require.Equal(t, f.layers, namesOf(stored))
	}
	if f.top != nil {
		path, err := d.Get(ctx, "top", nil)
		require.NoError(t, err)
		entries, err := os.ReadDir(path)
		require.NoError(t, err)
		require.Equal(t, f.top, namesOf(entries))
		require.NoError(t, os.WriteFile(filepath.Join(path, "more"), nil, 0o600), "it can be written")
		require.NoError(t, d.Put(ctx, "top"))
	}
	require.NoError(t, d.Create(ctx, "new", "base", nil))
	require.NoError(t, d.Remove(ctx, "new"))
	if slices.Contains(f.layers, "top") {
		require.NoError(t, d.Remove(ctx, "top"))
	}
	require.NoError(t, d.Remove(ctx, "base"))
	stored, err = os.ReadDir(filepath.Join(root, "btrfs/subvolumes"))
	require.NoError(t, err)
	require.Empty(t, stored)
}

func errorOf(_ string, err error) error { return err }

func namesOf(entries []os.DirEntry) (names []string) {
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
