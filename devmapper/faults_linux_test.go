package devmapper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/testenv"
)

// TestMetadataFull: the guard refuses new layers while there is still room; one
// without a guard gets ENOSPC and leaves nothing; growth mends it, and no layer
// was harmed.
func TestMetadataFull(t *testing.T) {
	root := newRoot(t)
	o := small()
	o.MetadataSize = 2 << 20
	d, err := New(root, o)
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	create(t, d, "kept", "")
	with(t, d, "kept", func(path string) { write(t, path+"/f", 1000, 1) })
	guarded := *o
	guarded.MinFreeSpace = 50
	dg := mustNew(t, root, &guarded)
	full, n := fillMetadata(t, d, dg)
	require.ErrorIs(t, full, unix.ENOSPC)
	require.NotErrorIs(t, full, errors.ErrUnsupported, "what the kernel answers")
	require.ErrorContains(t, full, "its metadata is full")
	_, err = d.Stat(t.Context(), fmt.Sprintf("l%d", n), nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	with(t, d, "kept", func(path string) { require.FileExists(t, path+"/f") })
	_, err = New(root, o)
	require.ErrorContains(t, err, "must be larger, or ExtendThreshold set")

	// One that may make it larger does so when it is opened.
	larger := *o
	larger.ExtendThreshold, larger.ExtendPercent = 90, 100
	dl := mustNew(t, root, &larger)
	create(t, dl, "after", "kept")
	with(t, d, "after", func(path string) { require.FileExists(t, path+"/f"); write(t, path+"/g", 1000, 2) })
	st, err := d.m.poolStatus(true)
	require.NoError(t, err)
	require.Equal(t, dm.PoolReadWrite, st.Mode)
	require.False(t, st.NeedsCheck)
	for i := range n {
		require.NoError(t, d.Remove(t.Context(), fmt.Sprintf("l%d", i)))
	}
	found, err := d.Check(t.Context())
	require.NoError(t, err)
	require.Empty(t, found)
}

// fillMetadata makes layers l0, l1 and so on until that fails, and returns the
// error and how many there are. A guarded driver must have refused before.
func fillMetadata(t *testing.T, d, guarded *Driver) (full error, n int) {
	t.Helper()
	// Every write to a snapshot makes a block of the tree its own, so let it
	// have many.
	create(t, d, "wide", "")
	wide, err := d.m.load("wide")
	require.NoError(t, err)
	touchDevice(t, d, wide, 64<<10)
	refused := false
	for n = 0; n < 2000; n++ {
		if !refused {
			if err := guarded.Create(t.Context(), "guarded", "", nil); err != nil {
				require.ErrorIs(t, err, layerfs.ErrQuota)
				require.ErrorContains(t, err, "of the pool's metadata are free, less than 50 percent")
				refused = true
			} else {
				require.NoError(t, guarded.Remove(t.Context(), "guarded"))
			}
		}
		id := fmt.Sprintf("l%d", n)
		if full = d.Create(t.Context(), id, "wide", nil); full != nil {
			require.True(t, refused)
			return full, n
		}
		dev, err := d.m.load(id)
		require.NoError(t, err)
		touchDevice(t, d, dev, 8<<20)
	}
	t.Fatal("the metadata was never full")
	return nil, 0
}

// touchDevice writes to a device that is not in use, once in so many bytes. A
// pool that is full refuses.
func touchDevice(t *testing.T, d *Driver, dev device, every int64) {
	t.Helper()
	name := d.m.deviceName("+touch", false)
	info, err := d.m.activateThin(name, "", dev.ID, dev.Size, false)
	require.NoError(t, err)
	f, err := dm.OpenDevice(info.Device, os.O_WRONLY)
	require.NoError(t, err)
	for at := int64(0); at < dev.Size && err == nil; at += every {
		_, err = f.WriteAt(make([]byte, 4096), at)
	}
	_ = errors.Join(err, f.Sync(), f.Close())
	require.NoError(t, d.m.removeDevice(t.Context(), name))
}

// TestTruncated: files of the pool that are cut off or gone, while it is active
// and while it is not.
func TestTruncated(t *testing.T) {
	template := &Template{Options: *small()}
	// setup returns a root whose layer "far" has its content at the end of the
	// data file, and "near" at its beginning.
	setup := func(t *testing.T) (d *Driver, root string) {
		root = template.Root(t)
		d, err := New(root, small())
		testenv.SkipUnsupported(t, err, "devmapper")
		require.NoError(t, err)
		create(t, d, "near", "")
		with(t, d, "near", func(path string) { write(t, path+"/f", 1000, 1) })
		create(t, d, "far", "")
		with(t, d, "far", func(path string) { write(t, path+"/f", 40<<20, 2) })
		return d, root
	}
	keeps := func(t *testing.T, d *Driver) {
		t.Helper()
		with(t, d, "near", func(path string) { require.FileExists(t, path+"/f") })
		create(t, d, "new", "near")
		with(t, d, "new", func(path string) { require.FileExists(t, path+"/f"); write(t, path+"/g", 1000, 3) })
	}
	for _, name := range []string{"data", "metadata"} {
		t.Run(name, func(t *testing.T) {
			d, root := setup(t)
			path := d.m.dataFile()
			if name == "metadata" {
				path = d.m.metadataFile()
			}
			require.NoError(t, d.Close())
			fi, err := os.Stat(path)
			require.NoError(t, err)
			cut := fi.Size() - 1<<20
			if name == "data" {
				cut = 24 << 20
			}
			require.NoError(t, os.Truncate(path, cut))
			_, err = New(root, small())
			require.ErrorContains(t, err, fmt.Sprintf("%s has %d bytes, but the pool has %d: it was truncated", path, cut, fi.Size()))
			require.NoError(t, os.Truncate(path, fi.Size()))
			keeps(t, mustNew(t, root, small()))
		})
	}
	for _, name := range []string{"data", "metadata"} {
		t.Run(name+"-active", func(t *testing.T) {
			d, root := setup(t)
			defer func() { require.NoError(t, d.Close()) }()
			path, cut := d.m.dataFile(), int64(24<<20)
			if name == "metadata" {
				path, cut = d.m.metadataFile(), small().MetadataSize-1<<20
			}
			fi, err := os.Stat(path)
			require.NoError(t, err)
			require.NoError(t, os.Truncate(path, cut))
			_, err = New(root, small())
			require.ErrorContains(t, err, fmt.Sprintf("%s has %d bytes, but the pool has %d: it was truncated", path, cut, fi.Size()))
			require.NoError(t, os.Truncate(path, fi.Size()))
			keeps(t, d)
		})
	}
	t.Run("removed", func(t *testing.T) {
		d, root := setup(t)
		for _, path := range []string{d.m.dataFile(), d.m.metadataFile()} {
			require.NoError(t, os.Rename(path, path+".away"))
			_, err := New(root, small()) // active, on a file that has no name
			require.ErrorContains(t, err, filepath.Base(path))
			require.ErrorIs(t, err, os.ErrNotExist)
			require.NoError(t, os.Rename(path+".away", path))
		}
		keeps(t, d) // who has it open goes on
		require.NoError(t, d.Close())
		for _, path := range []string{d.m.dataFile(), d.m.metadataFile()} {
			require.NoError(t, os.Rename(path, path+".away"))
			_, err := New(root, small())
			require.ErrorContains(t, err, "a file of the pool is missing, and with it all layers")
			require.NoFileExists(t, path)
			require.NoError(t, os.Rename(path+".away", path))
		}
		d = mustNew(t, root, small())
		with(t, d, "new", func(path string) { require.FileExists(t, path+"/g") })
	})
}

// TestFaulty: a layer whose file system or whose disk is broken fails with what
// the kernel says; the others go on, and after a repair so does it.
func TestFaulty(t *testing.T) {
	t.Run("file-system", func(t *testing.T) {
		for _, o := range []*Options{small(), smallXFS()} {
			t.Run("fs="+o.FS, func(t *testing.T) {
				d := mustNew(t, newRoot(t), o)
				for _, id := range []string{"bad", "good"} {
					create(t, d, id, "")
					with(t, d, id, func(path string) { write(t, path+"/f", 1000, 1) })
				}
				at := int64(0) // of the superblock
				if o.FS == "" {
					at = 1024
				}
				dev, err := d.m.load("bad")
				require.NoError(t, err)
				was := overwrite(t, d, dev, at, make([]byte, 512))
				_, err = d.Get(t.Context(), "bad", nil)
				require.ErrorContains(t, err, "/dev/dm-", "the device")
				var e *layerfs.Error
				require.ErrorAs(t, err, &e)
				require.Equal(t, "bad", e.ID)
				_, err = d.m.ctl.Info(d.m.deviceName("bad", false))
				require.ErrorIs(t, err, unix.ENXIO, "no device is left")
				with(t, d, "good", func(path string) { require.FileExists(t, path+"/f") })
				overwrite(t, d, dev, at, was)
				with(t, d, "bad", func(path string) { require.FileExists(t, path+"/f") })
			})
		}
	})
	t.Run("disk", func(t *testing.T) {
		// The pool's data is on a device that fails from some moment on.
		disk := newDisk(t, "data", 128<<20)
		meta := newDisk(t, "metadata", 4<<20)
		o := &Options{DataDevice: disk.path(), MetadataDevice: meta.path(), BaseSize: 64 << 20, MinFreeSpace: -1, Durability: layerfs.DurabilityNone}
		root := newRoot(t)
		d := mustNew(t, root, o)
		for _, id := range []string{"a", "b"} {
			create(t, d, id, "")
			with(t, d, id, func(path string) { write(t, path+"/f", 1000, 1) })
		}
		held, err := d.Get(t.Context(), "b", nil)
		require.NoError(t, err)
		disk.fail()
		_, err = d.Get(t.Context(), "a", nil)
		require.ErrorContains(t, err, "/dev/dm-")
		require.ErrorIs(t, err, unix.EIO)
		require.Error(t, writeSync(held+"/g", 1<<20), "a write that is lost is told")
		require.NoError(t, d.Put(t.Context(), "b"))
		disk.mend()
		for _, id := range []string{"a", "b"} {
			with(t, d, id, func(path string) {
				require.FileExists(t, path+"/f")
				require.NoError(t, writeSync(path+"/h", 1<<20))
			})
		}
		create(t, d, "c", "a")
	})
	t.Run("metadata-disk", func(t *testing.T) {
		disk := newDisk(t, "data", 128<<20)
		meta := newDisk(t, "metadata", 4<<20)
		o := &Options{DataDevice: disk.path(), MetadataDevice: meta.path(), BaseSize: 64 << 20, MinFreeSpace: -1, Durability: layerfs.DurabilityNone}
		root := newRoot(t)
		d, err := New(root, o)
		testenv.SkipUnsupported(t, err, "devmapper")
		require.NoError(t, err)
		create(t, d, "a", "")
		with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
		_, err = d.Get(t.Context(), "a", nil)
		require.NoError(t, err)
		meta.fail()
		err = d.Create(t.Context(), "b", "", nil) // may be in memory as yet
		for i := 0; err == nil && i < 10; i++ {
			_, err = d.m.poolStatus(false)
			if err == nil {
				err = d.Create(t.Context(), fmt.Sprintf("b%d", i), "", nil)
			}
		}
		require.Error(t, err)
		require.NotErrorIs(t, err, errors.ErrUnsupported)
		st, err := d.m.poolStatus(true)
		require.NoError(t, err)
		require.Equal(t, dm.PoolFail, st.Mode)
		// Its devices are marked as failed.
		found, err := d.Check(t.Context())
		require.NoError(t, err)
		require.Contains(t, fmt.Sprint(found), "its device has failed")
		_, err = New(root, o)
		require.Error(t, err)
		require.NoError(t, d.Put(t.Context(), "a"))
		require.NoError(t, d.Close())
		meta.mend()
		d = mustNew(t, root, o) // runs thin_check if the kernel asks for it
		with(t, d, "a", func(path string) { require.FileExists(t, path+"/f") })
		create(t, d, "c", "a")
		// What was created while nothing could be written is lost, and told.
		found, err = d.Check(t.Context())
		require.NoError(t, err)
		for _, p := range found {
			require.True(t, strings.HasPrefix(p.ID, "b"), "%v", p)
			require.NoError(t, d.Remove(t.Context(), p.ID))
		}
		found, err = d.Check(t.Context())
		require.NoError(t, err)
		require.Empty(t, found)
	})
}

// overwrite writes to the device of a layer that is not mounted, and returns
// what was there.
func overwrite(t *testing.T, d *Driver, dev device, offset int64, data []byte) (was []byte) {
	t.Helper()
	name := d.m.deviceName("+overwrite", false)
	info, err := d.m.activateThin(name, "", dev.ID, dev.Size, false)
	require.NoError(t, err)
	f, err := dm.OpenDevice(info.Device, os.O_RDWR)
	require.NoError(t, err)
	was = make([]byte, len(data))
	_, err = f.ReadAt(was, offset)
	require.NoError(t, err)
	_, err = f.WriteAt(data, offset)
	require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
	require.NoError(t, d.m.removeDevice(t.Context(), name))
	return was
}

// disk is a device that can be made to fail.
type disk struct {
	t    *testing.T
	c    *dm.Control
	name string
	info dm.Info
	good dm.Target
}

func newDisk(t *testing.T, name string, size int64) *disk {
	t.Helper()
	c, err := dm.Open()
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	path := filepath.Join(newRoot(t), name)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, size))
	l, err := loop.Attach(t.Context(), path, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Detach()) })
	x := &disk{t: t, c: c, name: fmt.Sprintf("layerfs-test-%s-%d", name, os.Getpid())}
	x.good, err = dm.Linear{Length: uint64(size) / dm.SectorSize, Device: l.Path()}.Target()
	require.NoError(t, err)
	x.info, err = c.Activate(x.name, "", []dm.Target{x.good}, false)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Remove(x.name)) })
	return x
}

