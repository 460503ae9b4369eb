package btrfs_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

const crashEnv = "LAYERFS_BTRFS_CRASH"

// crashChild is the process that TestKill kills: it makes, fills, reads and
// removes layers until then.
func crashChild() {
	root := os.Getenv(crashEnv)
	if root == "" {
		return
	}
	fmt.Fprintln(os.Stderr, churn(root))
	os.Exit(3)
}

func churn(root string) error {
	ctx := context.Background()
	d, err := btrfs.New(root, &btrfs.Options{Durability: layerfs.DurabilityNone})
	if err != nil {
		return err
	}
	layer, err := readAll(d.Diff(ctx, "kept", "", nil))
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for i := 0; ; i++ {
		id := fmt.Sprintf("l%d", i)
		if err := d.Create(ctx, id, "kept", &layerfs.CreateOptions{ReadOnly: i%3 == 0}); err != nil {
			return err
		}
		if _, err := d.Apply(ctx, id, bytes.NewReader(layer), nil); err != nil {
			return err
		}
		for _, err := range d.Changes(ctx, id, "kept") {
			if err != nil {
				return err
			}
		}
		if i%3 != 0 {
			if err := d.Rollback(ctx, id); err != nil {
				return err
			}
		}
		if i%2 == 0 {
			if err := d.Remove(ctx, id); err != nil {
				return err
			}
		}
	}
}

func readAll(r io.ReadCloser, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// TestKill kills a process at random moments: between a snapshot and its
// record, while a stream is read, while layers are exchanged. The next New
// mends all of it: every layer in the list is whole and none that was finished
// is lost, and no subvolume is left that is no layer.
func TestKill(t *testing.T) {
	mnt := testenv.Btrfs(t, 512, "-m single")
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	rng := rand.New(rand.NewPCG(1, 1))
	recovered := 0
	for round := range rounds {
		root := filepath.Join(mnt, fmt.Sprint(round))
		require.NoError(t, os.Mkdir(root, 0o755))
		fillKept(t, root)
		killAt(t, root, time.Duration(rng.IntN(40_000))*time.Microsecond)
		recovered += checkRecovered(t, root)
	}
	t.Log("problems mended:", recovered)
	require.NotZero(t, recovered, "no kill hit anything")
}

func fillKept(t *testing.T, root string) {
	t.Helper()
	d, err := btrfs.New(root, nil)
	require.NoError(t, err)
	require.NoError(t, d.Create(t.Context(), "kept", "", nil))
	path, err := d.Get(t.Context(), "kept", nil)
	require.NoError(t, err)
	for i := range 50 {
		require.NoError(t, os.WriteFile(filepath.Join(path, fmt.Sprint("f", i)), bytes.Repeat([]byte{byte(i)}, 5000), 0o644))
	}
	require.NoError(t, d.Put(t.Context(), "kept"))
	require.NoError(t, d.Close())
}

func killAt(t *testing.T, root string, after time.Duration) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crashEnv+"="+root)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.ReadFull(out, make([]byte, len("ready\n")))
	if err == nil {
		time.Sleep(after)
	}
	require.NoError(t, cmd.Process.Kill())
	werr := cmd.Wait()
	require.NoError(t, err, "the process did not get ready: %s", &stderr)
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	require.True(t, ok && status.Signaled(), "it ended by itself: %v: %s", werr, &stderr)
}

func checkRecovered(t *testing.T, root string) (mended int) {
	t.Helper()
	state := filepath.Join(root, "btrfs", ".layerfs")
	snapshots, err := os.ReadDir(filepath.Join(state, "snapshots"))
	require.NoError(t, err)
	builds, err := os.ReadDir(filepath.Join(state, "build"))
	require.NoError(t, err)
	d, err := btrfs.New(root, nil)
	require.NoError(t, err)
	defer d.Close()
	mended = len(d.Recovered()) + len(snapshots) + len(builds)
	noSnapshots(t, root)
	found, err := d.Check(t.Context())
	require.NoError(t, err)
	for _, p := range found {
		require.Equal(t, "rollback did not finish", p.Reason, "%+v", p)
	}
	infos, err := d.List(t.Context())
	require.NoError(t, err)
	listed := map[string]bool{}
	for _, i := range infos {
		listed[i.ID] = true
		if i.Incomplete != "" {
			require.NoError(t, d.Rollback(t.Context(), i.ID), "the same again mends it")
		}
		entries, err := os.ReadDir(i.Path)
		require.NoError(t, err)
		require.Len(t, entries, 50, "%s", i.ID)
	}
	require.True(t, listed["kept"])
	stored, err := os.ReadDir(filepath.Join(root, "btrfs", "subvolumes"))
	require.NoError(t, err)
	for _, e := range stored {
		require.True(t, listed[e.Name()], "%s is no layer", e.Name())
	}
	for _, i := range infos {
		if i.ID != "kept" {
			require.NoError(t, d.Remove(t.Context(), i.ID))
		}
	}
	require.NoError(t, d.Remove(t.Context(), "kept"))
	return mended
}
