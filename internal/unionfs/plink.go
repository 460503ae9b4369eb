//go:build linux

package unionfs

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A plink stands for a hard-linked lower inode that was copied up: its other
// names still lie on the lower branch, yet mean the copy. On disk it is a link
// to the copy in the plink directory of the branch, so that the copy can be
// reached whatever happens to its names. tabMu guards nlink and node.
type plink struct {
	lower, upper key
	ino          uint64 // in the union
	br           *Branch
	name         string // in the plink directory
	nlink        uint32 // names in the union
	node         *Node  // if it is in use
}

// makePlink links the copy into the plink directory, before it has a name.
func (fs *FS) makePlink(n *Node, w *Branch, c *dup, lower key, nlink uint64) (*plink, error) {
	if w.plnk < 0 {
		return nil, nil
	}
	k := keyOf(&c.st)
	p := &plink{
		lower: lower, upper: k, ino: n.ino, br: w, nlink: uint32(nlink), node: n,
		name: strconv.FormatUint(n.ino, 10) + "." + strconv.FormatUint(k.ino, 10),
	}
	err := c.linkTo(w.plnk, p.name)
	if err == unix.EEXIST {
		// Left by a mount that was not flushed, of an inode that is gone.
		if err = unix.Unlinkat(w.plnk, p.name, 0); err == nil {
			err = c.linkTo(w.plnk, p.name)
		}
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (fs *FS) dropPlink(p *plink) {
	fs.tabMu.Lock()
	delete(fs.plinks, p.lower)
	delete(fs.plinkUp, p.upper)
	if p.node != nil {
		p.node.plink = nil
		p.node = nil
	}
	fs.tabMu.Unlock()
	if err := unix.Unlinkat(p.br.plnk, p.name, 0); err != nil {
		fs.log.Warn("remove plink", "branch", p.br.path, "name", p.name, "err", err)
	}
}

// materialise gives the copy of a plink the lower name that means it. The
// caller holds dir.mu exclusively.
func (fs *FS) materialise(p *plink, dir *Node, name string) error {
	in := dir.instOn(p.br)
	if in == nil {
		return unix.ESTALE
	}
	fd, err := in.pin()
	if err != nil {
		return err
	}
	defer in.unpin()
	restore := keepTimes(fd)
	defer restore()
	err = unix.Linkat(p.br.plnk, p.name, fd, name, 0)
	if err == unix.EEXIST {
		return nil
	}
	if err == nil {
		dir.touched()
	}
	return err
}

// FlushLinks makes real hard links on the writable branch of all names that
// are pseudo-links, so that they stay linked without this union. It reads the
// directories of the union unless all names are on the branch already.
func (fs *FS) FlushLinks() error {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	return errno(fs.flushLinks())
}

func (fs *FS) flushLinks() error {
	fs.tabMu.Lock()
	var all []*plink
	want := map[uint64]*plink{}
	for _, p := range fs.plinks {
		all = append(all, p)
	}
	fs.tabMu.Unlock()
	for _, p := range all {
		var st unix.Stat_t
		if err := fstatat(p.br.plnk, p.name, &st); err == nil && uint64(st.Nlink) <= uint64(p.nlink) {
			want[p.ino] = p
		}
	}
	if len(want) > 0 {
		if err := fs.walkLinks(fs.root, want); err != nil {
			return err
		}
	}
	for _, p := range all {
		fs.dropPlink(p)
	}
	return nil
}

func (fs *FS) walkLinks(dir *Node, want map[uint64]*plink) error {
	l, err := fs.list(dir)
	if err != nil {
		return err
	}
	for k := range l.ents {
		e := &l.ents[k]
		if e.Type == unix.DT_DIR {
			var st unix.Stat_t
			dir.mu.RLock()
			n, err := fs.lookup(dir, e.Name, &st)
			dir.mu.RUnlock()
			if err == unix.ENOENT {
				continue
			}
			if err == nil {
				if n.IsDir() {
					err = fs.walkLinks(n, want)
				}
				fs.Forget(n, 1)
			}
			if err != nil {
				return err
			}
			continue
		}
		p := want[e.Ino]
		if p == nil || e.top == nil || e.top.br == p.br {
			continue
		}
		if _, err := fs.ensureUpper(dir, p.br); err != nil {
			return err
		}
		dir.mu.Lock()
		var f found
		err := fs.resolve(dir, e.Name, false, &f)
		if err == nil && f.top != nil && keyOf(&f.st) == p.lower {
			err = fs.materialise(p, dir, e.Name)
		}
		f.close()
		dir.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// recoverLinks finishes the flush that a crash prevented.
func (fs *FS) recoverLinks() ([]Repaired, error) {
	var done []Repaired
	for _, b := range fs.stack {
		if b.plnk < 0 {
			continue
		}
		var names []string
		err := listDir(b.plnk, make([]byte, 32<<10), func(e dirent) error {
			names = append(names, e.name)
			return nil
		})
		if err != nil {
			return done, err
		}
		slices.Sort(names)
		for _, name := range names {
			p := fs.lostPlink(b, name)
			if p == nil {
				if err := removeTree(b.plnk, name); err != nil {
					return done, err
				}
				done = append(done, Repaired{b.path, whPlink + "/" + name, "removed pseudo-link of nothing"})
				continue
			}
			fs.plinks[p.lower], fs.plinkUp[p.upper] = p, p
			fs.inos[p.upper] = p.ino
			done = append(done, Repaired{b.path, whPlink + "/" + name, "made hard links"})
		}
	}
	if len(fs.plinks) == 0 {
		return done, nil
	}
	return done, fs.flushLinks()
}

// lostPlink reads the name of a pseudo-link, if this engine made it: its first
// number tells file system and inode of the lower file.
func (fs *FS) lostPlink(b *Branch, name string) *plink {
	a, c, ok := strings.Cut(name, ".")
	ino, err1 := strconv.ParseUint(a, 10, 64)
	up, err2 := strconv.ParseUint(c, 10, 64)
	var st unix.Stat_t
	if !ok || errors.Join(err1, err2) != nil || !b.crashed || fstatat(b.plnk, name, &st) != nil || st.Ino != up || st.Nlink < 2 {
		return nil
	}
	for dev, idx := range fs.devs {
		if ino>>inoBits == idx {
			return &plink{
				lower: key{dev, ino & (1<<inoBits - 1)}, upper: keyOf(&st), ino: ino, br: b, name: name,
				nlink: ^uint32(0) >> 1,
			}
		}
	}
	return nil
}
