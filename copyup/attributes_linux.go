package copyup

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

func copyAttributes(dst, src string, opts *Options) error {
	c := newCopier(context.Background(), opts)
	s := c.scratch.Get().(*scratch)
	defer c.scratch.Put(s)
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW
	from, err := sys.Openat(unix.AT_FDCWD, src, flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := sys.Openat(unix.AT_FDCWD, dst, flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	source := handle{fd: from, at: place{name: src}}
	var st unix.Stat_t
	if err := source.stat(&st); err != nil {
		return err
	}
	return c.attributes(handle{fd: to}, source, &st, s)
}
