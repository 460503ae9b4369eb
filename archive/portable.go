package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/content"
	"github.com/layerfs/layerfs/whiteout"
)

// This is the implementation for systems other than Linux: one goroutine, and
// os.Root for what may not be left. It knows merged trees only and no xattrs,
// devices and fifos. Tests run it on Linux, too, beside the other one.

// portable is one Apply.
type portable struct {
	ctx   context.Context
	opts  *ApplyOptions
	p     *parser
	root  *os.Root
	made  map[string]bool // files of the stream
	dirs  map[string]bool // directories with something of the stream in them; true if they are in it themselves
	final []finalDir
	links []pendingPath
	skip  int64
	plnk  bool
}

type finalDir struct {
	path string
	h    *header
}

type pendingPath struct{ path, entry, target string }

func extractPortable(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (res layerfs.ApplyResult, err error) {
	if opts.Form != Merged {
		return res, &layerfs.UnsupportedError{Feature: "form " + opts.Form.String(), Reason: "not on this system"}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return res, err
	}
	defer root.Close()
	x := &portable{ctx: ctx, opts: opts, p: p, root: root, made: map[string]bool{}, dirs: map[string]bool{}}
	err = x.run()
	if x.plnk {
		if rerr := root.RemoveAll(plinkTemp); err == nil {
			err = rerr
		}
	}
	res.Skipped = x.skip
	return res, err
}

func (x *portable) run() error {
	for {
		if x.ctx.Err() != nil {
			return context.Cause(x.ctx)
		}
		h, err := x.p.next()
		if err == nil && h == nil {
			return x.end()
		}
		if err == nil {
			err = x.add(h)
		}
		if err != nil && (h != nil || x.p.named != "") {
			return entryError(x.p.named, err)
		}
		if err != nil {
			return err
		}
	}
}

func (x *portable) add(h *header) error {
	name := cleanName(h.name)
	dir, base := splitName(name)
	if strings.Contains(name, whiteout.Prefix) {
		done, renamed, err := x.reserved(dir, base)
		if done || err != nil {
			return err
		}
		if renamed != "" {
			if h.typ != typeReg {
				return nil
			}
			dir = renamed
		}
	}
	if name == "" {
		if h.typ != typeDir {
			return malformed("names the root and is no directory")
		}
		x.dirs[""] = true
		x.final = append(x.final, finalDir{".", h})
		return nil
	}
	dir, err := x.resolve(dir, true)
	if err != nil {
		return err
	}
	return x.put(path.Join(dir, base), h)
}

// reserved deals with AUFS's names. renamed is where pseudo-links are kept.
func (x *portable) reserved(dir, base string) (done bool, renamed string, err error) {
	for c := range strings.SplitSeq(dir, "/") {
		if c == whiteout.PlinkDir && dir == whiteout.PlinkDir {
			x.plnk = true
			return false, plinkTemp, nil
		}
		if whiteout.IsMeta(c) {
			return true, "", nil
		}
	}
	if base == whiteout.OpaqueName {
		if dir, err = x.resolve(dir, false); err != nil || dir == "\x00" {
			return true, "", err
		}
		return true, "", x.purge(dir)
	}
	if whiteout.IsMeta(base) {
		return true, "", nil
	}
	target, ok, err := hiddenName(base)
	if err != nil || !ok {
		return err != nil, "", err
	}
	if dir, err = x.resolve(dir, false); err != nil || dir == "\x00" {
		return true, "", err
	}
	p := path.Join(dir, target)
	own, kept := x.dirs[p]
	switch {
	case x.made[p]:
		return true, "", nil
	case kept:
		if !own {
			if err := x.setAttrs(p, &header{typ: typeDir, mode: 0o755}); err != nil {
				return true, "", err
			}
		}
		return true, "", x.purge(p)
	}
	return true, "", x.root.RemoveAll(p)
}

// resolve returns a directory as a path without links, "" for the root, and
// "\x00" if there is none and create is not set.
func (x *portable) resolve(dir string, create bool) (string, error) {
	at, links := "", 0
	for dir != "" {
		var c string
		c, dir, _ = strings.Cut(dir, "/")
		switch c {
		case "", ".":
			continue
		case "..":
			if at, _ = splitName(at); at == "." {
				at = ""
			}
			continue
		}
		next := path.Join(at, c)
		st, err := x.root.Lstat(next)
		switch {
		case err == nil && st.IsDir():
			at = next
			continue
		case err == nil && st.Mode()&fs.ModeSymlink != 0:
			target, err := x.root.Readlink(next)
			if err != nil {
				return "", err
			}
			if links++; links > maxLinks {
				return "", malformed("path goes through more than %d links", maxLinks)
			}
			if strings.HasPrefix(target, "/") {
				at = ""
			}
			if dir = target + "/" + dir; len(dir) > 1<<16 {
				return "", overLimit("path expands to more than 64 KiB")
			}
			continue
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
		if !create {
			return "\x00", nil
		}
		if err == nil {
			if err := x.clear(next); err != nil {
				return "", err
			}
		}
		if err := x.root.Mkdir(next, 0o755); err != nil {
			return "", err
		}
		if err := x.setAttrs(next, &header{typ: typeDir, mode: 0o755}); err != nil {
			return "", err
		}
		at = next
	}
	return at, nil
}

func (x *portable) keep(p string) {
	for {
		dir, _ := splitName(p)
		if p == "" {
			return
		}
		p = dir
		if _, ok := x.dirs[p]; !ok {
			x.dirs[p] = false
		}
	}
}

// clear removes what is at a name, links that wait for it first.
func (x *portable) clear(p string) error {
	if err := x.makeLinks(false); err != nil {
		return err
	}
	delete(x.made, p)
	for d := range x.dirs {
		if d == p || strings.HasPrefix(d, p+"/") {
			delete(x.dirs, d)
		}
	}
	for m := range x.made {
		if strings.HasPrefix(m, p+"/") {
			delete(x.made, m)
		}
	}
	x.final = slices.DeleteFunc(x.final, func(f finalDir) bool { return f.path == p || strings.HasPrefix(f.path, p+"/") })
	return x.root.RemoveAll(p)
}

func (x *portable) put(p string, h *header) error {
	x.keep(p)
	st, err := x.root.Lstat(p)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if exists && !(st.IsDir() && h.typ == typeDir) || x.made[p] {
		if err := x.clear(p); err != nil {
			return err
		}
		exists = false
	}
	if h.typ == typeDir {
		x.dirs[p] = true
		if !exists {
			if err := x.root.Mkdir(p, 0o700); err != nil {
				return err
			}
		}
		x.final = append(x.final, finalDir{p, h})
		return nil
	}
	x.made[p] = true
	switch h.typ {
	case typeReg:
		return x.putFile(p, h)
	case typeLink:
		x.links = append(x.links, pendingPath{p, h.name, h.link})
		return nil
	case typeSymlink:
		if err := x.root.Symlink(h.link, p); err != nil {
			return err
		}
		return x.chown(p, h)
	case typeChar, typeBlock:
		if err := checkDevice(h); err != nil {
			return err
		}
		switch x.opts.Devices {
		case layerfs.DevicesSkip:
			delete(x.made, p)
			x.skip++
			return nil
		case layerfs.DevicesRefuse:
			return fmt.Errorf("device node %d:%d refused: %w", h.major, h.minor, fs.ErrPermission)
		}
	}
	return &layerfs.UnsupportedError{Feature: "device nodes and fifos", Reason: "not on this system"}
}

func (x *portable) putFile(p string, h *header) error {
	f, err := x.root.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	extents := []extent{{0, h.size}}
	if h.isSparse {
		extents = h.sparse
	}
	for err == nil && len(extents) > 0 {
		e := &extents[0]
		if e.len == 0 {
			extents = extents[1:]
			continue
		}
		var b []byte
		if b, err = x.p.pieceUpTo(e.len); err != nil {
			break
		}
		_, err = f.WriteAt(b, e.off)
		e.off, e.len = e.off+int64(len(b)), e.len-int64(len(b))
	}
	if err == nil {
		err = f.Truncate(h.size)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return x.setAttrs(p, h)
}

// pieceUpTo is piece with a limit.
func (p *parser) pieceUpTo(n int64) ([]byte, error) {
	all := p.left
	p.left = min(all, n)
	b, _, err := p.piece()
	p.left = all - int64(len(b))
	if err == nil && b == nil {
		err = malformed("less content than the map of holes has")
	}
	return b, err
}

func (x *portable) chown(p string, h *header) error {
	if x.opts.IgnoreOwners || !hasOwners {
		return nil
	}
	if h.uid < 0 || h.uid >= 1<<32-1 || h.gid < 0 || h.gid >= 1<<32-1 {
		return malformed("owner %d:%d is out of range", h.uid, h.gid)
	}
	uid, gid, ok := x.opts.IDMap.ToHost(uint32(h.uid), uint32(h.gid))
	if !ok {
		return fmt.Errorf("owner %d:%d is not mapped: %w", h.uid, h.gid, fs.ErrInvalid)
	}
	if int(uid) == os.Geteuid() && int(gid) == os.Getegid() {
		if st, err := x.root.Lstat(p); err == nil {
			if u, g, _, _ := fileIDs(st); u == uid && g == gid {
				return nil
			}
		}
	}
	return x.root.Lchown(p, int(uid), int(gid))
}

// setAttrs sets what files other than links have.
func (x *portable) setAttrs(p string, h *header) error {
	if err := x.chown(p, h); err != nil {
		return err
	}
	mode := fs.FileMode(h.mode & 0o777)
	for bit, m := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if h.mode&bit != 0 {
			mode |= m
		}
	}
	if err := x.root.Chmod(p, mode); err != nil {
		return err
	}
	for _, a := range h.xattrs {
		err := &layerfs.UnsupportedError{Feature: "xattr " + shorten(a.name), Reason: "not on this system"}
		if x.opts.Lost == nil {
			return err
		}
		x.opts.Lost(&EntryError{h.name, err})
	}
	if h.name == "" && h.mtime == (stamp{}) {
		return nil // an implied directory
	}
	mtime := time.Unix(h.mtime.sec, h.mtime.nsec)
	atime := mtime
	if h.hasAtime {
		atime = time.Unix(h.atime.sec, h.atime.nsec)
	}
	return x.root.Chtimes(p, atime, mtime)
}

// purge removes what is not of the stream.
func (x *portable) purge(dir string) error {
	names, err := x.list(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		p := path.Join(dir, name)
		own, kept := x.dirs[p]
		switch {
		case x.made[p] || p == plinkTemp:
		case kept:
			if !own {
				if err := x.setAttrs(p, &header{typ: typeDir, mode: 0o755}); err != nil {
					return err
				}
			}
			if err := x.purge(p); err != nil {
				return err
			}
		default:
			if err := x.root.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x *portable) list(dir string) ([]string, error) {
	f, err := x.root.Open(orDot(dir))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func orDot(p string) string {
	if p == "" {
		return "."
	}
	return p
}

func (x *portable) end() error {
	if err := x.makeLinks(true); err != nil {
		return err
	}
	// The deepest first; of two entries for one directory the later one last.
	slices.SortStableFunc(x.final, func(a, b finalDir) int { return strings.Count(b.path, "/") - strings.Count(a.path, "/") })
	for _, f := range x.final {
		if err := x.setAttrs(f.path, f.h); err != nil {
			return entryError(f.h.name, err)
		}
	}
	return nil
}

func (x *portable) makeLinks(final bool) error {
	for pass := 0; len(x.links) > 0; pass++ {
		var rest []pendingPath
		for _, l := range x.links {
			err := x.makeLink(l)
			if errors.Is(err, fs.ErrNotExist) {
				rest = append(rest, l)
				continue
			}
			if err != nil {
				return entryError(l.entry, err)
			}
		}
		if final && (len(rest) == len(x.links) || pass == maxLinkPasses) {
			return entryError(rest[0].entry, malformed("target of the hard link does not exist: %w", fs.ErrNotExist))
		}
		slices.Reverse(rest)
		x.links = rest
		if !final {
			return nil
		}
	}
	return nil
}

func (x *portable) makeLink(l pendingPath) error {
	dir, base := splitName(cleanName(l.target))
	if dir == whiteout.PlinkDir && x.plnk {
		dir = plinkTemp
	}
	dir, err := x.resolve(dir, false)
	if err != nil {
		return err
	}
	target := path.Join(dir, base)
	st, err := fs.FileInfo(nil), error(fs.ErrNotExist)
	if dir != "\x00" && base != "" {
		st, err = x.root.Lstat(target)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return malformed("target of the hard link does not exist: %w", fs.ErrNotExist)
	}
	if err != nil {
		return err
	}
	if st.IsDir() {
		return malformed("hard link to the directory %s", shorten(target))
	}
	if target == l.path {
		return nil
	}
	return x.root.Link(target, l.path)
}

// portablePacker is one Write.
type portablePacker struct {
	ctx     context.Context
	opts    *WriteOptions
	sh      *shaper
	s       *sink
	root    *os.Root
	links   map[inodeID]string
	skipped int64
}

type inodeID struct{ dev, ino uint64 }

func packPortable(ctx context.Context, s *sink, dir string, opts *WriteOptions, pl plan, sh *shaper) (WriteResult, error) {
	if pl.form != Merged {
		return WriteResult{}, &layerfs.UnsupportedError{Feature: "form " + pl.form.String(), Reason: "not on this system"}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return WriteResult{}, err
	}
	defer root.Close()
	p := &portablePacker{ctx, opts, sh, s, root, map[inodeID]string{}, 0}
	if pl.changes == nil {
		err = p.writeTree("")
	} else {
		err = p.writeChanges(pl)
	}
	return WriteResult{Skipped: p.skipped}, err
}

func (p *portablePacker) writeTree(name string) error {
	isDir, err := p.writeOne(name)
	if err != nil || !isDir {
		return entryError(name, err)
	}
	f, err := p.root.Open(orDot(name))
	if err != nil {
		return entryError(name, err)
	}
	names, err := f.Readdirnames(-1)
	_ = f.Close()
	if err != nil {
		return entryError(name, err)
	}
	slices.Sort(names)
	for _, n := range names {
		if whiteout.IsReserved(n) {
			return &EntryError{path.Join(name, n), malformed("name is reserved for whiteouts")}
		}
		if err := p.writeTree(path.Join(name, n)); err != nil {
			return err
		}
	}
	return nil
}

func (p *portablePacker) writeChanges(pl plan) error {
	written := map[string]bool{"": true} // ancestors of the present path
	prev := ""
	for c, err := range pl.changes {
		if err != nil {
			return err
		}
		if c.Path == "" || c.Path[0] != '/' || path.Clean(c.Path) != c.Path {
			return fmt.Errorf("change %q: path is not absolute and clean", c.Path)
		}
		if prev != "" && layerfs.ComparePaths(prev, c.Path) >= 0 {
			return fmt.Errorf("changes are not in order: %q after %q", c.Path, prev)
		}
		prev = c.Path
		name := c.Path[1:]
		for w := range written {
			if w != "" && name != w && !strings.HasPrefix(name, w+"/") {
				delete(written, w)
			}
		}
		dir, base := splitName(name)
		for i := range len(dir) + 1 {
			if i < len(dir) && dir[i] != '/' || written[dir[:i]] {
				continue
			}
			written[dir[:i]] = true
			if _, err := p.writeOne(dir[:i]); err != nil {
				return entryError(dir[:i], err)
			}
		}
		if c.Kind == layerfs.Deleted {
			h, err := whiteoutHeader(dir, base)
			if err != nil {
				return entryError(name, err)
			}
			p.s.entries.Add(1)
			if err := p.s.write(appendHeader(nil, h)); err != nil {
				return err
			}
			continue
		}
		if whiteout.IsReserved(base) {
			return &EntryError{name, malformed("name is reserved for whiteouts")}
		}
		if name != "" {
			written[name] = true
		}
		if _, err := p.writeOne(name); err != nil {
			return entryError(name, err)
		}
	}
	return nil
}

func (p *portablePacker) writeOne(name string) (isDir bool, err error) {
	if p.ctx.Err() != nil {
		return false, context.Cause(p.ctx)
	}
	st, err := p.root.Lstat(orDot(name))
	if err != nil {
		return false, err
	}
	h := &header{name: orDot(name), mode: uint32(st.Mode().Perm()), mtime: stampOf(st.ModTime())}
	for m, bit := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if st.Mode()&m != 0 {
			h.mode |= bit
		}
	}
	uid, gid, id, nlink := fileIDs(st)
	h.uid, h.gid = int64(uid), int64(gid)
	if err := p.sh.shape(h); err != nil {
		return false, err
	}
	switch st.Mode().Type() {
	case fs.ModeDir:
		h.typ = typeDir
		h.name += "/"
		isDir = true
	case fs.ModeSymlink:
		h.typ = typeSymlink
		if h.link, err = p.root.Readlink(name); err != nil {
			return false, err
		}
	case 0:
		h.typ = typeReg
		h.size, h.stored = st.Size(), st.Size()
		if first, ok := p.links[id]; nlink > 1 && ok {
			h.typ, h.link, h.size, h.stored = typeLink, first, 0, 0
		} else if nlink > 1 {
			p.links[id] = h.name
		}
	case fs.ModeSocket:
		p.skipped++
		return false, nil
	default:
		return false, &layerfs.UnsupportedError{Feature: "device nodes and fifos", Reason: "not on this system"}
	}
	p.s.entries.Add(1)
	if err := p.s.write(appendHeader(nil, h)); err != nil || h.stored == 0 {
		return isDir, err
	}
	f, err := p.root.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return false, p.copyContent(f, h.stored)
}

func (p *portablePacker) copyContent(f *os.File, size int64) error {
	buf := make([]byte, min(chunkSize, size))
	for left := size; left > 0; {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		n, err := f.Read(buf[:min(left, int64(len(buf)))])
		if err == io.EOF {
			return errShrunk
		}
		if err != nil {
			return err
		}
		if err := p.s.write(buf[:n]); err != nil {
			return err
		}
		p.s.content.Add(int64(n))
		left -= int64(n)
	}
	return p.s.write(appendPadding(nil, int(size%blockSize)))
}

var errShrunk = errors.New("became shorter while it was read")

// comparePortable is Compare: a plain double walk.
func comparePortable(ctx context.Context, oldDir, newDir string, opts *CompareOptions, yield func(layerfs.Change) bool) error {
	oldRoot, err := os.OpenRoot(oldDir)
	if err != nil {
		return err
	}
	defer oldRoot.Close()
	newRoot, err := os.OpenRoot(newDir)
	if err != nil {
		return err
	}
	defer newRoot.Close()
	c := &portableComparer{ctx, opts, oldRoot, newRoot, yield}
	return c.compare("", true)
}

type portableComparer struct {
	ctx              context.Context
	opts             *CompareOptions
	oldRoot, newRoot *os.Root
	yield            func(layerfs.Change) bool
}

func (c *portableComparer) emit(p string, k layerfs.Kind) error {
	if !c.yield(layerfs.Change{Path: "/" + p, Kind: k}) {
		return errStopped
	}
	return nil
}

func (c *portableComparer) names(root *os.Root, p string) ([]string, error) {
	f, err := root.Open(orDot(p))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// compare yields what is at p and below; withOld says that the old tree has
// something there.
func (c *portableComparer) compare(p string, withOld bool) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	b, err := c.newRoot.Lstat(orDot(p))
	if err != nil {
		return err
	}
	var a fs.FileInfo
	if withOld {
		if a, err = c.oldRoot.Lstat(orDot(p)); err != nil {
			return err
		}
		differ, err := c.differ(p, a, b)
		if err != nil {
			return entryError(p, err)
		}
		if differ {
			if err := c.emit(p, layerfs.Modified); err != nil {
				return err
			}
		}
	} else if err := c.emit(p, layerfs.Added); err != nil {
		return err
	}
	if !b.IsDir() {
		return nil
	}
	news, err := c.names(c.newRoot, p)
	if err != nil {
		return entryError(p, err)
	}
	var olds []string
	if a != nil && a.IsDir() {
		if olds, err = c.names(c.oldRoot, p); err != nil {
			return entryError(p, err)
		}
	}
	slices.Sort(news)
	slices.Sort(olds)
	all := slices.Concat(news, olds)
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		child := path.Join(p, name)
		_, inOld := slices.BinarySearch(olds, name)
		if _, inNew := slices.BinarySearch(news, name); !inNew {
			err = c.emit(child, layerfs.Deleted)
		} else {
			err = c.compare(child, inOld)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *portableComparer) differ(p string, a, b fs.FileInfo) (bool, error) {
	ua, ga, _, _ := fileIDs(a)
	ub, gb, _, _ := fileIDs(b)
	switch {
	case os.SameFile(a, b):
		return false, nil
	case a.Mode() != b.Mode() || !a.ModTime().Equal(b.ModTime()) || ua != ub || ga != gb:
		return true, nil
	case a.Mode()&fs.ModeSymlink != 0:
		s, err := c.oldRoot.Readlink(p)
		if err != nil {
			return false, err
		}
		t, err := c.newRoot.Readlink(p)
		return s != t, err
	case !a.Mode().IsRegular():
		return false, nil
	case a.Size() != b.Size():
		return true, nil
	case c.opts.Content == ContentTrustTimes || a.Size() == 0:
		return false, nil
	}
	f, err := c.oldRoot.Open(p)
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := c.newRoot.Open(p)
	if err != nil {
		return false, err
	}
	defer g.Close()
	same, err := content.Equal(c.ctx, f, g)
	return !same, err
}
