package devmapper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// SendOptions are the options of [Driver.Send] and [Replica.Send]. Nil means
// none.
type SendOptions struct {
	// Progress is called with the bytes of the layer that were sent, of those
	// there are to send.
	Progress layerfs.ProgressFunc
}

// snap is a snapshot that a process reads. Its file and its lock go with it; a
// crash leaves the file, by which New deletes the device.
type snap struct {
	m      *mechanism
	path   string
	name   string // of its active device
	dev    device
	active *dm.Info // nil until it is opened
	state  string
	unlock func()
}

// snap takes a snapshot of a layer, whose lock the caller has. active is the
// name of its device, or empty if nothing can be written to it.
func (m *mechanism) snap(ctx context.Context, id, active, state string) (_ *snap, err error) {
	o, err := m.load(id)
	if err != nil {
		return nil, err
	}
	if state == "" {
		state = uuid()
	}
	key := ".snap-" + uuid() // two may read one state at a time
	s := &snap{m: m, path: m.devicePath(key), name: deviceName(m.prefix, "+"+key[1:]), state: state}
	if s.unlock, err = m.dir.Lock(ctx, key); err != nil {
		return nil, err
	}
	s.dev, err = m.snapshot(ctx, s.path, o.ID, active, o.Size, o.FSSize)
	if err != nil {
		s.unlock()
		return nil, err
	}
	return s, nil
}

func (s *snap) close(ctx context.Context) error {
	defer s.unlock()
	return errors.Join(s.m.removeDevice(ctx, s.name), s.m.discard(ctx, s.path))
}

// open activates the snapshot and opens its device. It stays active until
// close.
func (s *snap) open() (*directReader, error) {
	if s.active == nil {
		info, err := s.m.activateThin(s.name, s.m.thinUUID(s.dev.ID), s.dev.ID, s.dev.Size, true)
		if err != nil {
			return nil, err
		}
		s.active = &info
	}
	return openDirect(s.active.Device)
}

// Send writes what a layer has other than its ancestor base, or all of it for
// an empty base, as a stream of blocks; see [Driver.Receive]. The layer may be
// in use: what is sent is a snapshot of this moment. The cost grows with the
// blocks that are sent.
//
// A stream against a base can be received on the copy of the base alone.
func (d *Driver) Send(ctx context.Context, id, base string, w io.Writer, opts *SendOptions) error {
	r, err := d.replicate(ctx, id, base)
	if err == nil {
		_, err = r.send(ctx, w, opts)
		err = errors.Join(err, r.close())
	}
	return d.fail("send", id, err)
}

func (d *Driver) fail(op, id string, err error) error {
	if err == nil {
		return nil
	}
	return &layerfs.Error{Op: op, Driver: name, ID: id, Err: err}
}

// Replica copies a layer that is in use in rounds: each sends what has changed
// since the one before. It is not safe for concurrent use.
type Replica struct {
	d    *Driver
	id   string
	from string // state that the next round is relative to
	dev  uint32 // its device; 0 for none
	last *snap  // of the round before; nil before the first

	frozen *freeze // nil while the layer can be written
}

// Replicate starts to copy a layer. The first round is relative to base, an
// ancestor, or is all of the layer if base is empty.
func (d *Driver) Replicate(ctx context.Context, id, base string) (*Replica, error) {
	r, err := d.replicate(ctx, id, base)
	return r, d.fail("replicate", id, err)
}

func (d *Driver) replicate(ctx context.Context, id, base string) (*Replica, error) {
	_, _, err := d.m.lineage(id, base)
	if err != nil {
		return nil, err
	}
	r := &Replica{d: d, id: id}
	if base == "" {
		return r, nil
	}
	unlock, err := d.m.dir.Lock(ctx, base)
	if err != nil {
		return nil, err
	}
	defer unlock()
	dev, err := d.m.stateOf(base)
	if err != nil {
		return nil, err
	}
	r.from, r.dev = dev.State, dev.ID
	return r, nil
}

