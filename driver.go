package layerfs

import (
	"context"
	"io"
	"iter"
	"time"
)

// Driver is one mechanism that keeps layers below one root directory.
//
// All methods are safe for concurrent use, also by several drivers and
// processes on one root. Methods that take a context stop early when it is
// done and leave the state as if they had not been called, unless they say
// otherwise. Options may be nil.
type Driver interface {
	// Name returns the name of the mechanism, such as "overlay".
	Name() string

	// Create adds layer id on top of parent; an empty parent makes a base
	// layer. The parent is frozen from then on.
	//
	// Create is all or nothing: a failed or crashed Create leaves no layer.
	// The work is constant except for vfs, which copies the parent's tree.
	//
	// The error matches [ErrInvalidID] for a malformed id, [ErrExist] if id
	// is taken, [ErrNotExist] if parent is unknown, [ErrInUse] if parent is
	// held for writing, [ErrIncomplete] if parent is damaged and
	// [errors.ErrUnsupported] if opts asks for what this host lacks.
	Create(ctx context.Context, id, parent string, opts *CreateOptions) error

	// Get makes the merged tree of a layer available and returns its path.
	//
	// The path of a layer is the same at every Get and belongs to the driver;
	// it must not be renamed, unmounted or removed. Get counts: the tree stays
	// until [Driver.Put] has been called as often, or until every process that
	// holds it is gone. A frozen layer, or one asked for with
	// [GetOptions.ReadOnly], is a read-only tree where
	// [Features.ReadOnlyViews] is true.
	//
	// The error matches [ErrNotExist], [ErrIncomplete], or [ErrInUse] if the
	// layer is held in the other mode (writable and read-only).
	Get(ctx context.Context, id string, opts *GetOptions) (path string, err error)

	// Put releases one Get of this driver, or one persistent Get of any
	// driver if this one has none. The last Put makes the tree unavailable;
	// open files in it go on working. The error matches [ErrNotHeld] if
	// there was nothing to release.
	Put(ctx context.Context, id string) error

	// Remove deletes a layer. The error matches [ErrNotExist], or [ErrInUse]
	// if the layer is held or has children. Once Remove has returned nil or
	// the layer is gone from List, it never comes back, also after a crash.
	Remove(ctx context.Context, id string) error

	// Diff returns a tar stream of what id adds to base, which must be an
	// ancestor of id; an empty base stands for the empty tree. Deletions are
	// AUFS-style whiteouts as in the OCI image specification.
	//
	// The stream is made while it is read. The layer is held until Close,
	// which must be called. A Read error is an [*Error]; a stream that has not
	// ended in [io.EOF] is not a layer. What Diff gives for a layer that is
	// being written is undefined but harmless.
	Diff(ctx context.Context, id, base string, opts *DiffOptions) (io.ReadCloser, error)

	// Apply adds a tar stream in AUFS form (as made by Diff, or a layer of an
	// OCI image, compressed or not) to a layer that is not held.
	//
	// The order of entries does not matter. If Apply fails, the layer is as
	// it was, or it is marked incomplete: then all but Remove, Stat and List
	// fail with [ErrIncomplete]. The error matches [ErrReadOnly] for a frozen
	// layer, [ErrInUse] for a held one, [ErrLimit] if a limit was hit and
	// [ErrMalformed] for a bad stream.
	Apply(ctx context.Context, id string, r io.Reader, opts *ApplyOptions) (ApplyResult, error)

	// Changes yields what id changes against base, which must be an ancestor
	// of id or empty, in lexical order of the path's components (a directory comes
	// right before its contents). Iteration stops after the first error. The layer
	// is held while the loop runs.
	Changes(ctx context.Context, id, base string) iter.Seq2[Change, error]

	// Stat describes one layer. The error matches [ErrNotExist].
	Stat(ctx context.Context, id string, opts *StatOptions) (Info, error)

	// List describes every layer on disk, parents before children and
	// otherwise by id.
	List(ctx context.Context) ([]Info, error)

	// Features tells what this instance can do. It does not change during
	// the life of a driver and costs nothing.
	Features() Features

	// Status gives key and value pairs for people, under the keys Docker
	// made known.
	Status(ctx context.Context) ([]StatusItem, error)

	// Close releases what the driver itself holds, such as descriptors. It
	// unmounts nothing that is still held: those holds last until the process
	// ends. All later calls fail with [ErrClosed]; a second Close returns nil.
	Close() error
}

// Info describes a layer.
type Info struct {
	ID         string
	Parent     string    // empty for a base layer
	Created    time.Time // UTC
	ReadOnly   bool      // created read-only
	Children   int       // number of layers on top; a layer with any is frozen
	Incomplete string    // why the layer is unusable; empty if it is usable
	Path       string    // where Get makes the tree available
	Mounted    bool      // the tree is available now, held by whatever process
	Labels     map[string]string
	Quota      Quota
	Usage      *Usage // nil unless asked for
}

// Frozen reports whether the layer can no longer be written.
func (i Info) Frozen() bool { return i.ReadOnly || i.Children > 0 }

// Usage is the space a layer takes for itself, without its ancestors.
type Usage struct {
	Bytes  int64 // allocated on disk, not shared with other layers where that is known
	Inodes int64 // files of all types
}

// StatusItem is a line of [Driver.Status].
type StatusItem struct {
	Key   string
	Value string
}
