package overlay

import (
	"errors"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/whiteout"
)

// merged is the tree that overlayfs would show of a stack of layers, looked up
// in user space by the rules of the kernel (fs/overlayfs/namei.c, Linux 6.12:
// ovl_lookup, ovl_lookup_layer, ovl_lookup_single). It follows whiteouts of
// both kinds, opaque marks, redirects and metacopy, and never a symbolic link:
// what is looked up is always one component in an open directory.
type merged struct {
	roots []*os.File // of the layers, the top one first
	rules
}

// rules are how the layers say that something is gone.
type rules struct {
	prefix string // of overlayfs's own xattrs
	aufs   bool   // also by AUFS names, as fuse-overlayfs does where it cannot make devices
}

// place is a file or directory in one layer.
type place struct {
	layer int
	path  string // from the layer's root, "." for the root itself
}

// node is what the merged tree has under one name.
type node struct {
	stat   unix.Stat_t
	places []place // of a directory: all that are merged, the top one first; else one
	data   place   // of a regular file: where its content is; differs from places[0] under metacopy
}

func (n *node) isDir() bool { return n.stat.Mode&unix.S_IFMT == unix.S_IFDIR }

func openMerged(r rules, dirs []string) (_ *merged, err error) {
	m := &merged{rules: r}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	for _, d := range dirs {
		f, err := os.OpenFile(d, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		m.roots = append(m.roots, f)
	}
	return m, nil
}

func (m *merged) close() {
	for _, f := range m.roots {
		f.Close()
	}
}

// root returns the root of the tree that the layers from the given one make.
func (m *merged) root(from int) (*node, error) {
	n := new(node)
	for i := from; i < len(m.roots); i++ {
		n.places = append(n.places, place{i, "."})
		opaque, err := m.opaque(m.roots[i])
		if err != nil {
			return nil, err
		}
		if opaque {
			break
		}
	}
	if len(n.places) == 0 {
		return n, nil
	}
	if err := unix.Fstat(int(m.roots[from].Fd()), &n.stat); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: m.roots[from].Name(), Err: err}
	}
	return n, nil
}

// directory is a merged directory that is open.
type directory struct {
	m    *merged
	open []openPlace
}

type openPlace struct {
	place
	file *os.File
}

// dir opens all places of a merged directory. Only one directory of a tree is
// open at a time: with hundreds of layers each is hundreds of descriptors.
func (m *merged) dir(places []place) (*directory, error) {
	d := &directory{m: m}
	for _, p := range places {
		f, err := m.openDir(p)
		if err != nil {
			d.close()
			return nil, err
		}
		d.open = append(d.open, openPlace{p, f})
	}
	return d, nil
}

func (d *directory) close() {
	for _, o := range d.open {
		o.file.Close()
	}
}

