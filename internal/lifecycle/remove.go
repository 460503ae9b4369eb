package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
)

// Remove deletes a layer.
func (d *Driver) Remove(ctx context.Context, id string) (err error) {
	defer d.wrap("remove", id, &err)
	unlock, err := d.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	rec, err := d.dir.Load(id)
	if errors.Is(err, layerfs.ErrNotExist) {
		return d.removeAgain(ctx, id)
	}
	if err != nil {
		// What a power failure made unreadable must not stay for ever. The
		// storage is found by the id, and a marker with the parent by its lack
		// of a record.
		rec = &Record{ID: id, Incomplete: err.Error()}
		if err := d.dir.Save(rec); err != nil {
			return err
		}
	}
	ever, err := d.childless(id)
	if err != nil {
		return err
	}
	p, err := d.unheld(rec)
	if err != nil {
		return err
	}
	by, ok := d.m.(IDDeleter)
	remember := !ok || !by.DeletesByID(rec)
	if remember {
		if err := d.unmountStale(ctx, rec); err != nil {
			return err
		}
	}
	if err := d.dir.Drop(rec, remember); err != nil {
		if _, lerr := d.dir.Load(id); !remember && errors.Is(lerr, layerfs.ErrNotExist) {
			err = errors.Join(err, d.dir.Remember(rec)) // for another Remove
		}
		return err
	}
	// From here the layer is gone; a context that ends now must not leave
	// its storage for the next start.
	err = d.finishRemove(context.WithoutCancel(ctx), rec, leftovers{record: remember, gets: p.Stored(), children: ever})
	if err != nil && !remember {
		// So that Remove can be tried again before the next start.
		return errors.Join(err, d.dir.Remember(rec))
	}
	return err
}

// removeAgain retries a removal whose storage could not be deleted.
func (d *Driver) removeAgain(ctx context.Context, id string) error {
	rec, err := d.dir.LoadRemoved(id)
	if err != nil {
		return layerfs.ErrNotExist
	}
	return d.finishRemove(ctx, rec, everything())
}

// leftovers are what there is of a removed layer besides its storage. Looking
// for what is known not to be there takes a good part of the time of a Remove.
type leftovers struct {
	record   bool // among the removed ones
	gets     bool // persistent ones, if only of an earlier boot
	children bool // the directory for their markers
}

// everything is for what a crash left, of which nothing is known.
func everything() leftovers { return leftovers{true, true, true} }

func (d *Driver) finishRemove(ctx context.Context, rec *Record, left leftovers) error {
	if err := d.m.Delete(ctx, rec); err != nil {
		return fmt.Errorf("the layer is removed, but not its storage: %w", err)
	}
	if left.gets {
		if err := d.dir.SetPersistent(rec.ID, layerdir.Persistent{}); err != nil {
			return err
		}
	}
	if left.children {
		d.dir.DropChildren(rec.ID)
	}
	if left.record {
		return d.dir.Forget(rec.ID)
	}
	return nil
}

// childless makes sure that a layer whose lock is held has no children, and
// reports whether it ever had.
func (d *Driver) childless(id string) (ever bool, err error) {
	has, ever, err := d.dir.HadChildren(id)
	if err != nil || !has {
		return ever, err
	}
	children, err := d.dir.Children(id)
	if err != nil {
		return ever, err
	}
	if len(children) == 0 {
		return ever, d.unnamedChild(id)
	}
	const named = 3 // enough to act on, short enough to read
	text := strings.Join(children[:min(len(children), named)], ", ")
	if len(children) > named {
		text += fmt.Sprintf(" and %d more", len(children)-named)
	}
	return ever, fmt.Errorf("parent of %s: %w", text, layerfs.ErrInUse)
}

// unnamedChild tells why a layer has a child though no record names it as parent.
func (d *Driver) unnamedChild(id string) error {
	noted, err := d.dir.Noted(id)
	if err != nil {
		return err
	}
	for _, child := range noted {
		if _, err := d.dir.Load(child); err != nil && !errors.Is(err, layerfs.ErrNotExist) {
			return fmt.Errorf("%s may be a child (%w): %w", child, err, layerfs.ErrInUse)
		}
	}
	return fmt.Errorf("a child is being made or removed: %w", layerfs.ErrInUse)
}
