package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs"
)

func holdCases() []testCase {
	return []testCase{
		{name: "GetReadOnly", run: testGetReadOnly},
		{name: "HeldApply", run: testHeldApply},
		{name: "OpenFileAfterPut", run: testOpenFileAfterPut},
		{name: "Persist", run: testPersist},
		{name: "TwoDrivers", run: testTwoDrivers},
		{name: "DiffHolds", run: testDiffHolds},
		{name: "ChangesHolds", run: testChangesHolds},
	}
}

var readOnly = &layerfs.GetOptions{ReadOnly: true}

func testGetReadOnly(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	path, err := e.d.Get(e.ctx, "a", readOnly)
	if !e.d.Features().ReadOnlyViews {
		return want(err, "get", "a", errors.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(path, "f"), []byte("2"), 0o600); err == nil {
		return errors.New("a read-only tree could be written")
	}
	_, err = e.d.Get(e.ctx, "a", nil)
	if err := want(err, "get", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if again, err := e.d.Get(e.ctx, "a", readOnly); err != nil || again != path {
		return fmt.Errorf("second Get = %q, %v; want %q", again, err, path)
	}
	if err := errors.Join(e.d.Put(e.ctx, "a"), e.d.Put(e.ctx, "a")); err != nil {
		return err
	}
	if _, err := e.d.Get(e.ctx, "a", nil); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(path, "f"), []byte("2"), 0o600); err != nil {
		return err
	}
	_, err = e.d.Get(e.ctx, "a", readOnly)
	if err := want(err, "get", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := e.d.Put(e.ctx, "a"); err != nil {
		return err
	}
	return e.holds(e.d, "a", "f=2")
}

func testHeldApply(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	tar, err := readDiff(e, e.d, "a", "", nil)
	if err != nil {
		return err
	}
	if err := e.create("b", ""); err != nil {
		return err
	}
	path, err := e.d.Get(e.ctx, "b", nil)
	if err != nil {
		return err
	}
	_, err = e.d.Apply(e.ctx, "b", bytes.NewReader(tar), nil)
	if err := want(err, "apply", "b", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := dirHolds(path); err != nil {
		return err
	}
	if err := e.d.Put(e.ctx, "b"); err != nil {
		return err
	}
	if _, err := e.d.Apply(e.ctx, "b", bytes.NewReader(tar), nil); err != nil {
		return err
	}
	return e.holds(e.d, "b", "f=1")
}

func testOpenFileAfterPut(e *env) error {
	if err := errors.Join(e.create("a", "", "file f old"), e.create("b", "a")); err != nil {
		return err
	}
	path, err := e.d.Get(e.ctx, "b", nil)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(path, "f"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := e.d.Put(e.ctx, "b"); err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte("new"), 0); err != nil {
		return fmt.Errorf("write to a file opened before Put: %w", err)
	}
	b := make([]byte, 3)
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != "new" {
		return fmt.Errorf("read of a file opened before Put: %q, %v", b, err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	return errors.Join(e.holds(e.d, "b", "f=new"), e.holds(e.d, "a", "f=old"))
}

func testPersist(e *env) error {
	persist := &layerfs.GetOptions{Persist: true}
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	// The inner driver, because this Get outlives its driver.
	path, err := e.d.Driver.Get(e.ctx, "a", persist)
	if err != nil {
		return err
	}
	if err := e.d.Close(); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	if err := dirHolds(path, "f=1"); err != nil {
		return fmt.Errorf("after its driver was closed: %w", err)
	}
	if info, err := d.Stat(e.ctx, "a", nil); err != nil || !info.Mounted {
		return fmt.Errorf("Stat = %+v, %v; want Mounted", info, err)
	}
	if err := want(d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := e.holds(d, "a", "f=1"); err != nil {
		return err
	}
	if err := dirHolds(path, "f=1"); err != nil {
		return fmt.Errorf("after a Get and Put beside it: %w", err)
	}
	if err := d.Driver.Put(e.ctx, "a"); err != nil {
		return err
	}
	return want(d.Put(e.ctx, "a"), "put", "a", layerfs.ErrNotHeld)
}

func testTwoDrivers(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	path, err := e.d.Get(e.ctx, "a", nil)
	if err != nil {
		return err
	}
	if info, err := d.Stat(e.ctx, "a", nil); err != nil || !info.Mounted {
		return fmt.Errorf("second driver: Stat = %+v, %v; want Mounted", info, err)
	}
	if err := errors.Join(
		want(d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse),
		want(d.Put(e.ctx, "a"), "put", "a", layerfs.ErrNotHeld),
	); err != nil {
		return err
	}
	again, err := d.Get(e.ctx, "a", nil)
	if err != nil || again != path {
		return fmt.Errorf("second driver: Get = %q, %v; want %q", again, err, path)
	}
	if err := makeTree(again, "file g 2"); err != nil {
		return err
	}
	if err := e.d.Put(e.ctx, "a"); err != nil {
		return err
	}
	if err := dirHolds(path, "f=1", "g=2"); err != nil {
		return fmt.Errorf("after the Put of one of two drivers: %w", err)
	}
	if err := d.Put(e.ctx, "a"); err != nil {
		return err
	}
	if err := d.Create(e.ctx, "b", "a", nil); err != nil {
		return err
	}
	if err := want(e.d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := e.holds(e.d, "b", "f=1", "g=2"); err != nil {
		return err
	}
	if err := errors.Join(e.d.Remove(e.ctx, "b"), e.d.Remove(e.ctx, "a")); err != nil {
		return err
	}
	_, err = d.Stat(e.ctx, "a", nil)
	return want(err, "stat", "a", layerfs.ErrNotExist)
}

// testDiffHolds: a layer stays while a Diff of it is open, and no longer.
func testDiffHolds(e *env) error {
	if err := errors.Join(e.create("a", "", "data f 100000 1"), e.create("b", "a", "data g 100000 2")); err != nil {
		return err
	}
	r, err := e.d.Diff(e.ctx, "b", "a", nil)
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := r.Read(make([]byte, 10)); err != nil {
		return err
	}
	_, applyErr := e.d.Apply(e.ctx, "b", bytes.NewReader(nil), nil)
	if err := errors.Join(
		want(e.d.Remove(e.ctx, "b"), "remove", "b", layerfs.ErrInUse),
		want(applyErr, "apply", "b", layerfs.ErrInUse),
	); err != nil {
		return err
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		return fmt.Errorf("Close of a stream that was not read to the end: %w", err)
	}
	if _, err := r.Read(make([]byte, 10)); err == nil {
		return errors.New("a closed stream could be read")
	}
	return e.d.Remove(e.ctx, "b")
}

func testChangesHolds(e *env) error {
	if err := e.create("a", "", "file f 1", "file g 2"); err != nil {
		return err
	}
	for range e.d.Changes(e.ctx, "a", "") {
		if err := want(e.d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
			return err
		}
		break
	}
	return e.d.Remove(e.ctx, "a")
}
