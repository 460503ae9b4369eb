//go:build !layerfs_portable

package copyup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/tree"
)

// treeCopier is the visitor that copies what it visits.
type treeCopier struct {
	*copier
	root     *os.File // of the destination
	rootStat unix.Stat_t

	mu      sync.Mutex
	byInode map[inode]*link // files with names still to come, guarded by mu
	late    []lateFlags     // guarded by mu
}

// dirState is the Value of a directory.
type dirState struct {
	fd int // of the copy
	st unix.Stat_t
}

type inode struct{ dev, ino uint64 }

// link is a file with several names.
type link struct {
	path string        // of the first copy, below the root
	left uint64        // names not yet seen, guarded by treeCopier.mu
	done chan struct{} // closed when the copy is there, or failed
	ok   bool          // it is there; valid once done is closed
}

// lateFlags are inode flags to set when everything is copied: an immutable
// file gets no further names, and its directory no entries.
type lateFlags struct {
	path  string
	flags int
}

func copyTree(ctx context.Context, dstDir, srcDir string, opts *Options) (_ Stats, err error) {
	if err := ctx.Err(); err != nil {
		return Stats{}, err
	}
	src, err := os.OpenFile(srcDir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return Stats{}, err
	}
	defer src.Close()
	root, undo, err := openDestination(dstDir)
	if err != nil {
		return Stats{}, err
	}
	defer root.Close()
	defer func() {
		if err == nil {
			return
		}
		if uerr := undo(); uerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, uerr)
		}
	}()

	t := &treeCopier{copier: newCopier(ctx, opts), root: root, byInode: map[inode]*link{}}
	t.bare = true // openDestination saw to it
	if err := unix.Fstat(int(root.Fd()), &t.rootStat); err != nil {
		return Stats{}, os.NewSyscallError("fstat", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return Stats{}, os.NewSyscallError("fstat", err)
	}
	t.dev = st.Dev
	err = tree.WalkParallel(ctx, int(src.Fd()), opts.Workers, t)
	if err == nil {
		err = t.setLateFlags()
	}
	if err != nil {
		return Stats{}, err
	}
	t.finish()
	return t.stats(), nil
}

// openDestination makes the directory, or takes an empty one, and makes it
// private and without a default ACL. undo puts it back.
func openDestination(path string) (root *os.File, undo func() error, err error) {
	made := true
	if err := os.Mkdir(path, 0o700); errors.Is(err, os.ErrExist) {
		made = false
	} else if err != nil {
		return nil, nil, err
	}
	root, err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		if made {
			os.Remove(path)
		}
		return nil, nil, err
	}
	if !made {
		if _, err := root.Readdirnames(1); err != io.EOF {
			root.Close()
			if err == nil {
				err = &os.PathError{Op: "copy", Path: path, Err: unix.ENOTEMPTY}
			}
			return nil, nil, err
		}
	}
	undo, err = claim(root, path, made)
	if err != nil {
		root.Close()
		if made {
			os.Remove(path)
		}
		return nil, nil, err
	}
	return root, undo, nil
}

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

