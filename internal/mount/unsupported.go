//go:build !linux

package mount

import (
	"os"

	"github.com/moby/sys/mountinfo"

	"github.com/layerfs/layerfs"
)

// State is what [Query] finds at a path.
type State struct {
	MountPoint bool
	ReadOnly   bool
	Magic      uint32
	ID         uint64
}

func unsupported() error {
	return &layerfs.UnsupportedError{Feature: "mounting", Reason: "only Linux can do it"}
}

// Mount fails: only Linux has overlays.
func (o *Overlay) Mount(string) error { return unsupported() }

// Open fails with an error that matches errors.ErrUnsupported.
func (o *Overlay) Open() (*os.File, error) { return nil, unsupported() }

// Mount fails on this system.
func (p *FS) Mount(string) error { return unsupported() }

// Mount fails on this system.
func (p *BindMount) Mount(string) error { return unsupported() }

// Mount fails on this system.
func Mount(fstype, source, target string, flags Flags, options []string) error { return unsupported() }

// Bind fails on this system.
func Bind(source, target string, flags Flags) error { return unsupported() }

// Attach fails on this system.
func Attach(*os.File, string) error { return unsupported() }

// OpenTreeMapped fails on this system.
func OpenTreeMapped(string, *layerfs.IDMap) (*os.File, error) { return nil, unsupported() }

// OpenTreeIn fails on this system.
func OpenTreeIn(string, *os.File) (*os.File, error) { return nil, unsupported() }

// UserNamespace fails on this system.
func UserNamespace(*layerfs.IDMap) (*os.File, error) { return nil, unsupported() }

// Unmount fails on this system.
func Unmount(string) error { return unsupported() }

// UnmountNow fails on this system.
func UnmountNow(string) error { return unsupported() }

// Query fails on this system.
func Query(string) (State, error) { return State{}, unsupported() }

// IsMountPoint fails on this system.
func IsMountPoint(string) (bool, error) { return false, unsupported() }

// Under fails on this system.
func Under(string) ([]mountinfo.Info, error) { return nil, unsupported() }

// Shared fails on this system.
func Shared(string) (bool, error) { return false, unsupported() }

// MakePrivate fails on this system.
func MakePrivate(string) (bool, error) { return false, unsupported() }
