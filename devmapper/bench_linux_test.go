package devmapper

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/thin"
)

// BenchmarkCreate makes a layer. Beside it stands what containerd's devmapper
// snapshotter runs for the same.
func BenchmarkCreate(b *testing.B) {
	d := benchDriver(b, small())
	ctx := b.Context()
	require.NoError(b, d.Create(ctx, "base", "", nil))
	b.Run("driver=devmapper", func(b *testing.B) {
		n := 0
		for b.Loop() {
			require.NoError(b, d.Create(ctx, "c"+strconv.Itoa(n), "base", nil))
			n++
		}
		for i := range n {
			require.NoError(b, d.Remove(ctx, "c"+strconv.Itoa(i)))
		}
	})
	b.Run("driver=dmsetup", func(b *testing.B) {
		s := newSnapshotter(b, d, "base")
		for b.Loop() {
			s.create()
		}
	})
}

// snapshotter makes snapshots as containerd's devmapper snapshotter does, in
// the pool of a driver: dmsetup is run to suspend and resume the origin, which
// it keeps active, to take the snapshot, and to make the device active.
//
// Source: containerd snapshots/devmapper/pool_device.go, CreateSnapshotDevice,
// v2.0.
type snapshotter struct {
	tb     testing.TB
	d      *Driver
	tool   string
	dev    device
	origin string
	made   int
}

func newSnapshotter(tb testing.TB, d *Driver, origin string) *snapshotter {
	tb.Helper()
	s := &snapshotter{tb: tb, d: d, tool: testenv.RequireTool(tb, "dmsetup", "devmapper"), origin: d.m.deviceName("+bench", false)}
	var err error
	s.dev, err = d.m.load(origin)
	require.NoError(tb, err)
	_, err = d.m.activateThin(s.origin, "", s.dev.ID, s.dev.Size, false)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		ctx := context.Background()
		for i := range s.made {
			require.NoError(tb, d.m.removeDevice(ctx, s.origin+strconv.Itoa(firstMade+i)))
			require.NoError(tb, d.m.deleteThin(uint32(firstMade+i)))
		}
		require.NoError(tb, d.m.removeDevice(ctx, s.origin))
	})
	return s
}

// firstMade is a device number that the driver does not reach.
const firstMade = 1 << 20

func (s *snapshotter) create() {
	run := func(args ...string) {
		out, err := exec.Command(s.tool, args...).CombinedOutput()
		require.NoError(s.tb, err, "dmsetup %v: %s", args, out)
	}
	id := strconv.Itoa(firstMade + s.made)
	run("suspend", s.origin)
	run("message", s.d.m.pool, "0", "create_snap "+id+" "+strconv.Itoa(int(s.dev.ID)))
	run("resume", s.origin)
	run("create", "--noudevsync", s.origin+id, "--table", fmt.Sprintf("0 %d thin %v %s", s.dev.Size/512, s.d.m.poolDev, id))
	s.made++
}

func benchDriver(tb testing.TB, o *Options) *Driver {
	tb.Helper()
	d, err := New(testenv.Tmpfs(tb, "size=80%"), o)
	testenv.SkipUnsupported(tb, err, "devmapper")
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, d.Close()) })
	return d
}

// BenchmarkGetPut mounts a layer and unmounts it; the bare ioctls and mount
// calls that it takes stand beside it.
func BenchmarkGetPut(b *testing.B) {
	d := benchDriver(b, small())
	ctx := b.Context()
	require.NoError(b, d.Create(ctx, "a", "", nil))
	b.Run("driver=devmapper", func(b *testing.B) {
		for b.Loop() {
			_, err := d.Get(ctx, "a", nil)
			require.NoError(b, err)
			require.NoError(b, d.Put(ctx, "a"))
		}
	})
	b.Run("driver=bare", func(b *testing.B) {
		bare := bareMount(b, d, "a")
		for b.Loop() {
			bare()
		}
	})
}

