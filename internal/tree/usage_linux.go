package tree

import (
	"context"

	"github.com/layerfs/layerfs"
)

// Usage returns the space that the files below root take on disk, root
// included. A file with several names counts once. It costs one call for each
// file.
func Usage(ctx context.Context, root string) (layerfs.Usage, error) {
	type inode struct{ dev, ino uint64 }
	seen := make(map[inode]bool) // files with several names only
	var u layerfs.Usage
	err := Walk(ctx, root, func(e *Entry) error {
		if e.Stat.Nlink > 1 && !e.IsDir() {
			i := inode{uint64(e.Stat.Dev), e.Stat.Ino}
			if seen[i] {
				return nil
			}
			seen[i] = true
		}
		u.Inodes++
		u.Bytes += e.Stat.Blocks * blockUnit
		return nil
	})
	return u, err
}

// blockUnit is the unit of st_blocks, whatever the file system (stat(2)).
const blockUnit = 512
