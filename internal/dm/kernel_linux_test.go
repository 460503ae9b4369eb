package dm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// control opens the device mapper or skips.
func control(t *testing.T) *Control {
	t.Helper()
	testenv.RequireRoot(t)
	c, err := Open()
	if err != nil {
		testenv.SkipUnsupported(t, err, "devmapper")
		require.NoError(t, err)
	}
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

// disk returns a loop device of that many MiB.
func disk(t *testing.T, mib int64) string {
	t.Helper()
	losetup := testenv.RequireTool(t, "losetup", "devmapper")
	file := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(file)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(mib<<20))
	require.NoError(t, f.Close())
	out, err := exec.Command(losetup, "-f", "--show", file).CombinedOutput()
	require.NoError(t, err, "%s", out)
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		out, err := exec.Command(losetup, "-d", dev).CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	return dev
}

// unique returns a name that no other test uses.
func unique(t *testing.T, what string) string {
	return fmt.Sprintf("layerfs-test-%d-%s-%s", os.Getpid(), strings.NewReplacer("/", "-").Replace(t.Name()), what)
}

// activate makes a device for the test.
func activate(t *testing.T, c *Control, name string, table ...Target) Info {
	t.Helper()
	info, err := c.Activate(name, "", table, false)
	require.NoError(t, err)
	t.Cleanup(func() { removeSoon(t, c, name) })
	return info
}

// removeSoon removes a device that udev or a just closed file may hold.
func removeSoon(t *testing.T, c *Control, name string) {
	t.Helper()
	require.Eventually(t, func() bool {
		err := c.Remove(name)
		return err == nil || errors.Is(err, unix.ENXIO)
	}, 10*time.Second, 20*time.Millisecond, name)
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		require.NoError(t, err)
		return v
	}
}

// pool makes a thin pool with that many MiB of data.
func pool(t *testing.T, c *Control, mib int64, change func(*ThinPool)) (string, Info) {
	t.Helper()
	p := ThinPool{
		Length: uint64(mib << 20 / SectorSize), Metadata: disk(t, 16), Data: disk(t, mib),
		BlockSectors: 128, LowWater: 8, SkipBlockZeroing: true,
	}
	if change != nil {
		change(&p)
	}
	name := unique(t, "pool")
	return name, activate(t, c, name, must[Target](t)(p.Target()))
}

// thin makes a thin device of 8 MiB.
func thin(t *testing.T, c *Control, pool Info, id uint32) (string, Info) {
	t.Helper()
	name := unique(t, fmt.Sprintf("thin%d", id))
	return name, activate(t, c, name, must[Target](t)(Thin{Length: 16384, Pool: pool.Device.String(), ID: id}.Target()))
}

func write(t *testing.T, d Device, off int64, data []byte) error {
	t.Helper()
	f, err := OpenDevice(d, os.O_RDWR)
	require.NoError(t, err)
	_, err = f.WriteAt(data, off)
	if err == nil {
		err = f.Sync()
	}
	require.NoError(t, f.Close())
	return err
}

func read(t *testing.T, d Device, off int64, n int) []byte {
	t.Helper()
	f, err := OpenDevice(d, os.O_RDONLY)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, n)
	_, err = f.ReadAt(b, off)
	require.NoError(t, err)
	return b
}

