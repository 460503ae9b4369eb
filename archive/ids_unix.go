//go:build unix

package archive

import (
	"io/fs"
	"syscall"
)

// hasOwners says that files have owners as tar knows them.
const hasOwners = true

func fileIDs(st fs.FileInfo) (uid, gid uint32, id inodeID, nlink uint64) {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, inodeID{}, 1
	}
	return s.Uid, s.Gid, inodeID{uint64(s.Dev), uint64(s.Ino)}, uint64(s.Nlink)
}
