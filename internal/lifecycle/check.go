package lifecycle

import (
	"context"
	"errors"
	"fmt"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
)

// Check compares the records with what is on disk and mounted.
func (d *Driver) Check(ctx context.Context) (_ []layerfs.Problem, err error) {
	defer d.wrap("check", "", &err)
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	return d.scan(ctx, false)
}

// Repair mends what Check finds, as opening the driver does.
func (d *Driver) Repair(ctx context.Context) (_ []layerfs.Problem, err error) {
	defer d.wrap("repair", "", &err)
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	return d.scan(ctx, true)
}

// scan looks for what a crash can leave. With mend set it mends what it can,
// and returns just what it mended; else it returns everything it finds. Layers
// that somebody is working on are left alone.
func (d *Driver) scan(ctx context.Context, mend bool) ([]layerfs.Problem, error) {
	s := &scanner{d: d, ctx: ctx, mend: mend}
	if mend {
		if err := d.dir.ClearTemporary(); err != nil {
			return nil, err
		}
	}
	recs, bad, err := d.records()
	if err != nil {
		return nil, err
	}
	if !mend {
		s.found = bad
	}
	for _, step := range []func(map[string]*Record) error{s.removals, s.orphans, s.markers, s.mounts, s.damage} {
		if err := step(recs); err != nil {
			return nil, err
		}
	}
	return s.found, nil
}

type scanner struct {
	d     *Driver
	ctx   context.Context
	mend  bool
	found []layerfs.Problem
}

