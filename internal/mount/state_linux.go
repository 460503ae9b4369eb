package mount

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// State is what [Query] finds at a path.
type State struct {
	MountPoint bool   // the path is the root of a mount
	ReadOnly   bool   // the mount or its file system is read-only
	Magic      uint32 // type of the file system, unix.OVERLAYFS_SUPER_MAGIC and so on
	ID         uint64 // of the mount, as in mountinfo; 0 before Linux 5.8
}

// Query looks at the mount a path is on, with two system calls whatever the
// number of mounts is. A symbolic link is looked at, not followed.
//
// Before Linux 5.8 (STATX_ATTR_MOUNT_ROOT) all mounts are read to find out
// about MountPoint.
func Query(path string) (State, error) {
	// One descriptor: the path cannot change between the two calls, and
	// statfs(2) has no flag that keeps it from following a link.
	f, err := openTarget(path)
	if err != nil {
		return State{}, err
	}
	defer f.Close()
	s, err := mountOf(f)
	if err != nil {
		return State{}, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return State{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	s.ReadOnly = st.Flags&unix.ST_RDONLY != 0
	s.Magic = uint32(st.Type)
	return s, nil
}

// AnswerWithin is far more than a server takes for an answer on a host that can
// work.
const AnswerWithin = 10 * time.Second

// Ask is [Query] of a mount that a process may serve, which may be stopped: the
// error matches ETIMEDOUT if there is no answer for that long. What asks is left
// behind then, with a thread and a descriptor of the mount, until there is one.
func Ask(path string, within time.Duration) (State, error) {
	type answer struct {
		s   State
		err error
	}
	got := make(chan answer, 1)
	go func() {
		s, err := Query(path)
		got <- answer{s, err}
	}()
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case a := <-got:
		return a.s, a.err
	case <-t.C:
		return State{}, &os.PathError{Op: "statfs", Path: path, Err: fmt.Errorf("its server does not answer: %w", unix.ETIMEDOUT)}
	}
}

// mountOf fills MountPoint and ID.
func mountOf(f *os.File) (State, error) {
	var stx unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &stx); err != nil {
		return State{}, &os.PathError{Op: "statx", Path: f.Name(), Err: err}
	}
	var s State
	if stx.Mask&unix.STATX_MNT_ID != 0 {
		s.ID = stx.Mnt_id
	}
	if stx.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		var err error
		s.MountPoint, err = listed(f.Name())
		return s, err
	}
	s.MountPoint = stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	return s, nil
}

// IsMountPoint reports whether path is the root of a mount. A path that does
// not exist is none; a file system whose server is gone (FUSE, NFS) still is
// one. It costs one system call; before Linux 5.8 all mounts are read.
func IsMountPoint(path string) (bool, error) {
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	var stx unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, flags, 0, &stx)
	if err == nil {
		if stx.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
			return listed(path)
		}
		return stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	err = &os.PathError{Op: "statx", Path: path, Err: err}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ESTALE), errors.Is(err, unix.EIO), errors.Is(err, unix.EACCES):
		// The list of mounts does not ask the file system. EACCES is a FUSE
		// mount of another user.
		return listed(path)
	}
	return false, err
}

// listed reports whether path is in the list of mounts.
func listed(path string) (bool, error) {
	path, err := resolve(path)
	if err != nil {
		return false, err
	}
	list, err := mounts(mountinfo.SingleEntryFilter(path))
	return len(list) > 0, err
}

// resolve returns the path of an entry as mountinfo shows it.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil || path == "/" {
		return path, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	return filepath.Join(dir, filepath.Base(path)), err
}

// Under returns the mounts of this mount namespace at prefix and below it, in
// the order they were made in. Paths are unescaped. Mounts that are hidden
// below others are in the list too.
//
// The cost grows with the number of all mounts.
func Under(prefix string) ([]mountinfo.Info, error) {
	prefix, err := resolve(prefix)
	if err != nil {
		return nil, err
	}
	return mounts(mountinfo.PrefixFilter(prefix))
}

func mounts(filter mountinfo.FilterFunc) ([]mountinfo.Info, error) {
	// thread-self, because the thread group's leader may have ended.
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parse(f, filter)
}

func parse(r io.Reader, filter mountinfo.FilterFunc) ([]mountinfo.Info, error) {
	short, err := shorten(r)
	if err != nil {
		return nil, err
	}
	list, err := mountinfo.GetMountsFromReader(short, filter)
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	out := make([]mountinfo.Info, len(list))
	for i, m := range list {
		out[i] = *m
	}
	return out, nil
}

// maxLine is less than the 64 KiB at which bufio.Scanner, and so the mountinfo
// package, gives up on the whole list. An overlay of 500 layers shows every
// one of their paths.
const maxLine = 32 << 10

// shorten cuts the last field of overlong lines, the options of the file
// system. No other field can be as long: two paths of at most 4096 bytes,
// each of which takes up to four when it is escaped, and short words.
func shorten(r io.Reader) (io.Reader, error) {
	var out bytes.Buffer
	in := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := in.ReadSlice('\n')
		out.Write(line)
		if errors.Is(err, bufio.ErrBufferFull) {
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = in.ReadSlice('\n')
			}
			out.WriteByte('\n')
		}
		if err == io.EOF {
			return &out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read mountinfo: %w", err)
		}
	}
}

// Shared reports whether a mount that is made at dir would appear in other
// mount namespaces or at other places too, because the mount it would be below
// is in a peer group.
func Shared(dir string) (bool, error) {
	s, err := Query(dir)
	if err != nil {
		return false, err
	}
	abs, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	if abs, err = filepath.Abs(abs); err != nil {
		return false, err
	}
	list, err := mounts(mountinfo.ParentsFilter(abs))
	if err != nil {
		return false, err
	}
	// The last one is the topmost where mounts hide each other; it is used if
	// the kernel does not tell the id.
	shared := false
	best := -1
	for _, m := range list {
		if s.ID != 0 && uint64(m.ID) != s.ID || s.ID == 0 && len(m.Mountpoint) < best {
			continue
		}
		best = len(m.Mountpoint)
		shared = isShared(m.Optional)
	}
	return shared, nil
}

func isShared(optional string) bool {
	for field := range strings.FieldsSeq(optional) {
		if strings.HasPrefix(field, "shared:") {
			return true
		}
	}
	return false
}

// MakePrivate makes dir a mount point, by binding it to itself if it is none,
// whose mounts are seen by this mount namespace and its later copies only. It
// does nothing if they are already. It reports whether it made a mount, which
// the caller removes with [Unmount] when no mount is left below dir.
func MakePrivate(dir string) (mounted bool, err error) {
	shared, err := Shared(dir)
	if err != nil || !shared {
		return false, err
	}
	point, err := IsMountPoint(dir)
	if err != nil {
		return false, err
	}
	if !point {
		if err := Bind(dir, dir, 0); err != nil {
			return false, err
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		err = &os.PathError{Op: "mount private", Path: dir, Err: err}
		if !point {
			if uerr := Unmount(dir); uerr != nil {
				err = fmt.Errorf("%w (rollback: %v)", err, uerr)
			}
		}
		return false, err
	}
	return !point, nil
}
