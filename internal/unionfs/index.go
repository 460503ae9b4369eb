//go:build linux

package unionfs

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"
)

// errTooMany ends a listing that would make too large an index.
var errTooMany = errors.New("too many names")

// An index says what the read-only instances of a directory have, so that
// a lookup asks only those that have the name: without it, each costs one or
// two system calls, on every branch. It is made by listing the instances once
// lookups have cost about as much, and lives until a direct change of a branch
// is reported, so it is for unions that are told of them (see KeepListings).
type index struct {
	insts []*inst // the directory's, when it was made
	ask   []bool  // instances that are not indexed
	first map[string]int32
	more  map[string][]int32  // further instances, ascending
	fresh map[string]struct{} // names that changed since: all are asked
	n     int                 // in first and more
}

const (
	// indexMin is how many instances make an index worth its memory.
	indexMin = 6
	// maxFresh names may have changed before an index is made anew.
	maxFresh = 256
	// maxIndexed is how many names of instances all indexes of a union may
	// have, some 80 bytes each.
	maxIndexed = 200_000
	// namesPerProbe is how many names can be listed in the time that it takes
	// to ask one instance for a name.
	namesPerProbe = 4
)

// KeepListings says whether the caller reports every direct change of a
// read-only branch by Changed, or there is none. Call it before anything else.
func (fs *FS) KeepListings(keep bool) { fs.keepListings = keep }

func (x *index) size() int {
	if x == nil {
		return 0
	}
	return x.n
}

// A route tells which instances of a directory a lookup has to ask.
type route struct {
	x     *index
	first int32 // -1: none of the indexed ones
	more  []int32
}

func (r *route) skips(k int) bool {
	if r.x == nil || r.x.ask[k] || int(r.first) == k {
		return false
	}
	_, has := slices.BinarySearch(r.more, int32(k))
	return !has
}

// route returns the way of a lookup of name through the instances is of dir.
// The caller holds dir.mu.
func (fs *FS) route(dir *Node, is []*inst, name string) route {
	if !fs.keepListings || len(is) < indexMin {
		return route{}
	}
	fs.tabMu.Lock()
	x := dir.index
	if x != nil && (len(x.insts) != len(is) || &x.insts[0] != &is[0]) {
		fs.dropIndex(dir)
		x = nil
	}
	if x == nil {
		dir.probes += len(is)
		budget := dir.probes
		due := budget >= max(2*len(is), dir.indexAt)
		fs.tabMu.Unlock()
		if !due {
			return route{}
		}
		if x = fs.makeIndex(dir, is, budget*namesPerProbe); x == nil {
			return route{}
		}
		fs.tabMu.Lock()
	}
	defer fs.tabMu.Unlock()
	if _, changed := x.fresh[name]; changed {
		return route{}
	}
	r := route{x: x, first: -1, more: x.more[name]}
	if k, ok := x.first[name]; ok {
		r.first = k
	}
	return r
}

// makeIndex lists the read-only instances of dir, unless they have more than
// budget names. What it returns may be out of date for the next lookup, as
// long as it is not in dir.
func (fs *FS) makeIndex(dir *Node, is []*inst, budget int) *index {
	fs.tabMu.Lock()
	dir.indexAt = 2 * dir.probes // of the next try, should this one fail
	told := dir.told.Load()
	budget = min(budget, maxIndexed-fs.indexed)
	fs.tabMu.Unlock()
	x := &index{insts: is, ask: make([]bool, len(is)), first: map[string]int32{}}
	bp := fs.bufs.Get().(*[]byte)
	defer fs.bufs.Put(bp)
	for k, i := range is {
		fd, ok, err := -1, false, error(nil)
		if i.br.perm != RW {
			fd, ok, err = fs.look(dir, i)
		}
		if err != nil {
			return nil
		}
		if !ok {
			x.ask[k] = true
			continue
		}
		folds, known := indexTypes[i.br.fsType]
		if !known || fs.watch != nil && i.br.perm != RR && !i.watched.Load() {
			x.ask[k] = true
			i.unpin()
			continue
		}
		c := caseTest{folds: folds}
		err = listDir(fd, *bp, func(e dirent) error {
			c.listed(e.name)
			name, _ := fs.format.Concerns(e.name)
			if name == "" {
				return nil
			}
			if budget--; budget < 0 {
				return errTooMany
			}
			switch at, ok := x.first[name]; {
			case !ok:
				x.first[name] = int32(k)
				x.n++
			case int(at) != k:
				if x.more == nil {
					x.more = map[string][]int32{}
				}
				if m := x.more[name]; len(m) == 0 || int(m[len(m)-1]) != k {
					x.more[name] = append(m, int32(k))
					x.n++
				}
			}
			return nil
		})
		x.ask[k] = err != nil || !c.exact(fd)
		i.unpin()
		if err != nil {
			return nil
		}
	}
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	if dir.told.Load() != told || dir.freed || dir.dead {
		return nil // something changed meanwhile, maybe before it was listed
	}
	fs.dropIndex(dir)
	dir.index = x
	fs.indexed += x.size()
	return x
}