func (x *disk) path() string { return fmt.Sprintf("/dev/dm-%d", x.info.Device.Minor) }

// fail makes every access an error, mend undoes it. What is on its way is not
// waited for.
func (x *disk) fail() { x.change(dm.ErrorTarget(0, x.good.Length)) }
func (x *disk) mend() { x.change(x.good) }

func (x *disk) change(target dm.Target) {
	x.t.Helper()
	_, err := x.c.Load(x.name, []dm.Target{target}, false)
	require.NoError(x.t, err)
	_, err = x.c.Resume(x.name, dm.SuspendOptions{NoFlush: true, NoLockFS: true})
	require.NoError(x.t, err)
}

// TestThinRepair: metadata that thin_check finds damaged is refused with a word
// about what to do, and after that nothing is lost.
func TestThinRepair(t *testing.T) {
	repair := testenv.RequireTool(t, "thin_repair", "devmapper")
	testenv.RequireTool(t, "thin_check", "devmapper")
	root := newRoot(t)
	d, err := New(root, small())
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
	require.NoError(t, d.Close())
	path := d.m.metadataFile()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	super := make([]byte, 4096)
	_, err = f.ReadAt(super, 0)
	require.NoError(t, err)
	// bitmap_root of the data space map: struct disk_sm_root at byte 64 of the
	// superblock, drivers/md/persistent-data/dm-space-map-common.h.
	bitmaps := binary.LittleEndian.Uint64(super[64+16:])
	_, err = f.WriteAt(make([]byte, 4096), int64(bitmaps)*4096)
	require.NoError(t, errors.Join(err, f.Close()))
	setNeedsCheck(t, path)
	_, err = New(root, small())
	require.ErrorContains(t, err, "the pool's metadata is damaged: thin_check")
	require.ErrorContains(t, err, "run thin_repair on "+path)

	fixed := path + ".fixed"
	require.NoError(t, os.WriteFile(fixed, nil, 0o600))
	require.NoError(t, os.Truncate(fixed, small().MetadataSize))
	in, err := loop.Attach(t.Context(), path, nil) // it reads with O_DIRECT
	require.NoError(t, err)
	out, err := loop.Attach(t.Context(), fixed, nil)
	require.NoError(t, err)
	said, err := exec.Command(repair, "-i", in.Path(), "-o", out.Path()).CombinedOutput()
	require.NoError(t, err, "%s", said)
	require.NoError(t, errors.Join(in.Detach(), out.Detach()))
	require.NoError(t, os.Rename(fixed, path))
	d = mustNew(t, root, small())
	with(t, d, "a", func(path string) { require.FileExists(t, path+"/f") })
	create(t, d, "b", "a")
}

