// Package quota limits directories by project quotas, on ext4, f2fs and xfs.
//
// A project is a number that files carry and that new files inherit from their
// directory. The file system counts and limits what a project holds. Numbers
// belong to a whole file system; which ones are used by a root is read from its
// directories, so there is no record that could be wrong.
package quota

import (
	"fmt"
	"slices"

	"github.com/layerfs/layerfs"
)

// DefaultFirst is the first project id that is given out by default. Ids below
// are left for people and for /etc/projid.
const DefaultFirst = 100000

// Report is what a project holds and may hold.
type Report struct {
	Bytes  int64 // allocated, rounded up to blocks
	Inodes int64
	Limit  layerfs.Quota
}

// sector is the unit of space in struct fs_disk_quota.
const sector = 512

// sectors rounds a limit up, so that no less than asked for is granted.
func sectors(bytes int64) uint64 { return (uint64(bytes) + sector - 1) / sector }

// check refuses limits that mean nothing.
func check(q layerfs.Quota) error {
	if q.Bytes < 0 || q.Inodes < 0 {
		return fmt.Errorf("negative quota of %d bytes, %d inodes", q.Bytes, q.Inodes)
	}
	return nil
}

// unused returns the smallest id from first that is not in used and that busy
// does not know either.
func unused(first uint32, used []uint32, busy func(uint32) (bool, error)) (uint32, error) {
	slices.Sort(used)
	// Zero is the project of files without one.
	id := max(first, 1)
	for {
		if _, found := slices.BinarySearch(used, id); !found {
			other, err := busy(id)
			if err != nil {
				return 0, err
			}
			if !other {
				return id, nil
			}
		}
		if id++; id == 0 {
			return 0, fmt.Errorf("no project id from %d up is free", first)
		}
	}
}
