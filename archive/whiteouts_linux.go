package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/whiteout"
)

// reserved deals with an entry that has a name of AUFS's somewhere in its
// path. done is false if it is an ordinary entry after all.
func (x *extractor) reserved(h *header, name, dir, base string) (done bool, err error) {
	for c := range strings.SplitSeq(dir, "/") {
		switch {
		case c == whiteout.PlinkDir && dir == whiteout.PlinkDir:
			return true, x.plink(h, base)
		case whiteout.IsMeta(c):
			return true, nil // AUFS's own, means nothing elsewhere
		case x.form == whiteout.AUFS && whiteout.IsReserved(c):
			return true, malformed("%s is a whiteout and cannot be a directory", shorten(c))
		}
	}
	if base == whiteout.OpaqueName {
		return true, x.opaque(dir)
	}
	if whiteout.IsMeta(base) {
		return true, nil
	}
	target, ok, err := hiddenName(base)
	if err != nil || !ok {
		return err != nil, err
	}
	return true, x.whiteout(dir, target)
}

// plink keeps a file that hard links of the stream refer to as
// .wh..wh.plnk/NAME.
func (x *extractor) plink(h *header, base string) error {
	if h.typ != typeReg {
		return nil
	}
	root := x.dirs.root
	if x.plinks == nil {
		d, err := x.dirs.get(root)
		if err != nil {
			return err
		}
		if err := removeAll(d.fd, plinkTemp); err != nil {
			return pathError("unlinkat", plinkTemp, err)
		}
		if err := unix.Mkdirat(d.fd, plinkTemp, 0o700); err != nil {
			return pathError("mkdirat", plinkTemp, err)
		}
		x.touch(root)
		x.plinks = root.add(&node{name: plinkTemp, upper: true, hidden: true, kept: true, entry: true})
		x.plinks.special = root.special
		x.plinks.defACL = root.defACL
	}
	uid, gid, err := x.owner(h)
	if err != nil {
		return err
	}
	if err := x.clear(x.plinks, base); err != nil {
		return err
	}
	x.plinks.setMade(base, madeFile)
	d, err := x.dirs.get(x.plinks)
	if err != nil {
		return err
	}
	t := task{dir: d, name: base, h: h, uid: uid, gid: gid, special: x.plinks.special, defACL: x.plinks.defACL}
	if h.stored > 0 {
		return x.addContent(t)
	}
	x.w.add(t)
	return nil
}

// opaque hides what was in a directory before this layer.
func (x *extractor) opaque(dir string) error {
	n, err := x.lookup(dir)
	if err != nil {
		return err
	}
	if n == nil {
		if x.form == Merged || len(x.lowers) > 0 {
			return nil // nothing there to hide
		}
		if n, err = x.makeDir(dir); err != nil {
			return err
		}
	}
	x.lastNode = nil
	if err := x.purge(n); err != nil {
		return err
	}
	if x.form == Merged {
		return nil
	}
	if n.parent == nil {
		// Neither overlayfs nor AUFS looks for the mark at the root of a
		// layer; what is there is hidden name by name at the end.
		n.hidden, x.rootMarks = true, true
		x.hideChildren(n)
		return nil
	}
	if n.hidden {
		return nil
	}
	if err := x.ensureUpper(n); err != nil {
		return err
	}
	return x.markOpaque(n)
}

// markOpaque records that nothing of the lower layers shows in n.
func (x *extractor) markOpaque(n *node) error {
	n.hidden = true
	x.hideChildren(n)
	if n.opaqueX || x.form == Merged {
		return nil
	}
	n.opaqueX = true
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	x.touch(n)
	if x.form == whiteout.AUFS {
		return x.emptyFile(d.fd, whiteout.OpaqueName)
	}
	err = retryEINTR(func() error { return unix.Setxattr(procPath(d.fd), x.form.Prefix()+"opaque", []byte("y"), 0) })
	return pathError("setxattr", n.path(), err)
}

// hideChildren makes known directories below n agree with n being hidden.
func (x *extractor) hideChildren(n *node) {
	for _, c := range n.children {
		if !c.upper {
			x.dirs.kill(c)
			continue
		}
		c.hidden = true
		x.hideChildren(c)
	}
}