// dmsetup is the oracle.
func dmsetup(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(testenv.RequireTool(t, "dmsetup", "devmapper"), args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return strings.TrimSpace(string(out))
}

func TestKernelVersions(t *testing.T) {
	c := control(t)
	require.Equal(t, uint32(4), c.Version().Major)
	require.Contains(t, dmsetup(t, "version"), c.Version().String())

	v, err := c.TargetVersion("thin-pool")
	require.NoError(t, err)
	list, err := c.Versions()
	require.NoError(t, err)
	require.Contains(t, list, TargetVersion{"thin-pool", v})
	oracle := dmsetup(t, "targets")
	for _, e := range list {
		require.Contains(t, strings.Join(strings.Fields(oracle), " "), e.Name+" v"+e.Version.String())
	}
	_, err = c.TargetVersion("no-such-target")
	var unsupported *layerfs.UnsupportedError
	require.ErrorAs(t, err, &unsupported)
}

func TestKernelDevice(t *testing.T) {
	c := control(t)
	dev := disk(t, 16)
	name := unique(t, "a")
	table := []Target{
		must[Target](t)(Linear{Length: 1024, Device: dev, Offset: 2048}.Target()),
		ErrorTarget(1024, 8),
	}
	info, err := c.Create(name, "")
	require.NoError(t, err)
	t.Cleanup(func() { removeSoon(t, c, name) })
	require.False(t, info.Live)
	_, err = c.Create(name, "")
	require.ErrorIs(t, err, unix.EBUSY)
	deps, err := c.Deps(name)
	require.NoError(t, err)
	require.Empty(t, deps, "no table yet")

	info, err = c.Load(name, table, false)
	require.NoError(t, err)
	require.True(t, info.Inactive)
	got, err := c.Table(name, true)
	require.NoError(t, err)
	require.Len(t, got, 2)
	require.NoError(t, c.Clear(name))
	_, err = c.Load(name, table, false)
	require.NoError(t, err)
	info, err = c.Resume(name, SuspendOptions{})
	require.NoError(t, err)
	require.True(t, info.Live)
	require.Equal(t, 2, info.Targets)

	got, err = c.Table(name, false)
	require.NoError(t, err)
	var lines []string
	for _, l := range got {
		lines = append(lines, strings.TrimSpace(l.String()))
	}
	require.Equal(t, dmsetup(t, "table", name), strings.Join(lines, "\n"))
	back, err := ParseLinear(got[0])
	require.NoError(t, err)
	deps, err = c.Deps(name)
	require.NoError(t, err)
	require.Equal(t, back.Device, deps[0].String())

	require.NoError(t, c.SetUUID(name, "layerfs-uuid-"+name))
	require.ErrorIs(t, c.SetUUID(name, "other"), unix.EINVAL)
	renamed := name + "-renamed"
	require.NoError(t, c.Rename(name, renamed))
	t.Cleanup(func() { removeSoon(t, c, renamed) })
	_, err = c.Info(name)
	require.ErrorIs(t, err, unix.ENXIO)
	info, err = c.Info(renamed)
	require.NoError(t, err)
	require.Equal(t, "layerfs-uuid-"+name, info.UUID)
	require.Equal(t, info.Device.String(), dmsetup(t, "info", "-c", "--noheadings", "-o", "major,minor", "--separator", ":", renamed))
	list, err := c.List()
	require.NoError(t, err)
	require.Contains(t, list, Entry{renamed, info.Device})

	require.NoError(t, c.Suspend(renamed, SuspendOptions{}))
	info, err = c.Info(renamed)
	require.NoError(t, err)
	require.True(t, info.Suspended)
	info, err = c.Resume(renamed, SuspendOptions{})
	require.NoError(t, err)
	require.False(t, info.Suspended)
	require.Error(t, write(t, info.Device, 1024*SectorSize, make([]byte, 4096)), "the error target fails a write")
	require.NoError(t, write(t, info.Device, 0, []byte("hello")))
	f, err := os.Open(dev)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, 5)
	_, err = f.ReadAt(b, 2048*SectorSize)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
}

func TestKernelReadOnly(t *testing.T) {
	c := control(t)
	name := unique(t, "ro")
	info, err := c.Activate(name, "", []Target{must[Target](t)(Linear{Length: 1024, Device: disk(t, 1)}.Target())}, true)
	require.NoError(t, err)
	t.Cleanup(func() { removeSoon(t, c, name) })
	require.True(t, info.ReadOnly)
	f, err := OpenDevice(info.Device, os.O_RDWR) // newer kernels refuse it
	if err == nil {
		_, err = f.Write([]byte("x"))
		require.NoError(t, f.Close())
	}
	require.Error(t, err)
}

func TestKernelActivateRollsBack(t *testing.T) {
	c := control(t)
	name := unique(t, "x")
	_, err := c.Activate(name, "", []Target{{0, 8, "linear", "/no/such/device 0"}}, false)
	require.Error(t, err)
	require.Contains(t, err.Error(), "dm_table_load "+name)
	_, err = c.Info(name)
	require.ErrorIs(t, err, unix.ENXIO)
}

func TestKernelBadNames(t *testing.T) {
	c := control(t)
	for _, name := range []string{"", "a/b", strings.Repeat("x", 128), "a\x00b"} {
		_, err := c.Create(name, "")
		require.Error(t, err, "%q", name)
	}
	_, err := c.Create("x", strings.Repeat("u", 129))
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorIs(t, c.Remove(unique(t, "none")), unix.ENXIO)
}

