package aufs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/union"
)

// engine mounts unions.
type engine interface {
	name() Engine

	// mount mounts a union on target.
	mount(ctx context.Context, p plan, target string) error

	// unmount undoes mount, whoever made it. A union in use is taken out of
	// the tree and ends later. Nothing mounted is [mount.ErrNotMounted].
	unmount(ctx context.Context, target string) error

	// alter changes the branches of a mounted union.
	alter(ctx context.Context, target string, v verb) error

	// branches returns those of a mounted union; errElsewhere if this engine
	// cannot know.
	branches(target string) ([]union.Branch, error)

	// flush makes the pseudo-links of a mounted union real; errElsewhere if
	// this engine cannot.
	flush(ctx context.Context, target string) error

	// sync returns when direct changes of branches show.
	sync(ctx context.Context, target string) error

	close() error
}

// errElsewhere is what the FUSE engine says of a union it does not serve. It
// matches [errors.ErrUnsupported].
var errElsewhere error = &layerfs.UnsupportedError{
	Feature: "changing the branches", Reason: "another driver or process serves the layer",
}

// fuseEngine serves unions by this process.
type fuseEngine struct {
	set    settings
	source string // of the mounts
	log    *slog.Logger

	mu      sync.Mutex
	watcher *union.Watcher           // guarded by mu; made when first needed
	served  map[string]*union.Handle // guarded by mu; by target
	leaving sync.WaitGroup           // unions that may still need the watcher
}

func newFUSE(set settings, log *slog.Logger) (*fuseEngine, error) {
	source, err := sourceOf(os.Getpid())
	return &fuseEngine{set: set, source: source, log: log, served: make(map[string]*union.Handle)}, err
}

func (*fuseEngine) name() Engine { return FUSE }

// busyFor is how long a union of a writable branch may take to end after its
// mount point is gone: it makes pseudo-links real, and may be that of another
// process.
const busyFor = 2 * time.Second

func (e *fuseEngine) mount(ctx context.Context, p plan, target string) error {
	if p.label != "" {
		return noLabel
	}
	cfg := &union.Config{
		Branches: p.branches, UDBA: e.set.udba, ReadOnly: p.readOnly, NoPlink: e.set.noPlink, SumFree: e.set.sum,
		AllowSuid: true, AllowDev: true, Source: e.source, Logger: e.log,
	}
	var err error
	if cfg.Watcher, err = e.watch(); err != nil {
		return err
	}
	h, err := untilFree(ctx, func() (*union.Handle, error) { return union.Mount(ctx, target, cfg) })
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("the union that was last mounted is still in use: %w: %w", layerfs.ErrInUse, err)
	}
	if err != nil {
		return err
	}
	for _, r := range h.Repaired() {
		e.log.Info("repaired", "driver", name, "branch", r.Branch, "path", r.Path, "action", r.Action)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.served[target] = h
	e.leaving.Go(func() {
		<-h.Done()
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.served[target] == h {
			delete(e.served, target)
		}
	})
	return nil
}

// watch returns the inotify instance that all mounts share; nil if they need
// none.
func (e *fuseEngine) watch() (*union.Watcher, error) {
	if e.set.udba != union.Notify {
		return nil, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watcher == nil {
		w, err := union.NewWatcher()
		if err != nil {
			return nil, err
		}
		e.watcher = w
	}
	return e.watcher, nil
}

// untilFree repeats a call while another union has the branch.
func untilFree[T any](ctx context.Context, call func() (T, error)) (T, error) {
	end := time.Now().Add(busyFor)
	for wait := 200 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		v, err := call()
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return v, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return v, context.Cause(ctx)
		}
	}
}

func (e *fuseEngine) handle(target string) *union.Handle {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.served[target]
}