// emptyFile makes an AUFS whiteout or mark; 0444 is what AUFS gives them.
func (x *extractor) emptyFile(dir int, name string) error {
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o444)
	})
	if err != nil {
		return pathError("openat", name, err)
	}
	return pathError("close", name, unix.Close(fd))
}

// whiteout hides what was at a name before this layer.
func (x *extractor) whiteout(dir, base string) error {
	n, err := x.lookup(dir)
	if err != nil {
		return err
	}
	if n == nil {
		if x.form == Merged || len(x.lowers) > 0 {
			return nil // nothing there to hide
		}
		if n, err = x.makeDir(dir); err != nil {
			return err
		}
	}
	if n.made[base] != 0 {
		return nil // an entry of this layer hides it anyhow
	}
	x.lastNode = nil
	if c := n.child(base); c != nil && c.kept {
		if err := x.purge(c); err != nil {
			return err
		}
		if !c.entry {
			if err := x.reset(c); err != nil {
				return err
			}
		}
		if n.hidden || x.form == Merged {
			return nil
		}
		return x.markOpaque(c)
	} else if c != nil {
		x.dirs.kill(c)
	}
	if n.upper {
		x.touch(n)
		if err := x.remove(n, base); err != nil {
			return err
		}
	}
	if n.hidden || x.form == Merged {
		return nil
	}
	if x.opts.DropWhiteouts {
		e, _, err := x.lookupLower(n, base)
		if e == nil || err != nil {
			return err
		}
		_ = e.f.Close()
	}
	if err := x.ensureUpper(n); err != nil {
		return err
	}
	x.touch(n)
	n.setMade(base, madeWhiteout)
	return x.makeWhiteout(n, base)
}

func (x *extractor) makeWhiteout(n *node, base string) error {
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	switch x.form {
	case whiteout.AUFS:
		if len(base) > maxAUFSName {
			return &layerfs.UnsupportedError{
				Feature: fmt.Sprintf("whiteout of a name of %d bytes in an AUFS branch", len(base)),
				Reason:  fmt.Sprintf("it can be made for at most %d", maxAUFSName),
			}
		}
		return x.emptyFile(d.fd, whiteout.Prefix+base)
	case whiteout.Overlay, whiteout.OverlayUser:
		err := retryEINTR(func() error { return unix.Mknodat(d.fd, base, unix.S_IFCHR, 0) })
		if err == unix.EEXIST {
			return nil // another spelling of the name on a case-insensitive file system
		}
		return pathError("mknodat", path.Join(n.path(), base), err)
	}
	ns := x.form.Prefix()
	if err := x.emptyFile(d.fd, base); err != nil {
		return err
	}
	err = retryEINTR(func() error { return unix.Lsetxattr(procName(d.fd, base), ns+"whiteout", []byte("y"), 0) })
	if err != nil {
		return pathError("setxattr", path.Join(n.path(), base), err)
	}
	if !n.marked && !n.opaqueX {
		// Tells overlayfs to look for such whiteouts at all.
		n.marked = true
		err = retryEINTR(func() error { return unix.Setxattr(procPath(d.fd), ns+"opaque", []byte("x"), 0) })
	}
	return pathError("setxattr", n.path(), err)
}

// removeWhiteout removes a whiteout this Apply made.
func (x *extractor) removeWhiteout(n *node, base string) error {
	if x.form == whiteout.AUFS {
		base = whiteout.Prefix + base
	}
	return x.remove(n, base)
}

// unhide removes an AUFS whiteout that was there before: entry and whiteout at
// one name are an error to AUFS. It reports whether there was one.
func (x *extractor) unhide(n *node, base string) (bool, error) {
	if len(base) > maxAUFSName {
		return false, nil
	}
	d, err := x.dirs.get(n)
	if err != nil {
		return false, err
	}
	switch err := retryEINTR(func() error { return unix.Unlinkat(d.fd, whiteout.Prefix+base, 0) }); err {
	case nil:
		return true, nil
	case unix.ENOENT:
		return false, nil
	default:
		return false, pathError("unlinkat", whiteout.Prefix+base, err)
	}
}

