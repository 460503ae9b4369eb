package archive

import (
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/whiteout"
)

// openAncestor is a directory on the way from the root to a changed path.
type openAncestor struct {
	name    string // path in the stream
	dir     *dirFD
	written bool
}

// walkChanges turns a list of changes into items. The directories a change is
// in are opened one by one, so that no link leads away, and written once.
func (p *packer) walkChanges() error {
	stack := []openAncestor{{"", p.root, true}}
	defer func() {
		for _, a := range stack[1:] {
			a.dir.release()
		}
	}()
	prev := ""
	for c, err := range p.pl.changes {
		if err != nil {
			return err
		}
		if err := p.ctx.Err(); err != nil {
			return err
		}
		if c.Path == "" || c.Path[0] != '/' || path.Clean(c.Path) != c.Path {
			return fmt.Errorf("change %q: path is not absolute and clean", c.Path)
		}
		if prev != "" && layerfs.ComparePaths(prev, c.Path) >= 0 {
			return fmt.Errorf("changes are not in order: %q after %q", c.Path, prev)
		}
		prev = c.Path
		if stack, err = p.walkChange(stack, c); err != nil {
			return entryError(c.Path[1:], err)
		}
	}
	return nil
}

func (p *packer) walkChange(stack []openAncestor, c layerfs.Change) ([]openAncestor, error) {
	name := c.Path[1:]
	if name == "" {
		return stack, p.send(item{dir: p.root, base: ".", name: ".", typ: typeDir})
	}
	dir, base := splitName(name)
	for n := len(stack) - 1; n > 0 && stack[n].name != dir && !strings.HasPrefix(dir, stack[n].name+"/"); n-- {
		stack[n].dir.release()
		stack = stack[:n]
	}
	for stack[len(stack)-1].name != dir {
		top := stack[len(stack)-1]
		rest := dir
		if top.name != "" {
			rest = dir[len(top.name)+1:]
		}
		next, _, _ := strings.Cut(rest, "/")
		fd, err := openDir(top.dir.fd, next)
		if err != nil {
			return stack, pathError("openat", path.Join(top.name, next), err)
		}
		d := &dirFD{fd: fd}
		d.refs.Store(1)
		stack = append(stack, openAncestor{name: path.Join(top.name, next), dir: d})
	}
	for i := range stack {
		if a := &stack[i]; !a.written {
			a.written = true
			if err := p.send(item{dir: a.dir, base: ".", name: a.name, typ: typeDir}); err != nil {
				return stack, err
			}
		}
	}
	if c.Kind == layerfs.Deleted {
		h, err := whiteoutHeader(dir, base)
		if err != nil {
			return stack, err
		}
		return stack, p.send(item{name: h.name, mark: h})
	}
	if whiteout.IsReserved(base) {
		return stack, malformed("name is reserved for whiteouts")
	}
	top := stack[len(stack)-1].dir
	var st unix.Stat_t
	if err := unix.Fstatat(top.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return stack, pathError("fstatat", name, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		fd, err := openDir(top.fd, base)
		if err != nil {
			return stack, pathError("openat", name, err)
		}
		d := &dirFD{fd: fd}
		d.refs.Store(1)
		// It stays open for the changes in it, which come next.
		stack = append(stack, openAncestor{name: name, dir: d, written: true})
		return stack, p.send(item{dir: d, base: ".", name: name, typ: typeDir})
	}
	it := item{dir: top, base: base, name: name}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		it.typ = typeReg
	}
	return stack, p.send(it)
}

// missingLinks writes the names of changed files that are not in the list of
// changes. Without them the new content would have one name, the old another.
func (p *packer) missingLinks() error {
	if p.pl.changes == nil {
		return nil
	}
	missing := 0
	for _, l := range p.links {
		missing += l.left
	}
	if missing == 0 {
		return nil
	}
	written := make(map[string]bool)
	for _, l := range p.links {
		written[l.name] = true
	}
	return p.findLinks(p.root, "", written)
}

func (p *packer) findLinks(d *dirFD, dir string, written map[string]bool) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	entries, err := readEntries(d.fd)
	if err != nil {
		return entryError(dir, pathError("getdents64", dir, err))
	}
	for _, e := range entries {
		name := path.Join(dir, e.name)
		if e.typ == typeDir {
			fd, err := openDir(d.fd, e.name)
			if err != nil {
				return entryError(name, pathError("openat", name, err))
			}
			sub := &dirFD{fd: fd}
			sub.refs.Store(1)
			err = p.findLinks(sub, name, written)
			sub.release()
			if err != nil {
				return err
			}
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(d.fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return entryError(name, pathError("fstatat", name, err))
		}
		l := p.links[inode{uint64(st.Dev), st.Ino}]
		if l == nil || l.left == 0 || st.Nlink < 2 || p.linked[name] || written[name] {
			continue
		}
		h := &header{name: name, typ: typeLink, link: l.name}
		if err := p.fillStat(h, &st); err != nil {
			return entryError(name, err)
		}
		l.left--
		p.s.entries.Add(1)
		if err := p.s.write(appendHeader(nil, h)); err != nil {
			return err
		}
	}
	return nil
}
