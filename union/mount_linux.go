package union

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/internal/watch"
)

// A Watcher is an inotify instance that several mounts use.
type Watcher struct{ hub *watch.Hub }

// NewWatcher makes a Watcher. Its Close ends what it does for mounts, too.
func NewWatcher() (*Watcher, error) {
	h, err := watch.New()
	if err != nil {
		return nil, err
	}
	return &Watcher{h}, nil
}

// Close releases the inotify instance.
func (w *Watcher) Close() error { return w.hub.Close() }

// A Handle is a mounted union. Its methods are safe for concurrent use.
type Handle struct {
	target string
	fs     *unionfs.FS
	srv    *fusesrv.Server
	own    *watch.Hub // if not shared
	done   chan struct{}

	mu       sync.Mutex // one change of the branches at a time; guards repaired
	repaired []Repaired
	closeErr error // set before done is closed
}

// Mount mounts a union on target, an existing directory.
//
// It needs CAP_SYS_ADMIN and /dev/fuse. The error is an *fs.PathError naming
// the branch that cannot be one: EINVAL for branches that contain each other,
// for a writable one on a read-only file system or that AUFS wrote with its
// option dirren, and for kernel file systems; EBUSY for a writable branch that is writable in another union. ctx bounds
// the call only.
//
// The calling process must not depend on its own mounts to end: it serves them.
func Mount(ctx context.Context, target string, cfg *Config) (*Handle, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if cfg == nil {
		cfg = &Config{} // which names no branch
	}
	ec, err := cfg.engine()
	if err != nil {
		return nil, err
	}
	if target, err = filepath.Abs(target); err != nil {
		return nil, err
	}
	h := &Handle{target: target, done: make(chan struct{})}
	var w *fusesrv.Watch
	mode := map[UDBA]fusesrv.UDBA{"": fusesrv.Notify, Notify: fusesrv.Notify, None: fusesrv.None, Reval: fusesrv.Reval, Strict: fusesrv.Strict}[cfg.UDBA]
	if mode == fusesrv.Notify {
		hub := (*watch.Hub)(nil)
		if cfg.Watcher != nil {
			hub = cfg.Watcher.hub
		} else {
			if hub, err = watch.New(); err != nil {
				return nil, err
			}
			h.own = hub
		}
		w = fusesrv.NewWatch(hub)
		ec.Watch = w
	}
	undo := func() {
		if w != nil {
			w.Close()
		}
		if h.own != nil {
			h.own.Close()
		}
	}
	var rep []unionfs.Repaired
	h.fs, rep, err = unionfs.Open(ec)
	if err != nil {
		undo()
		return nil, err
	}
	h.note(rep)
	h.srv, err = fusesrv.Mount(fusesrv.Config{
		FS: h.fs, Target: target, UDBA: mode, Watch: w, ReadOnly: cfg.ReadOnly,
		NoPassthrough: cfg.NoPassthrough, NoXattr: cfg.NoXattr, Private: cfg.Private,
		NoSuid: !cfg.AllowSuid, NoDev: !cfg.AllowDev, NoExec: cfg.NoExec, Source: cfg.Source, Logger: cfg.Logger,
	})
	if err != nil {
		undo()
		return nil, errors.Join(err, h.fs.Close())
	}
	go func() {
		<-h.srv.Done()
		h.mu.Lock()
		defer h.mu.Unlock()
		// Whoever unmounted by umount(8) did not flush.
		h.closeErr = errors.Join(h.fs.FlushLinks(), h.fs.Close())
		if h.own != nil {
			h.closeErr = errors.Join(h.closeErr, h.own.Close())
		}
		close(h.done)
	}()
	return h, nil
}

func (c *Config) engine() (*unionfs.Config, error) {
	errs := []error{c.UDBA.check(), c.Format.check()}
	ec := &unionfs.Config{NoPlink: c.NoPlink, SumFree: c.SumFree, Logger: c.Logger}
	overlay := c.Format == Overlay || c.Format == OverlayUser
	if overlay {
		ec.Format = unionfs.Overlay{User: c.Format == OverlayUser}
	}
	for _, b := range c.Branches {
		s, err := b.spec()
		errs = append(errs, err)
		if overlay && b.Perm == "" {
			s.Perm = unionfs.ROWH
		}
		ec.Branches = append(ec.Branches, s)
	}
	return ec, errors.Join(errs...)
}

func (b Branch) spec() (unionfs.BranchSpec, error) {
	if err := b.Perm.check(); err != nil {
		return unionfs.BranchSpec{}, &os.PathError{Op: "branch", Path: b.Path, Err: err}
	}
	p := unionfs.RO
	if b.Perm != "" {
		var err error
		if p, err = unionfs.ParsePerm(string(b.Perm)); err != nil {
			return unionfs.BranchSpec{}, err
		}
	}
	return unionfs.BranchSpec{Path: b.Path, Perm: p}, nil
}