// stateOf returns the device of a layer that cannot change, with a state that
// names its content.
func (m *mechanism) stateOf(id string) (device, error) {
	dev, err := m.load(id)
	if err != nil || dev.State != "" {
		return dev, err
	}
	dev.State = uuid()
	return dev, m.save(m.devicePath(id), dev)
}

// Send writes the next round and returns the bytes of the layer in it. The
// receiver applies the first one with [Driver.Receive], the others with
// [Driver.ReceiveUpdate]. If a round fails, the next one has what it had.
func (r *Replica) Send(ctx context.Context, w io.Writer, opts *SendOptions) (int64, error) {
	n, err := r.send(ctx, w, opts)
	return n, r.d.fail("send", r.id, err)
}

func (r *Replica) send(ctx context.Context, w io.Writer, opts *SendOptions) (n int64, err error) {
	if opts == nil {
		opts = new(SendOptions)
	}
	s, err := r.take(ctx)
	if err != nil {
		return 0, err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return s.close(context.WithoutCancel(ctx)) })
	if n, err = r.round(ctx, s, w, opts); err != nil {
		return n, err
	}
	old := r.last
	r.last, r.from, r.dev = s, s.state, s.dev.ID
	if old != nil {
		if err := old.close(context.WithoutCancel(ctx)); err != nil {
			r.d.m.opts.Logger.Warn("delete a snapshot", "driver", name, "layer", r.id, "error", err)
		}
	}
	return n, nil
}

