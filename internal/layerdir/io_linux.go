package layerdir

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// A life of a layer is a few dozen system calls here; package os would make it
// twice as many (descriptors are put into non-blocking mode and back, Rename
// and Remove look before they act).

// folder is a directory that stays open, so that the kernel looks up one name
// and not a whole path for each of its entries. Whoever uses one sees to it
// that it is not closed meanwhile: see Locks.use.
type folder struct {
	path string
	fd   int
}

func openFolder(path string) (folder, error) {
	fd, err := sys.Openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	return folder{path, fd}, err
}

// Home returns a descriptor of the home, for calls that take one. It is open for
// as long as the caller has the lock of a layer, or a hold.
func (d *Dir) Home() int { return d.home.fd }

// KeepOpen opens a directory that, like Home, stays open for as long as somebody
// has the lock of a layer. It is for who opens a root, before others use d.
func (d *Dir) KeepOpen(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err == nil {
		d.kept = append(d.kept, f)
	}
	return f, err
}

func (f folder) close() error {
	if err := unix.Close(f.fd); err != nil {
		return errPath("close", f.path, err)
	}
	return nil
}

func (f folder) err(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return errPath(op, f.path+"/"+name, err)
}

// open opens an entry, retrying EINTR.
func (f folder) open(name string, flags int) (int, error) { return f.openMode(name, flags, 0o600) }

func (f folder) openMode(name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(f.fd, name, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, f.err("openat", name, err)
		}
	}
}

// append adds to a file, which need not exist, and returns its size then.
func (f folder) append(name, data string) (size int64, err error) {
	fd, err := f.open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if err != nil {
		return 0, err
	}
	if err = f.fill(fd, name, []byte(data)); err == nil {
		size, err = unix.Seek(fd, 0, io.SeekCurrent)
		err = f.err("lseek", name, err)
	}
	if cerr := unix.Close(fd); err == nil {
		err = f.err("close", name, cerr)
	}
	return size, err
}

// rename moves an entry to another folder.
func (f folder) rename(name string, to folder) error {
	if err := unix.Renameat(f.fd, name, to.fd, name); err != nil {
		return &os.LinkError{Op: "renameat", Old: f.path + "/" + name, New: to.path + "/" + name, Err: err}
	}
	return nil
}

// unlink removes a file; a missing one is no error.
func (f folder) unlink(name string) error {
	err := unix.Unlinkat(f.fd, name, 0)
	if err == unix.ENOENT {
		return nil
	}
	return f.err("unlinkat", name, err)
}

// stamp tells one state of a file that is replaced and not rewritten from
// another.
type stamp struct {
	inode   uint64
	written unix.Timespec
	size    int64
	making  bool // see folder.add
}

func stampOf(st *unix.Stat_t) stamp {
	return stamp{st.Ino, st.Mtim, st.Size, st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o777 == making}
}

// same reports whether the content is the same; the mark goes after it.
func (s stamp) same(t stamp) bool {
	return s.inode == t.inode && s.written == t.written && s.size == t.size
}

// settled reports whether the file is so old that another one with the same
// inode number has another time.
func (s stamp) settled(local bool) bool {
	age := settled
	if local && s.written.Nsec != 0 {
		age = tick
	}
	return time.Unix(s.written.Unix()).Before(wall().Add(-age))
}

// unfinished reports whether the file was being added when it was looked at.
func (s stamp) unfinished() bool { return s.making }

func (f folder) stat(name string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(f.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return stamp{}, f.err("fstatat", name, err)
	}
	return stampOf(&st), nil
}

// read returns the content of a file.
func (f folder) read(name string) ([]byte, error) {
	fd, err := f.open(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 1024) // what records and other states usually fit in
	for {
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, f.err("read", name, err)
		case n == 0:
			return buf, nil
		}
		if buf = buf[:len(buf)+n]; len(buf) == cap(buf) {
			buf = append(buf, make([]byte, len(buf))...)[:len(buf)]
		}
	}
}

// names lists the entries of a directory in the folder, or of "." itself.
func (f folder) names(name string) ([]string, error) {
	fd, err := f.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), f.path+"/"+name)
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// state tells whether a directory has changed.
type state struct {
	inode, links     uint64
	changed, entered unix.Timespec // ctime and mtime
	size             int64
}

// before reports whether the last change was before t.
func (s state) before(t time.Time) bool {
	return time.Unix(s.changed.Unix()).Before(t) && time.Unix(s.entered.Unix()).Before(t)
}

// fine reports whether the times are not of whole seconds.
func (s state) fine() bool { return s.changed.Nsec != 0 && s.entered.Nsec != 0 }

func (f folder) state() (state, bool) {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return state{}, false
	}
	return state{st.Ino, uint64(st.Nlink), st.Ctim, st.Mtim, st.Size}, true //nolint:unconvert // 32 bits wide on some architectures
}

// few returns the names in the folder, or nil if there are more than n or they
// cannot be read.
func (f folder) few(n int) map[string]bool {
	fd, err := f.open(".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil
	}
	dir := os.NewFile(uintptr(fd), f.path)
	defer dir.Close()
	list, err := dir.Readdirnames(n + 1)
	if err != nil && err != io.EOF || len(list) > n {
		return nil
	}
	names := make(map[string]bool, len(list))
	for _, name := range list {
		names[name] = true
	}
	return names
}

func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) }

// settle writes back the whole file system.
func (f folder) settle() error { return f.err("syncfs", ".", unix.Syncfs(f.fd)) }

