package thin

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const poolBlock = 64 << 10

// livePool is a pool of the kernel with a thin device that is mapped whole and
// a snapshot of it, both active.
type livePool struct {
	tb       testing.TB
	c        *dm.Control
	name     string
	meta     string // loop device
	metaFile string
	dev      [3]*os.File // by id; 0 is not used
	blocks   int64
	scratch  []byte
}

func loop(tb testing.TB, size int64) (dev, file string) {
	tb.Helper()
	losetup := testenv.RequireTool(tb, "losetup", "devmapper")
	file = filepath.Join(tb.TempDir(), "disk")
	require.NoError(tb, os.WriteFile(file, nil, 0o600))
	require.NoError(tb, os.Truncate(file, size))
	out, err := exec.Command(losetup, "-f", "--show", file).CombinedOutput()
	require.NoError(tb, err, "%s", out)
	dev = strings.TrimSpace(string(out))
	tb.Cleanup(func() { require.NoError(tb, exec.Command(losetup, "-d", dev).Run()) })
	return dev, file
}

// newLivePool makes one. With restored metadata the mappings were never
// written, which is much faster; the kernel cannot tell.
func newLivePool(tb testing.TB, size int64, restored bool) *livePool {
	tb.Helper()
	testenv.RequireRoot(tb)
	c, err := dm.Open()
	if err != nil {
		testenv.SkipUnsupported(tb, err, "devmapper")
		require.NoError(tb, err)
	}
	tb.Cleanup(func() { require.NoError(tb, c.Close()) })
	p := &livePool{
		tb: tb, c: c, name: fmt.Sprintf("layerfs-thin-%d-%s", os.Getpid(), tb.Name()),
		blocks: size / poolBlock, scratch: make([]byte, 4096),
	}
	p.meta, p.metaFile = loop(tb, 64<<20)
	data, _ := loop(tb, 2*size)
	if restored {
		doc := fmt.Sprintf(`<superblock uuid="" time="1" transaction="0" flags="0" version="2" data_block_size="%d" nr_data_blocks="%d">
<device dev_id="1" mapped_blocks="%d" transaction="0" creation_time="0" snap_time="1">
<range_mapping origin_begin="0" data_begin="0" length="%[3]d" time="0"/></device></superblock>`,
			poolBlock/dm.SectorSize, 2*p.blocks, p.blocks)
		src := filepath.Join(tb.TempDir(), "in.xml")
		require.NoError(tb, os.WriteFile(src, []byte(doc), 0o600))
		run(tb, "thin_restore", "-i", src, "-o", p.meta)
	}
	t, err := dm.ThinPool{
		Length: uint64(2*size) / dm.SectorSize, Metadata: p.meta, Data: data,
		BlockSectors: poolBlock / dm.SectorSize, SkipBlockZeroing: true,
	}.Target()
	require.NoError(tb, err)
	info := p.activate(p.name, t)
	if !restored {
		p.send(dm.CreateThin(1))
	}
	p.dev[1] = p.thin(info, 1)
	for i := int64(0); i < p.blocks && !restored; i++ {
		p.write(1, i)
	}
	require.NoError(tb, p.dev[1].Sync())
	thin1 := p.name + "-1"
	require.NoError(tb, c.Suspend(thin1, dm.SuspendOptions{}))
	p.send(dm.CreateSnap(2, 1))
	_, err = c.Resume(thin1, dm.SuspendOptions{})
	require.NoError(tb, err)
	p.dev[2] = p.thin(info, 2)
	return p
}

func (p *livePool) activate(name string, t dm.Target) dm.Info {
	p.tb.Helper()
	info, err := p.c.Activate(name, "", []dm.Target{t}, false)
	require.NoError(p.tb, err)
	p.tb.Cleanup(func() {
		require.Eventually(p.tb, func() bool { return p.c.Remove(name) == nil }, 10*time.Second, 10*time.Millisecond)
	})
	return info
}

