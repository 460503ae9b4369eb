package drivertest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/layerfs/layerfs"
)

// The cases of this file put the records of a driver into the states that a
// crash between two steps leaves; see the commit points in the documentation
// of internal/lifecycle, and the layout in that of internal/layerdir.
func recoveryCases() []testCase {
	return []testCase{
		{name: "RecoverCreate", needs: needHome, run: testRecoverCreate},
		{name: "RecoverRemove", needs: needHome, run: testRecoverRemove},
		{name: "RecoverStaleRemoval", needs: needHome, run: testRecoverStaleRemoval},
		{name: "RecoverBuild", needs: needHome, run: testRecoverBuild},
		{name: "RecoverMarkers", needs: needHome, run: testRecoverMarkers},
		{name: "RecoverTemporary", needs: needHome, run: testRecoverTemporary},
		{name: "Incomplete", needs: needHome, run: testIncomplete},
		{name: "UnreadableRecord", needs: needHome, run: testUnreadableRecord},
		{name: "LaterFormat", needs: needHome, run: testLaterFormat},
		{name: "LostState", needs: needHome, run: testLostState},
		{name: "CheckClean", run: testCheckClean},
	}
}

func (e *env) state(elem ...string) string {
	return filepath.Join(append([]string{e.h.Home(e.root), ".layerfs"}, elem...)...)
}

// checkAndRepair makes sure that Check finds a problem of a layer, Repair
// mends it, and Check finds no more.
func (e *env) checkAndRepair(id string) error {
	found, err := layerfs.Check(e.ctx, e.d)
	if errors.Is(err, errors.ErrUnsupported) {
		_, err = e.open(e.root) // which repairs as well
		return err
	}
	about := func(p layerfs.Problem) bool { return p.ID == id }
	if err != nil || !slices.ContainsFunc(found, about) {
		return fmt.Errorf("Check = %+v, %v; want a problem of %s", found, err, id)
	}
	for _, p := range found {
		if p.Reason == "" {
			return fmt.Errorf("problem without a reason: %+v", p)
		}
	}
	mended, err := layerfs.Repair(e.ctx, e.d)
	if errors.Is(err, errors.ErrUnsupported) {
		_, err = e.open(e.root)
		return err
	}
	if err != nil || !slices.ContainsFunc(mended, about) {
		return fmt.Errorf("Repair = %+v, %v; want %s mended", mended, err, id)
	}
	return testCheckClean(e)
}

func testCheckClean(e *env) error {
	found, err := layerfs.Check(e.ctx, e.d)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil || len(found) > 0 {
		return fmt.Errorf("Check = %+v, %v; want nothing", found, err)
	}
	return nil
}

// testRecoverCreate: storage, but no record.
func testRecoverCreate(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file secret 2")); err != nil {
		return err
	}
	crash := func() error {
		if err := os.Remove(e.state("records", "b")); err != nil {
			return err
		}
		if _, err := e.d.Stat(e.ctx, "b", nil); !errors.Is(err, layerfs.ErrNotExist) {
			return fmt.Errorf("Stat of a layer without a record: %v", err)
		}
		return nil
	}
	// A new layer of that name takes the place over without any repair, and
	// has nothing of it.
	if err := crash(); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	if err := d.Create(e.ctx, "b", "a", nil); err != nil {
		return err
	}
	if err := e.holds(d, "b", "f=1"); err != nil {
		return err
	}
	if err := crash(); err != nil {
		return err
	}
	if err := e.checkAndRepair("b"); err != nil {
		return err
	}
	// Its parent is free again.
	return errors.Join(e.fill(e.d, "a", "file f 2"), e.d.Remove(e.ctx, "a"))
}

// testRecoverRemove: the record was moved, the storage is still there.
func testRecoverRemove(e *env) error {
	for _, next := range []string{"repair", "create", "remove", "open"} {
		if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file secret 2")); err != nil {
			return err
		}
		if err := os.Rename(e.state("records", "b"), e.state("removed", "b")); err != nil {
			return err
		}
		infos, err := e.d.List(e.ctx)
		if err != nil || len(infos) != 1 {
			return fmt.Errorf("List = %+v, %v; want just a", infos, err)
		}
		switch next {
		case "repair":
			err = e.checkAndRepair("b")
		case "create":
			err = errors.Join(e.create("b", "a"), e.holds(e.d, "b", "f=1"), e.d.Remove(e.ctx, "b"))
		case "remove":
			err = e.d.Remove(e.ctx, "b")
		case "open":
			_, err = e.open(e.root)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", next, err)
		}
		if _, err := os.Lstat(e.state("removed", "b")); err == nil {
			return fmt.Errorf("%s: the removal was not finished", next)
		}
		if err := e.d.Remove(e.ctx, "a"); err != nil {
			return fmt.Errorf("%s: %w", next, err)
		}
	}
	return nil
}

