package unionhost

import (
	"encoding/json"
	"errors"
	"syscall"

	"github.com/layerfs/layerfs/internal/sys"
)

// A Branch is a directory of a union, with a permission in the notation of
// AUFS.
type Branch struct{ Path, Perm string }

// UDBA is how direct changes of branches are noticed: none, notify, reval or
// strict.
type UDBA string

// Config describes a union.
type Config struct {
	Target   string // absolute
	Branches []Branch
	UDBA     UDBA
	ReadOnly bool
	NoPlink  bool
	SumFree  bool
}

// Repaired is a leftover of a crash that was mended.
type Repaired struct{ Branch, Path, Action string }

// Info tells of a helper.
type Info struct {
	PID    int // of the worker
	Keeper int // of the process that starts another; 0 if there is none
	Mounts sys.ByteStrings
}

// Version is that of the calls and of the state. It is raised when an earlier
// worker would misunderstand either. A worker that is older than its client is
// replaced by the client's program; one that is older than what is mounted takes
// nothing over.
const Version = 1

// request is a call.
type request struct {
	Op      string
	Version int // of the client
	// Retry says that the call may have been done already, by a worker that was
	// killed before it said so.
	Retry  bool
	Target []byte
	Config *Config
	At     int
	Branch Branch
	Is     place   // of the branch
	Are    []place // of the branches
	Conn   int
	Argv   sys.ByteStrings
}

// place is which directory a path leads to, for whoever asks. It need not be the
// same for somebody else.
type place struct{ Dev, Ino uint64 }

// answer is that of a call.
type answer struct {
	Error    *remoteError
	Repaired []Repaired
	Branches []Branch
	Info     *Info
}

// remoteError is an error that comes from the worker.
type remoteError struct {
	Text  string
	Errno syscall.Errno
}

func (e *remoteError) Error() string { return e.Text }

// Unwrap returns the errno, if any, for errors.Is.
func (e *remoteError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

func remote(err error) *remoteError {
	if err == nil {
		return nil
	}
	r := &remoteError{Text: err.Error()}
	errors.As(err, &r.Errno)
	return r
}

// ErrNotServed says that a helper does not serve a target.
var ErrNotServed = errors.New("the helper does not serve this mount")

// Calls.
const (
	opMount    = "mount"
	opMounted  = "mounted"
	opInsert   = "insert"
	opAppend   = "append"
	opModify   = "modify"
	opDelete   = "delete"
	opBranches = "branches"
	opFlush    = "flush"
	opSync     = "sync"
	opInfo     = "info"
	opReplace  = "replace"
	opWait     = "wait"
	opRest     = "rest"
)

// Errors on the wire.
const (
	errnoNotServed = syscall.ENXIO           // ErrNotServed
	errnoLater     = syscall.EPROTONOSUPPORT // the call is of a later version
)

// Paths are bytes, and the strings of a message are not.

// MarshalJSON implements json.Marshaler.
func (b Branch) MarshalJSON() ([]byte, error) {
	return json.Marshal(wireBranch{[]byte(b.Path), b.Perm})
}

// UnmarshalJSON implements json.Unmarshaler.
func (b *Branch) UnmarshalJSON(text []byte) error {
	var w wireBranch
	err := json.Unmarshal(text, &w)
	*b = Branch{string(w.Path), w.Perm}
	return err
}

type wireBranch struct {
	Path []byte
	Perm string
}

// MarshalJSON implements json.Marshaler.
func (c Config) MarshalJSON() ([]byte, error) {
	return json.Marshal(wireConfig{plainConfig(c), []byte(c.Target)})
}

// UnmarshalJSON implements json.Unmarshaler.
func (c *Config) UnmarshalJSON(text []byte) error {
	var w wireConfig
	err := json.Unmarshal(text, &w)
	*c = Config(w.plainConfig)
	c.Target = string(w.Target)
	return err
}

type plainConfig Config

type wireConfig struct {
	plainConfig
	Target []byte // in place of the other one
}

// MarshalJSON implements json.Marshaler.
func (r Repaired) MarshalJSON() ([]byte, error) {
	return json.Marshal(wireRepaired{[]byte(r.Branch), []byte(r.Path), r.Action})
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *Repaired) UnmarshalJSON(text []byte) error {
	var w wireRepaired
	err := json.Unmarshal(text, &w)
	*r = Repaired{string(w.Branch), string(w.Path), w.Action}
	return err
}

type wireRepaired struct {
	Branch, Path []byte
	Action       string
}
