package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// fsconfigString is the number of bytes FSCONFIG_SET_STRING takes with the
// terminating NUL; fs/fsopen.c, strndup_user(_value, 256).
const fsconfigString = 256

// Mount mounts the overlay at target, which must be a directory and no
// symbolic link.
//
// It costs one system call for each layer and some eight more; [Classic] is a
// single one. Paths may hold any byte but NUL. Nothing is mounted if an error
// is returned. The error is an *os.PathError with the name of the call that
// failed; for the new mount API it has the explanation of the kernel. It
// matches [errors.ErrUnsupported] if the kernel has no overlayfs.
//
// Kernel: "lowerdir+" since 6.8 (commit 24e16e385f22), descriptors as layers
// since 6.13 (commit a08557d19ef4). Before that mount(2) is used.
func (o *Overlay) Mount(target string) error {
	if err := o.Validate(); err != nil {
		return err
	}
	source := o.Source
	if source == "" {
		source = "overlay"
	}
	switch o.Method {
	case NewAPI:
		return o.mountNew(source, target)
	case Classic:
		return o.mountClassic(source, target)
	case Descriptors:
		return o.mountDescriptors(source, target)
	}
	classic := o.mountClassic
	if len(o.Files) > 0 || len(o.Data()) > PageLimit {
		classic = o.mountDescriptors
	}
	if beforeLowerAppend() {
		return classic(source, target)
	}
	err := o.mountNew(source, target)
	if err == nil || !declines(err) {
		return err
	}
	return second(err, classic(source, target))
}

// beforeLowerAppend reports whether the kernel calls itself older than 6.8, in
// which the new API would be refused and, before 6.5, leave a line in the
// kernel's log each time. It is only about what to try first: where "lowerdir+"
// was ported back, mount(2) gives the same mount.
func beforeLowerAppend() bool {
	return !sys.KernelAtLeast(6, 8)
}

// declines reports whether mount(2) may do what the new API refused: the
// kernel has no such call (ENOSYS), a seccomp filter does not know it (EPERM,
// or ENOSYS again), or the option is newer than this kernel (EINVAL). Then the
// cost of a second failure does not matter.
func declines(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) ||
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}

// second chooses which of the errors of two methods says more.
func second(first, err error) error {
	var why *logError
	if err != nil && errors.As(first, &why) {
		return first
	}
	return err
}

// logError is an errno with what the kernel wrote to the log of the context.
type logError struct {
	text string
	err  error
}

func (e *logError) Error() string { return e.err.Error() + ": " + e.text }
func (e *logError) Unwrap() error { return e.err }

// context is a file system context of fsopen(2).
type context struct {
	fd     int
	fstype string
}

func openContext(fstype string) (context, error) {
	fd, err := retry(func() (int, error) { return unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC) })
	if errors.Is(err, unix.ENODEV) {
		return context{}, noFileSystem(fstype)
	}
	if err != nil {
		return context{}, &os.PathError{Op: "fsopen", Path: fstype, Err: err}
	}
	return context{fd, fstype}, nil
}

func noFileSystem(fstype string) error {
	return &layerfs.UnsupportedError{Feature: "file system " + fstype, Reason: "not in this kernel (/proc/filesystems)"}
}

func (c context) close() { unix.Close(c.fd) }

