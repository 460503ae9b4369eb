package devmapper

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
)

// mountAs makes mounts as a caller does.
func mountAs(t testing.TB, mounts []layerfs.Mount) string {
	t.Helper()
	target := t.TempDir()
	require.Len(t, mounts, 1)
	flags, rest := mount.ParseOptions(mounts[0].Options...)
	require.NoError(t, unix.Mount(mounts[0].Source, target, mounts[0].Type, uintptr(flags), strings.Join(rest, ",")))
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) }) // if the test failed
	return target
}

// TestMounts mounts layers as callers with a mount namespace of their own do.
func TestMounts(t *testing.T) {
	for _, noDeferred := range []bool{false, true} {
		for _, o := range []*Options{small(), smallXFS()} {
			o.MountOptions = []string{"nosuid"}
			o.NoDeferredRemoval, o.NoDeferredDeletion = noDeferred, noDeferred
			name := "fs=" + o.FS
			if noDeferred {
				name += "/no-deferred-removal"
			}
			t.Run(name, func(t *testing.T) { testMounts(t, o) })
		}
	}
}

func testMounts(t *testing.T, o *Options) {
	ctx := t.Context()
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
	create(t, d, "b", "a")
	require.NoError(t, d.SetQuota(ctx, "b", layerfs.Quota{Bytes: 512 << 20})) // which makes it grow

	mounts, err := layerfs.Mounts(ctx, d, "b", nil)
	require.NoError(t, err)
	_, err = d.Get(ctx, "b", nil)
	require.ErrorIs(t, err, layerfs.ErrInUse)
	again, err := d.Mounts(ctx, "b", nil)
	require.NoError(t, err)
	require.Equal(t, mounts, again)
	target := mountAs(t, mounts)
	require.FileExists(t, target+"/f")
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(target, &st))
	require.Greater(t, int64(st.Blocks)*int64(st.Bsize), int64(400<<20))
	require.NotZero(t, st.Flags&unix.ST_NOSUID)
	write(t, target+"/g", 1000, 2)
	var changes []string
	for c, err := range d.Changes(ctx, "b", "a") {
		require.NoError(t, err)
		changes = append(changes, c.Path)
	}
	require.Contains(t, changes, "/g")
	require.ErrorIs(t, d.Remove(ctx, "b"), layerfs.ErrInUse)
	require.NoError(t, d.Put(ctx, "b"))
	require.NoError(t, unix.Unmount(target, 0))
	require.NoError(t, d.Put(ctx, "b"))
	require.ErrorIs(t, d.Put(ctx, "b"), layerfs.ErrNotHeld)
	_, err = d.m.ctl.Info(d.m.deviceName("b", false))
	require.ErrorIs(t, err, unix.ENXIO, "the device is not active any more")
	with(t, d, "b", func(path string) {
		require.FileExists(t, path+"/g")
		_, err := d.Mounts(ctx, "b", nil)
		require.ErrorIs(t, err, layerfs.ErrInUse)
	})

	// A frozen layer is read-only; one that is not cannot be had so.
	mounts, err = d.Mounts(ctx, "a", &layerfs.GetOptions{ReadOnly: true})
	require.NoError(t, err)
	target = mountAs(t, mounts)
	require.FileExists(t, target+"/f")
	require.ErrorIs(t, os.WriteFile(target+"/x", nil, 0o600), unix.EROFS)
	require.NoError(t, unix.Unmount(target, 0))
	require.NoError(t, d.Put(ctx, "a"))
	_, err = d.Mounts(ctx, "b", &layerfs.GetOptions{ReadOnly: true})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = d.Mounts(ctx, "b", &layerfs.GetOptions{Persist: true})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	_, err = d.Mounts(ctx, "none", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)

	// Opening the root again does not take a device away that waits for its
	// mount; a mount outlives Put and the driver, and the device goes with it.
	if o.NoDeferredRemoval {
		return
	}
	other, err := New(filepath.Dir(d.m.home), o)
	require.NoError(t, err)
	mounts, err = other.Mounts(ctx, "b", nil)
	require.NoError(t, err)
	third, err := New(filepath.Dir(d.m.home), o)
	require.NoError(t, err)
	require.NoError(t, third.Close())
	target = mountAs(t, mounts)
	require.NoError(t, other.Put(ctx, "b"))
	require.NoError(t, other.Close())
	write(t, target+"/h", 1000, 3)
	require.NoError(t, unix.Unmount(target, 0))
	require.Eventually(t, func() bool {
		_, err := d.m.ctl.Info(d.m.deviceName("b", false))
		return errors.Is(err, unix.ENXIO)
	}, 10*time.Second, time.Millisecond)
	with(t, d, "b", func(path string) { require.FileExists(t, path+"/h") })
}
