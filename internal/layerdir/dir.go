package layerdir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
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

	dir     string     // immutable
	sync    bool       // immutable; false for durability none
	ordered bool       // immutable; see Ordered
	direct  bool       // immutable; see newNames
	boot    string     // immutable
	pid     string     // immutable
	kept    []*os.File // immutable once the root is open; see KeepOpen
	cache   sync.Map
	temp    atomic.Uint64 // numbers temporary names of this process

	// Immutable, and used between use and unuse only.
	home, root, records, removed, children, persist, build folder

	childrenNames, persistNames, removedNames, buildNames listing
}

// durability says how a file is replaced.
type durability uint8

const (
	// volatile syncs nothing.
	volatile durability = iota
	// durable syncs the content before the file gets its name, and then the
	// name.
	durable
	// durableInOrder does so where the file system keeps the order of what
	// happens (see inOrder). There the content need only be written before, and
	// one sync makes it, the file and its name durable, where two would each
	// wait for the journal.
	durableInOrder
)

// Open opens the state directory in home, which must exist, and makes it if it
// is new. The error matches errors.ErrUnsupported if a later version made it, and
// fs.ErrExist if home has something but no state: see [Guard].
func Open(home string, policy layerfs.Durability) (_ *Dir, err error) {
	d := &Dir{
		dir: filepath.Join(home, ".layerfs"), sync: policy != layerfs.DurabilityNone,
		boot: BootID(), pid: strconv.Itoa(os.Getpid()),
	}
	if err := Guard(home); err != nil {
		return nil, err
	}
	var open []folder
	shut := func() (err error) {
		for _, f := range open {
			err = errors.Join(err, f.close())
		}
		for _, f := range d.kept {
			err = errors.Join(err, f.Close())
		}
		return err
	}
	defer func() {
		if err != nil {
			_ = shut() // what went wrong first is what is told
		}
	}()
	for _, sub := range []struct {
		to   *folder
		name string
	}{{&d.home, ".."}, {&d.root, ""}, {&d.records, "records"}, {&d.removed, "removed"}, {&d.children, "children"}, {&d.persist, "persist"}, {&d.build, "build"}} {
		path := d.path(sub.name)
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if *sub.to, err = openFolder(path); err != nil {
			return nil, err
		}
		open = append(open, *sub.to)
	}
	d.ordered, d.direct = inOrder(d.dir), newNames(d.dir)
	for _, l := range []*listing{&d.childrenNames, &d.persistNames, &d.removedNames, &d.buildNames} {
		l.settle, l.local = settled, d.direct
	}
	if err := d.checkFormat(); err != nil {
		return nil, err
	}
	if err := d.Locks.open(d.path("locks"), shut); err != nil {
		return nil, err
	}
	return d, nil
}

// Guard keeps the layers of others, and ours if their records are lost: what has
// no record is deleted when a driver opens its home. So a home that is new may
// only have empty directories, and files that begin with a dot, which are probes.
// One that is not new has a directory of records. Open asks it; who writes to the
// state before that asks first.
func Guard(home string) error {
	state := filepath.Join(home, ".layerfs")
	is := func(path string) (bool, error) {
		_, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	}
	made, err := is(filepath.Join(state, "format"))
	if err != nil {
		return err
	}
	if made {
		there, err := is(filepath.Join(state, "records"))
		if err == nil && !there {
			err = &fs.PathError{Op: "open layers", Path: filepath.Join(state, "records"), Err: fmt.Errorf("the records of the layers are missing: %w", fs.ErrNotExist)}
		}
		return err
	}
	found, err := stranger(home)
	if found == "" || err != nil {
		return err
	}
	// What is there may be of a process that has made the state since.
	if made, err := is(filepath.Join(state, "format")); made || err != nil {
		return err
	}
	return &fs.PathError{Op: "open layers", Path: filepath.Join(home, found),
		Err: fmt.Errorf("it is not of this library, or %s was lost: %w", state, fs.ErrExist)}
}

// stranger returns the name of something in a directory that Guard does not let
// pass.
func stranger(home string) (string, error) {
	entries, err := os.ReadDir(home)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if !e.IsDir() {
			return e.Name(), nil
		}
		f, err := os.Open(filepath.Join(home, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		_, err = f.Readdirnames(1)
		f.Close()
		if err == nil {
			return e.Name(), nil
		}
		if err != io.EOF {
			return "", err
		}
	}
	return "", nil
}

// Ordered reports whether the file system makes what happened to it durable in
// the order in which it happened: the sync of a record then makes everything
// durable that was renamed or made before it.
func (d *Dir) Ordered() bool { return d.ordered }

func (d *Dir) checkFormat() error {
	b, err := d.root.read("format")
	if errors.Is(err, fs.ErrNotExist) {
		_, err = d.write(d.root, "format", []byte(format))
		return err
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
func (d *Dir) Builds() ([]string, error) { return d.ids(&d.build, ".") }

// BuildPath returns the path Build returns.
func (d *Dir) BuildPath(id string) string { return d.path("build", id) }

// NoBuild reports whether it is certain that a layer has nothing in the build
// directory. It is for those who would remove it.
func (d *Dir) NoBuild(id string) bool {
	if d.use() != nil {
		return false
	}
	defer d.unuse()
	return d.buildNames.lacks(&d.build, id)
}

// temporary returns a new name for what will be called name. It starts with a
// dot, so it is no id; [Dir.ClearTemporary] removes what a crash left.
func (d *Dir) temporary(name string) string {
	return "." + name + "." + d.pid + "." + strconv.FormatUint(d.temp.Add(1), 10)
}

// write replaces a file atomically and makes it and its name durable as the
// policy says.
func (d *Dir) write(to folder, name string, data []byte) (stamp, error) {
	how := volatile
	switch {
	case d.sync && d.ordered:
		how = durableInOrder
	case d.sync:
		how = durable
	}
	return to.replace(name, d.temporary(name), data, how)
}

// ClearTemporary removes what writers that crashed left of their files.
func (d *Dir) ClearTemporary() error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	for _, sub := range []folder{d.records, d.removed, d.persist, d.children} {
		names, err := sub.names(".")
		if err != nil {
			return err
		}
		for _, name := range names {
			id, ok := temporaryOf(name)
			if !ok {
				continue
			}
			err := d.unlessBusy(id, func() error { return sub.unlink(name) })
			if err != nil {
				return err
			}
		}
	}
	return d.clearUnfinished()
}

// unlessBusy calls a function with the lock of a layer, unless somebody has it.
func (d *Dir) unlessBusy(id string, do func() error) error {
	unlock, ok, err := d.TryLock(id)
	if err != nil || !ok {
		return err
	}
	defer unlock()
	return do()
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
