//go:build linux

package unionfs

import (
	"errors"
	"slices"
	"strings"
	"unicode/utf8"

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
}

const (
	// indexMin is how many instances make an index worth its memory.
	indexMin = 6
	// maxFresh names may have changed before an index is made anew.
	maxFresh = 256
	// maxIndexed is how many names all indexes of a union may have, some 80
	// bytes each.
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
	return len(x.first)
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
	told := dir.told
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
		if !exactTypes[i.br.fsType] || fs.watch != nil && i.br.perm != RR && !i.watched.Load() {
			x.ask[k] = true
			i.unpin()
			continue
		}
		sample, other, odd, both := "", "", false, false
		err = listDir(fd, *bp, func(e dirent) error {
			if sample == "" {
				if other = swapCase(e.name); other != e.name {
					sample = e.name
				} else {
					odd = odd || strings.ContainsFunc(e.name, func(r rune) bool { return r >= utf8.RuneSelf })
				}
			} else if e.name == other {
				both = true
			}
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
			case int(at) != k:
				if x.more == nil {
					x.more = map[string][]int32{}
				}
				if m := x.more[name]; len(m) == 0 || int(m[len(m)-1]) != k {
					x.more[name] = append(m, int32(k))
				}
			}
			return nil
		})
		if sample != "" {
			var st unix.Stat_t
			odd, _ = exists(fd, other, &st)
			odd = odd && !both
		}
		i.unpin()
		if err != nil {
			return nil
		}
		x.ask[k] = odd
	}
	fs.tabMu.Lock()
	defer fs.tabMu.Unlock()
	if dir.told != told || dir.freed || dir.dead {
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
	dir.told++
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

// exactTypes are file systems that find a name as it is listed only, unless
// a directory folds cases, and whose changes inotify sees.
var exactTypes = map[int64]bool{
	unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true, unix.TMPFS_MAGIC: true,
	unix.OVERLAYFS_SUPER_MAGIC: true, unix.EROFS_SUPER_MAGIC_V1: true, unix.SQUASHFS_MAGIC: true,
}

// swapCase exchanges upper and lower case of the first ASCII letter. If
// a directory has both names it does not fold cases, and if it finds one that
// it did not list, it does.
func swapCase(name string) string {
	for i := 0; i < len(name); i++ {
		if c := name[i] | 0x20; 'a' <= c && c <= 'z' {
			return name[:i] + string(name[i]^0x20) + name[i+1:]
		}
	}
	return name
}
