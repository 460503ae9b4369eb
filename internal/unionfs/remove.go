//go:build linux

package unionfs

import (
	"golang.org/x/sys/unix"
)

// victim is a name that is about to go, resolved with its directory locked.
type victim struct {
	f     found
	w     *Branch // where the removal is written
	in    *inst   // the directory's instance there
	upper bool    // the entry itself lies on w
}

// errRetry says that the directory had to be copied up without its lock.
const errRetry = unix.ERESTART

// victim resolves name in dir, which is locked. need is the branch on which
// the directory must be made before it is tried again, if errRetry.
func (fs *FS) victim(dir *Node, name string, v *victim) (need *Branch, err error) {
	if dir.isDead() {
		return nil, unix.ENOENT
	}
	if err := fs.resolve(dir, name, true, &v.f); err != nil {
		return nil, err
	}
	if v.f.top == nil {
		return nil, unix.ENOENT
	}
	if v.w = fs.writeBranch(v.f.top.br); v.w == nil {
		return nil, unix.EROFS
	}
	if v.in = dir.instOn(v.w); v.in == nil {
		return v.w, errRetry
	}
	v.upper = v.f.top.br == v.w
	return nil, nil
}

func (fs *FS) remove(dir *Node, name string, do func(*victim) error) error {
	if err := fs.checkName(name); err != nil {
		return err
	}
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	for {
		var v victim
		dir.mu.Lock()
		need, err := fs.victim(dir, name, &v)
		if err == nil {
			err = do(&v)
			dir.touched()
		}
		v.f.close()
		dir.mu.Unlock()
		if err != errRetry {
			return errno(err)
		}
		if _, err := fs.ensureUpper(dir, need); err != nil {
			return errno(err)
		}
	}
}

// Unlink removes a name of a non-directory.
func (fs *FS) Unlink(dir *Node, name string) error {
	return fs.remove(dir, name, func(v *victim) error {
		if v.f.isDir() {
			return unix.EISDIR
		}
		fd, err := v.in.pin()
		if err != nil {
			return err
		}
		defer v.in.unpin()
		if v.f.below || !v.upper {
			fs.stats.Whiteouts.Add(1)
			fs.hideMu.RLock()
			defer fs.hideMu.RUnlock()
			err = fs.format.Hide(v.w, fd, name, v.upper, false)
		} else {
			err = unix.Unlinkat(fd, name, 0)
		}
		if err == nil {
			fs.unnamed(dir, name, &v.f, v.upper)
		}
		return err
	})
}

// unnamed records that a non-directory lost a name.
func (fs *FS) unnamed(dir *Node, name string, f *found, upper bool) {
	k := keyOf(&f.st)
	left := uint32(f.st.Nlink) - 1
	fs.tabMu.Lock()
	n := dir.kids[name]
	p := fs.plinks[k]
	if p == nil {
		p = fs.plinkUp[k]
	}
	if n != nil && !n.IsDir() && n.key != k && (p == nil || n.plink != p) {
		n = nil // another file, removed directly
	}
	if p != nil {
		p.nlink--
		left = p.nlink
	} else if !upper && f.st.Nlink > 1 {
		fs.addHidden(k)
		left = max(uint32(f.st.Nlink), fs.hid[k]) - fs.hid[k]
	}
	back := false
	if n != nil && !n.IsDir() {
		back = n.delLink(dir, name)
		if len(n.links) == 0 {
			n.dead, n.left, n.last = true, left, new(f.st)
		}
	} else if left == 0 && upper {
		delete(fs.inos, k)
	}
	gone := p != nil && p.nlink == 0
	fs.tabMu.Unlock()
	if gone {
		fs.dropPlink(p)
	}
	if back {
		fs.Forget(dir, 1)
	}
}

// Rmdir removes a directory that has no entries in the union.
func (fs *FS) Rmdir(dir *Node, name string) error {
	return fs.remove(dir, name, func(v *victim) error {
		if !v.f.isDir() {
			return unix.ENOTDIR
		}
		var st unix.Stat_t
		below, upper := v.f.below, v.upper
		n, err := fs.attach(dir, name, &v.f, &st)
		if err != nil {
			return err
		}
		defer fs.Forget(n, 1)
		n.mu.Lock()
		defer n.mu.Unlock()
		if err := fs.emptyDir(n); err != nil {
			return err
		}
		fd, err := v.in.pin()
		if err != nil {
			return err
		}
		defer v.in.unpin()
		if below || !upper {
			fs.stats.Whiteouts.Add(1)
			err = fs.format.Hide(v.w, fd, name, upper, true)
		} else {
			err = dispose(fd, name, true)
		}
		if err == nil {
			fs.dirGone(dir, name, n, &st)
		}
		return err
	})
}

func (fs *FS) emptyDir(n *Node) error {
	l, err := fs.listLocked(n)
	if err != nil {
		return err
	}
	if len(l.ents) > 0 {
		return unix.ENOTEMPTY
	}
	return nil
}

// dirGone records that a directory was removed.
func (fs *FS) dirGone(dir *Node, name string, n *Node, st *unix.Stat_t) {
	fs.tabMu.Lock()
	back := n.parent == dir
	if dir.kids[name] == n {
		delete(dir.kids, name)
	}
	for _, i := range n.insts {
		delete(fs.inos, i.key)
	}
	is := n.insts
	n.parent, n.dead, n.last, n.insts = nil, true, new(*st), nil
	n.last.Nlink = 0
	fs.tabMu.Unlock()
	for _, i := range is {
		i.drop()
	}
	if fs.watch != nil {
		fs.watch.Remove(n)
	}
	if back {
		fs.Forget(dir, 1)
	}
}
