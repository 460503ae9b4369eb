package layerdir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
	path := d.recordPath(id)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		d.cache.Delete(id)
		return nil, layerfs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	if c, ok := d.cache.Load(id); ok {
		if c := c.(cached); os.SameFile(c.fi, fi) && c.fi.ModTime().Equal(fi.ModTime()) && c.fi.Size() == fi.Size() {
			return c.rec, nil
		}
	}
	rec, err := readRecord(path, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, layerfs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	d.cache.Store(id, cached{rec, fi})
	return rec, nil
}

// cached is a record and the file it was read from. A record is replaced by
// rename, never rewritten, so another inode or time means another record.
type cached struct {
	rec *Record
	fi  fs.FileInfo
}

func readRecord(path, id string) (*Record, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var rec Record
	if err := json.Unmarshal(b, &rec); err != nil {
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

// Save makes or replaces the record of a layer whose lock the caller holds;
// rec must not be changed any more. It is atomic and, unless the policy is none, on stable storage on return.
func (d *Dir) Save(rec *Record) error {
	b, err := json.MarshalIndent(rec, "", "\t")
	if err != nil {
		return fmt.Errorf("record of %s: %w", rec.ID, err)
	}
	path := d.recordPath(rec.ID)
	if err := d.writeFile(path, append(b, '\n')); err != nil {
		return err
	}
	// Nobody else can have replaced it since, and reading it back would give
	// the same.
	if fi, err := os.Lstat(path); err == nil {
		d.cache.Store(rec.ID, cached{rec, fi})
	}
	return nil
}

// IDs lists the layers that have a record, in no order.
func (d *Dir) IDs() ([]string, error) { return d.ids("records") }

// Drop commits the removal of a layer whose lock the caller holds: it is gone,
// and [Dir.Removed] lists it until [Dir.Forget].
func (d *Dir) Drop(rec *Record) error {
	if err := rename(d.recordPath(rec.ID), d.path("removed", rec.ID)); err != nil {
		return err
	}
	d.cache.Delete(rec.ID)
	if err := d.syncDir("records"); err != nil {
		return err
	}
	if rec.Parent != "" {
		if err := d.RemoveChild(rec.Parent, rec.ID); err != nil {
			return err
		}
	}
	return nil
}

// Removed lists the layers that were dropped but not yet forgotten.
func (d *Dir) Removed() ([]string, error) { return d.ids("removed") }

// LoadRemoved returns the record of a dropped layer.
func (d *Dir) LoadRemoved(id string) (*Record, error) {
	return readRecord(d.path("removed", id), id)
}

// Forget ends the removal of a layer: its storage is gone.
func (d *Dir) Forget(id string) error {
	return unlink(d.path("removed", id))
}

func (d *Dir) recordPath(id string) string { return d.path("records", id) }

func (d *Dir) path(elem ...string) string {
	return filepath.Join(append([]string{d.dir}, elem...)...)
}

// ids lists the names in a directory that are ids; others are temporary.
func (d *Dir) ids(sub string) ([]string, error) {
	f, err := os.Open(d.path(sub))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
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