// TestStale: devices of every kind that a crash leaves are mended or removed by
// the next New, those of a living process are not.
func TestStale(t *testing.T) {
	root := newRoot(t)
	d, err := New(root, small())
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
	create(t, d, "b", "")
	path, err := d.Get(t.Context(), "b", nil)
	require.NoError(t, err)
	a, err := d.m.load("a")
	require.NoError(t, err)
	b, err := d.m.load("b")
	require.NoError(t, err)
	c := d.m.ctl
	active := func(what string) (name string) {
		name = d.m.deviceName(what, false)
		_, err := d.m.activateThin(name, d.m.uuidOf(what), a.ID, a.Size, true)
		require.NoError(t, err, what)
		return name
	}
	var stale []string
	for _, what := range []string{"a", "+base", "+apply-a", "+snap-x", "+old-77", fmt.Sprintf("+%d", a.ID)} {
		stale = append(stale, active(what))
	}
	table := d.m.deviceName("+table", false) // created, and no more
	_, err = c.Create(table, d.m.uuidOf("table"))
	require.NoError(t, err)
	stale = append(stale, table)
	mounted := d.m.deviceName("b", false)
	require.NoError(t, c.Suspend(mounted, dm.SuspendOptions{}))
	lost := device{ID: a.ID + 1000, Size: a.Size}
	require.NoError(t, d.m.message(dm.CreateThin(lost.ID)))
	require.NoError(t, d.m.save(d.m.applyPath("a"), lost))
	// What a living process has under its lock is left alone.
	busy := active("+apply-b")
	unlock, err := d.m.dir.Lock(t.Context(), "b")
	require.NoError(t, err)

	d2 := mustNew(t, root, small())
	for _, name := range stale {
		_, err := c.Info(name)
		require.ErrorIs(t, err, unix.ENXIO, "%s", name)
	}
	_, err = c.Info(busy)
	require.NoError(t, err)
	require.NoError(t, c.Remove(busy))
	unlock()
	require.NoError(t, d2.m.sweep(t.Context()))
	info, err := c.Info(mounted)
	require.NoError(t, err)
	require.False(t, info.Suspended)
	require.NoError(t, writeSync(path+"/g", 1000))
	require.NoError(t, d.Put(t.Context(), "b"))
	require.NoFileExists(t, d.m.applyPath("a"))
	_, err = d.m.activateThin(d.m.deviceName("+x", false), "", lost.ID, 1<<20, true)
	require.ErrorIs(t, err, unix.ENODATA)
	with(t, d2, "a", func(path string) { require.FileExists(t, path+"/f") })
	with(t, d2, "b", func(path string) { require.FileExists(t, path+"/g") })
	require.NotEqual(t, a.ID, b.ID)
	require.NoError(t, d.Close())
}

