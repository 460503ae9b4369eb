package layerfs

import (
	"errors"
	"io/fs"
	"strings"
)

// Sentinels for what callers branch on, with [errors.Is].
var (
	// ErrNotExist says that a layer is unknown. It also matches
	// fs.ErrNotExist; a missing file never matches ErrNotExist.
	ErrNotExist error = sentinel{"layer does not exist", fs.ErrNotExist}

	// ErrExist says that a layer id is taken. It also matches fs.ErrExist.
	ErrExist error = sentinel{"layer exists", fs.ErrExist}

	// ErrInvalidID says that a string cannot name a layer. It also matches
	// fs.ErrInvalid.
	ErrInvalidID error = sentinel{"invalid layer id", fs.ErrInvalid}

	// ErrInUse says that a layer is held, or has children.
	ErrInUse = errors.New("layer in use")

	// ErrNotHeld says that a Put had no Get.
	ErrNotHeld = errors.New("layer not held")

	// ErrReadOnly says that a layer is frozen.
	ErrReadOnly = errors.New("layer is read-only")

	// ErrIncomplete says that an operation on the layer did not finish and
	// the layer can only be removed.
	ErrIncomplete = errors.New("layer is incomplete")

	// ErrNotAncestor says that a base is not below the layer.
	ErrNotAncestor = errors.New("not an ancestor")

	// ErrClosed says that the driver was closed. It also matches fs.ErrClosed.
	ErrClosed error = sentinel{"driver closed", fs.ErrClosed}

	// ErrLimit says that a limit on an untrusted layer was exceeded.
	ErrLimit = errors.New("limit exceeded")

	// ErrMalformed says that a stream is not a well-formed layer.
	ErrMalformed = errors.New("malformed layer")

	// ErrQuota says that a quota or a low-space guard refused an operation.
	ErrQuota = errors.New("quota exceeded")
)

// sentinel is an error that also matches a broader one of the standard library.
type sentinel struct {
	text  string
	broad error
}

func (s sentinel) Error() string        { return s.text }
func (s sentinel) Is(target error) bool { return target == s.broad }

// Error is the error of every operation of a driver.
type Error struct {
	Op     string // "create", "get", "diff"
	Driver string // "overlay"
	ID     string // layer, if any
	Path   string // file or device, if any
	Err    error  // cause, often *fs.PathError
}

// Error returns, for example,
// "overlay: create 5f3a (5f3a/upper): mkdirat: no space left on device".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Driver)
	b.WriteString(": ")
	b.WriteString(e.Op)
	if e.ID != "" {
		b.WriteString(" " + e.ID)
	}
	if e.Path != "" {
		b.WriteString(" (" + e.Path + ")")
	}
	b.WriteString(": ")
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// UnsupportedError says that this host, file system or build lacks a feature.
// It matches [errors.ErrUnsupported].
type UnsupportedError struct {
	Feature string // such as "overlay userxattr"
	Since   string // first version that has it, such as "Linux 5.11"; empty if no version would help
	Reason  string // what was found here
}

// Error returns, for example,
// "overlay userxattr is not supported: mount: invalid argument (needs Linux 5.11)".
func (e *UnsupportedError) Error() string {
	s := e.Feature + " is not supported"
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	if e.Since != "" {
		s += " (needs " + e.Since + ")"
	}
	return s
}

// Is reports whether target is [errors.ErrUnsupported].
func (e *UnsupportedError) Is(target error) bool { return target == errors.ErrUnsupported }