// fail adds the messages of the kernel to err. Each read gives one message,
// "e " for an error, "w " for a warning, "i " for information.
func (c context) fail(op, path string, err error) error {
	var lines []string
	buf := make([]byte, 4096)
	for range 16 { // the log is a ring of 8
		n, rerr := unix.Read(c.fd, buf)
		if rerr != nil || n == 0 {
			break
		}
		line := strings.TrimSpace(string(buf[:n]))
		if len(line) > 2 && line[1] == ' ' {
			line = line[2:]
		}
		lines = append(lines, line)
	}
	if len(lines) > 0 {
		err = &logError{strings.Join(lines, "; "), err}
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

func (c context) set(s Setting) error {
	var err error
	if s.Flag {
		err = unix.FsconfigSetFlag(c.fd, s.Key)
	} else {
		err = unix.FsconfigSetString(c.fd, s.Key, s.Value)
	}
	if err != nil {
		return c.fail("fsconfig "+s.Key, s.Value, err)
	}
	return nil
}

// attach creates the superblock and attaches its mount at target.
func (c context) attach(target string, flags Flags) error {
	mnt, err := c.detached(flags)
	if err != nil {
		return err
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// detached creates the superblock and a mount of it that is nowhere.
func (c context) detached(flags Flags) (fd int, err error) {
	if err := unix.FsconfigCreate(c.fd); err != nil {
		if errors.Is(err, unix.ENODEV) && !hasFileSystem(c.fstype) {
			return -1, noFileSystem(c.fstype)
		}
		return -1, c.fail("fsconfig create", c.fstype, err)
	}
	mnt, err := unix.Fsmount(c.fd, unix.FSMOUNT_CLOEXEC, int(attrs(flags)))
	if err != nil {
		return -1, c.fail("fsmount", c.fstype, err)
	}
	return mnt, nil
}

func hasFileSystem(fstype string) bool {
	list, err := os.ReadFile("/proc/filesystems")
	return err != nil || strings.Contains(string(list), "\t"+fstype+"\n")
}

func (o *Overlay) mountNew(source, target string) error {
	c, err := o.context(source)
	if err != nil {
		return err
	}
	defer c.close()
	return c.attach(target, o.Flags)
}

// context makes a context with all the settings of the plan.
func (o *Overlay) context(source string) (_ context, err error) {
	c, err := openContext("overlay")
	if err != nil {
		return c, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.set(Setting{Key: "source", Value: source}); err != nil {
		return c, err
	}
	for _, s := range o.Settings() {
		if s.Layer {
			err = c.setLayer(s, o.Files[s.Value])
		} else {
			err = c.set(s)
		}
		if err != nil {
			return c, err
		}
	}
	// As MS_RDONLY does: of the file system, not only of this mount of it.
	if o.Flags&ReadOnly != 0 && o.Upper != "" {
		if err := c.set(Setting{Key: "ro", Flag: true}); err != nil {
			return c, err
		}
	}
	return c, nil
}

// setLayer sets a layer from a descriptor, or from its path.
func (c context) setLayer(s Setting, f *os.File) error {
	value := s.Value
	if s.Key != "lowerdir+" {
		// upperdir and workdir are unescaped even here (ovl_mount_dir in
		// ovl_parse_layer, fs/overlayfs/params.c), lowerdir+ is not.
		value = strings.ReplaceAll(value, `\`, `\\`)
	}
	if f == nil && len(value) < fsconfigString {
		return c.set(Setting{Key: s.Key, Value: value})
	}
	if f == nil {
		var err error
		if f, err = openPath(s.Value); err != nil {
			return err
		}
		defer f.Close()
	}
	defer runtime.KeepAlive(f)
	fd := int(f.Fd())
	err := unix.FsconfigSetFd(c.fd, s.Key, fd)
	if errors.Is(err, unix.EINVAL) {
		// Before Linux 6.13 the option takes no descriptor. The lookup of the
		// magic link gives the same directory.
		return c.set(Setting{Key: s.Key, Value: fdPath(fd)})
	}
	if err != nil {
		return c.fail("fsconfig "+s.Key, s.Value, err)
	}
	return nil
}

func (o *Overlay) mountClassic(source, target string) error {
	for _, f := range o.Files {
		if f != nil {
			return fmt.Errorf("mount(2) with paths cannot use the descriptor of %s", f.Name())
		}
	}
	return classicMount(source, target, "overlay", msFlags(o.Flags), o.Data())
}

// mountDescriptors names every layer by a number of at most four digits, so
// that 500 of them fit a page whatever their paths are.
func (o *Overlay) mountDescriptors(source, target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	names := make(map[string]string)
	defer runtime.KeepAlive(o.Files)
	for _, p := range append([]string{o.Upper, o.Work}, o.Lowers...) {
		if p == "" || names[p] != "" {
			continue
		}
		f := o.Files[p]
		if f == nil {
			if f, err = openPath(p); err != nil {
				return err
			}
			defer f.Close()
		}
		names[p] = strconv.Itoa(int(f.Fd()))
	}
	data := strings.Join(o.mountOptions(func(p string) string { return names[p] }), ",")
	return onThread(func() error {
		if err := unix.Chdir("/proc/thread-self/fd"); err != nil {
			return &os.PathError{Op: "chdir", Path: "/proc/thread-self/fd", Err: err}
		}
		return classicMount(source, target, "overlay", msFlags(o.Flags), data)
	})
}

// onThread runs f on a thread whose working directory is its own. The thread
// is not unlocked and ends with the goroutine, so that no other one ever runs
// in that directory.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- os.NewSyscallError("unshare", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// classicMount calls mount(2). The target is opened first because mount(2)
// would follow a symbolic link.
func classicMount(source, target, fstype string, flags uint, data string) error {
	if len(data) > PageLimit {
		return &os.PathError{Op: "mount", Path: target, Err: fmt.Errorf("%d bytes of options, more than %d: %w", len(data), PageLimit, unix.E2BIG)}
	}
	if strings.IndexByte(data, 0) >= 0 {
		return &os.PathError{Op: "mount", Path: target, Err: fmt.Errorf("NUL byte in options: %w", unix.EINVAL)}
	}
	t, err := openTarget(target)
	if err != nil {
		return err
	}
	defer t.Close()
	err = unix.Mount(source, fdPath(int(t.Fd())), fstype, uintptr(flags), data)
	if errors.Is(err, unix.ENODEV) && !hasFileSystem(fstype) {
		return noFileSystem(fstype)
	}
	if err != nil {
		return &os.PathError{Op: "mount", Path: target, Err: err}
	}
	return nil
}

// Mount mounts the file system at target, which must not be a symbolic link.
// Nothing is mounted if an error is returned.
//
// Errors are as those of [Overlay.Mount].
func (p *FS) Mount(target string) error {
	if p.Flags&Recursive != 0 {
		return fmt.Errorf("mount of %s cannot be recursive", p.Type)
	}
	source := p.Source
	if source == "" {
		source = p.Type
	}
	switch p.Method {
	case NewAPI:
		return p.mountNew(source, target)
	case Classic:
		return p.mountClassic(source, target)
	case Descriptors:
		return fmt.Errorf("method %v is for overlays", p.Method)
	}
	err := p.mountNew(source, target)
	if err == nil || !declines(err) {
		return err
	}
	return second(err, p.mountClassic(source, target))
}

func (p *FS) mountNew(source, target string) error {
	c, err := openContext(p.Type)
	if err != nil {
		return err
	}
	defer c.close()
	settings := append([]Setting{{Key: "source", Value: source}}, parseSettings(p.Options)...)
	if p.Flags&ReadOnly != 0 {
		settings = append(settings, Setting{Key: "ro", Flag: true})
	}
	for _, s := range settings {
		if err := c.set(s); err != nil {
			return err
		}
	}
	return c.attach(target, p.Flags)
}

func (p *FS) mountClassic(source, target string) error {
	flags := msFlags(p.Flags)
	var list []string
	for _, s := range parseSettings(p.Options) {
		switch {
		case s.Flag && s.Key == "sync":
			flags |= unix.MS_SYNCHRONOUS
		case s.Flag && s.Key == "dirsync":
			flags |= unix.MS_DIRSYNC
		case s.Flag && s.Key == "lazytime":
			flags |= unix.MS_LAZYTIME
		case strings.Contains(s.Value, ","):
			return &os.PathError{Op: "mount", Path: target, Err: fmt.Errorf("comma in option %q: %w", s, unix.EINVAL)}
		default:
			list = append(list, s.String())
		}
	}
	return classicMount(source, target, p.Type, flags, strings.Join(list, ","))
}

// Mount mounts a file system; see [FS].
func Mount(fstype, source, target string, flags Flags, options []string) error {
	return (&FS{Type: fstype, Source: source, Flags: flags, Options: options}).Mount(target)
}

// Bind mounts the tree at source also at target; see [BindMount].
func Bind(source, target string, flags Flags) error {
	return (&BindMount{Source: source, Flags: flags}).Mount(target)
}

// Mount attaches the tree at target, which must not be a symbolic link.
//
// The flags hold from the first moment with the new API (open_tree, Linux 5.2;
// mount_setattr, 5.12). With [Classic] the mount is made first and restricted
// by a second call, so there is a moment in which it is not read-only yet.
// Nothing is mounted if an error is returned.
func (p *BindMount) Mount(target string) error {
	switch p.Method {
	case NewAPI:
		return p.mountNew(target)
	case Classic:
		return p.mountClassic(target)
	case Descriptors:
		return fmt.Errorf("method %v is for overlays", p.Method)
	}
	err := p.mountNew(target)
	if err == nil || !declines(err) {
		return err
	}
	return p.mountClassic(target)
}

func (p *BindMount) mountNew(target string) error {
	f, err := openTree(p.Source, p.Flags&Recursive != 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if set := attrs(p.Flags); set != 0 {
		attr := unix.MountAttr{Attr_set: uint64(set)}
		if p.Flags&(NoAtime|StrictAtime) != 0 {
			attr.Attr_clr = unix.MOUNT_ATTR__ATIME
		}
		if err := setAttr(f, p.Flags&Recursive != 0, &attr); err != nil {
			return err
		}
	}
	return Attach(f, target)
}

func (p *BindMount) mountClassic(target string) error {
	t, err := openTarget(target)
	if err != nil {
		return err
	}
	defer t.Close()
	how := uintptr(unix.MS_BIND)
	if p.Flags&Recursive != 0 {
		how |= unix.MS_REC
	}
	if err := unix.Mount(p.Source, fdPath(int(t.Fd())), "", how, ""); err != nil {
		return &os.PathError{Op: "mount", Path: target, Err: err}
	}
	restrict := uintptr(msFlags(p.Flags))
	if restrict == 0 {
		return nil
	}
	err = p.remount(target, restrict)
	if err != nil {
		if uerr := Unmount(target); uerr != nil {
			err = fmt.Errorf("%w (rollback: %v)", err, uerr)
		}
	}
	return err
}

// remount restricts the mount at target, and those below it if the plan is
// recursive: MS_REMOUNT works on one mount at a time.
func (p *BindMount) remount(target string, flags uintptr) error {
	points := []string{target}
	if p.Flags&Recursive != 0 {
		abs, err := filepath.EvalSymlinks(target)
		if err != nil {
			return err
		}
		list, err := Under(abs)
		if err != nil {
			return err
		}
		for _, m := range list {
			if m.Mountpoint != abs {
				points = append(points, m.Mountpoint)
			}
		}
	}
	for _, point := range points {
		var st unix.Statfs_t
		if err := unix.Statfs(point, &st); err != nil {
			return &os.PathError{Op: "statfs", Path: point, Err: err}
		}
		// What the source has stays, as with mount_setattr: a remount replaces
		// all flags. ST_* and MS_* are the same bits for these.
		keep := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NODIRATIME)
		if flags&(unix.MS_NOATIME|unix.MS_STRICTATIME) == 0 {
			keep |= uintptr(st.Flags) & unix.MS_NOATIME
		}
		if err := unix.Mount("", point, "", unix.MS_REMOUNT|unix.MS_BIND|flags|keep, ""); err != nil {
			return &os.PathError{Op: "mount", Path: point, Err: err}
		}
	}
	return nil
}

// Attach attaches a detached tree, such as one of [OpenTreeMapped], at target.
// The descriptor remains valid and belongs to the caller.
func Attach(tree *os.File, target string) error {
	defer runtime.KeepAlive(tree)
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// openTree returns a detached copy of the mount at path. It is dissolved when
// the last descriptor is closed unless it was attached.
func openTree(path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_NO_AUTOMOUNT)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := retry(func() (int, error) { return unix.OpenTree(unix.AT_FDCWD, path, flags) })
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func setAttr(f *os.File, recursive bool, attr *unix.MountAttr) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	defer runtime.KeepAlive(f)
	if err := unix.MountSetattr(int(f.Fd()), "", flags, attr); err != nil {
		return &os.PathError{Op: "mount_setattr", Path: f.Name(), Err: err}
	}
	return nil
}

// Unmount detaches what is mounted at target: it is gone from the tree at
// once, and from the kernel when nobody uses it any more. A symbolic link is
// not followed. Mounts below it go too.
//
// The error matches [ErrNotMounted] if target is no mount point. In a user
// namespace that is also what the kernel says of mounts that were made outside.
func Unmount(target string) error {
	err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	return unmountError(target, err)
}

// UnmountNow is [Unmount] without waiting users: it fails with EBUSY while the
// mount is in use, and when it returns nil the file system has been written
// and closed if this was its last mount, so that its device is free.
func UnmountNow(target string) error {
	return unmountError(target, unix.Unmount(target, unix.UMOUNT_NOFOLLOW))
}

func unmountError(target string, err error) error {
	if errors.Is(err, unix.EINVAL) {
		err = notMounted{}
	}
	if err != nil {
		return &os.PathError{Op: "umount2", Path: target, Err: err}
	}
	return nil
}

type notMounted struct{}

func (notMounted) Error() string        { return ErrNotMounted.Error() }
func (notMounted) Is(target error) bool { return target == ErrNotMounted || target == unix.EINVAL }

func openPath(path string) (*os.File, error) {
	return open(path, unix.O_PATH|unix.O_DIRECTORY)
}

func openTarget(path string) (*os.File, error) {
	return open(path, unix.O_PATH|unix.O_NOFOLLOW)
}

func open(path string, flags int) (*os.File, error) {
	fd, err := retry(func() (int, error) { return unix.Open(path, flags|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func fdPath(fd int) string { return "/proc/thread-self/fd/" + strconv.Itoa(fd) }

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// attrs returns the MOUNT_ATTR_* bits.
func attrs(f Flags) uint {
	return translate(f, func(b flagBit) uint { return b.attr })
}

// msFlags returns the MS_* bits.
func msFlags(f Flags) uint {
	return translate(f, func(b flagBit) uint { return b.ms })
}

type flagBit struct {
	flag     Flags
	attr, ms uint
}

func translate(f Flags, kind func(flagBit) uint) uint {
	var bits uint
	for _, b := range [...]flagBit{
		{ReadOnly, unix.MOUNT_ATTR_RDONLY, unix.MS_RDONLY},
		{NoSuid, unix.MOUNT_ATTR_NOSUID, unix.MS_NOSUID},
		{NoDev, unix.MOUNT_ATTR_NODEV, unix.MS_NODEV},
		{NoExec, unix.MOUNT_ATTR_NOEXEC, unix.MS_NOEXEC},
		{NoAtime, unix.MOUNT_ATTR_NOATIME, unix.MS_NOATIME},
		{NoDirAtime, unix.MOUNT_ATTR_NODIRATIME, unix.MS_NODIRATIME},
		{StrictAtime, unix.MOUNT_ATTR_STRICTATIME, unix.MS_STRICTATIME},
		{NoSymFollow, unix.MOUNT_ATTR_NOSYMFOLLOW, unix.MS_NOSYMFOLLOW},
	} {
		if f&b.flag != 0 {
			bits |= kind(b)
		}
	}
	return bits
}
