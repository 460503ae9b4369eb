package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/dm"
)

// watch is a goroutine that looks at the pool whenever the kernel has an event,
// makes its files larger, and calls Options.OnEvent. Without either option
// there is none.
type watch struct {
	m      *mechanism
	w      *dm.Watcher
	cancel context.CancelFunc
	done   sync.WaitGroup
	mode   dm.PoolMode // of the last look
	low    bool
	again  time.Time // when an extension is tried next that has failed
}

// lookEvery is how often the pool is looked at without an event: the kernel
// has one mark for metadata that it sets itself.
const lookEvery = 5 * time.Second

func (m *mechanism) startWatch() (*watch, error) {
	if m.opts.ExtendThreshold == 0 && m.opts.OnEvent == nil {
		return nil, nil
	}
	w, err := dm.NewWatcher()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &watch{m: m, w: w, cancel: cancel, mode: dm.PoolReadWrite}
	x.done.Go(func() { x.run(ctx) })
	return x, nil
}

func (x *watch) close() error {
	x.cancel()
	x.done.Wait()
	return x.w.Close()
}

func (x *watch) run(ctx context.Context) {
	if r := x.m.relieved; r != nil {
		x.emit(ExtendBegin, r.before, nil)
		x.emit(ExtendDone, r.after, r.err)
	}
	for ctx.Err() == nil {
		if err := x.look(ctx); err != nil && ctx.Err() == nil {
			x.m.opts.Logger.Error("look at the pool", "driver", name, "error", err)
		}
		wait, cancel := context.WithTimeout(ctx, lookEvery)
		err := x.w.Wait(wait)
		cancel()
		if err != nil && wait.Err() == nil {
			x.m.opts.Logger.Error("wait for the pool", "driver", name, "error", err)
			_ = sleep(ctx, lookEvery) // an end is seen by the loop
		}
	}
}

// look looks at the pool once.
func (x *watch) look(ctx context.Context) error {
	st, err := x.steady(ctx)
	if err != nil {
		return err
	}
	var failure error
	if x.m.opts.ExtendThreshold > 0 && (x.m.due(st.UsedData, st.TotalData) || x.m.due(st.UsedMeta, st.TotalMeta)) && !time.Now().Before(x.again) {
		x.emit(ExtendBegin, st, nil)
		failure = x.m.extend(ctx)
		if now, err := x.m.poolStatus(true); err == nil {
			st = now
		}
		x.emit(ExtendDone, st, failure)
		if failure != nil {
			x.again = time.Now().Add(lookEvery) // and not at each event of any device
		}
	}
	// What led to a failure comes before it.
	low := x.m.low(st.UsedData, st.TotalData) || x.m.low(st.UsedMeta, st.TotalMeta)
	if low && !x.low {
		x.emit(LowSpace, st, nil)
	}
	x.low = low
	if failed := st.Mode != dm.PoolReadWrite; failed != (x.mode != dm.PoolReadWrite) {
		kind := PoolRestored
		if failed {
			kind = PoolFailed
		}
		x.emit(kind, st, nil)
	}
	x.mode = st.Mode
	return failure
}

// steady returns the pool's status when nobody is just changing its table: the
// kernel sets the mode of the new one before it looks at the new size.
func (x *watch) steady(ctx context.Context) (dm.PoolStatus, error) {
	const tries = 100 // a crash may have left it suspended
	for try := 0; ; try++ {
		before, err := x.m.ctl.Info(x.m.pool)
		if err != nil {
			return dm.PoolStatus{}, err
		}
		st, err := x.m.poolStatus(true)
		if err != nil {
			return st, err
		}
		after, err := x.m.ctl.Info(x.m.pool)
		if err != nil || try == tries || !before.Suspended && !after.Suspended && before.Event == after.Event {
			return st, err
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return st, err
		}
	}
}

