package feature

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
)

// trial is an overlay that is mounted for a moment in a temporary directory.
type trial struct {
	since string
	plan  func(o *mount.Overlay)
	check func(d dirs) error // returns a refusal for no
}

// dirs are the directories of a trial.
type dirs struct{ lower, below, upper, work, merged string }

// refusal is what a check says if the mount was made and does not work.
type refusal string

func (r refusal) Error() string { return string(r) }

func trials() map[Feature]trial {
	return map[Feature]trial{
		Overlay:          {"Linux 4.0", func(*mount.Overlay) {}, func(d dirs) error { return checkOverlay(d, "trusted.overlay.opaque") }},
		OverlayUserXattr: {"Linux 5.11", func(o *mount.Overlay) { o.UserXattr = true }, func(d dirs) error { return checkOverlay(d, "user.overlay.opaque") }},
		Metacopy:         {"Linux 4.19", func(o *mount.Overlay) { o.Metacopy = "on" }, checkMetacopy},
		RedirectDir:      {"Linux 4.10", func(o *mount.Overlay) { o.RedirectDir = "on" }, checkRedirect},
		Index:            {"Linux 4.13", func(o *mount.Overlay) { o.Index = "on" }, checkIndex},
		XIno:             {"Linux 4.17", func(o *mount.Overlay) { o.XIno = "on" }, checkXIno},
		Volatile:         {"Linux 5.10", func(o *mount.Overlay) { o.Volatile = true }, checkVolatile},
		XattrWhiteout:    {"Linux 6.7", nil, nil},
		OverlayIDMap:     {"Linux 6.15", nil, nil},
	}
}

func (t trial) run(f Feature, dir string) (err error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	defer cleanUp(tmp, &err)
	d := dirs{tmp + "/lower", tmp + "/below", tmp + "/upper", tmp + "/work", tmp + "/merged"}
	for _, p := range []string{d.lower, d.below, d.upper, d.work, d.merged, d.lower + "/dir", d.lower + "/dir/sub"} {
		if err := os.Mkdir(p, 0o755); err != nil {
			return err
		}
	}
	for _, p := range []string{d.lower + "/file", d.below + "/hidden", d.below + "/shown"} {
		if err := os.WriteFile(p, []byte("data"), 0o644); err != nil {
			return err
		}
	}
	plan := mount.Overlay{Lowers: []string{d.lower}, Upper: d.upper, Work: d.work}
	check := t.check
	switch f {
	case XattrWhiteout:
		plan = mount.Overlay{Lowers: []string{d.lower, d.below}}
		if err := prepareXattrWhiteout(d); err != nil {
			return t.judge(f, err)
		}
		check = checkXattrWhiteout
	case OverlayIDMap:
		tree, err := mount.OpenTreeMapped(d.lower, someMap())
		if err != nil {
			return t.judge(f, err)
		}
		defer tree.Close()
		plan.Files = map[string]*os.File{d.lower: tree}
		check = checkMapped
	default:
		t.plan(&plan)
	}
	if err := plan.Mount(d.merged); err != nil {
		return t.judge(f, err)
	}
	// Before the removal of the directory: deferred calls run backwards.
	defer func() {
		if uerr := mount.Unmount(d.merged); uerr != nil && err == nil {
			err = uerr
		}
	}()
	return t.judge(f, check(d))
}

// judge tells a no from an error that says nothing about the feature.
func (t trial) judge(f Feature, err error) error {
	var r refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &r):
		return no(f, t.since, "%s", r)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return no(f, "", "%v", err)
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
		return no(f, t.since, "%v", err)
	}
	return err
}