// isWhiteout reports whether what is at a name of the target hides it.
func (x *extractor) isWhiteout(st *unix.Stat_t, dir int, name string) bool {
	if !isOverlay(x.form) {
		return false
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return st.Rdev == 0
	case unix.S_IFREG:
		if st.Size != 0 {
			return false
		}
		_, ok, err := readXattr(func(b []byte) (int, error) {
			return unix.Lgetxattr(procName(dir, name), x.form.Prefix()+"whiteout", b)
		})
		return ok && err == nil
	}
	return false
}

// purge removes from a directory of the target all that is not of this layer,
// whiteouts of this layer included: with nothing below they hide nothing.
func (x *extractor) purge(n *node) error {
	for _, c := range n.children {
		if !c.upper {
			x.dirs.kill(c)
		}
	}
	if !n.upper {
		return nil
	}
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	d.retain()
	defer d.release()
	names, err := readNames(d.fd)
	if err != nil {
		return pathError("getdents64", n.path(), err)
	}
	removed := false
	for _, name := range names {
		if x.form == whiteout.AUFS && name == whiteout.OpaqueName && n.opaqueX {
			continue
		}
		if c := n.child(name); c != nil {
			if !c.kept {
				x.dirs.kill(c)
			} else {
				if err := x.purge(c); err != nil {
					return err
				}
				if !c.entry {
					if err := x.reset(c); err != nil {
						return err
					}
				}
				continue
			}
		} else if n.made[name] == madeFile {
			continue
		}
		removed = true
		if err := removeAll(d.fd, name); err != nil {
			return fmt.Errorf("remove %s: %w", path.Join(n.path(), name), err)
		}
	}
	for name, m := range n.made {
		if m == madeWhiteout {
			delete(n.made, name)
		}
	}
	if removed {
		x.touch(n)
	}
	return nil
}

// reset gives a directory that was there, but is hidden by this layer, the
// attributes it would have had if it had not been there.
func (x *extractor) reset(n *node) error {
	h, uid, gid, err := x.implied()
	if err != nil {
		return err
	}
	if err := x.setDirAttrs(n, h, uid, gid, false); err != nil {
		return err
	}
	n.final.times = false
	return nil
}

// readNames lists a directory that may have been opened with O_PATH.
func readNames(dir int) ([]string, error) {
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), ".")
	defer f.Close()
	return f.Readdirnames(-1)
}

