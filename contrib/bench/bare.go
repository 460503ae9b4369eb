package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/contrib/bench/internal/timing"
)

// entry is what bare needs to know of a tar entry, found out before the clock
// starts.
type entry struct {
	*tar.Header
	offset int64 // of the content in the tar file
}

// counter counts the bytes that were read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func entries(name string) ([]entry, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c := &counter{r: f}
	r := tar.NewReader(c)
	var list []entry
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		h.Name = path.Clean(h.Name)
		list = append(list, entry{h, c.n})
	}
}

// applyBare makes the system calls that unpacking cannot do without, and no
// others: no look at what is there, no check of any path.
func applyBare(_ context.Context, j *job) (timing.Cost, error) {
	list, err := entries(j.Tar)
	if err != nil {
		return timing.Cost{}, err
	}
	src, err := unix.Open(j.Tar, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return timing.Cost{}, err
	}
	defer unix.Close(src)
	root, err := unix.Open(j.Dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return timing.Cost{}, err
	}
	defer unix.Close(root)
	return timing.Of(func() error {
		buf := make([]byte, 1<<20)
		var dirs []entry
		for _, e := range list {
			if err := bareEntry(root, src, e, buf); err != nil {
				return fmt.Errorf("%s: %w", e.Name, err)
			}
			if e.Typeflag == tar.TypeDir {
				dirs = append(dirs, e)
			}
		}
		for _, e := range dirs {
			if err := bareTimes(root, e); err != nil {
				return err
			}
		}
		return nil
	})
}

func bareTimes(root int, e entry) error {
	t := unix.NsecToTimespec(e.ModTime.UnixNano())
	return unix.UtimesNanoAt(root, e.Name, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW)
}

func bareEntry(root, src int, e entry, buf []byte) error {
	mode := uint32(e.Mode & 0o7777)
	switch e.Typeflag {
	case tar.TypeDir:
		if err := unix.Mkdirat(root, e.Name, 0o700); err != nil && e.Name != "." {
			return err
		}
		if err := unix.Fchownat(root, e.Name, e.Uid, e.Gid, 0); err != nil {
			return err
		}
		return unix.Fchmodat(root, e.Name, mode, 0)
	case tar.TypeReg:
		fd, err := unix.Openat(root, e.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for off := int64(0); off < e.Size; {
			n, err := unix.Pread(src, buf[:min(int64(len(buf)), e.Size-off)], e.offset+off)
			if err != nil {
				return err
			}
			if n == 0 {
				return io.ErrUnexpectedEOF
			}
			if _, err := unix.Write(fd, buf[:n]); err != nil {
				return err
			}
			off += int64(n)
		}
		if err := unix.Fchown(fd, e.Uid, e.Gid); err != nil {
			return err
		}
		for key, value := range e.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				if err := unix.Fsetxattr(fd, name, []byte(value), 0); err != nil {
					return err
				}
			}
		}
		if err := unix.Fchmod(fd, mode); err != nil {
			return err
		}
		t := unix.NsecToTimespec(e.ModTime.UnixNano())
		return unix.UtimesNanoAt(fd, "", []unix.Timespec{t, t}, unix.AT_EMPTY_PATH)
	case tar.TypeLink:
		return unix.Linkat(root, e.Linkname, root, e.Name, 0)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(e.Linkname, root, e.Name); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[e.Typeflag]
		dev := unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor))
		if err := unix.Mknodat(root, e.Name, kind|0o600, int(dev)); err != nil {
			return err
		}
		if err := unix.Fchmodat(root, e.Name, mode, 0); err != nil {
			return err
		}
	default:
		return fmt.Errorf("type %q", e.Typeflag)
	}
	if err := unix.Fchownat(root, e.Name, e.Uid, e.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return bareTimes(root, e)
}

// lifecycleBare makes, mounts, unmounts and removes what overlay needs for a
// container, with nothing kept in memory or checked.
func lifecycleBare(ctx context.Context, j *job) (timing.Cost, error) {
	root, err := workRoot(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	lower := filepath.Join(root, "base")
	if err := os.Mkdir(lower, 0o755); err != nil {
		return timing.Cost{}, err
	}
	if err := fillBase(lower); err != nil {
		return timing.Cost{}, err
	}
	return perContainer(j.N, func(id string) error { return bareLife(filepath.Join(root, id), lower) })
}

func bareLife(dir, lower string) error {
	upper, work, merged := dir+"/upper", dir+"/work", dir+"/merged"
	for _, d := range []string{dir, upper, work, merged} {
		if err := unix.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	fd, err := unix.Open(dir+"/lower-id", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte("base"))
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	if err := bareMount(lower, upper, work, merged); err != nil {
		return err
	}
	if err := checkMerged(merged); err != nil {
		return err
	}
	if err := unix.Unmount(merged, 0); err != nil {
		return err
	}
	if err := unix.Unlink(dir + "/lower-id"); err != nil {
		return err
	}
	// overlay leaves work/work behind.
	for _, d := range []string{work + "/work", work, upper, merged, dir} {
		if err := unix.Rmdir(d); err != nil {
			return &os.PathError{Op: "rmdir", Path: d, Err: err}
		}
	}
	return nil
}

func bareMount(lower, upper, work, merged string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs)
	for _, kv := range [][2]string{{"lowerdir", lower}, {"upperdir", upper}, {"workdir", work}} {
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(mnt)
	return unix.MoveMount(mnt, "", unix.AT_FDCWD, merged, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