// removals finishes what Remove has committed.
func (s *scanner) removals(map[string]*Record) error {
	ids, err := s.d.dir.Removed()
	if err != nil {
		return err
	}
	for _, id := range ids {
		err := s.each(layerfs.Problem{ID: id, Reason: "its removal did not finish", Repair: "delete its storage"}, func() (bool, error) {
			rec, err := s.d.dir.LoadRemoved(id)
			if err != nil {
				return false, nil // another process finished it
			}
			if !s.mend {
				return true, nil
			}
			// Whatever led to a layer of that id: its storage is not rubbish.
			if _, err := s.d.dir.Load(id); !errors.Is(err, layerfs.ErrNotExist) {
				return true, s.d.dir.Forget(id)
			}
			if err := s.d.unmountStale(s.ctx, rec); err != nil {
				return false, err
			}
			return true, s.d.finishRemove(s.ctx, rec, everything())
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// orphans deletes storage whose record was never written.
func (s *scanner) orphans(map[string]*Record) error {
	stored, err := s.d.m.Stored(s.ctx)
	if err != nil {
		return err
	}
	for _, id := range stored {
		if layerfs.CheckID(id) != nil {
			continue
		}
		if _, err := s.d.dir.Load(id); !errors.Is(err, layerfs.ErrNotExist) {
			continue
		}
		err := s.each(layerfs.Problem{ID: id, Path: s.d.relative(s.d.m.Path(id)), Reason: "storage of a layer that does not exist: its creation or its removal did not finish", Repair: "delete it"}, func() (bool, error) {
			if _, err := s.d.dir.Load(id); !errors.Is(err, layerfs.ErrNotExist) {
				return false, nil // its creation has finished since
			}
			if _, err := s.d.dir.LoadRemoved(id); err == nil {
				return false, nil // told by removals
			}
			if !s.mend {
				return true, nil
			}
			rec := &Record{ID: id}
			if err := s.d.unmountStale(s.ctx, rec); err != nil {
				return false, err
			}
			return true, s.d.finishRemove(s.ctx, rec, everything())
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// markers tells parents of the children that a power failure made them forget;
// the records are the truth. A child too much is found by HasChildren.
func (s *scanner) markers(recs map[string]*Record) error {
	known := make(map[string]map[string]bool)
	for id, rec := range recs {
		if rec.Parent == "" {
			continue
		}
		of := known[rec.Parent]
		if of == nil {
			of = make(map[string]bool)
			children, err := s.d.dir.Noted(rec.Parent)
			if err != nil {
				return err
			}
			for _, c := range children {
				of[c] = true
			}
			known[rec.Parent] = of
		}
		if of[id] {
			continue
		}
		if err := s.tell(id, rec.Parent); err != nil {
			return err
		}
	}
	return nil
}

// tell notes a child with its parent, under the lock of the parent. It waits for
// that: what must not be written must not be written until the next start.
func (s *scanner) tell(id, parent string) error {
	unlock, err := s.d.dir.Lock(s.ctx, parent)
	if err != nil {
		return err
	}
	defer unlock()
	if rec, err := s.d.dir.Load(id); err != nil || rec.Parent != parent {
		return nil // removed since
	}
	s.found = append(s.found, layerfs.Problem{ID: id, Reason: "its parent " + parent + " does not know of it", Repair: "note it"})
	if !s.mend {
		return nil
	}
	return s.d.dir.AddChild(parent, id)
}

// mounts ends the Gets of processes that died and of earlier boots.
func (s *scanner) mounts(map[string]*Record) error {
	ids, err := s.d.dir.PersistentIDs()
	if err != nil {
		return err
	}
	for _, id := range ids {
		err := s.each(layerfs.Problem{ID: id, Reason: "persistent gets of an earlier boot", Repair: "forget them"}, func() (bool, error) {
			p, err := s.d.dir.Persistent(id)
			if err != nil || p.Count > 0 || p.Mapped {
				return false, err
			}
			if !s.mend {
				return true, nil
			}
			return true, s.d.dir.SetPersistent(id, layerdir.Persistent{})
		})
		if err != nil {
			return err
		}
	}
	mounted, err := s.d.m.Mounted()
	if err != nil {
		return err
	}
	for _, id := range mounted {
		if layerfs.CheckID(id) != nil {
			continue
		}
		rec, err := s.d.dir.Load(id)
		if err != nil {
			rec = &Record{ID: id}
		}
		err = s.each(layerfs.Problem{ID: id, Path: s.d.relative(s.d.m.Path(id)), Reason: "mounted, but nobody holds it: its process died", Repair: "unmount it"}, func() (bool, error) {
			defer s.d.drop(id)
			held, _, _, err := s.d.holder(id, s.d.holdOf(id))
			if err != nil || held {
				return false, err
			}
			if !s.mend {
				return true, nil
			}
			return true, s.d.unmountStale(s.ctx, rec)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// damage reports what nothing but removing the layer helps with.
func (s *scanner) damage(recs map[string]*Record) error {
	if s.mend {
		return nil
	}
	for _, rec := range inOrder(recs) {
		if rec.Incomplete != "" {
			if _, err := s.d.dir.Load(rec.ID); err == nil {
				s.found = append(s.found, layerfs.Problem{ID: rec.ID, Reason: rec.Incomplete})
			}
			continue
		}
		if rec.Parent != "" && recs[rec.Parent] == nil {
			s.found = append(s.found, layerfs.Problem{ID: rec.ID, Reason: fmt.Sprintf("its parent %s does not exist", rec.Parent)})
		}
		if f, ok := s.d.m.(Finder); ok {
			if err := f.Find(s.ctx, rec); err != nil {
				s.found = append(s.found, layerfs.Problem{ID: rec.ID, Path: s.d.relative(s.d.m.Path(rec.ID)), Reason: err.Error()})
			}
		}
	}
	return nil
}

// each looks at one layer under its lock. A layer whose lock is taken is being
// worked on and is no problem. What cannot be mended is a problem of that layer
// alone: it is logged, and the driver opens.
func (s *scanner) each(p layerfs.Problem, look func() (bool, error)) error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	unlock, ok, err := s.d.dir.TryLock(p.ID)
	if err != nil || !ok {
		return err
	}
	defer unlock()
	is, err := look()
	if err != nil {
		s.d.opts.Logger.Error("repair", "driver", s.d.m.Name(), "layer", p.ID, "reason", p.Reason, "error", err)
		p.Reason += " (" + err.Error() + ")"
		is = !s.mend
	}
	if is {
		s.found = append(s.found, p)
	}
	return nil
}