// dropIndex forgets dir's index; tabMu is held.
func (fs *FS) dropIndex(dir *Node) {
	fs.indexed -= dir.index.size()
	dir.index, dir.probes, dir.indexAt = nil, 0, 0
}

// unindex notes that what name means in dir, or if it is empty any name, may
// have changed; tabMu is held.
func (fs *FS) unindex(dir *Node, name string) {
	dir.told.Add(1)
	x := dir.index
	if x == nil {
		return
	}
	if name == "" || len(x.fresh) >= maxFresh {
		fs.dropIndex(dir)
		return
	}
	if x.fresh == nil {
		x.fresh = map[string]struct{}{}
	}
	x.fresh[name] = struct{}{}
}

// A fold says how a directory of a file system may come to find names that it
// does not list.
type fold uint8

const (
	foldNever fold = iota
	foldFlag       // with FS_CASEFOLD_FL, which only an empty one can be given
	foldMount      // as the file system was made, or those below it
)

// indexTypes are file systems whose changes inotify sees, and which find a name
// as it is listed only, unless a directory folds cases: XFS all of them or none
// (mkfs.xfs -n version=ci).
var indexTypes = map[int64]fold{
	unix.EXT4_SUPER_MAGIC: foldFlag, unix.TMPFS_MAGIC: foldFlag,
	unix.XFS_SUPER_MAGIC: foldMount, unix.OVERLAYFS_SUPER_MAGIC: foldMount,
	unix.BTRFS_SUPER_MAGIC: foldNever, unix.EROFS_SUPER_MAGIC_V1: foldNever, unix.SQUASHFS_MAGIC: foldNever,
}

// A caseTest finds out whether a directory folds cases: it does if it finds
// a name in another case that it does not list.
type caseTest struct {
	folds         fold
	any           bool
	sample, other string // the first name with a letter, and its other case
	both          bool   // other is listed, too
}

func (c *caseTest) listed(name string) {
	c.any = true
	if c.sample == "" {
		if other := swapCase(name); other != name {
			c.sample, c.other = name, other
		}
		return
	}
	c.both = c.both || name == c.other
}

// exact reports whether it is certain that the directory fd, all of whose names
// were listed, finds no others, and will not.
func (c *caseTest) exact(fd int) bool {
	switch c.folds {
	case foldNever:
		return true
	case foldFlag:
		if !c.any {
			return false
		}
		flagged, err := caseFlag(fd)
		return err == nil && !flagged
	}
	if c.sample == "" {
		return false
	}
	var st unix.Stat_t
	swapped, err := exists(fd, c.other, &st)
	if err != nil || swapped {
		return err == nil && c.both
	}
	// The name may have been taken away before its other case was looked for.
	still, err := exists(fd, c.sample, &st)
	return err == nil && still
}

// caseFlag reports whether FS_CASEFOLD_FL is set on the directory fd.
func caseFlag(fd int) (bool, error) {
	d, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(d)
	flags, err := unix.IoctlGetUint32(d, unix.FS_IOC_GETFLAGS)
	if err == unix.ENOTTY || err == unix.EOPNOTSUPP {
		return false, nil // it knows no flags, as tmpfs before Linux 6.0
	}
	return flags&caseFoldFlag != 0, err
}

// caseFoldFlag is FS_CASEFOLD_FL, linux/fs.h.
const caseFoldFlag = 0x40000000

// swapCase exchanges upper and lower case of the first ASCII letter.
func swapCase(name string) string {
	for i := 0; i < len(name); i++ {
		if c := name[i] | 0x20; 'a' <= c && c <= 'z' {
			return name[:i] + string(name[i]^0x20) + name[i+1:]
		}
	}
	return name
}