// hideRoot hides each name that the lower layers have in the root.
func (x *extractor) hideRoot() error {
	root := x.dirs.root
	root.hidden, root.lowersOK, root.lowers = false, false, nil
	seen := map[string]bool{plinkTemp: true}
	for _, l := range x.lowers {
		names, err := readNames(l.root.Fd())
		if err != nil {
			return pathError("getdents64", l.root.Name(), err)
		}
		for _, name := range names {
			if seen[name] || x.form == whiteout.AUFS && whiteout.IsReserved(name) {
				continue
			}
			seen[name] = true
			if err := x.hideName(root, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x *extractor) hideName(n *node, name string) error {
	e, _, err := x.lookupLower(n, name)
	if e == nil || err != nil {
		return err
	}
	_ = e.f.Close()
	if n.made[name] != 0 {
		return nil
	}
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	switch err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case unix.ENOENT:
		x.touch(n)
		n.setMade(name, madeWhiteout)
		return x.makeWhiteout(n, name)
	case nil:
	default:
		return pathError("fstatat", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	c, _, err := x.step(n, name)
	if err != nil || c == nil {
		return err
	}
	return x.markOpaque(c)
}

// makeLinks makes the hard links that wait. A target that does not exist may
// still come; with final it is an error. Links may have links as targets in any
// order: as long as one could be made the others are tried again, from both
// ends in turns, which does a chain in either order in two passes.
func (x *extractor) makeLinks(final bool) error {
	x.linking = true
	defer func() { x.linking = false }()
	if !final {
		rest, err := x.tryLinks(x.links[x.linked:])
		x.links = append(x.links[:x.linked], rest...)
		x.linked = len(x.links)
		return err
	}
	for pass := 0; len(x.links) > 0; pass++ {
		before := len(x.links)
		rest, err := x.tryLinks(x.links)
		if err != nil {
			return err
		}
		if len(rest) == before || pass == maxLinkPasses {
			return entryError(rest[0].entry, errNoTarget)
		}
		slices.Reverse(rest)
		x.links = rest
	}
	return nil
}

// tryLinks makes what can be made and returns the rest, in the same memory.
func (x *extractor) tryLinks(links []pendingLink) (rest []pendingLink, err error) {
	rest = links[:0]
	for i, l := range links {
		if i%64 == 0 && x.ctx.Err() != nil {
			return rest, context.Cause(x.ctx)
		}
		if l.dir.dead {
			continue
		}
		err := x.makeLink(l)
		if errors.Is(err, errNoTarget) {
			rest = append(rest, l)
			continue
		}
		if err != nil {
			return rest, entryError(l.entry, err)
		}
	}
	return rest, nil
}

var errNoTarget = malformed("target of the hard link does not exist: %w", unix.ENOENT)

func (x *extractor) makeLink(l pendingLink) error {
	target := cleanName(l.target)
	dir, base := splitName(target)
	if target == "" {
		return malformed("hard link to the root")
	}
	var tn *node
	if dir == whiteout.PlinkDir && x.plinks != nil {
		tn = x.plinks
	} else {
		var err error
		if tn, err = x.lookup(dir); err != nil {
			return err
		}
	}
	if tn == nil || tn.made[base] == madeWhiteout {
		return errNoTarget
	}
	if tn.child(base) != nil {
		return malformed("hard link to the directory %s", shorten(target))
	}
	if err := x.ensureLinkTarget(tn, base); err != nil {
		return err
	}
	from, err := x.dirs.get(tn)
	if err != nil {
		return err
	}
	from.retain()
	defer from.release()
	to, err := x.dirs.get(l.dir)
	if err != nil {
		return err
	}
	link := func() error { return unix.Linkat(from.fd, base, to.fd, l.name, 0) }
	err = retryEINTR(link)
	if err == unix.EEXIST {
		var a, b unix.Stat_t
		if unix.Fstatat(from.fd, base, &a, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			unix.Fstatat(to.fd, l.name, &b, unix.AT_SYMLINK_NOFOLLOW) == nil && a.Dev == b.Dev && a.Ino == b.Ino {
			return nil // a link to itself
		}
		if err := removeAll(to.fd, l.name); err != nil {
			return pathError("unlinkat", l.name, err)
		}
		err = retryEINTR(link)
	}
	if err == unix.ENOENT {
		return errNoTarget
	}
	return pathError("linkat", l.name, err)
}

// ensureLinkTarget sees to it that base is in the target directory; a file of
// a lower layer is copied.
func (x *extractor) ensureLinkTarget(n *node, base string) error {
	if n.upper {
		d, err := x.dirs.get(n)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Fstatat(d.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
			return malformed("hard link to the directory %s", shorten(base))
		case err == nil && x.isWhiteout(&st, d.fd, base):
			return errNoTarget
		case err == nil:
			return nil
		case err != unix.ENOENT:
			return pathError("fstatat", base, err)
		}
		if x.form == whiteout.AUFS && len(base) <= maxAUFSName && unix.Fstatat(d.fd, whiteout.Prefix+base, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			return errNoTarget
		}
	}
	e, _, err := x.lookupLower(n, base)
	if err != nil {
		return err
	}
	if e == nil {
		return errNoTarget
	}
	defer e.f.Close()
	if e.kind == 'd' {
		return malformed("hard link to the directory %s", shorten(base))
	}
	if err := x.ensureUpper(n); err != nil {
		return err
	}
	x.touch(n)
	return x.copyUp(e, n, base)
}

// lowerHeader describes a directory of a lower layer as a stream would.
func (x *extractor) lowerHeader(ref lowerRef) (*header, uint32, uint32, error) {
	e, err := x.lowerLstat(ref)
	if err == nil && e == nil {
		err = pathError("openat2", ref.path, unix.ENOENT)
	}
	if err != nil {
		return nil, 0, 0, err
	}
	defer e.f.Close()
	h, err := x.describe(e)
	return h, e.st.Uid, e.st.Gid, err
}

// describe makes a header of a lower file; owners are the host's and stay out
// of it.
func (x *extractor) describe(e *lowerEntry) (*header, error) {
	h := &header{
		name: e.ref.path, mode: e.st.Mode & 0o7777, hasAtime: true,
		mtime: stamp{int64(e.st.Mtim.Sec), int64(e.st.Mtim.Nsec)},
		atime: stamp{int64(e.st.Atim.Sec), int64(e.st.Atim.Nsec)},
	}
	proc := procPath(int(e.f.Fd()))
	if e.kind == 'l' {
		return h, nil // what few xattrs links may have cannot be read through O_PATH
	}
	names, err := listXattrs(nil, func(b []byte) (int, error) { return unix.Listxattr(proc, b) })
	if err != nil {
		return nil, pathError("listxattr", e.ref.path, err)
	}
	for _, name := range names {
		shown := name
		if isOverlay(x.form) && strings.HasPrefix(name, x.form.Prefix()) {
			inner, ok := whiteout.Unescape(name)
			if !ok {
				continue // overlayfs's own
			}
			shown = inner
		}
		v, ok, err := getXattr(int(e.f.Fd()), name)
		if err != nil {
			return nil, pathError("getxattr", e.ref.path, err)
		}
		if ok {
			h.xattrs = append(h.xattrs, xattr{shown, v})
		}
	}
	return h, nil
}

// copyUp copies a file of a lower layer into the target.
func (x *extractor) copyUp(e *lowerEntry, n *node, base string) error {
	if _, ok, err := getXattr(int(e.f.Fd()), x.form.Prefix()+"metacopy"); e.kind == 'f' && err == nil && ok {
		return &layerfs.UnsupportedError{Feature: "hard link to a file without data", Reason: "lower file has overlay.metacopy"}
	}
	h, err := x.describe(e)
	if err != nil {
		return err
	}
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	t := &task{dir: d, name: base, h: h, uid: e.st.Uid, gid: e.st.Gid, special: n.special, defACL: n.defACL}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return x.copyUpFile(e, t)
	case unix.S_IFLNK:
		h.typ = typeSymlink
		if h.link, err = readlinkAt(int(e.f.Fd()), ""); err != nil {
			return pathError("readlinkat", e.ref.path, err)
		}
	case unix.S_IFIFO:
		h.typ = typeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.typ = typeChar
		if e.st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.typ = typeBlock
		}
		h.major, h.minor = unix.Major(e.st.Rdev), unix.Minor(e.st.Rdev)
	default:
		return &layerfs.UnsupportedError{Feature: "hard link to a socket of a lower layer"}
	}
	return x.makeFile(t)
}

func (x *extractor) copyUpFile(e *lowerEntry, t *task) error {
	in, err := os.Open(procPath(int(e.f.Fd())))
	if err != nil {
		return err
	}
	defer in.Close()
	fd, err := x.createAt(t)
	if err != nil {
		return pathError("openat", t.name, err)
	}
	out := os.NewFile(uintptr(fd), t.name)
	defer out.Close()
	if unix.IoctlFileClone(fd, int(in.Fd())) != nil {
		if err := copyRanges(x, out, in, e.st.Size); err != nil {
			return err
		}
	}
	if err := x.setFileAttrs(fd, t); err != nil {
		return err
	}
	return out.Close()
}

// copyRanges copies the data of a file and leaves its holes.
func copyRanges(x *extractor, out, in *os.File, size int64) error {
	for pos := int64(0); pos < size; {
		data, err := unix.Seek(int(in.Fd()), pos, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		end := size
		if err != nil {
			data = pos // no holes known here
		} else if end, err = unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE); err != nil {
			end = size
		}
		if _, err := in.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return err
		}
		for left := end - data; left > 0; { // a step at a time, for the context
			if err := x.ctx.Err(); err != nil {
				return err
			}
			n, err := io.CopyN(out, in, min(left, 64<<20))
			if err == io.EOF {
				return out.Truncate(size)
			}
			if err != nil {
				return err
			}
			left -= n
		}
		pos = end
	}
	return out.Truncate(size)
}
