package layerdir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Persistent describes the Gets of a layer that belong to no process.
type Persistent struct {
	Boot     string `json:"boot"`  // the boot they were made in
	Count    int    `json:"count"` // how many
	ReadOnly bool   `json:"read_only,omitempty"`

	// Mapped notes that the owners are mapped in the mount there is now, by
	// whatever Get. The kernel does not tell in one call.
	Mapped bool `json:"mapped,omitempty"`

	stored bool // there is a file, if only an old one
}

// Stored reports whether SetPersistent of the zero value has anything to do.
func (p Persistent) Stored() bool { return p.stored }

// Persistent returns the persistent Gets of a layer whose lock the caller
// holds. Those of an earlier boot are gone, as their mounts are.
func (d *Dir) Persistent(id string) (Persistent, error) {
	if err := d.use(); err != nil {
		return Persistent{}, err
	}
	defer d.unuse()
	if d.persistNames.lacks(&d.persist, id) {
		return Persistent{}, nil
	}
	b, err := d.persist.read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return Persistent{}, nil
	}
	if err != nil {
		return Persistent{}, err
	}
	var p Persistent
	if err := json.Unmarshal(b, &p); err != nil {
		return Persistent{}, fmt.Errorf("persistent gets of %s: %w", id, err)
	}
	if p.Boot != d.boot {
		p = Persistent{}
	}
	p.stored = true
	return p, nil
}

// SetPersistent replaces the persistent Gets of a layer whose lock the caller
// holds.
func (d *Dir) SetPersistent(id string, p Persistent) error {
	if err := d.use(); err != nil {
		return err
	}
	defer d.unuse()
	if p.Count == 0 && !p.Mapped {
		return d.persist.unlink(id)
	}
	p.Boot = d.boot
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = d.write(d.persist, id, append(b, '\n'))
	return err
}

// PersistentIDs lists the layers that have, or before a reboot had,
// persistent Gets.
func (d *Dir) PersistentIDs() ([]string, error) { return d.ids(&d.persist, ".") }

// BootID names this boot of the machine; it is empty where the system does
// not tell, and persistent Gets then outlive a reboot.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(b[:min(len(b), 36)])
}
