package drivertest

import (
	"errors"
	"fmt"

	"github.com/layerfs/layerfs"
)

// optionalCases test the optional operations of drivers that have them; one
// that has not says so with an error that matches errors.ErrUnsupported.
func optionalCases() []testCase {
	return []testCase{
		{name: "Rollback", run: testRollback},
		{name: "Clone", run: testClone},
		{name: "Mounts", run: testMounts},
		{name: "Wrapper", run: testWrapper},
	}
}

func testRollback(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1", "file d/g 2"), e.create("b", "a", "file f 3", "rm d", "file h 4")); err != nil {
		return err
	}
	err := layerfs.Rollback(e.ctx, e.d, "b")
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := e.holds(e.d, "b", "f=1", "d"); err != nil {
		return err
	}
	if list, err := collect(e.d, e, "b", "a"); err != nil || len(list) > 0 {
		return fmt.Errorf("changes after Rollback: %v, %v", list, err)
	}
	if err := want(layerfs.Rollback(e.ctx, e.d, "a"), "rollback", "a", layerfs.ErrReadOnly); err != nil {
		return err
	}
	if _, err := e.d.Get(e.ctx, "b", nil); err != nil {
		return err
	}
	if err := want(layerfs.Rollback(e.ctx, e.d, "b"), "rollback", "b", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := e.d.Put(e.ctx, "b"); err != nil {
		return err
	}
	if err := e.create("base", "", "file f 1"); err != nil {
		return err
	}
	if err := layerfs.Rollback(e.ctx, e.d, "base"); err != nil {
		return err
	}
	if err := e.holds(e.d, "base"); err != nil {
		return err
	}
	return want(layerfs.Rollback(e.ctx, e.d, "none"), "rollback", "none", layerfs.ErrNotExist)
}

func testClone(e *env) error {
	s := e.newStack(e.d, "layer")
	if err := errors.Join(s.add("file f 1", "file d/g 2"), s.add("append f more", "rm d", "file h 3", "link i h")); err != nil {
		return err
	}
	err := layerfs.Clone(e.ctx, e.d, "copy", s.id(1), &layerfs.CreateOptions{Labels: map[string]string{"k": "v"}})
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := e.d.Stat(e.ctx, "copy", nil)
	if err != nil || info.Parent != s.id(0) || info.Labels["k"] != "v" {
		return fmt.Errorf("Stat of a clone = %+v, %v", info, err)
	}
	model, err := s.model(1)
	if err != nil {
		return err
	}
	if err := e.with(e.d, "copy", nil, func(path string) error { return compareTrees(model, path, s.how) }); err != nil {
		return err
	}
	wantList, err := collect(e.d, e, s.id(1), s.id(0))
	if err != nil {
		return err
	}
	got, err := collect(e.d, e, "copy", s.id(0))
	if err != nil {
		return err
	}
	if err := sameChanges(wantList, got); err != nil {
		return err
	}
	// They have nothing to do with each other from now on.
	if err := errors.Join(e.fill(e.d, "copy", "file f other"), s.verify(1)); err != nil {
		return err
	}
	if err := e.d.Remove(e.ctx, s.id(1)); err != nil {
		return err
	}
	if err := e.holds(e.d, "copy", "f=other", "h=3", "i=3"); err != nil {
		return err
	}
	if _, err := e.d.Get(e.ctx, "copy", nil); err != nil {
		return err
	}
	return errors.Join(
		want(layerfs.Clone(e.ctx, e.d, "third", "copy", nil), "clone", "third", layerfs.ErrInUse),
		e.d.Put(e.ctx, "copy"),
		want(layerfs.Clone(e.ctx, e.d, "copy", "copy", nil), "clone", "copy", layerfs.ErrExist),
		want(layerfs.Clone(e.ctx, e.d, "third", "none", nil), "clone", "third", layerfs.ErrNotExist),
	)
}

func testMounts(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file g 2")); err != nil {
		return err
	}
	for id, names := range map[string][]string{"a": {"f=1"}, "b": {"f=1", "g=2"}} {
		list, err := layerfs.Mounts(e.ctx, e.d, id, nil)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return err
		}
		e.d.note(id, 1)
		if len(list) == 0 {
			return errors.New("Mounts gives none")
		}
		if info, err := e.d.Stat(e.ctx, id, nil); err != nil || !info.Mounted {
			return fmt.Errorf("Stat = %+v, %v; want Mounted", info, err)
		}
		if err := want(e.d.Remove(e.ctx, id), "remove", id, layerfs.ErrInUse); err != nil {
			return err
		}
		if err := e.tryMounts(list, id == "a", names); err != nil {
			return fmt.Errorf("%s: mounts %+v: %w", id, list, err)
		}
		// Two mounts of one layer would not be one file system.
		_, err = e.d.Get(e.ctx, id, nil)
		if err := want(err, "get", id, layerfs.ErrInUse); err != nil {
			return fmt.Errorf("Get after Mounts: %w", err)
		}
		if err := e.d.Put(e.ctx, id); err != nil {
			return err
		}
		if err := want(e.d.Put(e.ctx, id), "put", id, layerfs.ErrNotHeld); err != nil {
			return err
		}
		if err := e.holds(e.d, id, names...); err != nil {
			return fmt.Errorf("Get after Mounts and Put: %w", err)
		}
	}
	_, err := layerfs.Mounts(e.ctx, e.d, "none", nil)
	return want(err, "mounts", "none", layerfs.ErrNotExist)
}

// wrapper is a driver in another, as a program may have it.
type wrapper struct{ layerfs.Driver }

func (w wrapper) Unwrap() layerfs.Driver { return w.Driver }

// closedWrapper does not let anything through.
type closedWrapper struct{ layerfs.Driver }

func testWrapper(e *env) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	direct := layerfs.SetLabels(e.ctx, e.d.Driver, "a", nil)
	wrapped := layerfs.SetLabels(e.ctx, wrapper{wrapper{e.d.Driver}}, "a", nil)
	if (direct == nil) != (wrapped == nil) {
		return fmt.Errorf("SetLabels: %v, through wrappers: %v", direct, wrapped)
	}
	return want(layerfs.SetLabels(e.ctx, closedWrapper{e.d.Driver}, "a", nil), "set labels", "a", errors.ErrUnsupported)
}