// testRecoverStaleRemoval: the record of a removal beside that of a layer, as a
// restored backup may have both. The layer is what counts.
func testRecoverStaleRemoval(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file kept 2")); err != nil {
		return err
	}
	rec, err := os.ReadFile(e.state("records", "b"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(e.state("removed", "b"), rec, 0o600); err != nil {
		return err
	}
	if err := e.checkAndRepair("b"); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	return e.holds(d, "b", "f=1", "kept=2")
}

// testRecoverBuild: a tree in the build directory.
func testRecoverBuild(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	build := e.state("build", "b")
	if err := makePlain(build, "left/over"); err != nil {
		return err
	}
	if err := errors.Join(e.create("b", "a"), e.holds(e.d, "b", "f=1"), e.d.Remove(e.ctx, "b")); err != nil {
		return err
	}
	if err := makePlain(build, "left/over"); err != nil {
		return err
	}
	if _, err := e.open(e.root); err != nil {
		return err
	}
	if _, err := os.Lstat(build); err == nil {
		return errors.New("what a crash left in the build directory is still there")
	}
	return nil
}

func makePlain(root, name string) error {
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o600)
}

// testRecoverMarkers: markers of children that were never made, and markers
// that a power failure took.
func testRecoverMarkers(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a")); err != nil {
		return err
	}
	if err := os.WriteFile(e.state("children", "b"), []byte("\nghost"), 0o600); err != nil {
		return err
	}
	if info, err := e.d.Stat(e.ctx, "b", nil); err != nil || info.Children != 0 {
		return fmt.Errorf("Stat = %+v, %v; want no children", info, err)
	}
	if err := e.fill(e.d, "b", "file g 2"); err != nil {
		return fmt.Errorf("a layer with the marker of a child that does not exist: %w", err)
	}
	if err := os.Remove(e.state("children", "a")); err != nil {
		return err
	}
	if err := e.checkAndRepair("b"); err != nil {
		return err
	}
	if err := want(e.d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	return errors.Join(e.d.Remove(e.ctx, "b"), e.d.Remove(e.ctx, "a"))
}

// testRecoverTemporary: files of a writer that crashed before its rename.
func testRecoverTemporary(e *env) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	for _, name := range []string{".a.999999999.1", ".new.999999999.7"} {
		if err := os.WriteFile(e.state("records", name), []byte("{"), 0o600); err != nil {
			return err
		}
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	names, err := os.ReadDir(e.state("records"))
	if err != nil || len(names) != 1 {
		return fmt.Errorf("records: %v, %v; want just one", names, err)
	}
	infos, err := d.List(e.ctx)
	if err != nil || len(infos) != 1 {
		return fmt.Errorf("List = %+v, %v", infos, err)
	}
	return nil
}

// mark changes a field of a record.
func (e *env) mark(id, field string, value any) error {
	b, err := os.ReadFile(e.state("records", id))
	if err != nil {
		return err
	}
	rec := map[string]any{}
	if err := json.Unmarshal(b, &rec); err != nil {
		return err
	}
	rec[field] = value
	if b, err = json.Marshal(rec); err != nil {
		return err
	}
	temp := e.state("records", ".edit")
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, e.state("records", id))
}

