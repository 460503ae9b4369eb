package devmapper

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/sys"
)

// recorder keeps the events of a driver.
type recorder struct {
	mu   sync.Mutex
	list []Event
}

func (r *recorder) on(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, e)
}

func (r *recorder) events() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Event(nil), r.list...)
}

// kinds waits for so many events and returns what they are about.
func (r *recorder) kinds(t *testing.T, want int) []string {
	t.Helper()
	require.Eventually(t, func() bool { return len(r.events()) >= want }, 12*lookEvery, 20*time.Millisecond, "%d events", want)
	var kinds []string
	for _, e := range r.events() {
		kinds = append(kinds, e.Kind.String())
	}
	return kinds
}

// noMore waits for what is told again: that is told at the next look.
func (r *recorder) noMore(t *testing.T) {
	t.Helper()
	n := len(r.events())
	time.Sleep(lookEvery + time.Second)
	require.Len(t, r.events(), n)
}

// told compares what an event says with what the pool says now, when a few more
// blocks may be in use.
func told(t *testing.T, d *Driver, e Event) {
	t.Helper()
	st, err := d.m.poolStatus(true)
	require.NoError(t, err)
	require.Equal(t, string(st.Mode), e.Mode)
	require.Equal(t, int64(st.TotalData)*d.m.opts.BlockSize, e.Total)
	require.Equal(t, int64(st.TotalMeta)*dm.MetadataBlockSize, e.MetadataTotal)
	require.InDelta(t, int64(st.UsedData)*d.m.opts.BlockSize, e.Used, float64(e.Total/4))
	require.InDelta(t, int64(st.UsedMeta)*dm.MetadataBlockSize, e.MetadataUsed, float64(e.MetadataTotal/20))
	require.NoError(t, e.Err)
}

// TestEvents: a pool that runs out of space and is mended tells of each step
// once, in order, and with what was so then.
func TestEvents(t *testing.T) {
	root := newRoot(t)
	o := small()
	o.DataSize, o.BaseSize, o.MinFreeSpace, o.ErrorIfNoSpace = 64<<20, 256<<20, 50, true
	var r recorder
	o.OnEvent = r.on
	d := mustNew(t, root, o)
	create(t, d, "a", "")
	path, err := d.Get(t.Context(), "a", nil)
	require.NoError(t, err)

	require.Empty(t, r.kinds(t, 0))
	require.NoError(t, writeSync(path+"/f", 40<<20))
	require.Equal(t, []string{"low-space"}, r.kinds(t, 1))
	low := r.events()[0]
	require.Greater(t, low.Used, low.Total/2)
	require.Equal(t, "rw", low.Mode)
	require.EqualValues(t, 64<<20, low.Total)

	require.Error(t, writeSync(path+"/g", 40<<20))
	require.Equal(t, []string{"low-space", "pool-failed"}, r.kinds(t, 2))
	failed := r.events()[1]
	told(t, d, failed)
	require.Equal(t, "out_of_data_space", failed.Mode)
	require.Equal(t, failed.Total, failed.Used)

	// Another driver makes it larger, and is told of that alone.
	larger := *o
	larger.ExtendThreshold, larger.ExtendPercent, larger.MinFreeSpace = 90, 300, -1
	var other recorder
	larger.OnEvent = other.on
	mustNew(t, root, &larger)
	require.Equal(t, []string{"extend-begin", "extend-done"}, other.kinds(t, 2))
	begin, done := other.events()[0], other.events()[1]
	require.Equal(t, failed.Mode, begin.Mode)
	require.Equal(t, failed.Used, begin.Used)
	require.Equal(t, failed.Total, begin.Total)
	require.EqualValues(t, 256<<20, done.Total)
	require.Equal(t, "rw", done.Mode)
	require.NoError(t, done.Err)
	require.Equal(t, []string{"low-space", "pool-failed", "pool-restored"}, r.kinds(t, 3))
	restored := r.events()[2]
	require.Equal(t, "rw", restored.Mode)
	require.EqualValues(t, 256<<20, restored.Total)
	require.NoError(t, d.Put(t.Context(), "a"))

	// Low again is told again.
	create(t, d, "b", "")
	with(t, d, "b", func(path string) {
		require.NoError(t, writeSync(path+"/f", 100<<20))
		require.Equal(t, []string{"low-space", "pool-failed", "pool-restored", "low-space"}, r.kinds(t, 4))
		told(t, d, r.events()[3])
	})
	r.noMore(t)
	require.Len(t, other.events(), 2)
}