// openDir opens a directory component by component, so that a name that was
// made a link meanwhile is an error.
func (m *merged) openDir(p place) (*os.File, error) {
	at := int(m.roots[p.layer].Fd())
	name := path.Join(m.roots[p.layer].Name(), p.path)
	var last *os.File
	for part := range strings.SplitSeq(p.path, "/") {
		fd, err := openat(at, part, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if last != nil {
			last.Close()
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat", Path: name, Err: err}
		}
		last = os.NewFile(uintptr(fd), name)
		at = fd
	}
	return last, nil
}

func openat(at int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(at, name, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// names lists the names in those places of a directory that are in layers
// above the given one, hidden ones included, sorted.
func (d *directory) names(above int) ([]string, error) {
	var all []string
	for _, o := range d.open {
		if o.layer >= above {
			break
		}
		// A second descriptor: reading moves the position of the first.
		fd, err := openat(int(o.file.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, &os.PathError{Op: "openat", Path: o.file.Name(), Err: err}
		}
		f := os.NewFile(uintptr(fd), o.file.Name())
		names, err := f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return nil, err
		}
		all = append(all, names...)
	}
	if d.m.aufs {
		all = plainNames(all)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// plainNames stands each AUFS whiteout for the name it hides.
func plainNames(names []string) []string {
	var out []string
	for _, n := range names {
		base, ok, err := whiteout.Target(n)
		switch {
		case whiteout.IsMeta(n) || err != nil:
		case ok:
			out = append(out, base)
		default:
			out = append(out, n)
		}
	}
	return out
}

// lookup finds a name in a merged directory; nil if it is not there.
func (d *directory) lookup(name string) (*node, error) {
	l := lookup{m: d.m, name: name}
	for _, o := range d.open {
		l.at(o)
		for l.redirected != "" && l.err == nil && !l.stop {
			l.follow(o.layer + 1)
		}
		if l.err != nil || l.stop {
			break
		}
	}
	if l.err != nil || l.found == nil {
		return nil, l.err
	}
	return l.found, nil
}

// lookup is the state of one lookup as it goes down the layers.
type lookup struct {
	m          *merged
	name       string // in the layers to come; a relative redirect changes it
	redirected string // absolute redirect that waits to be followed
	found      *node
	metacopy   bool // found has its content further down
	stop       bool
	err        error
}

// at looks in one place of the parent directory.
func (l *lookup) at(o openPlace) {
	var st unix.Stat_t
	err := unix.Fstatat(int(o.file.Fd()), l.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		l.stop = l.m.aufs && exists(o.file, whiteout.Prefix+l.name)
		return
	}
	where := place{o.layer, path.Join(o.path, l.name)}
	if err != nil {
		l.err = &os.PathError{Op: "fstatat", Path: path.Join(o.file.Name(), l.name), Err: err}
		return
	}
	l.step(o.file, l.name, st, where)
}

// step takes what one layer has under the name.
func (l *lookup) step(parent *os.File, name string, st unix.Stat_t, where place) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		l.directory(parent, name, st, where)
	case unix.S_IFCHR:
		if st.Rdev == 0 {
			l.stop = true
			return
		}
		l.file(parent, name, st, where)
	default:
		l.file(parent, name, st, where)
	}
}

func (l *lookup) file(parent *os.File, name string, st unix.Stat_t, where place) {
	regular := st.Mode&unix.S_IFMT == unix.S_IFREG
	if l.found != nil && l.found.isDir() {
		l.stop = true // hidden below a directory, and ends it
		return
	}
	if regular && st.Size == 0 && l.xattrWhiteout(parent, name, where.layer) {
		l.stop = true
		return
	}
	if l.found == nil {
		l.found = &node{stat: st, places: []place{where}, data: where}
	} else { // the content of a metacopy
		if !regular {
			l.stop = true
			return
		}
		l.found.data = where
	}
	l.metacopy = false
	if regular {
		_, l.metacopy, l.err = l.m.attr(parent, name, "metacopy")
	}
	if !l.metacopy || l.err != nil {
		l.stop = true
		return
	}
	l.redirect(parent, name)
}

func (l *lookup) directory(parent *os.File, name string, st unix.Stat_t, where place) {
	if l.found != nil && !l.found.isDir() {
		l.stop = true
		return
	}
	if l.found == nil {
		l.found = &node{stat: st}
	}
	l.found.places = append(l.found.places, where)
	opaque, _, err := l.m.attr(parent, name, "opaque")
	if err != nil || opaque == "y" || l.m.aufs && exists(parent, name+"/"+whiteout.OpaqueName) {
		l.stop, l.err = true, err
		return
	}
	l.redirect(parent, name)
}

func exists(dir *os.File, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// redirect takes the name a file has in the layers below.
func (l *lookup) redirect(parent *os.File, name string) {
	to, ok, err := l.m.attr(parent, name, "redirect")
	switch {
	case err != nil:
		l.err = err
	case !ok:
	case strings.HasPrefix(to, "/"):
		l.redirected = path.Clean(to)
	default:
		l.name = to
	}
}

// follow goes on with an absolute redirect in the layers from the given one:
// the rest of the lookup starts at their roots.
func (l *lookup) follow(from int) {
	target := strings.TrimPrefix(l.redirected, "/")
	l.redirected = ""
	for i := from; i < len(l.m.roots) && !l.stop && l.err == nil; i++ {
		target = l.layer(i, target)
		if l.redirected != "" {
			target = strings.TrimPrefix(l.redirected, "/")
			l.redirected = ""
		}
	}
	l.stop = true // all layers have been asked
}

// layer looks a path up in one layer and returns the path that it has in the
// layers below: a directory on the way may be redirected, too.
func (l *lookup) layer(i int, target string) (below string) {
	dir := l.m.roots[i]
	parts := strings.Split(target, "/")
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	for n, part := range parts {
		rest := path.Join(parts[n:]...)
		var st unix.Stat_t
		err := unix.Fstatat(int(dir.Fd()), part, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return path.Join(below, rest)
		}
		if err != nil {
			l.err = &os.PathError{Op: "fstatat", Path: path.Join(dir.Name(), part), Err: err}
			return ""
		}
		if n == len(parts)-1 {
			l.name = part
			l.step(dir, part, st, place{i, target})
			return path.Join(below, l.name)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a whiteout, or it hides what is below
			l.stop = true
			return ""
		}
		through := lookup{m: l.m, name: part}
		through.directory(dir, part, st, place{i, part})
		if through.err != nil {
			l.err = through.err
			return ""
		}
		l.stop = l.stop || through.stop // opaque: this layer is the last, but still counts
		if below = path.Join(below, through.name); through.redirected != "" {
			below = strings.TrimPrefix(through.redirected, "/")
		}
		fd, err := openat(int(dir.Fd()), part, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			l.err = &os.PathError{Op: "openat", Path: path.Join(dir.Name(), part), Err: err}
			return ""
		}
		dir = os.NewFile(uintptr(fd), path.Join(dir.Name(), part))
		opened = append(opened, dir)
	}
	return below
}

// xattrWhiteout reports whether an empty file is a whiteout by xattr. The
// kernel (6.7 and later) looks neither in an upper directory nor in the lowest
// layer, and only in directories marked for it.
func (l *lookup) xattrWhiteout(parent *os.File, name string, layer int) bool {
	if layer == 0 || layer == len(l.m.roots)-1 {
		return false
	}
	marked := false
	for _, a := range []struct{ name, value string }{{"opaque", "x"}, {"whiteouts", ""}} {
		v, ok, err := l.m.attrOf(parent, a.name)
		marked = marked || err == nil && ok && (a.value == "" || v == a.value)
	}
	if !marked {
		return false
	}
	_, ok, err := l.m.attr(parent, name, "whiteout")
	return ok && err == nil
}

func (m *merged) opaque(dir *os.File) (bool, error) {
	v, _, err := m.attrOf(dir, "opaque")
	return v == "y" || m.aufs && exists(dir, whiteout.OpaqueName), err
}

// attr reads one of overlayfs's xattrs of a name in an open directory.
func (m *merged) attr(dir *os.File, name, attr string) (value string, ok bool, err error) {
	return m.getxattr(procPath(dir)+"/"+name, path.Join(dir.Name(), name), attr, unix.Lgetxattr)
}

// attrOf reads one of overlayfs's xattrs of an open directory.
func (m *merged) attrOf(dir *os.File, attr string) (value string, ok bool, err error) {
	return m.getxattr(procPath(dir), dir.Name(), attr, unix.Getxattr)
}

func (m *merged) getxattr(proc, name, attr string, get func(string, string, []byte) (int, error)) (string, bool, error) {
	var buf [4096]byte // a redirect is a path
	n, err := get(proc, m.prefix+attr, buf[:])
	switch {
	case err == nil:
		return string(buf[:n]), true, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
		return "", false, nil
	}
	return "", false, &os.PathError{Op: "getxattr " + m.prefix + attr, Path: name, Err: err}
}
