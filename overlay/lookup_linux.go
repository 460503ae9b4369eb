package overlay

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/merged"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/whiteout"
)

// rules are how overlayfs's layers hide what is below them, by the rules of the
// kernel (fs/overlayfs/namei.c, Linux 6.12: ovl_lookup, ovl_lookup_layer,
// ovl_lookup_single): whiteouts of both kinds, opaque marks, redirects and
// metacopy.
type rules struct {
	prefix string // of overlayfs's own xattrs
	aufs   bool   // also by AUFS names, as fuse-overlayfs does where it cannot make devices
	union  bool   // names with whiteout.MetaPrefix are package union's, and not of the tree
}

// Name stands each AUFS whiteout for the name it hides; the other ones have
// that name.
func (r rules) Name(entry string) (string, bool) {
	if !r.aufs {
		return entry, !r.union || !whiteout.IsMeta(entry)
	}
	base, ok, err := whiteout.Target(entry)
	switch {
	case whiteout.IsMeta(entry) || err != nil:
		return "", false
	case ok:
		return base, true
	}
	return entry, true
}

// Xattr hides overlayfs's own xattrs and shows those that are escaped.
func (r rules) Xattr(stored string) (string, bool) {
	if !strings.HasPrefix(stored, r.prefix) {
		return stored, true
	}
	return whiteout.Unescape(stored)
}

// Opaque reports whether an open directory hides what is below it.
func (r rules) Opaque(dir *os.File) (bool, error) {
	v, _, err := r.attr(dir, "", "opaque")
	return v == "y" || r.aufs && exists(dir, whiteout.OpaqueName), err
}

// Lookup finds a name in a merged directory; nil if it is not there.
func (r rules) Lookup(d *merged.Directory, name string) (*merged.Node, error) {
	l := lookup{rules: r, roots: d.Roots(), name: name}
	for _, o := range d.Places {
		l.at(o)
		for l.redirected != "" && l.err == nil && !l.stop {
			l.follow(o.Layer + 1)
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
	rules
	roots      []*os.File
	name       string // in the layers to come; a relative redirect changes it
	redirected string // absolute redirect that waits to be followed
	found      *merged.Node
	metacopy   bool // found has its content further down
	stop       bool
	err        error
}

// at looks in one place of the parent directory.
func (l *lookup) at(o merged.OpenPlace) {
	var st unix.Stat_t
	err := unix.Fstatat(int(o.File.Fd()), l.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		l.stop = l.aufs && exists(o.File, whiteout.Prefix+l.name)
		return
	}
	where := merged.Place{Layer: o.Layer, Path: path.Join(o.Path, l.name)}
	if err != nil {
		l.err = &os.PathError{Op: "fstatat", Path: path.Join(o.File.Name(), l.name), Err: err}
		return
	}
	l.step(o.File, l.name, st, where)
}

// step takes what one layer has under the name.
func (l *lookup) step(parent *os.File, name string, st unix.Stat_t, where merged.Place) {
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

func (l *lookup) file(parent *os.File, name string, st unix.Stat_t, where merged.Place) {
	regular := st.Mode&unix.S_IFMT == unix.S_IFREG
	if l.found != nil && l.found.IsDir() {
		l.stop = true // hidden below a directory, and ends it
		return
	}
	if regular && st.Size == 0 && l.xattrWhiteout(parent, name, where.Layer) {
		l.stop = true
		return
	}
	if l.found == nil {
		l.found = &merged.Node{Stat: st, Places: []merged.Place{where}, Data: where}
	} else { // the content of a metacopy
		if !regular {
			l.stop = true
			return
		}
		l.found.Data = where
	}
	l.metacopy = false
	if regular {
		_, l.metacopy, l.err = l.attr(parent, name, "metacopy")
	}
	if !l.metacopy || l.err != nil {
		l.stop = true
		return
	}
	l.redirect(parent, name)
}

func (l *lookup) directory(parent *os.File, name string, st unix.Stat_t, where merged.Place) {
	if l.found != nil && !l.found.IsDir() {
		l.stop = true
		return
	}
	if l.found == nil {
		l.found = &merged.Node{Stat: st}
	}
	l.found.Places = append(l.found.Places, where)
	opaque, _, err := l.attr(parent, name, "opaque")
	if err != nil || opaque == "y" || l.aufs && exists(parent, name+"/"+whiteout.OpaqueName) {
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
	to, ok, err := l.attr(parent, name, "redirect")
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
	for i := from; i < len(l.roots) && !l.stop && l.err == nil; i++ {
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
	dir := l.roots[i]
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
			l.step(dir, part, st, merged.Place{Layer: i, Path: target})
			return path.Join(below, l.name)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR { // a whiteout, or it hides what is below
			l.stop = true
			return ""
		}
		through := lookup{rules: l.rules, name: part}
		through.directory(dir, part, st, merged.Place{Layer: i, Path: part})
		if through.err != nil {
			l.err = through.err
			return ""
		}
		l.stop = l.stop || through.stop // opaque: this layer is the last, but still counts
		if below = path.Join(below, through.name); through.redirected != "" {
			below = strings.TrimPrefix(through.redirected, "/")
		}
		if dir, l.err = merged.OpenAt(dir, part, unix.O_RDONLY|unix.O_DIRECTORY); l.err != nil {
			return ""
		}
		opened = append(opened, dir)
	}
	return below
}

// xattrWhiteout reports whether an empty file is a whiteout by xattr. The
// kernel (6.7 and later) looks neither in an upper directory nor in the lowest
// layer, and only in directories marked for it.
func (l *lookup) xattrWhiteout(parent *os.File, name string, layer int) bool {
	if layer == 0 || layer == len(l.roots)-1 {
		return false
	}
	marked := false
	for _, a := range []struct{ name, value string }{{"opaque", "x"}, {"whiteouts", ""}} {
		v, ok, err := l.attr(parent, "", a.name)
		marked = marked || err == nil && ok && (a.value == "" || v == a.value)
	}
	if !marked {
		return false
	}
	_, ok, err := l.attr(parent, name, "whiteout")
	return ok && err == nil
}

// attr reads one of overlayfs's xattrs of a name in an open directory, or of
// that itself.
func (r rules) attr(dir *os.File, name, attr string) (value string, ok bool, err error) {
	var buf [4096]byte // a redirect is a path
	n, err := sys.GetxattrAt(int(dir.Fd()), name, r.prefix+attr, buf[:])
	switch {
	case err == nil:
		return string(buf[:n]), true, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
		return "", false, nil
	}
	if pe := (*os.PathError)(nil); errors.As(err, &pe) {
		pe.Path = path.Join(dir.Name(), name)
	}
	return "", false, err
}