// TestExtend: the pool grows before it is full, and tells before and after.
func TestExtend(t *testing.T) {
	o := small()
	o.DataSize = 64 << 20
	o.ExtendThreshold, o.ExtendPercent = 50, 100
	var r recorder
	o.OnEvent = r.on
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	require.NoError(t, d.SetQuota(t.Context(), "a", layerfs.Quota{Bytes: 128 << 20}))
	with(t, d, "a", func(path string) {
		for i := range 10 {
			write(t, fmt.Sprintf("%s/f%d", path, i), 9<<20, uint64(i))
			require.NoError(t, sys.Syncfs(path))
			require.Eventually(t, func() bool {
				st, err := d.m.poolStatus(true)
				require.NoError(t, err)
				return !d.m.due(st.UsedData, st.TotalData)
			}, 12*lookEvery, 10*time.Millisecond)
		}
	})
	// 90 MiB and what the file system has need 256 MiB.
	require.Equal(t, []string{"extend-begin", "extend-done", "extend-begin", "extend-done"}, r.kinds(t, 4))
	total := o.DataSize
	for i, e := range r.events() {
		require.Equal(t, "rw", e.Mode)
		require.NoError(t, e.Err)
		if e.Kind == ExtendDone {
			total *= 2
		} else {
			require.GreaterOrEqual(t, e.Used*100, e.Total*50)
		}
		require.Equal(t, total, e.Total, "%d", i)
		require.Less(t, e.Used, e.Total)
		require.Positive(t, e.MetadataUsed)
		require.Equal(t, o.MetadataSize, e.MetadataTotal)
	}
	r.noMore(t)
	last := r.events()[3]
	require.Less(t, last.Used*100, last.Total*50)
	fi, err := os.Stat(d.m.dataFile())
	require.NoError(t, err)
	require.Equal(t, total, fi.Size())
}

// TestExtendOne: a data file that cannot grow does not keep the metadata from it.
func TestExtendOne(t *testing.T) {
	o := small()
	o.DataSize, o.BaseSize = 64<<20, 128<<20
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	before, err := d.m.poolStatus(true)
	require.NoError(t, err)
	second, err := loop.Attach(t.Context(), d.m.dataFile(), nil) // which one to enlarge?
	require.NoError(t, err)
	d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 1, 100 // both are due
	grown, err := d.m.extendPool()
	require.ErrorContains(t, err, second.Path())
	require.True(t, grown)
	now, err := d.m.poolStatus(true)
	require.NoError(t, err)
	require.Greater(t, now.TotalMeta, before.TotalMeta)
	require.Equal(t, before.TotalData, now.TotalData)
	require.NoError(t, second.Detach())
	_, err = d.m.extendPool()
	require.NoError(t, err)
	now, err = d.m.poolStatus(true)
	require.NoError(t, err)
	require.Equal(t, 2*before.TotalData, now.TotalData)
}

// TestExtendFails: an extension that fails says why and is tried again, does not
// hide what comes of it, and the next one does not start from where it got.
func TestExtendFails(t *testing.T) {
	o := small()
	o.DataSize, o.BaseSize, o.ErrorIfNoSpace = 64<<20, 128<<20, true
	o.ExtendThreshold, o.ExtendPercent = 80, 300
	var r recorder
	o.OnEvent = r.on
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	second, err := loop.Attach(t.Context(), d.m.dataFile(), nil) // which one to enlarge?
	require.NoError(t, err)
	with(t, d, "a", func(path string) {
		require.ErrorIs(t, writeDirect(path+"/f", 80<<20), unix.ENOSPC)
		failed := func() bool {
			tries, full := 0, false
			for _, e := range r.events() {
				full = full || e.Kind == PoolFailed
				if e.Kind == ExtendDone {
					tries++
				}
			}
			return full && tries >= 2
		}
		require.Eventually(t, failed, 12*lookEvery, 20*time.Millisecond)
	})
	require.NoError(t, second.Detach())
	require.Eventually(t, func() bool {
		st, err := d.m.poolStatus(true)
		require.NoError(t, err)
		return st.Mode == dm.PoolReadWrite
	}, 12*lookEvery, 20*time.Millisecond)
	with(t, d, "a", func(path string) { require.NoError(t, writeSync(path+"/g", 1<<20)) })
	r.noMore(t)
	var kinds []EventKind
	for i, e := range r.events() {
		switch {
		case e.Kind == ExtendDone && e.Err != nil:
			require.ErrorContains(t, e.Err, second.Path())
			require.EqualValues(t, 64<<20, e.Total)
			require.Equal(t, ExtendBegin, r.events()[i-1].Kind)
			kinds = kinds[:len(kinds)-1] // the pair
		default:
			kinds = append(kinds, e.Kind)
		}
	}
	require.Equal(t, []EventKind{PoolFailed, ExtendBegin, ExtendDone, PoolRestored}, kinds)
	last := r.events()[len(r.events())-2]
	require.NoError(t, last.Err)
	require.Equal(t, "rw", last.Mode)
	require.EqualValues(t, 256<<20, last.Total)
	fi, err := os.Stat(d.m.dataFile())
	require.NoError(t, err)
	require.EqualValues(t, 256<<20, fi.Size())
}