// testIncomplete: the layer of an Apply that crashed, and layers on it.
func testIncomplete(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file g 2"), e.create("c", "b")); err != nil {
		return err
	}
	if err := e.mark("b", "incomplete", "apply did not finish"); err != nil {
		return err
	}
	info, err := e.d.Stat(e.ctx, "b", nil)
	if err != nil || info.Incomplete == "" {
		return fmt.Errorf("Stat = %+v, %v; want Incomplete", info, err)
	}
	infos, err := e.d.List(e.ctx)
	if err != nil || len(infos) != 3 {
		return fmt.Errorf("List = %+v, %v", infos, err)
	}
	_, getErr := e.d.Get(e.ctx, "b", nil)
	_, childErr := e.d.Get(e.ctx, "c", nil)
	_, diffErr := e.d.Diff(e.ctx, "b", "a", nil)
	_, changesErr := collect(e.d, e, "c", "b")
	_, applyErr := e.d.Apply(e.ctx, "b", bytes.NewReader(makeTar()), nil)
	if err := errors.Join(
		want(getErr, "get", "b", layerfs.ErrIncomplete),
		want(childErr, "get", "c", layerfs.ErrIncomplete),
		want(diffErr, "diff", "b", layerfs.ErrIncomplete),
		want(changesErr, "changes", "c", layerfs.ErrIncomplete),
		want(applyErr, "apply", "b", layerfs.ErrIncomplete),
		want(e.d.Create(e.ctx, "d", "b", nil), "create", "d", layerfs.ErrIncomplete),
		want(e.d.Remove(e.ctx, "b"), "remove", "b", layerfs.ErrInUse),
		e.holds(e.d, "a", "f=1"),
	); err != nil {
		return err
	}
	if found, err := layerfs.Check(e.ctx, e.d); !errors.Is(err, errors.ErrUnsupported) {
		if err != nil || !slices.ContainsFunc(found, func(p layerfs.Problem) bool { return p.ID == "b" && p.Repair == "" }) {
			return fmt.Errorf("Check = %+v, %v; want b without repair", found, err)
		}
	}
	if err := e.d.Remove(e.ctx, "c"); err != nil {
		return err
	}
	err = layerfs.Rollback(e.ctx, e.d, "b")
	if errors.Is(err, errors.ErrUnsupported) {
		return e.d.Remove(e.ctx, "b")
	}
	if err != nil {
		return fmt.Errorf("Rollback of an incomplete layer: %w", err)
	}
	return e.holds(e.d, "b", "f=1")
}

// testUnreadableRecord: a record that a power failure has emptied.
func testUnreadableRecord(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file g 2"), e.create("x", "", "file h 3")); err != nil {
		return err
	}
	if err := os.WriteFile(e.state("records", "b"), nil, 0o600); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return fmt.Errorf("a driver with one bad record does not open: %w", err)
	}
	infos, err := d.List(e.ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(infos, func(i layerfs.Info) bool { return i.ID == "b" })
	if i < 0 || infos[i].Incomplete == "" {
		return fmt.Errorf("List = %+v; want b incomplete", infos)
	}
	_, getErr := d.Get(e.ctx, "b", nil)
	createErr := d.Create(e.ctx, "b", "", nil)
	if getErr == nil || !errors.Is(createErr, layerfs.ErrExist) {
		return fmt.Errorf("Get of a bad record: %v; Create: %v", getErr, createErr)
	}
	if err := errors.Join(e.holds(d, "x", "h=3"), e.holds(d, "a", "f=1")); err != nil {
		return err
	}
	// It may have been a child, and is what to look at.
	if err := d.Remove(e.ctx, "a"); !errors.Is(err, layerfs.ErrInUse) || !strings.Contains(err.Error(), " b ") {
		return fmt.Errorf("Remove of the parent of a bad record: %v; want ErrInUse that names b", err)
	}
	if err := d.Remove(e.ctx, "b"); err != nil {
		// The record is put away so that the case can end.
		return errors.Join(fmt.Errorf("a layer with a bad record cannot be removed: %w", err), os.Remove(e.state("records", "b")))
	}
	return errors.Join(e.create("b", "a"), e.holds(d, "b", "f=1"))
}

// testLostState: layers without their records are not taken for what a crash
// left, which is deleted; as little are those of another program.
func testLostState(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file g 2")); err != nil {
		return err
	}
	aside := filepath.Join(e.h.Home(e.root), ".aside")
	refused := func(path string) (err error) {
		if err := os.Rename(path, aside); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Rename(aside, path)) }()
		if _, err := e.open(e.root); err == nil {
			return fmt.Errorf("a root without %s can be opened", path)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s was made: %v", path, err)
		}
		return nil
	}
	if err := errors.Join(refused(e.state()), refused(e.state("records"))); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	return errors.Join(e.holds(d, "b", "f=1", "g=2"), testCheckClean(e))
}

func testLaterFormat(e *env) error {
	if err := os.WriteFile(e.state("format"), []byte("layerfs 999\n"), 0o600); err != nil {
		return err
	}
	_, err := e.open(e.root)
	if !errors.Is(err, errors.ErrUnsupported) {
		err = fmt.Errorf("a root of a later format: %v, want ErrUnsupported", err)
	} else {
		err = nil
	}
	return errors.Join(err, os.WriteFile(e.state("format"), []byte("layerfs 1\n"), 0o600))
}
