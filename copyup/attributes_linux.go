//go:build !layerfs_portable

package copyup

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

func copyAttributes(dst, src string, opts *Options) error {
	if done, err := plainAttributes(dst, src, opts); done || err != nil {
		return err
	}
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

// plainAttributes does it for directories without xattrs, the usual case, by
// name: it is a part of every new layer, and half of the calls do.
func plainAttributes(dst, src string, opts *Options) (done bool, err error) {
	for _, p := range []string{src, dst} {
		n, err := unix.Llistxattr(p, nil)
		if n != 0 || err != nil {
			return false, nil
		}
	}
	var want, have unix.Stat_t
	if err := unix.Lstat(src, &want); err != nil {
		return false, &os.PathError{Op: "lstat", Path: src, Err: err}
	}
	if err := unix.Lstat(dst, &have); err != nil {
		return false, &os.PathError{Op: "lstat", Path: dst, Err: err}
	}
	if want.Mode != have.Mode || !opts.IgnoreOwners && (want.Uid != have.Uid || want.Gid != have.Gid) || want.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, nil
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dst, []unix.Timespec{want.Atim, want.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, &os.PathError{Op: "utimensat", Path: dst, Err: err}
	}
	return true, nil
}