// take takes the snapshot of a round. A layer that cannot change keeps its
// state, so that what is sent on top of it later finds it.
func (r *Replica) take(ctx context.Context) (*snap, error) {
	m := r.d.m
	if r.frozen == nil || r.frozen.suspended {
		unlock, err := m.dir.Lock(ctx, r.id)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	rec, err := m.dir.Load(r.id)
	if err != nil {
		return nil, err
	}
	state := ""
	if frozen, err := m.frozen(rec); err != nil {
		return nil, err
	} else if frozen {
		dev, err := m.stateOf(r.id)
		if err != nil {
			return nil, err
		}
		state = dev.State
	}
	active := m.deviceName(r.id, false)
	if r.frozen != nil {
		active = "" // it is suspended already, or not active at all
	}
	return m.snap(ctx, r.id, active, state)
}

func (r *Replica) round(ctx context.Context, s *snap, w io.Writer, opts *SendOptions) (sent int64, err error) {
	m := r.d.m
	ranges, err := m.rangesOf(ctx, r.dev, s.dev.ID, s.dev.Size)
	if err != nil {
		return 0, err
	}
	var total int64
	for _, x := range ranges {
		if !x.Unmapped {
			total += x.Length
		}
	}
	f, err := s.open()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out, err := newStreamWriter(w, streamHeader{FS: m.opts.FS, Size: s.dev.Size, FSSize: s.dev.FSSize, From: r.from, To: s.state})
	if err != nil {
		return 0, err
	}
	report := throttle(opts.Progress)
	buf := make([]byte, maxRecord)
	for _, x := range ranges {
		for off := x.Offset; off < x.Offset+x.Length; {
			if err := context.Cause(ctx); err != nil {
				return sent, err
			}
			n := min(maxRecord, x.Offset+x.Length-off)
			if x.Unmapped {
				err = out.record(recordHole, uint64(off), uint32(n), nil)
			} else if err = readFull(f, buf[:n], off); err == nil {
				err = out.record(recordData, uint64(off), uint32(n), buf[:n])
				sent += n
			}
			if err != nil {
				return sent, err
			}
			off += n
			report(layerfs.Progress{Phase: "send", Bytes: sent, Total: total}, false)
		}
	}
	report(layerfs.Progress{Phase: "send", Bytes: sent, Total: total}, true)
	return sent, out.end()
}

// Close lets the layer be written again and deletes the snapshot that the
// replica keeps.
func (r *Replica) Close() error { return r.d.fail("replicate", r.id, r.close()) }

func (r *Replica) close() error {
	err := r.thaw()
	if r.last == nil {
		return err
	}
	s := r.last
	r.last = nil
	return errors.Join(err, s.close(context.Background()))
}

// freeze is what keeps a layer from being written.
type freeze struct {
	suspended bool // else the layer is not active, and its lock is held
	unlock    func()
}

// Freeze keeps the layer as it is until [Replica.Thaw] or Close: whoever writes
// to it waits, and so do Get and Put if it is not mounted for writing. What is
// sent in between is the end of what was written. BlockDiff, Changes and Diff of
// the layer wait too.
//
// If the process dies, New on the root lets the layer go on; the kernel keeps
// waiting writers until then. Freezing a frozen layer does nothing.
func (r *Replica) Freeze(ctx context.Context) error { return r.d.fail("freeze", r.id, r.freeze(ctx)) }

func (r *Replica) freeze(ctx context.Context) (err error) {
	if r.frozen != nil {
		return nil
	}
	m := r.d.m
	unlock, err := m.dir.Lock(ctx, r.id)
	if err != nil {
		return err
	}
	device := m.deviceName(r.id, false)
	unlockOrigin, err := m.dir.Lock(ctx, ".origin-"+device)
	if err != nil {
		unlock()
		return err
	}
	info, err := m.ctl.Info(device)
	if err == nil && !info.ReadOnly && info.Live && info.Opens > 0 {
		err = m.ctl.Suspend(device, dm.SuspendOptions{})
		if err == nil {
			unlock()
			r.frozen = &freeze{true, unlockOrigin}
			m.step("freeze: suspended")
			return nil
		}
	}
	unlockOrigin()
	if err := ignore(err, unix.ENXIO); err != nil {
		unlock()
		return err
	}
	r.frozen = &freeze{false, unlock}
	return nil
}

// Thaw ends what [Replica.Freeze] began. Thawing a layer that is not frozen
// does nothing.
func (r *Replica) Thaw() error { return r.d.fail("thaw", r.id, r.thaw()) }

func (r *Replica) thaw() error {
	f := r.frozen
	if f == nil {
		return nil
	}
	r.frozen = nil
	defer f.unlock()
	if !f.suspended {
		return nil
	}
	_, err := r.d.m.ctl.Resume(r.d.m.deviceName(r.id, false), dm.SuspendOptions{})
	return ignore(err, unix.ENXIO)
}

// incoming is a stream that Create or Apply of the mechanism fills a device
// from. It is handed through the shared life cycle in the context, so that a
// received layer has the same commit points as any other.
type incoming struct {
	r          *streamReader
	progress   layerfs.ProgressFunc
	unfinished bool
}

type incomingKey struct{}

func incomingOf(ctx context.Context) *incoming {
	in, _ := ctx.Value(incomingKey{}).(*incoming)
	return in
}

// ReceiveOptions are the options of [Driver.Receive]. Nil means none.
type ReceiveOptions struct {
	// Create has the labels and the like of the new layer.
	Create layerfs.CreateOptions

	// Unfinished makes a layer that more rounds of a [Replica] are to come
	// for: it is incomplete, so that nobody can use it, until
	// [Driver.FinishReceive]. A crash leaves it so; it can be removed.
	Unfinished bool

	// Progress is called with the bytes that were written.
	Progress layerfs.ProgressFunc
}

// unfinished is why a layer of [ReceiveOptions.Unfinished] is incomplete.
const unfinished = "more of it was to be received"

// Receive makes a layer on parent from a stream of [Driver.Send]. A stream of a
// whole layer is received without a parent; one that is relative to a base only
// on a layer that has the content of that base, which was received too.
//
// All or nothing, also in a crash. The error matches [layerfs.ErrMalformed] if
// the stream is damaged or cut. What is in the stream is a file system that the
// kernel will mount: receive from senders alone whose disks you would mount.
func (d *Driver) Receive(ctx context.Context, id, parent string, r io.Reader, opts *ReceiveOptions) error {
	if opts == nil {
		opts = new(ReceiveOptions)
	}
	s, err := newStreamReader(r)
	if err != nil {
		return d.fail("receive", id, err)
	}
	ctx = context.WithValue(ctx, incomingKey{}, &incoming{s, opts.Progress, opts.Unfinished})
	return renamed("receive", d.Create(ctx, id, parent, &opts.Create))
}

// ReceiveUpdate brings a layer that was received to the state of the next round
// of a [Replica]. The layer must be neither held nor frozen, and not have been
// mounted for writing since. All or nothing. A layer that was received with
// [ReceiveOptions.Unfinished] stays unfinished.
func (d *Driver) ReceiveUpdate(ctx context.Context, id string, r io.Reader, opts *ReceiveOptions) error {
	if opts == nil {
		opts = new(ReceiveOptions)
	}
	s, err := newStreamReader(r)
	if err != nil {
		return d.fail("receive", id, err)
	}
	in := &incoming{r: s, progress: opts.Progress}
	if rec, err := d.m.dir.Load(id); err == nil && rec.Incomplete == unfinished {
		return lifecycle.Update(ctx, d.frame, "receive", id, func(chain lifecycle.Chain, rec *lifecycle.Record) error {
			if rec.Incomplete != unfinished {
				return fmt.Errorf("it was finished meanwhile: %w", layerfs.ErrInUse)
			}
			return d.m.update(ctx, chain, in)
		})
	}
	_, err = d.Apply(context.WithValue(ctx, incomingKey{}, in), id, nil, nil)
	return renamed("receive", err)
}

// FinishReceive makes a layer usable that was received with
// [ReceiveOptions.Unfinished]. Other layers are left as they are.
func (d *Driver) FinishReceive(ctx context.Context, id string) error {
	return lifecycle.Update(ctx, d.frame, "receive", id, func(_ lifecycle.Chain, rec *lifecycle.Record) error {
		if rec.Incomplete == unfinished {
			rec.Incomplete, rec.Sealed = "", rec.ReadOnly
		}
		return nil
	})
}

// renamed gives an error of another verb the name of this one.
func renamed(op string, err error) error {
	var e *layerfs.Error
	if errors.As(err, &e) {
		c := *e
		c.Op = op
		return &c
	}
	return err
}

// receive makes the device of a new layer from a stream.
func (m *mechanism) receive(ctx context.Context, rec *lifecycle.Record, parent lifecycle.Chain, in *incoming) (err error) {
	h := in.r.header
	if err := m.fits(h); err != nil {
		return err
	}
	if err := m.guard(); err != nil {
		return err
	}
	if rec.Sealed = rec.ReadOnly; in.unfinished {
		rec.Incomplete, rec.Sealed = unfinished, false
	}
	size, err := m.receivedSize(h, rec.Quota)
	if err != nil {
		return err
	}
	path := m.devicePath(rec.ID)
	if err := m.discard(ctx, path); err != nil {
		return err
	}
	var dev device
	switch {
	case len(parent) == 0 && h.From != "":
		return fmt.Errorf("the stream is relative to the state %s: it needs a parent", h.From)
	case len(parent) == 0:
		dev, err = m.blank(ctx, path, size, h.FSSize)
	default:
		var o origin
		if o, err = m.originOf(parent); err != nil {
			return err
		}
		if h.From == "" || o.State != h.From {
			return fmt.Errorf("the stream is relative to the state %q, but the parent has %q", h.From, o.State)
		}
		dev, err = m.snapshot(ctx, path, o.ID, o.name, size, h.FSSize)
	}
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.discard(context.WithoutCancel(ctx), path) })
	if err := m.noSpace(m.write(ctx, rec.ID, dev, in)); err != nil {
		return err
	}
	dev.State = h.To
	return m.save(path, dev)
}