// TestRelievedTells: what New could not do for a pool that was full is told with
// what it did.
func TestRelievedTells(t *testing.T) {
	for _, failure := range []error{nil, unix.EFBIG} {
		t.Run(fmt.Sprint(failure), func(t *testing.T) {
			var r recorder
			m := &mechanism{opts: Options{OnEvent: r.on}, relieved: &relief{
				before: dm.PoolStatus{Mode: dm.PoolReadOnly, UsedMeta: 512, TotalMeta: 512},
				after:  dm.PoolStatus{Mode: dm.PoolReadWrite, UsedMeta: 512, TotalMeta: 1024},
				err:    failure,
			}}
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // before the first look
			(&watch{m: m}).run(ctx)
			require.Equal(t, []Event{
				{Kind: ExtendBegin, Mode: "ro", MetadataUsed: 2 << 20, MetadataTotal: 2 << 20},
				{Kind: ExtendDone, Mode: "rw", MetadataUsed: 2 << 20, MetadataTotal: 4 << 20, Err: failure},
			}, r.events())
		})
	}
}

// TestExtendFullMetadata: New makes the full metadata of a pool larger. If that
// fails, its error says why and not only that the pool is full; if only the data
// file cannot grow, the pool is used and the event says why.
func TestExtendFullMetadata(t *testing.T) {
	w := way{fs: "ext4", how: "direct", write: writeDirect}
	template := &Template{Options: w.fullOptions()}
	o := &template.Options
	o.DataSize, o.MetadataSize, o.ErrorIfNoSpace = 64<<20, 2<<20, true
	d, path := template.full(t, nil)
	require.NoError(t, w.write(path+"/half", 40<<20))
	useMetadata(t, d)
	var err error
	for i := 0; err == nil && i < 50; i++ {
		if err = w.write(fmt.Sprintf("%s/f%d", path, i), 256<<10); err == nil {
			_ = takeBlock(d, 1000+i) // may be refused already
		}
	}
	require.ErrorIs(t, err, unix.EIO)
	w.stops(t, path)
	full, err := d.m.poolStatus(true)
	require.NoError(t, err)
	require.Equal(t, dm.PoolReadOnly, full.Mode)
	require.Greater(t, full.UsedData*100, full.TotalData*50)

	// The files grow, but the pool is refused a table for them.
	d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 50, 100
	block := d.m.opts.BlockSize
	d.m.fault = func(step string) {
		if step == "extend: loop device" {
			d.m.opts.BlockSize = block + dm.SectorSize
		}
	}
	second, err := loop.Attach(t.Context(), d.m.dataFile(), nil) // which one to enlarge?
	require.NoError(t, err)
	err = d.m.relieve(full)
	d.m.fault, d.m.opts.BlockSize = nil, block
	d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 0, 0
	require.ErrorIs(t, err, unix.ENOSPC)
	require.ErrorContains(t, err, "metadata is full")
	require.ErrorContains(t, err, "thin-pool: block size of")
	require.ErrorContains(t, err, second.Path())

	other := *o
	other.ExtendThreshold, other.ExtendPercent = 50, 100
	var r recorder
	other.OnEvent = r.on
	mustNew(t, filepath.Dir(d.m.home), &other)
	r.kinds(t, 2)
	begin, done := r.events()[0], r.events()[1]
	require.Equal(t, ExtendBegin, begin.Kind)
	require.Equal(t, "ro", begin.Mode)
	require.EqualValues(t, 2<<20, begin.MetadataTotal)
	require.Equal(t, ExtendDone, done.Kind)
	require.Equal(t, "rw", done.Mode)
	require.EqualValues(t, 4<<20, done.MetadataTotal)
	require.EqualValues(t, 64<<20, done.Total)
	require.ErrorContains(t, done.Err, second.Path())
	require.NoError(t, second.Detach())
	require.Eventually(t, func() bool {
		list := r.events()
		last := list[len(list)-1]
		return last.Kind == ExtendDone && last.Err == nil && last.Total == 128<<20
	}, 12*lookEvery, 20*time.Millisecond)
	w.goesOn(t, d, path)
	unharmed(t, d)
}
