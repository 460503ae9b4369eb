package layerdir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/layerfs/layerfs"
)

// Record is what is known of a layer. A Record that was loaded is shared and
// must not be changed; change a Clone.
type Record struct {
	ID         string            `json:"id"`
	Parent     string            `json:"parent,omitempty"`
	Created    time.Time         `json:"created"`
	ReadOnly   bool              `json:"read_only,omitempty"`
	Sealed     bool              `json:"sealed,omitempty"`     // a read-only layer that has had its Apply
	Incomplete string            `json:"incomplete,omitempty"` // what did not finish
	Copied     Moment            `json:"copied,omitzero"`      // when the tree was the parent's; zero for clones
	Labels     map[string]string `json:"labels,omitempty"`
	MountLabel string            `json:"mount_label,omitempty"`
	Quota      layerfs.Quota     `json:"quota,omitzero"`
	Backend    json.RawMessage   `json:"backend,omitempty"` // what only the backend understands
}

// Clone returns a copy that may be changed and saved. Labels and Backend are
// replaced, not edited, so they may be shared.
func (r *Record) Clone() *Record {
	c := *r
	return &c
}

// Load returns the record of a layer. The error matches layerfs.ErrNotExist
// if there is none. It costs one stat unless the record has changed.
func (d *Dir) Load(id string) (*Record, error) {
	if err := layerfs.CheckID(id); err != nil {
		return nil, err
	}
	if err := d.use(); err != nil {
		return nil, err
	}
	defer d.unuse()
	const tries = 16 // of one that is replaced all the time
	at, err := d.records.stat(id)
	for try := 1; err == nil; try++ {
		if c, ok := d.cache.Load(id); ok {
			if c := c.(cached); c.at.same(at) && (c.settled || !at.settled(d.direct)) {
				return c.rec, nil
			}
		}
		var rec *Record
		rec, err = readRecord(d.records, id)
		if err == nil {
			if at.settled(d.direct) {
				d.cache.Store(id, cached{rec, at, true})
			}
			return rec, nil
		}
		if !errors.Is(err, errCutOff) {
			break
		}
		// Was it this file that is cut off, or one that is being made in its
		// place?
		now, serr := d.records.stat(id)
		switch {
		case serr != nil:
			err = serr
		case try < tries && !(now.same(at) && now.unfinished() == at.unfinished()):
			at, err = now, nil
		case now.unfinished():
			err = fs.ErrNotExist
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		d.cache.Delete(id)
		return nil, layerfs.ErrNotExist
	}
	return nil, err
}

// making is the mode of a record until Add has written it.
const making = 0o700

// errCutOff is what is wrong with a record that was not wholly written: each is
// made with a newline at its end.
var errCutOff = errors.New("it is empty or cut off")

// cached is a record and the file it was read from. A record is replaced by
// rename, never rewritten, so another inode or time means another record; also
// where an inode is used again at once, as its time was settled when it was read.
//
// What this process wrote itself is believed at once, and read when it has
// settled: another process may have dropped it and added one as long, with the
// same inode, within the same tick of the clock.
type cached struct {
	rec     *Record
	at      stamp
	settled bool
}

func readRecord(from folder, id string) (*Record, error) {
	b, err := from.read(id)
	if err != nil {
		return nil, err
	}
	var rec Record
	if err := json.Unmarshal(b, &rec); err != nil {
		if len(b) == 0 || b[len(b)-1] != '\n' {
			err = errCutOff
		}
		return nil, fmt.Errorf("record of %s: %w", id, err)
	}
	if rec.ID != id {
		return nil, fmt.Errorf("record of %s: it is named %q inside", id, rec.ID)
	}
	if rec.Parent != "" {
		if err := layerfs.CheckID(rec.Parent); err != nil {
			return nil, fmt.Errorf("record of %s: parent: %w", id, err)
		}
	}
	return &rec, nil
}

// Add is Save of a layer that has no record, which is cheaper than to replace
// one. If it fails there may be a record: see [Dir.Drop].
func (d *Dir) Add(rec *Record) error {
	return d.store(rec, func(b []byte) (stamp, error) {
		if d.direct {
			at, err := d.records.add(rec.ID, b, d.sync)
			// What is there was never finished, or the caller would not call.
			if !errors.Is(err, fs.ErrExist) {
				return at, err
			}
		}
		return d.write(d.records, rec.ID, b)
	})
}

// clearUnfinished removes the records that a crash kept Add from writing.
func (d *Dir) clearUnfinished() error {
	ids, err := d.IDs()
	if err != nil {
		return err
	}
	for _, id := range ids {
		at, err := d.records.stat(id)
		if err != nil || !at.unfinished() {
			continue
		}
		err = d.unlessBusy(id, func() error {
			_, err := d.Load(id)
			switch {
			case errors.Is(err, layerfs.ErrNotExist):
				return d.records.unlink(id)
			case err == nil: // a power failure took the end of the mark
				return d.records.finish(id)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Save makes or replaces the record of a layer whose lock the caller holds;
// rec must not be changed any more. It is atomic and, unless the policy is
// none, on stable storage on return.
func (d *Dir) Save(rec *Record) error {
	return d.store(rec, func(b []byte) (stamp, error) { return d.write(d.records, rec.ID, b) })
}

// store encodes a record, writes it by a function, and remembers it.
func (d *Dir) store(rec *Record, write func([]byte) (stamp, error)) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	b, err := encode(rec)
	if err != nil {
		return err
	}
	at, err := write(b)
	if noSpace(err) && d.root.settle() == nil {
		// What was freed can often only be used after a commit, and what is being
		// written has reserved more than it will need: on btrfs with qgroups this is
		// how a record fails right after a full disk was emptied.
		at, err = write(b)
	}
	if err != nil {
		return err
	}
	// Nobody else can have replaced it yet, as the caller has the lock.
	d.cache.Store(rec.ID, cached{rec, at, false})
	return nil
}

func encode(rec *Record) ([]byte, error) {
	b, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("record of %s: %w", rec.ID, err)
	}
	return append(b, '\n'), nil
}

// IDs lists the layers that have a record, in no order.
func (d *Dir) IDs() ([]string, error) { return d.ids(&d.records, ".") }

// Drop commits the removal of a layer whose lock the caller holds: it is gone.
// Its parent finds out when somebody asks.
// With remember set its record is kept elsewhere, and [Dir.Removed] lists it
// until [Dir.Forget]; without, the storage must be found by the id alone.
func (d *Dir) Drop(rec *Record, remember bool) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	d.cache.Delete(rec.ID)
	var err error
	if remember {
		err = d.records.rename(rec.ID, d.removed)
	} else {
		err = d.records.unlink(rec.ID)
	}
	if err == nil && d.sync {
		err = d.records.sync()
	}
	return err
}

// Remember makes [Dir.Removed] list a layer that was dropped without.
func (d *Dir) Remember(rec *Record) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	b, err := encode(rec)
	if err == nil {
		_, err = d.write(d.removed, rec.ID, b)
	}
	return err
}

// Removed lists the layers that were dropped but not yet forgotten.
func (d *Dir) Removed() ([]string, error) { return d.ids(&d.removed, ".") }

// LoadRemoved returns the record of a dropped layer. The error is
// [layerfs.ErrNotExist] if there is none.
func (d *Dir) LoadRemoved(id string) (*Record, error) {
	if err := d.use(); err != nil {
		return nil, err
	}
	defer d.unuse()
	if d.removedNames.lacks(&d.removed, id) {
		return nil, layerfs.ErrNotExist
	}
	rec, err := readRecord(d.removed, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, layerfs.ErrNotExist
	}
	return rec, err
}

// Forget ends the removal of a layer: its storage is gone.
func (d *Dir) Forget(id string) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	return d.removed.unlink(id)
}

func (d *Dir) path(elem ...string) string {
	return filepath.Join(append([]string{d.dir}, elem...)...)
}

// ids lists the names in a directory that are ids; others are temporary.
func (d *Dir) ids(in *folder, sub string) ([]string, error) {
	if err := d.use(); err != nil {
		return nil, err
	}
	defer d.unuse()
	names, err := in.names(sub)
	if err != nil {
		return nil, err
	}
	ids := names[:0]
	for _, n := range names {
		if layerfs.CheckID(n) == nil {
			ids = append(ids, n)
		}
	}
	return ids, nil
}
