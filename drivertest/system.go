package drivertest

import (
	"errors"
	"fmt"
	"runtime"
	"time"
)

func systemCases() []testCase {
	return []testCase{{name: "Leaks", run: testLeaks}}
}

// testLeaks runs every verb many times, with errors in between, and compares
// the numbers of open files and goroutines before and after.
func testLeaks(e *env) error {
	if err := errors.Join(e.create("a", "", "file f 1"), e.round(0)); err != nil {
		return err
	}
	before, err := openFiles()
	if err != nil {
		return err
	}
	routines := runtime.NumGoroutine()
	const rounds = 15
	for i := range rounds {
		if err := e.round(i + 1); err != nil {
			return err
		}
	}
	var after, now int
	// What was closed may end a moment later, and tests that run at the same time
	// have files of their own, which come and go; what leaked stays.
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if after, err = openFiles(); err != nil {
			return err
		}
		now = runtime.NumGoroutine()
		if after <= before && now <= routines {
			return nil
		}
	}
	return fmt.Errorf("%d rounds left %d open files and %d goroutines", rounds, after-before, now-routines)
}

func (e *env) round(i int) error {
	d, err := e.h.New(e.root)
	if err != nil {
		return err
	}
	defer d.Close()
	id, copyID := fmt.Sprintf("r%d", i), fmt.Sprintf("copy%d", i)
	if err := d.Create(e.ctx, id, "a", nil); err != nil {
		return err
	}
	path, err := d.Get(e.ctx, id, nil)
	if err != nil {
		return err
	}
	if err := makeTree(path, "file g 2", "rm f"); err != nil {
		return err
	}
	if err := errors.Join(d.Put(e.ctx, id), d.Create(e.ctx, copyID, "", nil), pipe(e, d, id, "", d, copyID, nil)); err != nil {
		return err
	}
	r, err := d.Diff(e.ctx, id, "a", nil)
	if err != nil {
		return err
	}
	if err := r.Close(); err != nil { // unread
		return err
	}
	if _, err := collect(d, e, id, "a"); err != nil {
		return err
	}
	for range d.Changes(e.ctx, id, "a") {
		break
	}
	if d.Create(e.ctx, id, "a", nil) == nil || d.Put(e.ctx, id) == nil || d.Remove(e.ctx, "a") == nil {
		return errors.New("what had to fail did not")
	}
	if _, err := d.Get(e.ctx, "a", nil); err != nil {
		return err
	}
	return errors.Join(d.Put(e.ctx, "a"), d.Remove(e.ctx, copyID), d.Remove(e.ctx, id), d.Close())
}