func claim(root *os.File, path string, made bool) (undo func() error, err error) {
	fd := int(root.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	acls := map[string][]byte{}
	buf := make([]byte, 64<<10)
	for _, name := range []string{aclAccess, aclDefault} {
		if n, err := unix.Fgetxattr(fd, name, buf); err == nil {
			acls[name] = slices.Clone(buf[:n])
		}
	}
	if err := (handle{fd: fd}).removeACLs(); err != nil {
		return nil, err
	}
	if err := unix.Fchmod(fd, 0o700); err != nil {
		return nil, &os.PathError{Op: "fchmod", Path: path, Err: err}
	}
	return func() error {
		if made {
			return removeAll(path, true)
		}
		if err := removeAll(path, false); err != nil {
			return err
		}
		errs := []error{
			unix.Fchown(fd, int(st.Uid), int(st.Gid)),
			unix.Fchmod(fd, st.Mode&07777),
		}
		for name, value := range acls {
			errs = append(errs, unix.Fsetxattr(fd, name, value, 0))
		}
		errs = append(errs, sys.Futimens(fd, st.Atim, st.Mtim))
		return errors.Join(errs...)
	}, nil
}

// removeAll removes a directory, or only what is in it. Copies of directories
// without write permission are made writable first: that is for the callers
// that are not root.
func removeAll(path string, self bool) error {
	err := removeTree(path, self)
	if err == nil || !errors.Is(err, os.ErrPermission) {
		return err
	}
	werr := tree.Walk(context.Background(), path, func(e *tree.Entry) error {
		if e.IsDir() {
			return unix.Fchmod(e.Self, 0o700)
		}
		return nil
	})
	return errors.Join(werr, removeTree(path, self))
}

func removeTree(path string, self bool) error {
	if self {
		return os.RemoveAll(path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(path + "/" + e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// Enter makes the copy of a directory, for its maker only until Leave.
func (t *treeCopier) Enter(d *tree.Dir) error {
	ds := &dirState{fd: -1}
	d.Value = ds
	if err := t.enter(d, ds); err != nil {
		return at(d.Path(""), err)
	}
	t.entries.Add(1)
	return nil
}

func (t *treeCopier) enter(d *tree.Dir, ds *dirState) error {
	if err := unix.Fstat(d.FD, &ds.st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if ds.st.Dev == t.rootStat.Dev && ds.st.Ino == t.rootStat.Ino {
		return fmt.Errorf("the destination is inside the source: %w", unix.EINVAL)
	}
	parent, name := int(t.root.Fd()), "."
	if d.Parent != nil {
		parent, name = d.Parent.Value.(*dirState).fd, d.Name
		if err := unix.Mkdirat(parent, name, 0o700); err != nil {
			return os.NewSyscallError("mkdirat", err)
		}
	}
	var err error
	ds.fd, err = sys.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err == nil && t.opts.InodeFlags {
		err = earlyFlags(ds.fd, d.FD)
	}
	return err
}

// Leave gives the copy of a directory its attributes.
func (t *treeCopier) Leave(d *tree.Dir) error {
	ds := d.Value.(*dirState)
	s := t.scratch.Get().(*scratch)
	defer t.scratch.Put(s)
	src := handle{fd: d.FD, at: place{dir: d}}
	err := t.attributes(handle{fd: ds.fd}, src, &ds.st, s)
	if err == nil && t.opts.InodeFlags {
		err = t.keepFlags(d.FD, src.at)
	}
	return at(src.at.String(), err)
}

// Release closes the copy of a directory.
func (t *treeCopier) Release(d *tree.Dir) {
	if ds := d.Value.(*dirState); ds.fd >= 0 {
		unix.Close(ds.fd)
	}
}

// Entry copies what is not a directory.
func (t *treeCopier) Entry(d *tree.Dir, name string, typ uint8) error {
	dst := d.Value.(*dirState).fd
	var err error
	if typ == unix.DT_REG {
		err = t.regular(d, name, dst)
	} else {
		err = t.other(d, name, dst)
	}
	t.tick()
	if err != nil {
		return at(d.Path(name), err)
	}
	return nil
}

func (t *treeCopier) regular(d *tree.Dir, name string, dst int) error {
	fd, err := openSource(d.FD, name)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	defer unix.Close(fd)
	src := handle{fd: fd, at: place{d, name}}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("changed to type %#o while it was copied: %w", st.Mode&unix.S_IFMT, unix.ESTALE)
	}
	if st.Nlink > 1 {
		return t.linked(d, name, dst, &st, func() (bool, error) { return true, t.create(dst, name, src, &st) })
	}
	return t.create(dst, name, src, &st)
}

// create copies a regular file. Its mode may be right from the start, as
// nobody else can look into the directory yet.
func (t *treeCopier) create(dst int, name string, src handle, st *unix.Stat_t) error {
	fd, err := sys.Openat(dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, st.Mode&0777)
	if err != nil {
		return err
	}
	err = t.fill(handle{fd: fd}, src, st)
	if cerr := unix.Close(fd); err == nil && cerr != nil && cerr != unix.EINTR {
		err = os.NewSyscallError("close", cerr)
	}
	if err == nil && t.opts.InodeFlags {
		err = t.keepFlags(src.fd, src.at)
	}
	t.entries.Add(1)
	return err
}

func (t *treeCopier) other(d *tree.Dir, name string, dst int) error {
	src := handle{fd: -1, dir: d.FD, name: name, at: place{d, name}}
	var st unix.Stat_t
	if err := src.stat(&st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	create := func() (bool, error) {
		made, err := t.special(dst, name, src, &st)
		if made {
			t.entries.Add(1)
		}
		return made, err
	}
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return t.linked(d, name, dst, &st, create)
	}
	_, err := create()
	return err
}

// linked makes the copy of a file with several names when the first is met,
// and links of it for the others. create reports whether it made anything.
func (t *treeCopier) linked(d *tree.Dir, name string, dst int, st *unix.Stat_t, create func() (bool, error)) error {
	key := inode{st.Dev, st.Ino}
	t.mu.Lock()
	l := t.byInode[key]
	first := l == nil
	if first {
		l = &link{path: d.Path(name), left: uint64(st.Nlink), done: make(chan struct{})}
		t.byInode[key] = l
	}
	if l.left--; l.left == 0 {
		delete(t.byInode, key)
	}
	t.mu.Unlock()
	if first {
		defer close(l.done)
		made, err := create()
		l.ok = made && err == nil
		return err
	}
	// Whoever makes the first copy waits for nobody, so this ends.
	select {
	case <-l.done:
	case <-t.ctx.Done():
		return t.ctx.Err()
	}
	if !l.ok {
		t.skipped.Add(1)
		return nil // left out, or the whole copy has failed
	}
	t.entries.Add(1)
	t.copier.links.Add(1)
	return t.link(l.path, dst, name)
}

// link makes a hard link to a path of the copy, which holds no symlinks to
// follow: all directories in it were made here.
func (t *treeCopier) link(path string, dst int, name string) error {
	dir, base, closeDir, err := t.resolve(path)
	if err != nil {
		return err
	}
	defer closeDir()
	return os.NewSyscallError("linkat", unix.Linkat(dir, base, dst, name, 0))
}

// resolve returns a directory and a path below it that is short enough for the
// kernel.
func (t *treeCopier) resolve(path string) (dir int, rest string, closeDir func(), err error) {
	dir, rest, closeDir = int(t.root.Fd()), path, func() {}
	for len(rest) >= unix.PathMax {
		cut := strings.LastIndexByte(rest[:unix.PathMax-1], '/')
		next, err := sys.Openat(dir, rest[:cut], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		closeDir()
		if err != nil {
			return -1, "", nil, err
		}
		dir, rest, closeDir = next, rest[cut+1:], func() { unix.Close(next) }
	}
	return dir, rest, closeDir, nil
}

// keepFlags remembers the inode flags of a source.
func (t *treeCopier) keepFlags(src int, p place) error {
	flags, err := getFlags(src)
	if err != nil || flags&flagsCopied == 0 {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.late = append(t.late, lateFlags{p.String(), flags})
	return nil
}

// setLateFlags sets what keepFlags remembered. If one cannot be set all are
// taken back, so that the copy can be removed.
func (t *treeCopier) setLateFlags() error {
	for i, l := range t.late {
		if err := t.setFlagsOf(l.path, l.flags); err != nil {
			for _, l := range t.late[:i] {
				err = errors.Join(err, t.setFlagsOf(l.path, 0))
			}
			return at(l.path, err)
		}
	}
	return nil
}

func (t *treeCopier) setFlagsOf(path string, flags int) error {
	if path == "" {
		path = "."
	}
	dir, rest, closeDir, err := t.resolve(path)
	if err != nil {
		return err
	}
	defer closeDir()
	fd, err := sys.Openat(dir, rest, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return setFlags(fd, flags, flagsCopied)
}