func (e *fuseEngine) unmount(ctx context.Context, target string) error {
	h := e.handle(target)
	if h == nil {
		return unmountNow(target)
	}
	// The union must have let its branch go when this returns, if nobody
	// works in it; else it ends when the last user does.
	ctx, cancel := context.WithTimeout(ctx, busyFor)
	defer cancel()
	err := h.Unmount(ctx)
	switch {
	case errors.Is(err, unix.EBUSY):
		err = mount.Unmount(target)
	case errors.Is(err, context.DeadlineExceeded):
		err = nil // the mount is gone from the tree, but used elsewhere
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil && e.served[target] == h {
		delete(e.served, target)
	}
	return err
}

// unmountNow unmounts what anybody has mounted.
func unmountNow(target string) error {
	err := mount.UnmountNow(target)
	if errors.Is(err, unix.EBUSY) {
		return mount.Unmount(target)
	}
	return err
}

func (e *fuseEngine) alter(ctx context.Context, target string, v verb) error {
	h := e.handle(target)
	if h == nil {
		return errElsewhere
	}
	switch v.op {
	case "add":
		return h.Insert(ctx, v.at, v.Branch)
	case "append":
		return h.Append(ctx, v.Branch)
	case "mod":
		return h.Modify(ctx, v.Path, v.Perm)
	case "del":
		return h.Delete(ctx, v.Path)
	}
	return fmt.Errorf("[bug] verb %q", v.op)
}

func (e *fuseEngine) branches(target string) ([]union.Branch, error) {
	h := e.handle(target)
	if h == nil {
		return nil, errElsewhere
	}
	return h.Branches(), nil
}

func (e *fuseEngine) flush(ctx context.Context, target string) error {
	h := e.handle(target)
	if h == nil {
		return errElsewhere
	}
	return h.FlushLinks(ctx)
}

func (e *fuseEngine) sync(ctx context.Context, target string) error {
	h := e.handle(target)
	if h == nil {
		return errElsewhere
	}
	return h.Sync(ctx)
}

// close ends nothing that is mounted: mounts that are held last until the
// process ends. The watcher goes with the last of them.
func (e *fuseEngine) close() error {
	e.mu.Lock()
	w, busy := e.watcher, len(e.served) > 0
	e.watcher = nil
	e.mu.Unlock()
	if w == nil {
		return nil
	}
	if !busy {
		return w.Close()
	}
	go func() {
		e.leaving.Wait()
		if err := w.Close(); err != nil {
			e.log.Warn("close watcher", "driver", name, "error", err)
		}
	}()
	return nil
}

// probeFUSE finds out whether a union can be mounted. Nobody serves what it
// mounts, so nothing can wait for that.
func (m *mechanism) probeFUSE() error {
	no := func(err error) error {
		return &layerfs.UnsupportedError{Feature: "a union over FUSE", Reason: err.Error()}
	}
	return m.try(func(branches []union.Branch, target string) error {
		cfg := &unionfs.Config{}
		for i, b := range branches {
			cfg.Branches = append(cfg.Branches, unionfs.BranchSpec{Path: b.Path, Perm: []unionfs.Perm{unionfs.RW, unionfs.ROWH}[i]})
		}
		u, _, err := unionfs.Open(cfg)
		if err != nil {
			return no(err)
		}
		if err := u.Close(); err != nil {
			return no(err)
		}
		fd, err := fusesrv.OpenDevice()
		if err != nil {
			return no(err)
		}
		defer unix.Close(fd)
		if err := fusesrv.MountDevice(fd, &fusesrv.Config{Target: target}); err != nil {
			return no(err)
		}
		return mount.Unmount(target)
	})
}

// try tries something with two branches and a mount point.
func (m *mechanism) try(run func(branches []union.Branch, target string) error) (err error) {
	s, err := makeScratch(m.home, probePrefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.remove()) }()
	branches := []union.Branch{{Path: s.dir + "/rw", Perm: union.RW}, {Path: s.dir + "/ro", Perm: union.ROWH}}
	for _, b := range branches {
		if err := os.Mkdir(b.Path, 0o755); err != nil {
			return err
		}
	}
	return run(branches, filepath.Join(s.dir, mountPoint))
}