// update makes a new device for a received layer from a stream.
func (m *mechanism) update(ctx context.Context, chain lifecycle.Chain, in *incoming) error {
	rec, h := chain.Layer(), in.r.header
	if err := m.fits(h); err != nil {
		return err
	}
	old, err := m.load(rec.ID)
	if err != nil {
		return err
	}
	if h.From == "" || old.State != h.From {
		return fmt.Errorf("the stream is relative to the state %q, but the layer has %q", h.From, old.State)
	}
	return m.swap(ctx, rec, chain, max(h.Size, old.Size), h.FSSize, func(d device) (device, error) {
		d.State = h.To
		return d, m.noSpace(m.write(ctx, rec.ID, d, in))
	})
}

// fits makes sure that a stream can become a layer here.
func (m *mechanism) fits(h streamHeader) error {
	if h.FS != m.opts.FS {
		return &layerfs.UnsupportedError{Feature: "a layer with " + h.FS, Reason: "this root has " + m.opts.FS}
	}
	return nil
}

// receivedSize returns the size of the device for a stream: that of the
// sender's, or more if the quota asks for it.
func (m *mechanism) receivedSize(h streamHeader, q layerfs.Quota) (int64, error) {
	o := origin{device: device{Size: h.Size}}
	if q.Bytes == 0 {
		return m.sizeFor(o, q, true)
	}
	// What the sender rounded up to is no larger than its quota.
	const unit = 4096
	q.Bytes = (q.Bytes + unit - 1) / unit * unit
	return m.sizeFor(o, q, true)
}