// bareMount returns a function that mounts a layer and unmounts it with nothing
// but the calls that this takes.
func bareMount(tb testing.TB, d *Driver, id string) func() {
	tb.Helper()
	dev, err := d.m.load(id)
	require.NoError(tb, err)
	name, target := d.m.deviceName("+bare", false), tb.TempDir()
	table, err := dm.Thin{Length: uint64(dev.Size) / dm.SectorSize, Pool: d.m.poolDev.String(), ID: dev.ID}.Target()
	require.NoError(tb, err)
	return func() {
		info, err := d.m.ctl.Activate(name, "", []dm.Target{table}, false)
		require.NoError(tb, err)
		require.NoError(tb, unix.Mount(fmt.Sprintf("/dev/dm-%d", info.Device.Minor), target, "ext4", 0, "noinit_itable"))
		require.NoError(tb, mount.UnmountNow(target))
		require.NoError(tb, d.m.ctl.Remove(name))
	}
}

// BenchmarkChanges finds three changed files among sixty thousand, natively and
// by a walk over both trees.
func BenchmarkChanges(b *testing.B) {
	for _, fs := range []string{"ext4", "xfs"} {
		x := newManyFiles(b, fs, 60000)
		suffix := fmt.Sprintf("fs=%s/files=%d/changed=3", fs, 60000)
		b.Run("how=native/"+suffix, func(b *testing.B) {
			for b.Loop() {
				x.native()
			}
		})
		b.Run("how=walk/"+suffix, func(b *testing.B) {
			for b.Loop() {
				x.walk()
			}
		})
	}
}

// manyFiles are a layer with many files, and one above it with three of them
// changed.
type manyFiles struct {
	tb    testing.TB
	d     *Driver
	chain lifecycle.Chain
	at    int
}

func newManyFiles(tb testing.TB, fs string, files int) *manyFiles {
	tb.Helper()
	o := small()
	o.FS, o.BaseSize, o.DataSize = fs, 1<<30, 2<<30
	d := benchDriver(tb, o)
	ctx := context.Background()
	require.NoError(tb, d.Create(ctx, "base", "", nil))
	path, err := d.Get(ctx, "base", nil)
	require.NoError(tb, err)
	// Most are empty, which favours the walk if anything: one call for each
	// file is what can be afforded where every instruction is emulated.
	const each = 60
	for i := 0; i < files; i += each {
		dir := fmt.Sprintf("%s/d%d/e%d", path, i/each/50, i/each%50)
		require.NoError(tb, os.MkdirAll(dir, 0o755))
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		require.NoError(tb, err)
		for n := range each {
			if err := unix.Mknodat(fd, "f"+strconv.Itoa(n), unix.S_IFREG|0o644, 0); err != nil {
				require.NoError(tb, err)
			}
		}
		require.NoError(tb, unix.Close(fd))
	}
	require.NoError(tb, d.Put(ctx, "base"))
	require.NoError(tb, d.Create(ctx, "top", "base", nil))
	path, err = d.Get(ctx, "top", nil)
	require.NoError(tb, err)
	for _, i := range []int{0, files / each / 2, files/each - 1} {
		require.NoError(tb, os.WriteFile(fmt.Sprintf("%s/d%d/e%d/f7", path, i/50, i%50), []byte("other"), 0o644))
	}
	require.NoError(tb, d.Put(ctx, "top"))
	x := &manyFiles{tb: tb, d: d}
	x.chain, x.at, err = d.m.lineage("top", "base")
	require.NoError(tb, err)
	return x
}

func (x *manyFiles) native() {
	n := 0
	for _, err := range x.d.m.NativeChanges(context.Background(), x.chain, x.at) {
		require.NoError(x.tb, err)
		n++
	}
	require.Equal(x.tb, 3, n)
}

func (x *manyFiles) walk() {
	ctx := context.Background()
	newer, err := x.d.m.View(ctx, x.chain)
	require.NoError(x.tb, err)
	older, err := x.d.m.View(ctx, x.chain[x.at:])
	require.NoError(x.tb, err)
	n := 0
	for _, err := range archive.Compare(ctx, older.Path, newer.Path, nil) {
		require.NoError(x.tb, err)
		n++
	}
	require.Equal(x.tb, 3, n)
	require.NoError(x.tb, newer.Release())
	require.NoError(x.tb, older.Release())
}