func (p *livePool) thin(pool dm.Info, id uint32) *os.File {
	p.tb.Helper()
	t, err := dm.Thin{Length: uint64(p.blocks * poolBlock / dm.SectorSize), Pool: pool.Device.String(), ID: id}.Target()
	require.NoError(p.tb, err)
	info := p.activate(fmt.Sprintf("%s-%d", p.name, id), t)
	f, err := dm.OpenDevice(info.Device, os.O_RDWR)
	require.NoError(p.tb, err)
	p.tb.Cleanup(func() { require.NoError(p.tb, f.Close()) })
	return f
}

func (p *livePool) send(msg string) {
	p.tb.Helper()
	_, err := p.c.Message(p.name, 0, msg)
	require.NoError(p.tb, err)
}

func (p *livePool) write(id int, block int64) {
	_, err := p.dev[id].WriteAt(p.scratch, block*poolBlock)
	require.NoError(p.tb, err)
}

// snapshot gives fn the metadata as it is now.
func (p *livePool) snapshot(fn func(root uint64, m *Metadata)) {
	p.tb.Helper()
	for _, f := range p.dev[1:] {
		require.NoError(p.tb, f.Sync())
	}
	p.send(dm.ReserveMetadataSnap())
	defer p.send(dm.ReleaseMetadataSnap())
	st, err := p.c.PoolStatus(p.name)
	require.NoError(p.tb, err)
	r, err := OpenDevice(p.meta)
	require.NoError(p.tb, err)
	defer r.Close()
	m, err := Open(r, st.HeldRoot)
	require.NoError(p.tb, err)
	fn(st.HeldRoot, m)
}

// TestKernelDiff compares what this package reads of a live pool with what was
// written to it and with thin_delta.
func TestKernelDiff(t *testing.T) {
	p := newLivePool(t, 64<<20, false)
	r := rand.New(rand.NewPCG(9, 10))
	want := map[uint64]Kind{}
	check := func() {
		t.Helper()
		p.snapshot(func(_ uint64, m *Metadata) {
			require.Equal(t, uint32(128), m.BlockSectors)
			got := collect(t, m, 1, 2)
			require.Equal(t, want, got)
			require.Equal(t, thinDelta(t, p.meta, 1, 2, "-m"), got)
			st, err := p.c.ThinStatus(p.name + "-2")
			require.NoError(t, err)
			require.Equal(t, st.Mapped/128, uint64(len(content(t, m, 2))))
			n := 0
			for d, err := range m.Devices() {
				require.NoError(t, err)
				n++
				require.Equal(t, uint32(n), d.ID)
			}
			require.Equal(t, 2, n)
		})
	}
	check()
	// Several rounds on one pool: a reader that sees an old page would fail.
	for round := range 5 {
		for range 10 {
			b := r.Int64N(p.blocks)
			p.write(1+round%2, b)
			if want[uint64(b)] == 0 {
				want[uint64(b)] = Different
			}
		}
		b := r.Int64N(p.blocks)
		require.NoError(t, dm.Discard(p.dev[2], uint64(b)*poolBlock, poolBlock))
		want[uint64(b)] = LeftOnly
		check()
		p.write(2, b) // mapped again, to another block
		want[uint64(b)] = Different
		check()
	}
}

// BenchmarkKernelDiff reports 100 changed blocks of a layer of 10 GiB.
func BenchmarkKernelDiff(b *testing.B) {
	p := newLivePool(b, 10<<30, true)
	r := rand.New(rand.NewPCG(11, 12))
	for range 100 {
		p.write(2, r.Int64N(p.blocks))
	}
	p.snapshot(func(root uint64, _ *Metadata) {
		for name, path := range map[string]string{"device": p.meta, "file": p.metaFile} {
			b.Run("reader=layerfs/from="+name, func(b *testing.B) {
				for b.Loop() {
					f, err := OpenDevice(path)
					require.NoError(b, err)
					m, err := Open(f, root)
					require.NoError(b, err)
					n := uint64(0)
					for r, err := range m.Diff(1, 2) {
						require.NoError(b, err)
						n += r.Length
					}
					require.NoError(b, f.Close())
					require.InDelta(b, 100, n, 3)
					b.ReportMetric(float64(m.Reads()), "reads/op")
				}
			})
		}
		b.Run("reader=thin_delta", func(b *testing.B) {
			for b.Loop() {
				run(b, "thin_delta", "--thin1", "1", "--thin2", "2", p.meta, "-m")
			}
		})
	})
}
