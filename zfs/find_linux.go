package zfs

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// findObjects calls found for each path of a tree that leads to one of some
// objects. It reads directories and nothing else.
func findObjects(ctx context.Context, tree string, objects map[uint64]bool, found func(path string)) error {
	if len(objects) == 0 {
		return nil
	}
	root, err := newRoot(tree)
	if err != nil {
		return err
	}
	defer root.close()
	if objects[root.st.Ino] {
		found("/")
	}
	f := &finder{ctx: ctx, objects: objects, found: found, buf: make([]byte, 64<<10)}
	return f.dir("", root)
}

type finder struct {
	ctx     context.Context
	objects map[uint64]bool
	found   func(path string)
	buf     []byte
}

// dir looks at what is below a directory.
func (f *finder) dir(path string, p *place) error {
	if err := context.Cause(f.ctx); err != nil {
		return err
	}
	d, err := p.open()
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil // of no known type, or the layer is being written
	}
	if err != nil {
		return err
	}
	defer d.Close()
	var below []string
	err = readDir(d, f.buf, func(e entry) {
		if f.objects[e.ino] {
			f.found(path + "/" + e.name)
		}
		if e.kind == unix.DT_DIR || e.kind == unix.DT_UNKNOWN {
			below = append(below, e.name)
		}
	})
	if err != nil {
		return err
	}
	for _, name := range below {
		sub := &place{dir: int(d.Fd()), name: name}
		sub.st.Mode = unix.S_IFDIR
		if err := f.dir(path+"/"+name, sub); err != nil {
			return err
		}
	}
	return nil
}
