package lifecycle

import (
	"context"
	"errors"
	"io"
	"iter"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
)

// Record is a layer's record; see layerdir.Record.
type Record = layerdir.Record

// Chain is a layer and its ancestors, nearest first.
type Chain []*Record

// Layer returns the layer itself.
func (c Chain) Layer() *Record { return c[0] }

// Index returns the place of a layer in the chain, len(c) for the empty base,
// and -1 if it is not there.
func (c Chain) Index(base string) int {
	if base == "" {
		return len(c)
	}
	for i, r := range c {
		if r.ID == base {
			return i
		}
	}
	return -1
}

// Mode says how a layer is mounted.
type Mode struct {
	ReadOnly bool
	IDMap    *layerfs.IDMap
}

// State says how a layer's path is mounted.
type State struct {
	Mounted  bool
	ReadOnly bool
}

// View is a read-only look at the merged tree of a layer, apart from Get.
type View struct {
	Path    string
	Release func() error
}

// Mechanism is one way to keep layers. Unless it says otherwise, a method is
// called with the lock of the layer held, so that it need not exclude itself.
type Mechanism interface {
	// Name returns the driver's name.
	Name() string

	// Features returns what the instance can do.
	Features() layerfs.Features

	// Path returns where Mount shows a layer. No lock is held.
	Path(id string) string

	// Create makes the storage of a new layer on parent, which is empty for a
	// base layer. It may set rec.Backend and rec.Quota. If it fails nothing
	// is left. The parent's lock is not held, but the parent is frozen and
	// cannot go away.
	Create(ctx context.Context, rec *Record, parent Chain, opts *layerfs.CreateOptions) error

	// Delete removes the storage of a layer that is not mounted, whole or
	// half-made. If its record was never written, rec has nothing but the
	// id. Nothing to remove is no error.
	Delete(ctx context.Context, rec *Record) error

	// Stored lists the layers that have storage, including half-made. No lock
	// is held.
	Stored(ctx context.Context) ([]string, error)

	// Mount shows a layer at its path.
	Mount(ctx context.Context, chain Chain, mode Mode) error

	// Unmount undoes Mount, also one by a process that died. Nothing to
	// unmount is no error.
	Unmount(ctx context.Context, rec *Record) error

	// State looks at a layer's path. Where Mount of a writable layer has
	// nothing to do, it is never mounted. Nor is what nobody can use any
	// more, which State unmounts.
	State(id string) (State, error)

	// Mounted lists the layers that are mounted. No lock is held.
	Mounted() ([]string, error)

	// Apply applies a stream to a layer that is not mounted. If it cannot do
	// it in one step it calls touch before its first change; if it then
	// fails, the layer stays incomplete.
	Apply(ctx context.Context, chain Chain, r io.Reader, opts *layerfs.ApplyOptions, touch func() error) (layerfs.ApplyResult, error)

	// View shows the merged tree without disturbing Get. The layer is pinned,
	// but no lock is held.
	View(ctx context.Context, chain Chain) (View, error)

	// Usage returns the space a layer takes. The layer is pinned, but no lock
	// is held.
	Usage(ctx context.Context, chain Chain) (layerfs.Usage, error)

	// Sync makes the content of a layer durable.
	Sync(ctx context.Context, rec *Record) error

	// Status returns the driver's part of Status. No lock is held.
	Status(ctx context.Context) ([]layerfs.StatusItem, error)

	// Close releases what the mechanism holds itself.
	Close() error
}

// ErrDecline is returned by a native path, before any side effect, if it
// cannot answer; then the generic path does. Nothing else starts it.
var ErrDecline = errors.New("native path declines")

// NativeChanger is a mechanism that knows what changed. base is an index of
// the chain, len(chain) for the empty tree. ErrDecline may only come first.
type NativeChanger interface {
	NativeChanges(ctx context.Context, chain Chain, base int) iter.Seq2[layerfs.Change, error]
}

// NativeDiffer is a mechanism that can write a diff of its own. It returns
// ErrDecline before it writes anything.
type NativeDiffer interface {
	NativeDiff(ctx context.Context, w io.Writer, chain Chain, base int, opts *layerfs.DiffOptions) error
}

// LiveBaser is a mechanism whose layers can be made on a parent that is held
// for writing.
type LiveBaser interface {
	LiveBase() bool
}

// Mortal is a mechanism whose mounts may end with a process that serves them, so
// that each Get looks whether there is still one, also while the layer is held.
type Mortal interface {
	Mortal() bool
}

// Releaser is a mechanism that may go on using a layer after it was unmounted.
// Released waits until it does not; the error matches [layerfs.ErrInUse] if that
// is not soon. Nothing to wait for is no error.
type Releaser interface {
	Released(ctx context.Context, id string) error
}

// Finder is a mechanism that can tell whether the storage of a layer is
// missing or damaged; it returns no error if the storage is there.
type Finder interface {
	Find(ctx context.Context, rec *Record) error
}

// IDDeleter is a mechanism that finds and deletes the storage of some layers
// by the id alone (see Delete), all of it, and unmounts them if they are mounted.
// Their records are not kept until the storage is gone: after a crash they are
// storage without a record.
type IDDeleter interface {
	DeletesByID(rec *Record) bool
}
