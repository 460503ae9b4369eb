package layerdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

// unsynced is mustOpen without syncing.
func unsynced(t *testing.T, home string) *Dir {
	t.Helper()
	return openWith(t, home, layerfs.DurabilityNone)
}

// TestGoneChildAskedByTwo: the id of a removed layer stands in the files of two
// parents. Who looks must not be taken for who makes it.
func TestGoneChildAskedByTwo(t *testing.T) {
	home := t.TempDir()
	const looks = 1000
	var wg sync.WaitGroup
	for i := range 2 {
		d, parent := unsynced(t, home), fmt.Sprint("p", i)
		wg.Go(func() {
			for range looks {
				if err := d.AddChild(parent, "work"); !assert.NoError(t, err) {
					return
				}
				has, err := d.HasChildren(parent)
				if !assert.NoError(t, err) || !assert.False(t, has, "nobody makes it") {
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestLoadBesideAdd: without the lock a record is there or not, never damaged.
func TestLoadBesideAdd(t *testing.T) {
	home := t.TempDir()
	writer, reader := unsynced(t, home), unsynced(t, home)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(stop)
		for i := range 2000 {
			rec := &Record{ID: "x", Parent: fmt.Sprint("p", i%7), Created: time.Now().UTC()}
			if !assert.NoError(t, writer.Add(rec)) || !assert.NoError(t, writer.Drop(rec, false)) {
				return
			}
		}
	})
	for {
		select {
		case <-stop:
			wg.Wait()
			return
		default:
		}
		if _, err := reader.Load("x"); err != nil {
			require.ErrorIs(t, err, layerfs.ErrNotExist)
		}
	}
}

// TestMarkIsTaken: a power failure can leave a whole record with its mark. It is
// a layer, and if it is damaged later that must not look like one never made.
func TestMarkIsTaken(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("records are marked on Linux only")
	}
	home := t.TempDir()
	d := mustOpen(t, home)
	if !d.direct {
		t.Skip("on this file system records come by a rename")
	}
	require.NoError(t, d.Add(&Record{ID: "x"}))
	path := filepath.Join(home, ".layerfs", "records", "x")
	require.NoError(t, os.Chmod(path, making))
	require.NoError(t, mustOpen(t, home).ClearTemporary())
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), fi.Mode().Perm())
	require.NoError(t, os.Truncate(path, 3))
	_, err = mustOpen(t, home).Load("x")
	require.Error(t, err)
	require.False(t, errors.Is(err, layerfs.ErrNotExist), "it is damaged, and there")
}