// TestStaleBusy: a device to be deleted that somebody still has keeps nobody
// from opening the root, and goes later.
func TestStaleBusy(t *testing.T) {
	for _, deferred := range []bool{true, false} {
		t.Run(fmt.Sprintf("deferred=%t", deferred), func(t *testing.T) {
			o := small()
			o.NoDeferredDeletion = !deferred
			root := newRoot(t)
			d := mustNew(t, root, o)
			create(t, d, "a", "")
			lost := device{ID: 5000, Size: 64 << 20}
			require.NoError(t, d.m.message(dm.CreateThin(lost.ID)))
			require.NoError(t, d.m.save(d.m.deletePath(lost.ID), lost))
			name := d.m.prefix + "-test"
			_, err := d.m.activateThin(name, "", lost.ID, lost.Size, false)
			require.NoError(t, err)
			again, err := New(root, o)
			require.NoError(t, err)
			require.Equal(t, "1", status(t, again)["Deferred Deleted Device Count"])
			require.NoError(t, d.m.removeDevice(t.Context(), name))
			create(t, again, "b", "a") // looks at what was deferred
			require.Equal(t, "0", status(t, again)["Deferred Deleted Device Count"])
			require.NoError(t, again.Close())
		})
	}
}

// TestBusy: with neither deferral a layer that is in use cannot be removed, and
// is whole after that.
func TestBusy(t *testing.T) {
	o := small()
	o.NoDeferredRemoval, o.NoDeferredDeletion = true, true
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
	dev, err := d.m.load("a")
	require.NoError(t, err)
	name := d.m.prefix + "-test" // not the driver's
	_, err = d.m.activateThin(name, "", dev.ID, dev.Size, true)
	require.NoError(t, err)
	err = d.Remove(t.Context(), "a")
	require.ErrorIs(t, err, layerfs.ErrInUse)
	require.NoError(t, d.m.ctl.Remove(name))
	require.NoError(t, d.Remove(t.Context(), "a"))
	create(t, d, "a", "")
}

// TestFailedMount: a Get that fails after the device was activated leaves none.
func TestFailedMount(t *testing.T) {
	for _, deferred := range []bool{true, false} {
		t.Run(fmt.Sprintf("deferred=%t", deferred), func(t *testing.T) {
			o := small()
			o.NoDeferredRemoval, o.NoDeferredDeletion = !deferred, !deferred
			d := mustNew(t, newRoot(t), o)
			create(t, d, "a", "")
			require.NoError(t, os.WriteFile(d.m.Path("a"), nil, 0o600)) // no directory
			_, err := d.Get(t.Context(), "a", nil)
			require.ErrorContains(t, err, "move_mount")
			gone := func() bool { // the kernel may take its time
				_, err := d.m.ctl.Info(d.m.deviceName("a", false))
				return errors.Is(err, unix.ENXIO)
			}
			require.Eventually(t, gone, 10*time.Second, 10*time.Millisecond)
			require.NoError(t, os.Remove(d.m.Path("a")))
			with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
			require.Eventually(t, gone, 10*time.Second, 10*time.Millisecond)
			require.NoError(t, d.Remove(context.WithoutCancel(t.Context()), "a"))
		})
	}
}
