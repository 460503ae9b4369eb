//go:build linux

package unionfs

import (
	"time"

	"golang.org/x/sys/unix"
)

// A hard-linked file of a lower branch counts names there that the union does
// not show, because a whiteout, an opaque directory or an entry above hides
// them. FS.hid says how many of a file's names are hidden. They are counted
// when the first hard-linked lower file is looked up, by reading those
// directories that lie on several branches, and kept up to date by the calls
// that hide a name. Nothing but a change of the branches shows one again.

// addHidden notes that a name of the lower file k was hidden; tabMu is held,
// and hideMu shared since before it was.
func (fs *FS) addHidden(k key) {
	if fs.hid == nil {
		fs.hid = map[key]uint32{}
	}
	fs.hid[k]++
}

// HasHidden reports whether the union hides names of n's file.
func (n *Node) HasHidden() bool {
	n.fs.tabMu.Lock()
	defer n.fs.tabMu.Unlock()
	return n.fs.hid[n.key] > 0
}

// visible is how many of nlink names the union shows; one at least, since
// whoever asks found one. Direct changes of branches are not counted.
func visible(nlink, hidden uint64) uint64 {
	if hidden >= nlink {
		return min(nlink, 1)
	}
	return nlink - hidden
}

// linked finishes a call that tells attributes: a file with several names must
// have its hidden ones counted.
func (fs *FS) linked(n *Node, st *unix.Stat_t) error {
	if n.IsDir() || fs.counted.Load() || time.Now().UnixNano() < fs.countAgain.Load() {
		return nil
	}
	if st.Nlink < 2 {
		fs.tabMu.Lock()
		hidden := fs.hid[n.key]
		fs.tabMu.Unlock()
		if hidden == 0 {
			return nil
		}
	}
	fs.countHidden()
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	return errno(fs.getAttr(n, st))
}

func (fs *FS) countHidden() {
	fs.stackMu.RLock()
	defer fs.stackMu.RUnlock()
	fs.hideMu.Lock()
	defer fs.hideMu.Unlock()
	if fs.counted.Load() {
		return
	}
	start := time.Now()
	bp := fs.bufs.Get().(*[]byte)
	defer fs.bufs.Put(bp)
	c := counter{fs: fs, buf: *bp, n: map[key]uint32{}}
	ps := make([]place, len(fs.stack))
	for i, b := range fs.stack {
		ps[i] = place{b, b.root}
	}
	if err := c.merged(ps); err != nil {
		// The numbers are too high by what could not be read.
		fs.log.Warn("count hidden links", "err", err)
	}
	fs.tabMu.Lock()
	fs.hid = c.n
	fs.tabMu.Unlock()
	fs.counted.Store(true)
	fs.countAgain.Store(time.Now().Add(countShare * time.Since(start)).UnixNano())
}

// countShare keeps a branch that changes all the time from being counted all
// the time: at most one part of so many goes into it. The numbers lag behind.
const countShare = 10

// A counter adds up hidden names.
type counter struct {
	fs  *FS
	buf []byte
	n   map[key]uint32
	fds int // open in the directories above
}

// open opens a directory, EMFILE if that would leave none for other calls:
// whoever made a branch may have made it as deep as a file system can hold.
func (c *counter) open(fd int, name string) (int, error) {
	if c.fds >= c.fs.maxFDs {
		return -1, unix.EMFILE
	}
	d, err := openDirAt(fd, name)
	if err == nil {
		c.fds++
	}
	return d, err
}

func (c *counter) close(fd int) {
	unix.Close(fd)
	c.fds--
}

type place struct {
	br *Branch
	fd int
}

// merged counts in a directory that lies at several places, top first.
func (c *counter) merged(ps []place) error {
	if len(ps) < 2 {
		return nil
	}
	seen := map[string]bool{} // what a name is above: true, a directory to merge with
	dirs := map[string][]int{}
	for k, p := range ps {
		var names []dirent
		var white []string
		err := c.fs.listBranch(p.br, p.fd, c.buf,
			func(e dirent) { names = append(names, e) }, func(w string) { white = append(white, w) })
		if err != nil {
			return err
		}
		for _, e := range names {
			dir, above := seen[e.name]
			isDir := e.typ == unix.DT_DIR
			switch {
			case !above:
				seen[e.name] = isDir
			case !dir || !isDir:
				if err := c.hidden(p.fd, e); err != nil {
					return err
				}
			}
			if isDir && (!above || dir) {
				dirs[e.name] = append(dirs[e.name], k)
			}
		}
		for _, w := range white {
			if _, above := seen[w]; !above {
				seen[w] = false
			}
		}
		if p.br.perm.Whiteouts() && k < len(ps)-1 {
			opaque, err := c.fs.format.Opaque(p.fd)
			if err != nil {
				return err
			}
			if opaque {
				for _, q := range ps[k+1:] {
					if err := c.whole(q.fd); err != nil {
						return err
					}
				}
				break
			}
		}
	}
	for name, at := range dirs {
		if len(at) < 2 {
			continue
		}
		sub := make([]place, 0, len(at))
		var err error
		for _, k := range at {
			var fd int
			if fd, err = c.open(ps[k].fd, name); err != nil {
				break
			}
			sub = append(sub, place{ps[k].br, fd})
		}
		if err == nil {
			err = c.merged(sub)
		}
		for _, s := range sub {
			c.close(s.fd)
		}
		if err != nil && err != unix.ENOENT && err != unix.ENOTDIR {
			return err
		}
	}
	return nil
}

// hidden counts an entry and what lies below it.
func (c *counter) hidden(fd int, e dirent) error {
	var st unix.Stat_t
	if e.typ == unix.DT_DIR {
		d, err := c.open(fd, e.name)
		if err != nil {
			return err
		}
		defer c.close(d)
		return c.whole(d)
	}
	if err := fstatat(fd, e.name, &st); err != nil && err != unix.ENOENT {
		return err
	} else if err == nil && st.Nlink > 1 {
		c.n[keyOf(&st)]++
	}
	return nil
}

// whole counts everything in a directory.
func (c *counter) whole(fd int) error {
	var names []dirent
	err := listDir(fd, c.buf, func(e dirent) error {
		names = append(names, e)
		return nil
	})
	for _, e := range names {
		if err == nil {
			err = c.hidden(fd, e)
		}
	}
	return err
}
