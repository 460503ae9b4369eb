package quota

import (
	"context"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
)

// projectsLock is the key under which project ids are given out. It is no id
// of a layer, and is taken after a layer's lock.
const projectsLock = ".projects"

// Layers limits layers whose storage is one directory each.
type Layers struct {
	Projects *Projects     // nil if the file system has none
	Reason   string        // why, if so
	Dir      *layerdir.Dir // gives the lock and the place where layers are made
	Home     string        // the directories of the layers are in it
}

// Limit puts a directory and what is in it under a quota of its own.
func (l *Layers) Limit(ctx context.Context, dir string, q layerfs.Quota) error {
	if l.Projects == nil {
		return &layerfs.UnsupportedError{Feature: "a quota for a layer", Reason: l.Reason}
	}
	unlock, err := l.Dir.Lock(ctx, projectsLock)
	if err != nil {
		return err
	}
	defer unlock()
	around, err := l.Projects.ID(l.Home)
	if err != nil {
		return err
	}
	id, err := l.Projects.ID(dir)
	if err != nil {
		return err
	}
	if id == 0 || id == around { // none, or one that the whole root has
		if id, err = l.Projects.Allocate(l.Home, filepath.Dir(l.Dir.BuildPath("x"))); err != nil {
			return err
		}
		if err := l.Projects.AssignTree(id, dir); err != nil {
			return err
		}
	}
	return l.Projects.SetLimits(id, q)
}

// Forget returns a function that lifts the quota of a layer once its directory
// is gone: the id may be given out again.
func (l *Layers) Forget(rec *layerdir.Record, dir string) func() error {
	nothing := func() error { return nil }
	if l.Projects == nil || rec.Quota == (layerfs.Quota{}) {
		return nothing
	}
	id, err := l.Projects.ID(dir)
	if err != nil || id == 0 {
		return nothing // half-made
	}
	return func() error { return l.Projects.Clear(id) }
}

// Share puts a directory under the quota that the directory of a layer has, so
// that what is made in it can be renamed into the layer: across projects that
// is EXDEV.
func (l *Layers) Share(rec *layerdir.Record, layer, dir string) error {
	if l.Projects == nil || rec.Quota == (layerfs.Quota{}) {
		return nil
	}
	id, err := l.Projects.ID(layer)
	if err != nil {
		return err
	}
	return l.Projects.Assign(id, dir)
}