// checkOverlay makes a whiteout, a renamed whiteout and an opaque directory.
func checkOverlay(d dirs, opaque string) error {
	// The overlay itself says EIO if it cannot set its xattrs, as it would for
	// a broken disk.
	if err := unix.Lsetxattr(d.upper, opaque+".probe", []byte("y"), 0); err != nil {
		return &os.PathError{Op: "lsetxattr " + opaque, Path: "upper", Err: err}
	}
	if err := os.Rename(d.merged+"/file", d.merged+"/renamed"); err != nil {
		return err
	}
	if err := os.RemoveAll(d.merged + "/dir"); err != nil {
		return err
	}
	if err := os.Mkdir(d.merged+"/dir", 0o755); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(d.upper+"/file", &st); err != nil {
		return &os.PathError{Op: "lstat", Path: "file", Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		return refusal(fmt.Sprintf("a removed file has mode %o and device %d in the upper layer and is no whiteout", st.Mode, st.Rdev))
	}
	return hasXattr(d.upper+"/dir", opaque, "y")
}

func hasXattr(path, name, want string) error {
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, name, buf)
	if errors.Is(err, unix.ENODATA) {
		return refusal(fmt.Sprintf("no xattr %s in the upper layer", name))
	}
	if err != nil {
		return &os.PathError{Op: "lgetxattr " + name, Path: filepath.Base(path), Err: err}
	}
	if want != "" && string(buf[:n]) != want {
		return refusal(fmt.Sprintf("xattr %s is %q, not %q", name, buf[:n], want))
	}
	return nil
}

func checkMetacopy(d dirs) error {
	if err := os.Chmod(d.merged+"/file", 0o600); err != nil {
		return err
	}
	return hasXattr(d.upper+"/file", "trusted.overlay.metacopy", "")
}

func checkRedirect(d dirs) error {
	if err := os.Rename(d.merged+"/dir", d.merged+"/moved"); err != nil {
		return err // EXDEV if the option was ignored
	}
	return hasXattr(d.upper+"/moved", "trusted.overlay.redirect", "")
}

// checkIndex looks for the index itself: the option is turned off with a
// message in the log where file handles are missing.
func checkIndex(d dirs) error { return exists(d.work+"/index", "the kernel made no index") }

func checkVolatile(d dirs) error {
	return exists(d.work+"/work/incompat/volatile", "the kernel made no mark of a volatile mount")
}

func exists(path, otherwise string) error {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return refusal(otherwise)
	}
	return err
}

// checkXIno asks for what xino is for: all objects have the device number of
// the overlay. Layers on one file system have that without it, so the answer is
// about the option; whether it works for other layers depends on their inode
// numbers.
func checkXIno(d dirs) error {
	var dir, file unix.Stat_t
	if err := unix.Lstat(d.merged, &dir); err != nil {
		return &os.PathError{Op: "lstat", Path: d.merged, Err: err}
	}
	if err := unix.Lstat(d.merged+"/file", &file); err != nil {
		return &os.PathError{Op: "lstat", Path: d.merged + "/file", Err: err}
	}
	if dir.Dev != file.Dev {
		return refusal("files have the device number of their layer")
	}
	return nil
}

// prepareXattrWhiteout makes the form of Documentation/filesystems/overlayfs.rst,
// "whiteouts and opaque directories": an empty file with the xattr whiteout, in
// a directory whose xattr opaque is "x".
func prepareXattrWhiteout(d dirs) error {
	if err := os.WriteFile(d.lower+"/hidden", nil, 0o644); err != nil {
		return err
	}
	for path, attr := range map[string][2]string{
		d.lower + "/hidden": {"trusted.overlay.whiteout", "y"},
		d.lower:             {"trusted.overlay.opaque", "x"},
	} {
		if err := unix.Lsetxattr(path, attr[0], []byte(attr[1]), 0); err != nil {
			return &os.PathError{Op: "lsetxattr " + attr[0], Path: filepath.Base(path), Err: err}
		}
	}
	return nil
}

func checkXattrWhiteout(d dirs) error {
	if _, err := os.Lstat(d.merged + "/shown"); err != nil {
		return err
	}
	if _, err := os.Lstat(d.merged + "/hidden"); !errors.Is(err, os.ErrNotExist) {
		return refusal("a file with the xattr whiteout is not taken for one")
	}
	return nil
}

func checkMapped(d dirs) error {
	var plain, mapped unix.Stat_t
	if err := unix.Lstat(d.lower+"/file", &plain); err != nil {
		return &os.PathError{Op: "lstat", Path: d.lower, Err: err}
	}
	if err := unix.Lstat(d.merged+"/file", &mapped); err != nil {
		return &os.PathError{Op: "lstat", Path: d.merged, Err: err}
	}
	if plain.Uid == mapped.Uid {
		return refusal(fmt.Sprintf("a file of user %d is not mapped", plain.Uid))
	}
	return nil
}