// BenchmarkBlockDiff reports the changed blocks of a layer of 10 GiB. The reads
// of metadata show that the cost is that of the changes.
func BenchmarkBlockDiff(b *testing.B) {
	x := newLargeLayer(b)
	for _, changed := range []int{1, 100, 1000} {
		id := x.child(changed)
		b.Run("size=10G/changed="+strconv.Itoa(changed), func(b *testing.B) {
			for b.Loop() {
				x.diff(id, changed)
			}
			b.ReportMetric(float64(x.reads(id)), "reads/op")
		})
	}
}

// largeLayer is a layer of 10 GiB that is mapped in 8000 places.
type largeLayer struct {
	tb  testing.TB
	d   *Driver
	dev device
}

func newLargeLayer(tb testing.TB) *largeLayer {
	tb.Helper()
	o := small()
	o.BaseSize, o.DataSize, o.MetadataSize = 10<<30, 20<<30, 64<<20
	x := &largeLayer{tb: tb, d: benchDriver(tb, o)}
	require.NoError(tb, x.d.Create(context.Background(), "base", "", nil))
	var err error
	x.dev, err = x.d.m.load("base")
	require.NoError(tb, err)
	x.write(x.dev.ID, func(i int) int64 { return int64(i) * (10 << 30 / 8000) / 65536 * 65536 }, 8000)
	return x
}

// write writes to a device, without a file system in the way.
func (x *largeLayer) write(n uint32, offset func(i int) int64, count int) {
	name := x.d.m.deviceName("+write", false)
	info, err := x.d.m.activateThin(name, "", n, x.dev.Size, false)
	require.NoError(x.tb, err)
	f, err := dm.OpenDevice(info.Device, os.O_WRONLY)
	require.NoError(x.tb, err)
	block := make([]byte, 4096)
	for i := range count {
		if _, err := f.WriteAt(block, offset(i)); err != nil {
			require.NoError(x.tb, err)
		}
	}
	require.NoError(x.tb, f.Sync())
	require.NoError(x.tb, f.Close())
	require.NoError(x.tb, x.d.m.removeDevice(context.Background(), name))
}

// child makes a layer that differs in so many blocks.
func (x *largeLayer) child(changed int) (id string) {
	id = "c" + strconv.Itoa(changed)
	require.NoError(x.tb, x.d.Create(context.Background(), id, "base", nil))
	c, err := x.d.m.load(id)
	require.NoError(x.tb, err)
	places := rand.New(rand.NewPCG(1, 2)).Perm(10 << 30 / 65536)
	x.write(c.ID, func(i int) int64 { return int64(places[i]) * 65536 }, changed)
	return id
}

func (x *largeLayer) diff(id string, changed int) {
	var bytes int64
	for r, err := range x.d.BlockDiff(context.Background(), id, "base") {
		require.NoError(x.tb, err)
		bytes += r.Length
	}
	require.Equal(x.tb, int64(changed)*65536, bytes)
}

// reads returns how many blocks of metadata a report reads.
func (x *largeLayer) reads(id string) (n int64) {
	c, err := x.d.m.load(id)
	require.NoError(x.tb, err)
	require.NoError(x.tb, x.d.m.withMetadata(context.Background(), func(md *thin.Metadata) error {
		before := md.Reads()
		for range md.Diff(x.dev.ID, c.ID) {
		}
		n = md.Reads() - before
		return nil
	}))
	return n
}

// BenchmarkLife is the life of a container: create, get, put, remove.
func BenchmarkLife(b *testing.B) {
	for _, durability := range []layerfs.Durability{layerfs.DurabilityNone, layerfs.DurabilityMetadata} {
		o := small()
		o.Durability = durability
		d := benchDriver(b, o)
		ctx := b.Context()
		require.NoError(b, d.Create(ctx, "base", "", nil))
		b.Run("durability="+durability.String(), func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, d.Create(ctx, "c", "base", nil))
				_, err := d.Get(ctx, "c", nil)
				require.NoError(b, err)
				require.NoError(b, d.Put(ctx, "c"))
				require.NoError(b, d.Remove(ctx, "c"))
			}
		})
	}
}