func (h *Handle) note(rep []unionfs.Repaired) {
	for _, r := range rep {
		h.repaired = append(h.repaired, Repaired(r))
	}
}

// Target returns the mount point.
func (h *Handle) Target() string { return h.target }

// Repaired returns what was mended on the branches so far.
func (h *Handle) Repaired() []Repaired {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Repaired(nil), h.repaired...)
}

// Branches returns the branches, top first.
func (h *Handle) Branches() []Branch {
	var out []Branch
	for _, b := range h.fs.Branches() {
		out = append(out, Branch{b.Path, Perm(b.Perm.String())})
	}
	return out
}

// Append adds a branch below all others.
func (h *Handle) Append(ctx context.Context, b Branch) error { return h.insert(ctx, -1, b) }

// Prepend adds a branch above all others.
func (h *Handle) Prepend(ctx context.Context, b Branch) error { return h.insert(ctx, 0, b) }

// Insert adds a branch at an index, 0 being the top. New lookups see it when
// Insert returns; open files keep their branch. EDOM if there are fewer
// branches.
func (h *Handle) Insert(ctx context.Context, at int, b Branch) error {
	if at < 0 {
		return &os.PathError{Op: "insert branch", Path: b.Path, Err: unix.EDOM}
	}
	return h.insert(ctx, at, b)
}

func (h *Handle) insert(ctx context.Context, at int, b Branch) error {
	s, err := b.spec()
	if err != nil {
		return err
	}
	return h.change(ctx, func() ([]unionfs.Repaired, error) {
		if at < 0 {
			at = len(h.fs.Branches())
		}
		return h.fs.Insert(at, s)
	})
}

func (h *Handle) change(ctx context.Context, do func() ([]unionfs.Repaired, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.done:
		return os.ErrClosed
	default:
	}
	h.srv.DropIdle()
	rep, err := do()
	h.note(rep)
	if err == nil {
		h.srv.InvalidateAll()
	}
	return err
}

// Delete takes a branch away: EBUSY while a file on it is open through the
// mount. Its files stay as they are.
func (h *Handle) Delete(ctx context.Context, path string) error {
	return h.change(ctx, func() ([]unionfs.Repaired, error) { return nil, h.fs.Delete(path) })
}

// Modify changes the permission of a branch: EBUSY if it is to become
// read-only while a file on it is open for writing, or has been open without
// a pause since it was.
func (h *Handle) Modify(ctx context.Context, path string, perm Perm) error {
	s, err := Branch{path, perm}.spec()
	if err != nil {
		return err
	}
	return h.change(ctx, func() ([]unionfs.Repaired, error) { return h.fs.Modify(path, s.Perm) })
}

// Sync returns when every change made directly on a branch before the call
// shows in the mount. With [None] and [Reval] it makes the kernel forget what
// it knows.
func (h *Handle) Sync(ctx context.Context) error { return h.srv.Sync(ctx) }

// Refresh forgets everything that is known of the branches, here and in the
// kernel, so that changes made directly on any branch show when it returns.
// Unlike Sync it serves writable branches, too, and every mode. The next use
// of each file costs a request.
func (h *Handle) Refresh(ctx context.Context) error {
	if err := h.srv.Sync(ctx); err != nil {
		return err
	}
	h.fs.ChangedAll()
	h.srv.InvalidateAll()
	return nil
}

// FlushLinks makes the hard links of copied-up files real on the writable
// branch, which Unmount does, too.
func (h *Handle) FlushLinks(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return h.fs.FlushLinks()
}

// Stats returns counters. They are cheap to read.
func (h *Handle) Stats() Stats {
	s, c := h.srv.Stats(), h.fs.Counters()
	return Stats{
		Requests: s.Requests, Nodes: s.Nodes, OpenFiles: s.Handles, Backings: s.Backings, Passthrough: s.Passthrough,
		Lookups: c.Lookups.Load(), CopyUps: c.CopyUps.Load(), CopyUpBytes: c.CopyUpBytes.Load(), Whiteouts: c.Whiteouts.Load(),
		Invalidated: s.Invalidated, Lost: s.Lost,
	}
}

// Done is closed when the mount is gone and everything is released.
func (h *Handle) Done() <-chan struct{} { return h.done }

// Unmount ends the mount. EBUSY, and the mount goes on, if it is in use.
func (h *Handle) Unmount(ctx context.Context) error { return h.unmount(ctx, false) }

// Detach takes the mount out of the tree at once; it ends when its last user
// does, which Done tells. ctx bounds the call.
func (h *Handle) Detach(ctx context.Context) error { return h.unmount(ctx, true) }

func (h *Handle) unmount(ctx context.Context, detach bool) error {
	if err := h.srv.Unmount(ctx, detach); err != nil {
		return err
	}
	select {
	case <-h.done:
		return h.closeErr
	case <-ctx.Done():
		return ctx.Err()
	}
}
