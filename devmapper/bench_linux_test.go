package devmapper

import (
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
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/thin"
)

// BenchmarkCreate makes a layer. Beside it stands what containerd's devmapper
// snapshotter runs for the same, on the same pool: dmsetup to suspend and
// resume the origin, which it keeps active, to take the snapshot, and to make
// the device active.
//
// Source: containerd snapshots/devmapper/pool_device.go, CreateSnapshotDevice,
// v2.0.
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
		tool := testenv.RequireTool(b, "dmsetup", "devmapper")
		run := func(args ...string) {
			out, err := exec.Command(tool, args...).CombinedOutput()
			require.NoError(b, err, "dmsetup %v: %s", args, out)
		}
		dev, err := d.m.load("base")
		require.NoError(b, err)
		origin := d.m.deviceName("+bench", false)
		_, err = d.m.activateThin(origin, "", dev.ID, dev.Size, false)
		require.NoError(b, err)
		const first = 1 << 20
		n := 0
		for b.Loop() {
			id := strconv.Itoa(first + n)
			run("suspend", origin)
			run("message", d.m.pool, "0", "create_snap "+id+" "+strconv.Itoa(int(dev.ID)))
			run("resume", origin)
			run("create", "--noudevsync", origin+id, "--table", fmt.Sprintf("0 %d thin %v %s", dev.Size/512, d.m.poolDev, id))
			n++
		}
		for i := range n {
			require.NoError(b, d.m.removeDevice(ctx, origin+strconv.Itoa(first+i)))
			require.NoError(b, d.m.deleteThin(uint32(first+i)))
		}
		require.NoError(b, d.m.removeDevice(ctx, origin))
	})
}

func benchDriver(b *testing.B, o *Options) *Driver {
	b.Helper()
	d, err := New(testenv.Tmpfs(b, "size=80%"), o)
	testenv.SkipUnsupported(b, err, "devmapper")
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, d.Close()) })
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
		dev, err := d.m.load("a")
		require.NoError(b, err)
		name, target := d.m.deviceName("+bare", false), b.TempDir()
		table, err := dm.Thin{Length: uint64(dev.Size) / dm.SectorSize, Pool: d.m.poolDev.String(), ID: dev.ID}.Target()
		require.NoError(b, err)
		for b.Loop() {
			info, err := d.m.ctl.Activate(name, "", []dm.Target{table}, false)
			require.NoError(b, err)
			require.NoError(b, unix.Mount(fmt.Sprintf("/dev/dm-%d", info.Device.Minor), target, "ext4", 0, "noinit_itable"))
			require.NoError(b, mount.UnmountNow(target))
			require.NoError(b, d.m.ctl.Remove(name))
		}
	})
}

// BenchmarkChanges finds three changed files among sixty thousand, natively and
// by a walk over both trees.
func BenchmarkChanges(b *testing.B) {
	files := 60000
	if testing.Short() { // making them takes minutes without hardware support
		files = 12000
	}
	for _, fs := range []string{"ext4", "xfs"} {
		o := small()
		o.FS, o.BaseSize, o.DataSize = fs, 1<<30, 2<<30
		d := benchDriver(b, o)
		ctx := b.Context()
		require.NoError(b, d.Create(ctx, "base", "", nil))
		path, err := d.Get(ctx, "base", nil)
		require.NoError(b, err)
		for i := range files {
			dir := fmt.Sprintf("%s/d%d/e%d", path, i/1000, i/20%50)
			if i%20 == 0 {
				require.NoError(b, os.MkdirAll(dir, 0o755))
			}
			require.NoError(b, os.WriteFile(dir+"/f"+strconv.Itoa(i), []byte("some content"), 0o644))
		}
		require.NoError(b, d.Put(ctx, "base"))
		require.NoError(b, d.Create(ctx, "top", "base", nil))
		path, err = d.Get(ctx, "top", nil)
		require.NoError(b, err)
		for _, i := range []int{7, files/2 + 11, files - 1} {
			require.NoError(b, os.WriteFile(fmt.Sprintf("%s/d%d/e%d/f%d", path, i/1000, i/20%50, i), []byte("other"), 0o644))
		}
		require.NoError(b, d.Put(ctx, "top"))
		chain, at, err := d.m.lineage("top", "base")
		require.NoError(b, err)
		suffix := fmt.Sprintf("fs=%s/files=%d/changed=3", fs, files)
		b.Run("how=native/"+suffix, func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range d.m.NativeChanges(ctx, chain, at) {
					require.NoError(b, err)
					n++
				}
				require.Equal(b, 3, n)
			}
		})
		b.Run("how=walk/"+suffix, func(b *testing.B) {
			for b.Loop() {
				newer, err := d.m.View(ctx, chain)
				require.NoError(b, err)
				older, err := d.m.View(ctx, chain[at:])
				require.NoError(b, err)
				n := 0
				for _, err := range archive.Compare(ctx, older.Path, newer.Path, nil) {
					require.NoError(b, err)
					n++
				}
				require.Equal(b, 3, n)
				require.NoError(b, newer.Release())
				require.NoError(b, older.Release())
			}
		})
	}
}

// BenchmarkBlockDiff reports the changed blocks of a layer of 10 GiB. The reads
// of metadata show that the cost is that of the changes.
func BenchmarkBlockDiff(b *testing.B) {
	o := small()
	o.BaseSize, o.DataSize, o.MetadataSize = 10<<30, 20<<30, 64<<20
	d := benchDriver(b, o)
	ctx := b.Context()
	require.NoError(b, d.Create(ctx, "base", "", nil))
	dev, err := d.m.load("base")
	require.NoError(b, err)
	// A device that is mapped in 8000 places, without a file system in the way.
	poke := func(n uint32, offsets func(i int) int64, count int) {
		name := d.m.deviceName("+poke", false)
		info, err := d.m.activateThin(name, "", n, dev.Size, false)
		require.NoError(b, err)
		f, err := dm.OpenDevice(info.Device, os.O_WRONLY)
		require.NoError(b, err)
		for i := range count {
			_, err := f.WriteAt(make([]byte, 4096), offsets(i))
			require.NoError(b, err)
		}
		require.NoError(b, f.Sync())
		require.NoError(b, f.Close())
		require.NoError(b, d.m.removeDevice(ctx, name))
	}
	poke(dev.ID, func(i int) int64 { return int64(i) * (10 << 30 / 8000) / 65536 * 65536 }, 8000)
	for _, changed := range []int{1, 100, 1000} {
		id := "c" + strconv.Itoa(changed)
		require.NoError(b, d.Create(ctx, id, "base", nil))
		c, err := d.m.load(id)
		require.NoError(b, err)
		r := rand.New(rand.NewPCG(1, 2))
		places := r.Perm(10 << 30 / 65536)
		poke(c.ID, func(i int) int64 { return int64(places[i]) * 65536 }, changed)
		b.Run("size=10G/changed="+strconv.Itoa(changed), func(b *testing.B) {
			for b.Loop() {
				var bytes int64
				for r, err := range d.BlockDiff(ctx, id, "base") {
					require.NoError(b, err)
					bytes += r.Length
				}
				require.Equal(b, int64(changed)*65536, bytes)
			}
			require.NoError(b, d.m.withMetadata(ctx, func(md *thin.Metadata) error {
				before := md.Reads()
				for range md.Diff(dev.ID, c.ID) {
				}
				b.ReportMetric(float64(md.Reads()-before), "reads/op")
				return nil
			}))
		})
	}
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
