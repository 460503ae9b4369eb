package aufs

import (
	"context"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// projectsLock is the key under which project ids are given out. It is no id
// of a layer, and is taken after a layer's lock.
const projectsLock = ".projects"

// limit puts a directory and what is in it under a quota of its own.
func (m *mechanism) limit(ctx context.Context, dir string, q layerfs.Quota) error {
	if m.projects == nil {
		return &layerfs.UnsupportedError{Feature: "a quota for a layer", Reason: m.features.Reasons["Quota"]}
	}
	unlock, err := m.dir.Lock(ctx, projectsLock)
	if err != nil {
		return err
	}
	defer unlock()
	around, err := m.projects.ID(m.home)
	if err != nil {
		return err
	}
	id, err := m.projects.ID(dir)
	if err != nil {
		return err
	}
	if id == 0 || id == around { // none, or one that the whole root has
		if id, err = m.projects.Allocate(m.home, filepath.Dir(m.dir.BuildPath("x"))); err != nil {
			return err
		}
		if err := m.projects.AssignTree(id, dir); err != nil {
			return err
		}
	}
	return m.projects.SetLimits(id, q)
}

// unlimited returns a function that forgets the quota of a layer once its
// directory is gone: the id may be given out again.
func (m *mechanism) unlimited(rec *lifecycle.Record) (forget func() error) {
	nothing := func() error { return nil }
	if m.projects == nil || rec.Quota == (layerfs.Quota{}) {
		return nothing
	}
	id, err := m.projects.ID(m.branch(rec.ID))
	if err != nil || id == 0 {
		return nothing // half-made
	}
	return func() error { return m.projects.Clear(id) }
}

// sameLimit puts a directory under the quota a layer has, so that what is made
// in it can be renamed into the layer: across projects that is EXDEV.
func (m *mechanism) sameLimit(rec *lifecycle.Record, dir string) error {
	if m.projects == nil || rec.Quota == (layerfs.Quota{}) {
		return nil
	}
	id, err := m.projects.ID(m.branch(rec.ID))
	if err != nil {
		return err
	}
	return m.projects.Assign(id, dir)
}
