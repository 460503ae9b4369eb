package safepath

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links a lookup follows, as in the kernel.
const maxLinks = 40

// maxRetries bounds the tries against EAGAIN; openat2(2) promises nothing, but
// a rename in each of so many lookups is an attack.
const maxRetries = 1000

// Options are the options of [OpenRoot].
type Options struct {
	// NoOpenat2 forces the walk component by component, for tests.
	NoOpenat2 bool
}

// Root is a directory that lookups stay in. It is safe for concurrent use.
type Root struct {
	f    *os.File
	walk atomic.Bool // openat2 does not work here
}

// OpenRoot opens a directory; links in dir itself are followed. opts may be
// nil.
func OpenRoot(dir string, opts *Options) (*Root, error) {
	fd, err := retry(func() (int, error) {
		return unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	r := &Root{f: os.NewFile(uintptr(fd), dir)}
	r.walk.Store(opts != nil && opts.NoOpenat2)
	return r, nil
}

// Close releases the directory. Files opened through it stay open.
func (r *Root) Close() error { return r.f.Close() }

// Name returns the path OpenRoot was given.
func (r *Root) Name() string { return r.f.Name() }

// Fd returns the descriptor of the root, opened with O_PATH, for the *at
// family. It is valid until Close.
func (r *Root) Fd() int { return int(r.f.Fd()) }

// Open opens path with flags as for open(2), without O_CREAT; O_CLOEXEC is
// added. Links are followed inside the root, also the last one unless flags
// has O_NOFOLLOW. Magic links of /proc fail with ELOOP. Beware of fifos and
// devices in trees others can write to: add O_NONBLOCK or ask with O_PATH.
func (r *Root) Open(path string, flags int) (*os.File, error) {
	return r.open(path, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// OpenExact is Open for a path without symbolic links: if there is one, also
// in the last place, it fails with ELOOP, but with O_PATH|O_NOFOLLOW the last
// component may be a link and is opened itself. A ".." that would leave the
// root fails with EXDEV.
func (r *Root) OpenExact(path string, flags int) (*os.File, error) {
	return r.open(path, flags, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
}

func (r *Root) open(path string, flags int, resolve uint64) (*os.File, error) {
	rel := strings.TrimLeft(path, "/")
	if rel == "" {
		rel = "."
	}
	fd, err := -1, error(nil)
	if strings.IndexByte(path, 0) >= 0 || flags&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0 {
		err = unix.EINVAL
	} else {
		fd, err = r.openFD(rel, flags|unix.O_CLOEXEC|unix.O_LARGEFILE, resolve)
	}
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (r *Root) openFD(rel string, flags int, resolve uint64) (int, error) {
	defer func() { _ = r.f.Name() }() // keeps r.f reachable during the calls
	root := r.Fd()
	if !r.walk.Load() {
		how := unix.OpenHow{Flags: uint64(flags), Resolve: resolve}
		var fd int
		var err error
		for range maxRetries {
			fd, err = unix.Openat2(root, rel, &how)
			if err != unix.EAGAIN && err != unix.EINTR {
				break
			}
		}
		// ENOSYS: Linux before 5.6. EPERM: seccomp filters that do not know the
		// call; open(2) itself gives EPERM for little, and the walk repeats it.
		if err != unix.ENOSYS && err != unix.EPERM {
			return fd, err
		}
		if err == unix.ENOSYS {
			r.walk.Store(true)
		}
	}
	if resolve&unix.RESOLVE_NO_SYMLINKS != 0 {
		return walkExact(root, rel, flags)
	}
	return walkInRoot(root, rel, flags)
}

// walkExact opens a path of real directories below root.
func walkExact(root int, rel string, flags int) (int, error) {
	w := walker{stack: []int{root}}
	defer w.close()
	comps := split(rel)
	for i, c := range comps {
		if c == ".." && len(w.stack) == 1 {
			return -1, unix.EXDEV
		}
		if i == len(comps)-1 {
			return w.last(c, flags|unix.O_NOFOLLOW)
		}
		if err := w.step(c); err != nil {
			return -1, err
		}
	}
	return w.last(".", flags)
}

// walkInRoot opens a path and follows links inside root.
func walkInRoot(root int, rel string, flags int) (int, error) {
	w := walker{stack: []int{root}}
	defer w.close()
	todo := split(rel)
	links := 0
	slash := strings.HasSuffix(rel, "/") // the last component must be a directory
	for len(todo) > 0 {
		c := todo[0]
		todo = todo[1:]
		last := len(todo) == 0
		if c == ".." || c == "." {
			if err := w.step(c); err != nil {
				return -1, err
			}
			continue
		}
		top := w.stack[len(w.stack)-1]
		target, isLink, err := readLink(top, c)
		switch {
		case err != nil:
			return -1, err
		case isLink && !(last && !slash && flags&unix.O_NOFOLLOW != 0):
			if links++; links > maxLinks {
				return -1, unix.ELOOP
			}
			if target == "" {
				return -1, unix.ENOENT
			}
			if target[0] == '/' {
				w.toRoot()
			}
			if last && strings.HasSuffix(target, "/") {
				slash = true
			}
			todo = append(split(target), todo...)
			continue
		case last:
			if slash {
				flags |= unix.O_DIRECTORY
			}
			fd, err := w.last(c, flags|unix.O_NOFOLLOW)
			if err == unix.ELOOP && flags&unix.O_NOFOLLOW == 0 {
				// It became a link since it was looked at.
				if links++; links > maxLinks {
					return -1, unix.ELOOP
				}
				todo = []string{c}
				continue
			}
			return fd, err
		}
		if err := w.step(c); err != nil {
			if err == unix.ENOTDIR {
				if _, isLink, _ := readLink(top, c); isLink {
					if links++; links > maxLinks {
						return -1, unix.ELOOP
					}
					todo = append([]string{c}, todo...)
					continue
				}
			}
			return -1, err
		}
	}
	return w.last(".", flags&^unix.O_NOFOLLOW)
}

// walker is the chain of open directories from the root to where a lookup is.
// ".." pops it and never asks the kernel, whose answer could be outside.
type walker struct {
	stack []int // the first is the root's and not ours
}

func (w *walker) step(c string) error {
	switch c {
	case ".":
		return nil
	case "..":
		if n := len(w.stack); n > 1 {
			_ = unix.Close(w.stack[n-1])
			w.stack = w.stack[:n-1]
		}
		return nil
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(w.stack[len(w.stack)-1], c, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	w.stack = append(w.stack, fd)
	return nil
}

func (w *walker) last(c string, flags int) (int, error) {
	if c == ".." {
		if err := w.step(c); err != nil {
			return -1, err
		}
		c = "."
	}
	if c == "." {
		flags &^= unix.O_NOFOLLOW
	}
	return retry(func() (int, error) { return unix.Openat(w.stack[len(w.stack)-1], c, flags, 0) })
}

func (w *walker) toRoot() {
	for _, fd := range w.stack[1:] {
		_ = unix.Close(fd)
	}
	w.stack = w.stack[:1]
}

func (w *walker) close() { w.toRoot() }

// split cuts a path into components; empty ones are gone.
func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// readLink returns the target of name, and false if name is no symbolic link.
// It reads through a descriptor, so that a magic link of procfs is found out
// before it leads anywhere.
func readLink(dir int, name string) (target string, isLink bool, err error) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return "", false, err
	}
	defer unix.Close(fd)
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(fd, "", buf)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
			return "", false, nil // what an O_PATH descriptor of another type gives
		}
		if err != nil {
			return "", false, err
		}
		if n < size {
			return string(buf[:n]), true, magic(fd)
		}
	}
}

// magic returns ELOOP if fd is a link of procfs, whose target is not a path.
// That is more than RESOLVE_NO_MAGICLINKS refuses (/proc/self is a plain
// link), but a layer has no business in procfs.
func magic(fd int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if st.Type == unix.PROC_SUPER_MAGIC {
		return unix.ELOOP
	}
	return nil
}

func retry(f func() (int, error)) (int, error) {
	for {
		if fd, err := f(); err != unix.EINTR {
			return fd, err
		}
	}
}