func (x *watch) emit(kind EventKind, st dm.PoolStatus, err error) {
	if x.m.opts.OnEvent == nil {
		return
	}
	block := x.m.opts.BlockSize
	x.m.opts.OnEvent(Event{
		Kind: kind, Mode: string(st.Mode), Err: err,
		Used: int64(st.UsedData) * block, Total: int64(st.TotalData) * block,
		MetadataUsed: int64(st.UsedMeta) * dm.MetadataBlockSize, MetadataTotal: int64(st.TotalMeta) * dm.MetadataBlockSize,
	})
}

// due reports whether the use has reached the threshold.
func (m *mechanism) due(used, total uint64) bool {
	return total > 0 && used*100 >= total*uint64(m.opts.ExtendThreshold)
}

// low reports whether less than MinFreeSpace is free.
func (m *mechanism) low(used, total uint64) bool {
	return m.opts.MinFreeSpace > 0 && (total-used)*100 < total*uint64(m.opts.MinFreeSpace)
}

// extend makes the files of the pool larger that have reached the threshold,
// unless another driver did.
func (m *mechanism) extend(ctx context.Context) error {
	unlock, err := m.dir.Lock(ctx, poolLock)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = m.extendPool()
	return err
}

// extendPool does the work of extend and reports whether there was any. A file
// that cannot grow does not keep the other from it, nor the pool from what is
// there.
func (m *mechanism) extendPool() (grown bool, err error) {
	st, err := m.poolStatus(true)
	if err != nil {
		return false, err
	}
	var errs []error
	for _, f := range []struct {
		path        string
		used, total uint64
		block       int64
	}{{m.dataFile(), st.UsedData, st.TotalData, m.opts.BlockSize}, {m.metadataFile(), st.UsedMeta, st.TotalMeta, dm.MetadataBlockSize}} {
		if !m.due(f.used, f.total) {
			continue
		}
		if err := m.enlarge(f.path, int64(f.total)*f.block); err != nil {
			errs = append(errs, err)
			continue
		}
		grown = true
	}
	if grown {
		errs = append(errs, m.reloadPool())
	}
	return grown, errors.Join(errs...)
}

// maxMetadata is the most that a pool's metadata can use,
// THIN_METADATA_MAX_SECTORS.
const maxMetadata = 255 * (1 << 14) * 4096

// enlarge makes a file and its loop device larger, by a share of what the pool
// has by now. What an attempt that failed has done already is not done again.
func (m *mechanism) enlarge(path string, now int64) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	const unit = 1 << 20
	size := (now + now*int64(m.opts.ExtendPercent)/100 + unit - 1) / unit * unit
	if path == m.metadataFile() && size > maxMetadata {
		if size = maxMetadata; now >= size {
			return fmt.Errorf("%s cannot be larger: %w", path, unix.EFBIG)
		}
	}
	m.step("extend: file")
	if size > fi.Size() {
		if err := os.Truncate(path, size); err != nil {
			return err
		}
	}
	m.step("extend: loop device")
	d, err := loopOf(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Resize(), d.Close())
}

// reloadPool gives the pool the size that its devices have now.
func (m *mechanism) reloadPool() error {
	ts, err := m.ctl.Table(m.pool, false)
	if err != nil {
		return err
	}
	if len(ts) != 1 {
		return fmt.Errorf("device %s is not a thin pool", m.pool)
	}
	p, err := dm.ParseThinPool(ts[0])
	if err != nil {
		return err
	}
	size, err := sizeOf(devicePath(p.Data))
	if err != nil {
		return err
	}
	t, err := m.poolTable(p.Data, p.Metadata, size).Target()
	if err != nil {
		return err
	}
	m.step("extend: load")
	if _, err := m.ctl.Load(m.pool, []dm.Target{t}, false); err != nil {
		return err
	}
	m.step("extend: loaded")
	// A pool that is full has writes waiting that a flush would wait for.
	_, err = m.ctl.Resume(m.pool, dm.SuspendOptions{NoFlush: true, NoLockFS: true})
	return err
}
