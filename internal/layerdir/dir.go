package layerdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/layerfs/layerfs"
)

// format is what the file of that name says. A later, incompatible layout
// gets another number, and older libraries refuse it.
const format = "layerfs 1\n"

// Dir is the state directory of one driver.
type Dir struct {
	Locks // of the layers

	dir   string // immutable
	sync  bool   // immutable; false for durability none
	boot  string // immutable
	cache sync.Map
	temp  atomic.Uint64 // numbers temporary names of this process
}

// Open opens the state directory in home, which must exist, and makes it if it
// is new. The error matches errors.ErrUnsupported if a later version made it.
func Open(home string, durability layerfs.Durability) (*Dir, error) {
	d := &Dir{dir: filepath.Join(home, ".layerfs"), sync: durability != layerfs.DurabilityNone, boot: BootID()}
	for _, sub := range []string{"", "records", "removed", "children", "persist", "build"} {
		if err := os.Mkdir(d.path(sub), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	if err := d.checkFormat(); err != nil {
		return nil, err
	}
	if err := d.Locks.open(d.path("locks")); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Dir) checkFormat() error {
	b, err := os.ReadFile(d.path("format"))
	if errors.Is(err, fs.ErrNotExist) {
		return d.writeFile(d.path("format"), []byte(format))
	}
	if err != nil {
		return err
	}
	if string(b) != format {
		return &layerfs.UnsupportedError{Feature: "layer directory format " + strings.TrimSpace(string(b)), Reason: "this library knows " + strings.TrimSpace(format)}
	}
	return nil
}

// Build returns the path at which the storage of a layer may be made before it
// is renamed into place. It is on the file system of the home and does not
// exist; what a crash left there is removed by clear.
func (d *Dir) Build(id string, clear func(path string) error) (string, error) {
	path := d.path("build", id)
	if _, err := os.Lstat(path); err == nil {
		if err := clear(path); err != nil {
			return "", fmt.Errorf("clear what a crash left: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return path, nil
}

// Builds lists the layers that have something in the build directory.
func (d *Dir) Builds() ([]string, error) { return d.ids("build") }

// BuildPath returns the path Build returns.
func (d *Dir) BuildPath(id string) string { return d.path("build", id) }

// writeFile replaces a file atomically and syncs it and its directory as the
// policy says. The temporary name starts with a dot, so it is no id;
// [Dir.ClearTemporary] removes what a crash left.
func (d *Dir) writeFile(path string, data []byte) error {
	dir, base := filepath.Split(path)
	temp := fmt.Sprintf("%s.%s.%d.%d", dir, base, os.Getpid(), d.temp.Add(1))
	err := writeNew(temp, data, d.sync)
	if err == nil {
		err = rename(temp, path)
	}
	if err != nil {
		_ = unlink(temp) // what went wrong first is what is told
		return err
	}
	if d.sync {
		return syncDir(dir)
	}
	return nil
}

// ClearTemporary removes what writers that crashed left of their files.
func (d *Dir) ClearTemporary() error {
	for _, sub := range []string{"records", "persist"} {
		entries, err := os.ReadDir(d.path(sub))
		if err != nil {
			return err
		}
		for _, e := range entries {
			id, ok := temporaryOf(e.Name())
			if !ok {
				continue
			}
			unlock, ok, err := d.TryLock(id)
			if err != nil {
				return err
			}
			if !ok { // its writer lives
				continue
			}
			err = os.Remove(d.path(sub, e.Name()))
			unlock()
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// temporaryOf returns the id in a temporary name, .ID.PID.N.
func temporaryOf(name string) (id string, ok bool) {
	name, ok = strings.CutPrefix(name, ".")
	if !ok {
		return "", false
	}
	for range 2 {
		i := strings.LastIndexByte(name, '.')
		if i < 0 {
			return "", false
		}
		name = name[:i]
	}
	return name, layerfs.CheckID(name) == nil
}

func (d *Dir) syncDir(sub string) error {
	if !d.sync {
		return nil
	}
	return syncDir(d.path(sub))
}