func TestKernelRemove(t *testing.T) {
	c := control(t)
	name := unique(t, "a")
	info := activate(t, c, name, must[Target](t)(Linear{Length: 1024, Device: disk(t, 1)}.Target()))
	f, err := OpenDevice(info.Device, os.O_RDONLY)
	require.NoError(t, err)
	require.ErrorIs(t, c.Remove(name), unix.EBUSY)
	deferred, err := c.RemoveDeferred(name)
	require.NoError(t, err)
	require.True(t, deferred)
	info, err = c.Info(name)
	require.NoError(t, err)
	require.True(t, info.DeferredRemove)
	require.Equal(t, 1, info.Opens)
	require.NoError(t, c.CancelDeferred(name))
	info, err = c.Info(name)
	require.NoError(t, err)
	require.False(t, info.DeferredRemove)
	_, err = c.RemoveDeferred(name)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.Eventually(t, func() bool {
		_, err := c.Info(name)
		return errors.Is(err, unix.ENXIO)
	}, 10*time.Second, 10*time.Millisecond)
}

func TestKernelNodes(t *testing.T) {
	c := control(t)
	info := activate(t, c, unique(t, "a"), must[Target](t)(Linear{Length: 1024, Device: disk(t, 1)}.Target()))
	n := NewNodes(filepath.Join(t.TempDir(), "nodes"))
	p, err := n.Path(info.Device)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("/dev/dm-%d", info.Device.Minor), p, "devtmpfs has it")
	// As on a /dev that is no devtmpfs.
	p, err = n.make(info.Device)
	require.NoError(t, err)
	again, err := n.make(info.Device)
	require.NoError(t, err)
	require.Equal(t, p, again)
	f, err := os.Open(p)
	require.NoError(t, err)
	size, err := Size(f)
	require.NoError(t, err)
	require.Equal(t, uint64(1024*SectorSize), size)
	require.NoError(t, f.Close())
	require.NoError(t, n.Forget(info.Device))
	require.NoError(t, n.Forget(info.Device))
	require.NoFileExists(t, p)
	require.NoError(t, os.WriteFile(p, nil, 0o600))
	_, err = n.make(info.Device)
	require.ErrorContains(t, err, "something else is there")

	f, err = openNode(unix.S_IFBLK, info.Device, os.O_RDONLY)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

func TestKernelManyDevices(t *testing.T) {
	c := control(t)
	const n = 150
	long := strings.Repeat("n", 60)
	for i := range n {
		name := fmt.Sprintf("layerfs-test-%d-many-%s-%d", os.Getpid(), long, i)
		_, err := c.Create(name, "")
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, c.Remove(name)) })
	}
	list, err := c.List()
	require.NoError(t, err)
	found := 0
	for _, e := range list {
		if strings.Contains(e.Name, long) {
			found++
		}
	}
	require.Equal(t, n, found, "the buffer has grown as needed")
}

