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
	if err := d.childless(id); err != nil {
		return err
	}
	if err := d.unheld(ctx, rec); err != nil {
		return err
	}
	if err := d.dir.Drop(rec); err != nil {
		return err
	}
	// From here the layer is gone; a context that ends now must not leave
	// its storage for the next start.
	return d.finishRemove(context.WithoutCancel(ctx), rec)
}

// removeAgain retries a removal whose storage could not be deleted.
func (d *Driver) removeAgain(ctx context.Context, id string) error {
	rec, err := d.dir.LoadRemoved(id)
	if err != nil {
		return layerfs.ErrNotExist
	}
	return d.finishRemove(ctx, rec)
}

func (d *Driver) finishRemove(ctx context.Context, rec *Record) error {
	if err := d.m.Delete(ctx, rec); err != nil {
		return fmt.Errorf("the layer is removed, but not its storage: %w", err)
	}
	if err := d.dir.SetPersistent(rec.ID, layerdir.Persistent{}); err != nil {
		return err
	}
	d.dir.DropChildren(rec.ID)
	return d.dir.Forget(rec.ID)
}

// childless makes sure that a layer whose lock is held has no children.
func (d *Driver) childless(id string) error {
	has, err := d.dir.HasChildren(id)
	if err != nil || !has {
		return err
	}
	children, err := d.dir.Children(id)
	if err != nil {
		return err
	}
	const named = 3 // enough to act on, short enough to read
	text := strings.Join(children[:min(len(children), named)], ", ")
	if len(children) > named {
		text += fmt.Sprintf(" and %d more", len(children)-named)
	}
	return fmt.Errorf("parent of %s: %w", text, layerfs.ErrInUse)
}
