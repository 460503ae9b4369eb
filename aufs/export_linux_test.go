package aufs

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/layerfs/layerfs/internal/mount"
)

// EndDead does for all mounts below a directory what the next Get or New of
// a driver does: it lets processes end that were killed while they waited for
// a union of their own.
func EndDead(dir string) error {
	infos, err := mount.Under(dir)
	if err != nil {
		return err
	}
	for _, info := range infos {
		_, err := endDead(filepath.Clean(info.Mountpoint))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			return err
		}
	}
	return nil
}