func TestKernelThin(t *testing.T) {
	c := control(t)
	poolName, p := pool(t, c, 32, nil)
	table, err := c.Table(poolName, false)
	require.NoError(t, err)
	parsed, err := ParseThinPool(table[0])
	require.NoError(t, err)
	require.True(t, parsed.SkipBlockZeroing)
	deps, err := c.Deps(poolName)
	require.NoError(t, err)
	require.Len(t, deps, 2)

	send := func(msg string) error {
		_, err := c.Message(poolName, 0, msg)
		return err
	}
	require.NoError(t, send(CreateThin(1)))
	require.ErrorIs(t, send(CreateThin(1)), unix.EEXIST)
	a, ai := thin(t, c, p, 1)
	tb, err := c.Table(a, false)
	require.NoError(t, err)
	pt, err := ParseThin(tb[0])
	require.NoError(t, err)
	require.Equal(t, Thin{Length: 16384, Pool: p.Device.String(), ID: 1}, pt)
	st, err := c.ThinStatus(a)
	require.NoError(t, err)
	require.Equal(t, ThinStatus{}, st)

	one := bytes.Repeat([]byte("1"), 65536)
	require.NoError(t, write(t, ai.Device, 65536, one))
	st, err = c.ThinStatus(a)
	require.NoError(t, err)
	require.Equal(t, ThinStatus{Mapped: 128, Highest: 255}, st)

	require.NoError(t, c.Suspend(a, SuspendOptions{}))
	require.NoError(t, send(CreateSnap(2, 1)))
	_, err = c.Resume(a, SuspendOptions{})
	require.NoError(t, err)
	b, bi := thin(t, c, p, 2)
	require.NoError(t, write(t, bi.Device, 65536, bytes.Repeat([]byte("2"), 65536)))
	require.Equal(t, one, read(t, ai.Device, 65536, 65536), "the origin keeps its data")

	require.NoError(t, send(SetTransactionID(0, 5)))
	require.ErrorIs(t, send(SetTransactionID(0, 6)), unix.EINVAL)
	require.NoError(t, send(ReserveMetadataSnap()))
	require.ErrorIs(t, send(ReserveMetadataSnap()), unix.EBUSY)
	ps, err := c.PoolStatus(poolName)
	require.NoError(t, err)
	require.NotZero(t, ps.HeldRoot)
	require.Equal(t, uint64(5), ps.TransactionID)
	require.Equal(t, PoolReadWrite, ps.Mode)
	require.Equal(t, uint64(2), ps.UsedData)
	require.Equal(t, uint64(512), ps.TotalData)
	status, err := c.Status(poolName, true)
	require.NoError(t, err)
	require.Equal(t, dmsetup(t, "status", "--noflush", poolName), status[0].String())
	require.NoError(t, send(ReleaseMetadataSnap()))
	require.ErrorIs(t, send(ReleaseMetadataSnap()), unix.EINVAL)

	// A discard of a block that only the snapshot has frees it.
	f, err := OpenDevice(bi.Device, os.O_RDWR)
	require.NoError(t, err)
	require.NoError(t, Discard(f, 65536, 65536))
	require.NoError(t, f.Close())
	ps, err = c.PoolStatus(poolName)
	require.NoError(t, err)
	require.Equal(t, uint64(1), ps.UsedData)

	require.ErrorIs(t, send(DeleteThin(2)), unix.EBUSY)
	removeSoon(t, c, b)
	require.NoError(t, send(DeleteThin(2)))
	require.ErrorIs(t, send(DeleteThin(2)), unix.ENODATA)
	_, err = c.ThinStatus(poolName)
	require.ErrorContains(t, err, "not a thin")
}

func TestKernelPoolFull(t *testing.T) {
	c := control(t)
	w, err := NewWatcher()
	require.NoError(t, err)
	defer w.Close()
	name, p := pool(t, c, 4, func(p *ThinPool) { p.LowWater, p.ErrorIfNoSpace = 16, true })
	_, err = c.Message(name, 0, CreateThin(1))
	require.NoError(t, err)
	_, d := thin(t, c, p, 1)
	before, err := c.Info(name)
	require.NoError(t, err)

	type event struct {
		nr  uint32
		err error
	}
	got := make(chan event, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() {
		nr, err := w.WaitEvent(ctx, name, before.Event)
		got <- event{nr, err}
	}()
	require.NoError(t, write(t, d.Device, 0, make([]byte, 3<<20+65536)))
	e := <-got
	require.NoError(t, e.err, "the low water mark is passed")
	require.Greater(t, e.nr, before.Event)

	require.Error(t, write(t, d.Device, 0, make([]byte, 6<<20)), "a write without space fails")
	st, err := c.PoolStatus(name)
	require.NoError(t, err)
	require.Equal(t, PoolOutOfSpace, st.Mode)
	require.Equal(t, st.TotalData, st.UsedData)
	require.True(t, st.ErrorIfNoSpace)
}

func TestKernelWatcherCancel(t *testing.T) {
	control(t)
	w, err := NewWatcher()
	require.NoError(t, err)
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Wait(ctx) }()
	time.Sleep(50 * time.Millisecond)
	cancel()
	select {
	case err := <-done:
		require.ErrorIs(t, err, context.Canceled)
	case <-time.After(10 * time.Second):
		t.Fatal("Wait did not end")
	}
	require.ErrorIs(t, w.Wait(ctx), context.Canceled)
}

func TestKernelNoControlNode(t *testing.T) {
	control(t)
	f, err := openNode(unix.S_IFCHR, Device{10, 1 << 19}, os.O_RDWR)
	if err == nil {
		f.Close()
	}
	require.Error(t, err, "there is no such misc device")
	require.NotErrorIs(t, err, fs.ErrNotExist)
}

func BenchmarkKernelActivateRemove(b *testing.B) {
	c, err := Open()
	if err != nil {
		b.Skip(err)
	}
	defer c.Close()
	table := []Target{ErrorTarget(0, 1024)}
	for b.Loop() {
		if _, err := c.Activate("layerfs-bench", "", table, false); err != nil {
			b.Fatal(err)
		}
		for c.Remove("layerfs-bench") != nil {
			time.Sleep(time.Millisecond) // udev looks at it
		}
	}
}
