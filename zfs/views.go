//go:build linux || freebsd

package zfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// views is the directory in which an open driver has its private mounts,
// views/NAME/SERIAL.ID, notes of its snapshots, named alike, and with zfs-fuse what
// was moved aside, views/NAME/asideSERIAL.ID. Its lock, views/NAME.lock, lasts as
// long as the driver, so that another can tell what a crash left.
type views struct {
	dir  string
	lock *os.File
}

func openViews(all string) (*views, error) {
	if err := os.MkdirAll(all, 0o700); err != nil {
		return nil, err
	}
	v := &views{dir: filepath.Join(all, random())}
	f, err := os.OpenFile(v.dir+".lock", os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = flock(f)
	if err == nil {
		err = os.Mkdir(v.dir, 0o700)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	v.lock = f
	return v, nil
}

// flock locks a file unless somebody else has.
func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("flock", err)
		}
	}
}

// close gives the directory up. Views that are still shown, by a Diff that
// nobody closed, are left to the next driver.
func (v *views) close() error {
	err := os.Remove(v.dir)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.Remove(v.dir + ".lock")
	} else {
		err = nil
	}
	return errors.Join(err, v.lock.Close())
}

// View shows the merged tree in a private place.
func (m *mechanism) View(ctx context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	rec := chain.Layer()
	unlock, err := m.dir.Lock(ctx, rec.ID)
	if err != nil {
		return lifecycle.View{}, err
	}
	defer unlock()
	v, err := m.private(ctx, rec, true)
	if err != nil {
		return v, err
	}
	release := v.Release
	v.Release = func() error {
		// Whoever mounts the layer may take this view for its source, so it
		// must not go at the same time. A closed driver has no locks any more.
		if unlock, err := m.dir.Lock(context.Background(), rec.ID); err == nil {
			defer unlock()
		}
		return release()
	}
	return v, nil
}

// private shows a layer, whose lock is held, in a private place.
func (m *mechanism) private(ctx context.Context, rec *lifecycle.Record, readOnly bool) (_ lifecycle.View, err error) {
	if err := m.answers(); err != nil {
		return lifecycle.View{}, err
	}
	path := filepath.Join(m.views.dir, fmt.Sprintf("%d.%s", m.serial.Add(1), rec.ID))
	var u undo.Stack
	defer u.Run(&err)
	if err := os.Mkdir(path, 0o700); err != nil {
		return lifecycle.View{}, err
	}
	u.Push(func() error { return os.Remove(path) })
	if err := m.show(ctx, rec, path, lifecycle.Mode{ReadOnly: readOnly}); err != nil {
		return lifecycle.View{}, err
	}
	return lifecycle.View{Path: path, Release: func() error {
		if err := m.hide(path); err != nil {
			return err
		}
		return os.Remove(path)
	}}, nil
}

// clearStage removes the private mounts that a crash left.
func (m *mechanism) clearStage(ctx context.Context) error {
	if err := os.MkdirAll(m.state("stage"), 0o700); err != nil {
		return err
	}
	if err := m.clearDir(ctx, m.state("stage"), func(name string) string { return name }); err != nil {
		return err
	}
	locks, err := filepath.Glob(globQuote(m.state("views")) + "/*.lock")
	if err != nil {
		return err
	}
	for _, path := range locks {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := m.clearViews(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// clearViews removes the views of a driver that is gone.
func (m *mechanism) clearViews(ctx context.Context, lock string) error {
	f, err := os.OpenFile(lock, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(f); err != nil {
		return nil // its driver lives
	}
	dir := strings.TrimSuffix(lock, ".lock")
	err = m.clearDir(ctx, dir, func(name string) string {
		_, id, _ := strings.Cut(name, ".")
		return id
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if removeDir(dir) != nil {
		return nil // somebody works on a layer of it; later
	}
	return removeDir(lock)
}

// clearDir removes what is in dir for layers that nobody is working on:
// directories, which are unmounted, and the files that name a snapshot.
func (m *mechanism) clearDir(ctx context.Context, dir string, idOf func(name string) string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		unlock, ok, err := m.dir.TryLock(idOf(e.Name()))
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if e.Type().IsRegular() {
			err = m.dropMoment(ctx, path, idOf(e.Name()))
		} else if err = m.hide(path); err == nil {
			err = removeDir(path)
		}
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// patiently tries something again while zfs says that the dataset is busy:
// the end of a mount, above all of a daemon's, comes a moment after the call
// that ended it.
func (m *mechanism) patiently(ctx context.Context, call func() error) error {
	const most = 2 * time.Second
	start := time.Now()
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := call()
		if !says(err, textBusy, textMounted) && !errors.Is(err, unix.EBUSY) || time.Since(start) > most {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}