// sync makes the names in the folder durable.
func (f folder) sync() error { return f.err("fsync", ".", unix.Fsync(f.fd)) }

// replace puts a file with this content under a name in one step, by way of a
// temporary name.
func (f folder) replace(name, temp string, data []byte, how durability) (_ stamp, err error) {
	fd, err := f.open(temp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return stamp{}, err
	}
	defer func() {
		if cerr := unix.Close(fd); err == nil {
			err = f.err("close", temp, cerr)
		}
		if err != nil {
			_ = f.unlink(temp) // what went wrong first is what is told
		}
	}()
	if err := f.fill(fd, temp, data); err != nil {
		return stamp{}, err
	}
	switch how {
	case durable:
		err = f.err("fsync", temp, unix.Fsync(fd))
	case durableInOrder:
		const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		err = f.err("sync_file_range", temp, unix.SyncFileRange(fd, 0, 0, all))
		if err != nil { // no such call, or a seccomp filter
			err = f.err("fsync", temp, unix.Fsync(fd))
		}
	}
	if err != nil {
		return stamp{}, err
	}
	var st unix.Stat_t // a rename changes none of what a stamp has
	if err := unix.Fstat(fd, &st); err != nil {
		return stamp{}, f.err("fstat", temp, err)
	}
	if err := unix.Renameat(f.fd, temp, f.fd, name); err != nil {
		return stamp{}, &os.LinkError{Op: "renameat", Old: f.path + "/" + temp, New: f.path + "/" + name, Err: err}
	}
	switch how {
	case durable:
		err = f.sync()
	case durableInOrder:
		err = f.err("fsync", name, unix.Fsync(fd))
	}
	return stampOf(&st), err
}

// add makes a file that does not exist, in fewer calls than replace, and with
// one sync where that takes two: under its name at once, but marked by its mode.
// Until the mark is gone a file that is empty or cut off was not added, and
// nobody was told that it was. The mark goes after the content, and where it is
// synced after that.
//
// It is for file systems that make the name of a new file durable with the file
// (see newNames).
func (f folder) add(name string, data []byte, sync bool) (_ stamp, err error) {
	fd, err := f.openMode(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, making)
	if err != nil {
		return stamp{}, err
	}
	defer func() {
		if cerr := unix.Close(fd); err == nil {
			err = f.err("close", name, cerr)
		}
	}()
	if err := f.fill(fd, name, data); err != nil {
		_ = f.unlink(name) // what went wrong first is what is told
		return stamp{}, err
	}
	if sync {
		if err := unix.Fsync(fd); err != nil {
			return stamp{}, f.err("fsync", name, err)
		}
	}
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return stamp{}, f.err("fchmod", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return stamp{}, f.err("fstat", name, err)
	}
	return stampOf(&st), nil
}

// finish takes the mark from a file that is whole.
func (f folder) finish(name string) error {
	return f.err("fchmodat", name, unix.Fchmodat(f.fd, name, 0o600, 0))
}

// newNames reports whether the fsync of a new file on the file system of a
// directory makes its name durable, and its mode is kept.
//
// ext4 and xfs commit in order (see inOrder; ext4 without a journal writes the
// directory of a new file with it, ext4_sync_parent in fs/ext4/fsync.c), btrfs
// logs the names of an inode with it (btrfs_log_inode_parent in
// fs/btrfs/tree-log.c), and on tmpfs nothing is durable.
func newNames(path string) bool {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false
	}
	switch int64(fs.Type) { //nolint:unconvert // 32 bits wide on some architectures
	case unix.XFS_SUPER_MAGIC, unix.EXT4_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return true
	}
	return false
}

func (f folder) fill(fd int, name string, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return f.err("write", name, err)
		}
		data = data[n:]
	}
	return nil
}

// inOrder reports whether the file system of a directory commits what happened
// to it in the order in which it happened, so that the fsync of a file makes
// its last rename durable, and everything before.
//
// ext4 does with its journal and xfs with its log, to both of which a rename
// adds the inode that is renamed:
// Documentation/filesystems/ext4/journal.rst, xfs-delayed-logging-design.rst.
// ext4 without a journal does not, and tells by the task that commits it
// (journal_task, Documentation/ABI/testing/sysfs-fs-ext4, Linux 4.19). What is
// written by sync_file_range before has to be on the disk by then, too: before
// Linux 5.2 it left pages out that were busy (mm/filemap.c, commit "fs:
// sync_file_range(2) may use WB_SYNC_ALL writeback").
func inOrder(path string) bool {
	if !sys.KernelAtLeast(5, 2) {
		return false
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return false
	}
	switch int64(fs.Type) { //nolint:unconvert // 32 bits wide on some architectures
	case unix.XFS_SUPER_MAGIC:
		return true
	case unix.EXT4_SUPER_MAGIC:
		return hasJournal(path)
	}
	return false
}

func hasJournal(path string) bool {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false
	}
	dev := uint64(st.Dev) //nolint:unconvert // 32 bits wide on some architectures
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return false
	}
	// Without a flush before the commit record, the disk may have that first.
	options, err := os.ReadFile("/proc/fs/ext4/" + filepath.Base(device) + "/options")
	if err != nil || strings.Contains(string(options), "journal_async_commit") {
		return false
	}
	// A number of a process, 0 if it is not in our namespace, or "<none>".
	task, err := os.ReadFile("/sys/fs/ext4/" + filepath.Base(device) + "/journal_task")
	return err == nil && len(task) > 0 && task[0] >= '0' && task[0] <= '9'
}
