package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/safepath"
	"github.com/layerfs/layerfs/whiteout"
)

// extractor is one Apply on Linux. The goroutine of the parser finds out what
// an entry means, makes directories and whiteouts, and hands all else to
// workers; hard links and the attributes of directories come last.
type extractor struct {
	ctx  context.Context
	opts *ApplyOptions
	form whiteout.Form
	p    *parser
	w    *workers
	dirs dirs

	lowers []lowerLayer

	euid, egid uint32
	umask      uint32

	links     []pendingLink
	linked    int  // links before this one were tried and have no target yet
	linking   bool // in makeLinks
	finish    []*node
	rootMarks bool // the root is opaque
	plinks    *node
	skipped   int64

	// Where the entry before was; most have the same directory.
	lastDir  string
	lastNode *node

	failed atomic.Bool
	mu     sync.Mutex
	err    error // first of the workers, guarded by mu

	lostMu sync.Mutex // for opts.Lost
}

type pendingLink struct {
	dir    *node
	name   string
	entry  string
	target string
}

func extract(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (layerfs.ApplyResult, error) {
	if opts.portable {
		return extractPortable(ctx, p, dir, opts)
	}
	return extractLinux(ctx, p, dir, opts)
}

func extractLinux(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (res layerfs.ApplyResult, err error) {
	umask, err := readUmask()
	if err != nil {
		return res, err
	}
	x := &extractor{
		ctx: ctx, opts: opts, form: opts.Form, p: p,
		euid: uint32(unix.Geteuid()), egid: uint32(unix.Getegid()), umask: umask,
	}
	fd, err := ignoringEINTR(func() (int, error) {
		return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return res, pathError("open", dir, err)
	}
	limit := opts.fdCapacity
	if limit == 0 {
		limit = 256
	}
	x.dirs.init(fd, limit)
	defer x.dirs.closeAll()
	defer func() {
		for _, l := range x.lowers {
			_ = l.root.Close()
		}
	}()
	for _, l := range opts.Lowers {
		root, err := safepath.OpenRoot(l, &safepath.Options{NoOpenat2: opts.noOpenat2})
		if err != nil {
			return res, err
		}
		x.lowers = append(x.lowers, lowerLayer{root})
	}
	if err := x.inspect(x.dirs.root); err != nil {
		x.relock()
		return res, err
	}
	n := opts.Workers
	if n == 0 {
		n = min(runtime.GOMAXPROCS(0), 8)
	}
	x.w = newWorkers(x, n)
	p.onWait = x.w.onWait
	err = x.run()
	x.w.close()
	if x.plinks != nil {
		if rerr := removeAll(x.dirs.root.fd.fd, plinkTemp); rerr != nil && err == nil {
			err = pathError("unlinkat", plinkTemp, rerr)
		}
	}
	if werr := x.workerError(); werr != nil {
		err = werr
	}
	if err != nil {
		x.relock()
	}
	res.Skipped = x.skipped
	return res, err
}

func (x *extractor) workerError() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

func (x *extractor) fail(err error) {
	x.mu.Lock()
	if x.err == nil {
		x.err = err
	}
	x.mu.Unlock()
	x.failed.Store(true)
}

func (x *extractor) lost(entry string, err error) {
	x.lostMu.Lock()
	defer x.lostMu.Unlock()
	x.opts.Lost(&EntryError{entry, err})
}

func (x *extractor) run() error {
	for {
		if x.failed.Load() {
			return nil // workerError has it
		}
		if err := x.ctx.Err(); err != nil {
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

func (x *extractor) add(h *header) error {
	name := cleanName(h.name)
	dir, base := splitName(name)
	if strings.HasPrefix(base, whiteout.Prefix) || strings.Contains(name, whiteout.Prefix) {
		done, err := x.reserved(h, name, dir, base)
		if done || err != nil {
			return err
		}
	}
	if name == "" {
		if h.typ != typeDir {
			return malformed("names the root and is no directory")
		}
		return x.replaceDirAttrs(x.dirs.root, h)
	}
	uid, gid, err := x.owner(h)
	if err != nil {
		return err
	}
	n, err := x.makeDir(dir)
	if err != nil {
		return err
	}
	return x.put(n, base, h, uid, gid)
}

// put makes an entry in a directory that exists.
func (x *extractor) put(n *node, base string, h *header, uid, gid uint32) error {
	n.keep()
	x.touch(n)
	if h.typ == typeDir {
		return x.putDir(n, base, h, uid, gid)
	}
	if err := x.clear(n, base); err != nil {
		return err
	}
	if x.form == whiteout.AUFS && n.old {
		if _, err := x.unhide(n, base); err != nil {
			return err
		}
	}
	switch h.typ {
	case typeLink:
		x.links = append(x.links, pendingLink{n, base, h.name, h.link})
		n.setMade(base, madeFile)
		return nil
	case typeChar, typeBlock:
		if err := checkDevice(h); err != nil {
			return err
		}
		switch x.opts.Devices {
		case layerfs.DevicesSkip:
			x.skipped++
			return nil
		case layerfs.DevicesRefuse:
			return fmt.Errorf("device node %d:%d refused: %w", h.major, h.minor, fs.ErrPermission)
		case layerfs.DevicesRecord:
			h = recordDevice(h, uint32(h.uid), uint32(h.gid))
		default:
			if h.typ == typeChar && h.major == 0 && h.minor == 0 && isOverlay(x.form) {
				err := errors.New("character device 0:0 would be a whiteout")
				if x.opts.Lost == nil {
					return &layerfs.UnsupportedError{Feature: "character device 0:0 in an overlay layer", Reason: "it would be a whiteout"}
				}
				x.lost(h.name, err)
				return nil
			}
		}
	}
	n.setMade(base, madeFile)
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	t := task{dir: d, name: base, h: h, uid: uid, gid: gid, special: n.special, defACL: n.defACL}
	if h.typ == typeReg && h.stored > 0 {
		return x.addContent(t)
	}
	x.w.add(t)
	return nil
}

// addContent takes the body of a file and has it written.
func (x *extractor) addContent(t task) error {
	if t.h.stored <= smallFile {
		for {
			b, c, err := x.p.piece()
			if err != nil {
				for _, p := range t.pieces {
					p.c.release()
				}
				return err
			}
			if b == nil {
				x.w.add(t)
				return nil
			}
			c.retain()
			t.pieces = append(t.pieces, piece{b, c})
		}
	}
	x.w.flush() // what waits in the batch must not hold chunks meanwhile
	t.dir.retain()
	f := &bigFile{task: t}
	for {
		b, c, err := x.p.piece()
		if b == nil || err != nil {
			if err != nil {
				x.failed.Store(true) // nobody should go on with the file
				x.mu.Lock()
				if x.err == nil {
					x.err = entryError(t.h.name, err)
				}
				x.mu.Unlock()
			}
			x.w.feed(f, piece{}, true)
			return err
		}
		c.retain()
		x.w.feed(f, piece{b, c}, false)
	}
}

// clear removes what this Apply, or a look-up of it, knows to be at a name.
// What else is there is removed when the new entry turns out to collide.
func (x *extractor) clear(n *node, base string) error {
	if c := n.child(base); c != nil {
		if err := x.settle(); err != nil {
			return err
		}
		x.dirs.kill(c)
		x.lastNode = nil
		if c.upper {
			return x.remove(n, base)
		}
		return nil
	}
	switch n.made[base] {
	case madeWhiteout:
		delete(n.made, base)
		return x.removeWhiteout(n, base)
	case madeFile:
		if err := x.settle(); err != nil {
			return err
		}
		delete(n.made, base)
		return x.remove(n, base)
	}
	return nil
}

// settle waits until all that came before is in the target, links included as
// far as their targets are there.
func (x *extractor) settle() error {
	if x.linking {
		return nil
	}
	x.w.wait()
	if x.failed.Load() {
		return x.workerError()
	}
	return x.makeLinks(false)
}

func (x *extractor) remove(n *node, base string) error {
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	if err := removeAll(d.fd, base); err != nil {
		return fmt.Errorf("remove %s: %w", path.Join(n.path(), base), err)
	}
	return nil
}

// owner returns the host's ids of an entry.
func (x *extractor) owner(h *header) (uid, gid uint32, err error) {
	if x.opts.IgnoreOwners {
		return x.euid, x.egid, nil
	}
	if h.uid < 0 || h.uid >= 1<<32-1 || h.gid < 0 || h.gid >= 1<<32-1 {
		return 0, 0, malformed("owner %d:%d is out of range", h.uid, h.gid)
	}
	uid, gid, ok := x.opts.IDMap.ToHost(uint32(h.uid), uint32(h.gid))
	if !ok {
		return 0, 0, fmt.Errorf("owner %d:%d is not mapped: %w", h.uid, h.gid, unix.EINVAL)
	}
	return uid, gid, nil
}

// implied returns the attributes of a directory the stream has no entry for.
func (x *extractor) implied() (*header, uint32, uint32, error) {
	h := &header{typ: typeDir, mode: 0o755}
	uid, gid, err := x.owner(h)
	return h, uid, gid, err
}

// lookup finds a directory, through links, without making anything. The result
// is nil if it does not exist or is no directory.
func (x *extractor) lookup(dir string) (*node, error) { return x.walk(dir, false) }

// makeDir finds a directory, through links, and makes what is missing of it in
// the target: with the attributes of the lower instance, or else as
// [extractor.implied] says. Where another type of file is in the way, it is
// replaced, as a later entry would.
func (x *extractor) makeDir(dir string) (*node, error) {
	if x.lastNode != nil && x.lastDir == dir && x.lastNode.upper && !x.lastNode.dead {
		return x.lastNode, nil
	}
	n, err := x.walk(dir, true)
	if err == nil {
		x.lastDir, x.lastNode = dir, n
	}
	return n, err
}

func (x *extractor) walk(dir string, create bool) (*node, error) {
	n := x.dirs.root
	links := 0
	for dir != "" {
		var c string
		c, dir, _ = strings.Cut(dir, "/")
		switch c {
		case "", ".":
			continue
		case "..":
			if n.parent != nil {
				n = n.parent
			}
			continue
		}
		next, target, err := x.step(n, c)
		if err != nil {
			return nil, err
		}
		if target != "" {
			if links++; links > maxLinks {
				return nil, malformed("path goes through more than %d links", maxLinks)
			}
			if target[0] == '/' {
				n = x.dirs.root
			}
			if len(target)+len(dir) > 1<<16 {
				return nil, overLimit("path expands to more than 64 KiB")
			}
			dir = target + "/" + dir
			continue
		}
		if next == nil {
			if !create {
				return nil, nil
			}
			if next, err = x.makeImplied(n, c); err != nil {
				return nil, err
			}
		}
		n = next
	}
	if create {
		if err := x.ensureUpper(n); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// step looks one component up in the target, and below it in the union. It
// returns the directory, or the target of a link, or neither.
func (x *extractor) step(n *node, c string) (*node, string, error) {
	if len(c) > maxName {
		return nil, "", pathError("openat", c, unix.ENAMETOOLONG)
	}
	if child := n.child(c); child != nil {
		return child, "", nil
	}
	switch n.made[c] {
	case madeWhiteout:
		return nil, "", nil
	case madeFile:
		if err := x.settle(); err != nil { // it may be a link
			return nil, "", err
		}
	}
	if n.upper {
		d, err := x.dirs.get(n)
		if err != nil {
			return nil, "", err
		}
		fd, err := openDir(d.fd, c)
		switch err {
		case nil:
			child := n.add(&node{name: c, upper: true, hidden: n.hidden})
			x.dirs.attach(child, fd)
			return child, "", x.inspect(child)
		case unix.ENOENT:
		case unix.ENOTDIR, unix.ELOOP:
			target, err := readlinkAt(d.fd, c)
			if err == unix.EINVAL {
				return nil, "", nil // not a link
			}
			return nil, target, pathError("readlinkat", c, err)
		default:
			return nil, "", pathError("openat", path.Join(n.path(), c), err)
		}
		if x.form == whiteout.AUFS && !n.hidden {
			var st unix.Stat_t
			if len(c) <= maxAUFSName && unix.Fstatat(d.fd, whiteout.Prefix+c, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
				return nil, "", nil
			}
		}
	}
	if n.hidden || len(x.lowers) == 0 {
		return nil, "", nil
	}
	e, refs, err := x.lookupLower(n, c)
	if err != nil || e == nil {
		return nil, "", err
	}
	defer e.f.Close()
	switch e.kind {
	case 'd':
		return n.add(&node{name: c, lowers: refs, lowersOK: true}), "", nil
	case 'l':
		target, err := readlinkAt(int(e.f.Fd()), "")
		return nil, target, pathError("readlinkat", e.ref.path, err)
	}
	return nil, "", nil
}

func readlinkAt(dir int, name string) (string, error) {
	buf := make([]byte, 4096) // PATH_MAX bounds the target of a link
	n, err := ignoringEINTR(func() (int, error) { return unix.Readlinkat(dir, name, buf) })
	if err != nil {
		return "", err
	}
	if n == 0 {
		return "", unix.ENOENT
	}
	return string(buf[:n]), nil
}

// inspect learns what is special about a directory that was there before.
func (x *extractor) inspect(n *node) error {
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return pathError("fstat", n.path(), err)
	}
	n.old = true
	n.final.times = true
	n.final.atime, n.final.mtime = st.Atim, st.Mtim
	if x.euid != 0 && st.Uid == x.euid && st.Mode&0o700 != 0o700 {
		if d, err = x.unlock(n, st.Mode); err != nil {
			return err
		}
	}
	if _, ok, err := getXattr(d.fd, aclDefault); err != nil {
		return pathError("getxattr", n.path(), err)
	} else if ok {
		n.defACL = true
	}
	n.special = n.defACL || st.Mode&unix.S_ISGID != 0
	switch {
	case isOverlay(x.form):
		v, ok, err := getXattr(d.fd, x.form.Prefix()+"opaque")
		if err != nil {
			return pathError("getxattr", n.path(), err)
		}
		if ok && v == "y" && n.parent != nil {
			n.hidden, n.opaqueX = true, true
		}
	case x.form == whiteout.AUFS:
		err := unix.Fstatat(d.fd, whiteout.OpaqueName, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && n.parent != nil {
			n.hidden, n.opaqueX = true, true
		}
	}
	return nil
}

// unlock gives the owner of a directory, who is no root, the permissions to work
// in it until the end.
func (x *extractor) unlock(n *node, mode uint32) (*dirFD, error) {
	d, err := x.dirs.get(n)
	if err != nil {
		return nil, err
	}
	if err := unix.Chmod(procPath(d.fd), mode&0o7777|0o700); err != nil {
		return nil, pathError("chmod", n.path(), err)
	}
	n.locked, n.lockedMode = true, mode&0o7777
	n.final.chmod, n.final.mode = true, n.lockedMode
	x.queue(n)
	x.dirs.closeNode(n) // may have been opened without permission to read
	return x.dirs.get(n)
}

// relock gives the directories their permissions back after a failure.
func (x *extractor) relock() {
	slices.SortStableFunc(x.finish, func(a, b *node) int { return b.depth - a.depth })
	for _, n := range x.finish {
		if !n.locked || n.dead {
			continue
		}
		if d, err := x.dirs.get(n); err == nil {
			_ = unix.Chmod(procPath(d.fd), n.lockedMode)
		}
	}
}

// touch says that the modification time of n must be set at the end.
func (x *extractor) touch(n *node) {
	n.touched = true
	x.queue(n)
}

func (x *extractor) queue(n *node) {
	if !n.queued {
		n.queued = true
		x.finish = append(x.finish, n)
	}
}

// ensureUpper makes the directories up to n that only lower layers have, each
// with the attributes it has there.
func (x *extractor) ensureUpper(n *node) error {
	if n.upper {
		return nil
	}
	if err := x.ensureUpper(n.parent); err != nil {
		return err
	}
	refs, err := x.lowersOf(n)
	if err != nil {
		return err
	}
	if len(refs) == 0 {
		return fmt.Errorf("[bug] %s is in no layer", n.path())
	}
	h, uid, gid, err := x.lowerHeader(refs[0])
	if err != nil {
		return err
	}
	x.touch(n.parent)
	return x.mkdir(n, h, uid, gid)
}

// makeImplied makes a directory that neither the stream nor a layer has.
func (x *extractor) makeImplied(n *node, name string) (*node, error) {
	if err := x.ensureUpper(n); err != nil {
		return nil, err
	}
	h, uid, gid, err := x.implied()
	if err != nil {
		return nil, err
	}
	opaque := n.made[name] == madeWhiteout
	if err := x.clear(n, name); err != nil {
		return nil, err
	}
	if x.form == whiteout.AUFS && n.old {
		gone, err := x.unhide(n, name)
		if err != nil {
			return nil, err
		}
		opaque = opaque || gone
	}
	x.touch(n)
	child := n.add(&node{name: name, hidden: n.hidden || opaque})
	if err := x.mkdir(child, h, uid, gid); err != nil {
		return nil, err
	}
	child.final.times = false // it keeps that of its making
	if opaque {
		return child, x.markOpaque(child)
	}
	return child, nil
}

// mkdir makes a directory of the union in the target.
func (x *extractor) mkdir(n *node, h *header, uid, gid uint32) error {
	d, err := x.dirs.get(n.parent)
	if err != nil {
		return err
	}
	// The owner must be able to work in it; the rest is set at the end.
	mode := h.mode&0o777 | 0o700
	made := false
	err = retryEINTR(func() error { return unix.Mkdirat(d.fd, n.name, mode) })
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(d.fd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("fstatat", n.path(), err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			n.upper = true
			if err := x.inspect(n); err != nil {
				return err
			}
			return x.setDirAttrs(n, h, uid, gid, false)
		}
		hides := x.isWhiteout(&st, d.fd, n.name)
		if err := removeAll(d.fd, n.name); err != nil {
			return pathError("unlinkat", n.path(), err)
		}
		if err := unix.Mkdirat(d.fd, n.name, mode); err != nil {
			return pathError("mkdirat", n.path(), err)
		}
		made = true
		if hides {
			n.upper = true
			if err := x.setDirAttrs(n, h, uid, gid, true); err != nil {
				return err
			}
			return x.markOpaque(n)
		}
	} else if err != nil {
		return pathError("mkdirat", n.path(), err)
	} else {
		made = true
	}
	n.upper = true
	return x.setDirAttrs(n, h, uid, gid, made)
}

// setDirAttrs sets what can be set at once and notes the rest for the end.
// fresh says that the directory was made by us just now.
func (x *extractor) setDirAttrs(n *node, h *header, uid, gid uint32, fresh bool) error {
	chown := true
	if fresh {
		chown = n.parent.special || uid != x.euid || gid != x.egid
		n.special = n.parent.special // set-group-ID is inherited
		n.defACL = n.parent.defACL
	}
	if chown {
		if err := x.chownDir(n, uid, gid); err != nil {
			return err
		}
	}
	n.final.mode = h.mode
	n.final.chmod = !fresh || n.special || h.mode&(0o7000|x.umask) != 0 || h.mode&0o700 != 0o700
	n.final.atime, n.final.mtime = h.times()
	n.final.times = true
	x.queue(n)
	if !fresh || n.defACL {
		if err := x.dropXattrs(n, h); err != nil {
			return err
		}
		n.defACL = false
	}
	for _, a := range h.xattrs {
		name, ok, err := x.xattrName(h, a.name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if name == aclDefault {
			// Would be inherited by all that is made in it from now on.
			n.final.acl, n.final.hasACL = a.value, true
			continue
		}
		d, err := x.dirs.get(n)
		if err != nil {
			return err
		}
		err = retryEINTR(func() error { return unix.Setxattr(procPath(d.fd), name, []byte(a.value), 0) })
		if err := x.lostXattr(h, a.name, err); err != nil {
			return err
		}
	}
	return nil
}

func (x *extractor) chownDir(n *node, uid, gid uint32) error {
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	err = retryEINTR(func() error { return unix.Fchownat(d.fd, "", int(uid), int(gid), unix.AT_EMPTY_PATH) })
	return pathError("fchownat", n.path(), err)
}

// dropXattrs removes what a directory has and its new header has not.
func (x *extractor) dropXattrs(n *node, h *header) error {
	d, err := x.dirs.get(n)
	if err != nil {
		return err
	}
	proc := procPath(d.fd)
	names, err := listXattrs(nil, func(b []byte) (int, error) { return unix.Listxattr(proc, b) })
	if err != nil {
		return pathError("listxattr", n.path(), err)
	}
	for _, name := range names {
		wanted := slices.ContainsFunc(h.xattrs, func(a xattr) bool { return a.name == name && name != aclDefault })
		label := name == "security.selinux" || isOverlay(x.form) && strings.HasPrefix(name, x.form.Prefix())
		if wanted || label {
			continue
		}
		err := retryEINTR(func() error { return unix.Removexattr(proc, name) })
		if err != nil && err != unix.ENODATA {
			if err := x.lostXattr(h, name, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// putDir makes a directory of the stream, or gives one that is there the
// attributes of the entry.
func (x *extractor) putDir(n *node, base string, h *header, uid, gid uint32) error {
	if c := n.child(base); c != nil {
		c.keep()
		c.entry = true
		if c.upper {
			return x.setDirAttrs(c, h, uid, gid, false)
		}
		return x.mkdir(c, h, uid, gid)
	}
	opaque := n.made[base] == madeWhiteout
	if err := x.clear(n, base); err != nil {
		return err
	}
	if x.form == whiteout.AUFS && n.old {
		gone, err := x.unhide(n, base)
		if err != nil {
			return err
		}
		opaque = opaque || gone
	}
	c := n.add(&node{name: base, hidden: n.hidden || opaque, entry: true})
	c.keep()
	if err := x.mkdir(c, h, uid, gid); err != nil {
		return err
	}
	if opaque {
		return x.markOpaque(c)
	}
	return nil
}

// replaceDirAttrs is for the root, which always exists.
func (x *extractor) replaceDirAttrs(n *node, h *header) error {
	uid, gid, err := x.owner(h)
	if err != nil {
		return err
	}
	n.keep()
	n.entry = true
	return x.setDirAttrs(n, h, uid, gid, false)
}

// end makes what had to wait: links, marks of the root, and the attributes of
// directories, those deepest down first.
func (x *extractor) end() error {
	x.w.wait()
	if x.failed.Load() {
		return nil
	}
	if err := x.makeLinks(true); err != nil {
		return err
	}
	if x.rootMarks {
		if err := x.hideRoot(); err != nil {
			return err
		}
	}
	slices.SortStableFunc(x.finish, func(a, b *node) int { return b.depth - a.depth })
	for _, n := range x.finish {
		if n.dead || !n.upper {
			continue
		}
		if err := x.finishDir(n); err != nil {
			return err
		}
	}
	return nil
}

func (x *extractor) finishDir(n *node) error {
	f := &n.final
	if f.chmod || f.hasACL {
		d, err := x.dirs.get(n)
		if err != nil {
			return err
		}
		if f.hasACL {
			err := retryEINTR(func() error { return unix.Setxattr(procPath(d.fd), aclDefault, []byte(f.acl), 0) })
			if err := x.lostXattr(&header{name: n.path()}, aclDefault, err); err != nil {
				return err
			}
		}
		if f.chmod {
			// Through proc, as the descriptor may have been opened with O_PATH.
			err := retryEINTR(func() error { return unix.Chmod(procPath(d.fd), f.mode) })
			if err != nil {
				return pathError("chmod", n.path(), err)
			}
		}
	}
	if !f.times {
		return nil
	}
	ts := []unix.Timespec{f.atime, f.mtime}
	if n.parent == nil {
		err := retryEINTR(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(n.fd.fd), ts, 0) })
		return pathError("utimensat", "", err)
	}
	d, err := x.dirs.get(n.parent)
	if err != nil {
		return err
	}
	err = retryEINTR(func() error { return unix.UtimesNanoAt(d.fd, n.name, ts, unix.AT_SYMLINK_NOFOLLOW) })
	return pathError("utimensat", n.path(), err)
}
