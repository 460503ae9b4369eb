package dm

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Watcher waits for events of the device mapper. It has a control node of its
// own, because what it has seen is kept per open file. One goroutine may wait
// at a time.
type Watcher struct {
	c *Control
}

// NewWatcher returns a watcher that has seen everything until now.
func NewWatcher() (*Watcher, error) {
	c, err := Open()
	if err != nil {
		return nil, err
	}
	w := &Watcher{c}
	if err := w.arm(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return w, nil
}

// Close gives the control node back.
func (w *Watcher) Close() error { return w.c.Close() }

// arm makes poll report events from now on. DM_DEV_ARM_POLL, Linux 4.14.
func (w *Watcher) arm() error {
	_, err := w.c.call("dm_dev_arm_poll", sys.DMDevArmPollReq(), &request{})
	return err
}

// Wait returns when any device had an event since the last Wait, or since
// NewWatcher: a change of a pool's mode or a watermark passed, but also
// creation, removal and rename. It may return without one. The error is that
// of ctx or of poll(2).
func (w *Watcher) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r, wr, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { wr.Close() })
	defer func() {
		if stop() {
			wr.Close()
		}
	}()
	fds := []unix.PollFd{
		{Fd: int32(w.c.f.Fd()), Events: unix.POLLIN},
		{Fd: int32(r.Fd()), Events: unix.POLLIN}, // end of file once ctx is done
	}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return &os.PathError{Op: "poll", Path: controlPath, Err: err}
		case fds[0].Revents != 0:
			// Armed before the caller looks: what happens meanwhile is seen by
			// the next Wait.
			return w.arm()
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

// WaitEvent waits until the number of a device's last event is another than
// last, and returns it. The error is that of ctx, or matches ENXIO if the
// device is gone.
func (w *Watcher) WaitEvent(ctx context.Context, name string, last uint32) (uint32, error) {
	for {
		i, err := w.c.Info(name)
		if err != nil || i.Event != last {
			return i.Event, err
		}
		if err := w.Wait(ctx); err != nil {
			return last, err
		}
	}
}
