package lifecycle

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
)

// Options are the options every backend has.
type Options struct {
	Durability layerfs.Durability
	Logger     *slog.Logger // nil means silent
}

// Driver implements layerfs.Driver, and the optional operations that need no
// mechanism, for a backend.
type Driver struct {
	m    Mechanism         // immutable
	dir  *layerdir.Dir     // immutable
	home string            // immutable
	opts Options           // immutable; Logger is set
	rec  []layerfs.Problem // immutable after New: what was mended

	mu     sync.Mutex
	closed bool             // guarded by mu
	held   map[string]*hold // guarded by mu; its entries by the layer's lock
}

// hold is how this driver holds a layer.
type hold struct {
	gets     int
	rec      *Record // as of the first of them; changes of it since do not matter to Put
	readOnly bool
	planned  bool // the caller mounts it itself: see Plan
	idMap    *layerfs.IDMap
	pins     int
}

// Open makes the home directory if it is new, and its state directory. It is
// apart from New because a mechanism may need the home to find out what it can
// do.
func Open(home string, opts Options) (*layerdir.Dir, error) {
	if err := os.MkdirAll(home, 0o711); err != nil {
		return nil, err
	}
	return layerdir.Open(home, opts.Durability)
}

// New returns a driver for a mechanism after it has finished or rolled back
// what a crash left; see [Driver.Recovered]. It closes dir if it fails, but not
// the mechanism.
func New(ctx context.Context, home string, dir *layerdir.Dir, m Mechanism, opts Options) (*Driver, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Driver{m: m, dir: dir, home: home, opts: opts, held: make(map[string]*hold)}
	mended, err := d.scan(ctx, true)
	if err != nil {
		dir.Close()
		return nil, d.error("open", "", err)
	}
	for _, p := range mended {
		opts.Logger.Info("recovered", "driver", m.Name(), "layer", p.ID, "path", p.Path, "reason", p.Reason, "repair", p.Repair)
	}
	d.rec = mended
	return d, nil
}

// Name returns the driver's name.
func (d *Driver) Name() string { return d.m.Name() }

// Features tells what this instance can do.
func (d *Driver) Features() layerfs.Features { return d.m.Features() }

// Recovered tells what the opening of this driver found and mended after a
// crash.
func (d *Driver) Recovered() []layerfs.Problem { return d.rec }

// Status gives key and value pairs for people.
func (d *Driver) Status(ctx context.Context) (_ []layerfs.StatusItem, err error) {
	defer d.wrap("status", "", &err)
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	return d.m.Status(ctx)
}

// Close releases what the driver itself holds.
func (d *Driver) Close() (err error) {
	defer d.wrap("close", "", &err)
	d.mu.Lock()
	closed := d.closed
	d.closed = true
	d.mu.Unlock()
	if closed {
		return nil
	}
	return errors.Join(d.m.Close(), d.dir.Close())
}

// begin starts a verb.
func (d *Driver) begin(ctx context.Context) error {
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return layerfs.ErrClosed
	}
	return context.Cause(ctx)
}

// lock starts a verb that changes layers.
func (d *Driver) lock(ctx context.Context, ids ...string) (unlock func(), err error) {
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	for _, id := range ids {
		if err := layerfs.CheckID(id); err != nil {
			return nil, err
		}
	}
	return d.dir.Lock(ctx, ids...)
}

// load returns a layer that is whole.
func (d *Driver) load(id string) (*Record, error) {
	rec, err := d.dir.Load(id)
	if err != nil {
		return nil, err
	}
	if rec.Incomplete != "" {
		return nil, incomplete(rec)
	}
	return rec, nil
}

// chain returns a layer and its ancestors, all of which are whole.
func (d *Driver) chain(id string) (Chain, error) {
	var c Chain
	for at := id; at != ""; {
		rec, err := d.load(at)
		if err != nil {
			if at != id {
				err = &chainError{at, err}
			}
			return nil, err
		}
		if c.Index(at) >= 0 {
			return nil, &chainError{at, errors.New("the layer is its own ancestor")}
		}
		c = append(c, rec)
		at = rec.Parent
	}
	return c, nil
}

// chainError names the ancestor that is at fault. It hides ErrNotExist, which
// would say that the layer asked for does not exist.
type chainError struct {
	id  string
	err error
}

func (e *chainError) Error() string { return "ancestor " + e.id + ": " + e.err.Error() }

func (e *chainError) Is(target error) bool {
	return target == layerfs.ErrIncomplete
}

// hold returns how this driver holds a layer whose lock the caller has. The
// entry goes away with drop.
func (d *Driver) holdOf(id string) *hold {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.held[id]
	if h == nil {
		h = new(hold)
		d.held[id] = h
	}
	return h
}

// setGets changes a count under both locks, since Stat and List read it under
// mu alone.
func (d *Driver) setGets(h *hold, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h.gets = n
}

func (d *Driver) drop(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.held[id]; h != nil && h.gets == 0 && h.pins == 0 {
		delete(d.held, id)
	}
}

// error makes the one error of a verb. The path of a PathError becomes the
// path of the error, relative to the home where it lies there.
func (d *Driver) error(op, id string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*layerfs.Error](err); ok {
		return err
	}
	e := &layerfs.Error{Op: op, Driver: d.m.Name(), ID: id, Err: err}
	if p, ok := err.(*fs.PathError); ok { //nolint:errorlint // only the outermost gives its path away
		e.Path = d.relative(p.Path)
		e.Err = &os.SyscallError{Syscall: p.Op, Err: p.Err}
	}
	return e
}

func (d *Driver) wrap(op, id string, err *error) { *err = d.error(op, id, *err) }

func (d *Driver) relative(path string) string {
	if rel, err := filepath.Rel(d.home, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}

func incomplete(rec *Record) error {
	return &incompleteError{rec.Incomplete}
}

type incompleteError struct{ what string }

func (e *incompleteError) Error() string {
	return layerfs.ErrIncomplete.Error() + " (" + e.what + "); it can only be removed"
}

func (e *incompleteError) Is(target error) bool { return target == layerfs.ErrIncomplete }