// blank makes an empty device.
func (m *mechanism) blank(ctx context.Context, path string, size, fsSize int64) (device, error) {
	for {
		n, transaction, err := m.number(ctx)
		if err != nil {
			return device{}, err
		}
		d := device{ID: n, Size: size, FSSize: fsSize, Transaction: transaction, Since: coarse()}
		if err := m.save(path, d); err != nil {
			return device{}, err
		}
		_, err = m.ctl.Message(m.pool, 0, dm.CreateThin(n))
		if err == nil {
			return d, nil
		}
		if rerr := removeFile(path); rerr != nil || !errors.Is(err, unix.EEXIST) {
			return device{}, errors.Join(err, rerr)
		}
	}
}

// write writes a stream to a device that is not active.
func (m *mechanism) write(ctx context.Context, id string, d device, in *incoming) (err error) {
	dev := deviceName(m.prefix, "+apply-"+id)
	if err := m.removeDevice(ctx, dev); err != nil {
		return err
	}
	info, err := m.activateThin(dev, m.thinUUID(d.ID), d.ID, d.Size, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.removeDevice(context.WithoutCancel(ctx), dev)) }()
	f, err := dm.OpenDevice(info.Device, os.O_RDWR)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	report := throttle(in.progress)
	var p layerfs.Progress
	p.Phase = "receive"
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		rec, err := in.r.next()
		if err == io.EOF {
			report(p, true)
			return f.Sync()
		}
		if err != nil {
			return err
		}
		if rec.hole {
			err = m.hole(f, rec)
		} else {
			_, err = f.WriteAt(rec.data, rec.offset)
			p.Bytes += rec.length
		}
		if err != nil {
			return err
		}
		report(p, false)
	}
}

// hole makes a range read as zeroes, unmapped where the pool can.
func (m *mechanism) hole(f *os.File, rec blockRecord) error {
	block := m.opts.BlockSize
	if !m.opts.IgnoreDiscard && rec.offset%block == 0 && rec.length%block == 0 {
		err := dm.Discard(f, uint64(rec.offset), uint64(rec.length))
		if err == nil || !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	zero := make([]byte, min(rec.length, 1<<20))
	for off := rec.offset; off < rec.offset+rec.length; off += int64(len(zero)) {
		if _, err := f.WriteAt(zero[:min(int64(len(zero)), rec.offset+rec.length-off)], off); err != nil {
			return err
		}
	}
	return nil
}
