package whiteout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/tree"
)

func checkForm(f Form) error {
	if !f.valid() {
		return fmt.Errorf("%v: %w", f, os.ErrInvalid)
	}
	return nil
}

// Read says what entry name of directory dir means in form f. The overlay
// forms read each other's whiteouts, in the name space of f: device 0/0, and
// an empty file with the whiteout xattr. A symlink is not followed.
//
// The error is a [*NameError] for a malformed AUFS whiteout, and one of the
// file system if the entry is missing or not readable.
func Read(dir *os.File, name string, f Form) (Entry, error) {
	if err := checkForm(f); err != nil {
		return Entry{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return Entry{}, &os.PathError{Op: "fstatat", Path: name, Err: err}
	}
	return read(int(dir.Fd()), name, &st, f)
}

func read(dir int, name string, st *unix.Stat_t, f Form) (Entry, error) {
	if f == AUFS {
		return readName(name)
	}
	hides, err := isOverlayWhiteout(dir, name, st, f)
	if err != nil || !hides {
		return Entry{Kind: Plain}, err
	}
	return Entry{Whiteout, name}, nil
}

func readName(name string) (Entry, error) {
	switch {
	case IsOpaque(name):
		return Entry{Kind: Opaque}, nil
	case IsMeta(name):
		return Entry{Kind: Meta}, nil
	}
	target, ok, err := Target(name)
	if err != nil {
		return Entry{}, err
	}
	if !ok {
		return Entry{Kind: Plain}, nil
	}
	return Entry{Whiteout, target}, nil
}

func isOverlayWhiteout(dir int, name string, st *unix.Stat_t, f Form) (bool, error) {
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFCHR:
		return st.Rdev == 0, nil
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0:
		_, ok, err := getxattr(dir, name, f.Prefix()+whiteoutAttr)
		return ok, err
	}
	return false, nil
}

// getxattr returns the value of a short xattr and whether there is one.
func getxattr(dir int, name, attr string) (string, bool, error) {
	var buf [64]byte
	n, err := sys.GetxattrAt(dir, name, attr, buf[:])
	switch {
	case err == nil:
		return string(buf[:n]), true, nil
	case errors.Is(err, unix.ERANGE):
		return "", true, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return "", false, nil
	}
	return "", false, err
}

func removexattr(dir int, name, attr string) error {
	err := sys.RemovexattrAt(dir, name, attr)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// IsOpaqueDir reports whether directory dir hides all that the layers below
// have at its place.
func IsOpaqueDir(dir *os.File, f Form) (bool, error) {
	if err := checkForm(f); err != nil {
		return false, err
	}
	return isOpaqueDir(int(dir.Fd()), f)
}

func isOpaqueDir(dir int, f Form) (bool, error) {
	if f == AUFS {
		var st unix.Stat_t
		err := unix.Fstatat(dir, OpaqueName, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			return false, nil
		}
		if err != nil {
			return false, &os.PathError{Op: "fstatat", Path: OpaqueName, Err: err}
		}
		return true, nil
	}
	v, _, err := getxattr(dir, "", f.OpaqueXattr())
	return v == "y", err
}

// What a crash may leave; Convert removes it.
const (
	makeTemp    = MetaPrefix + "whiteout"
	convertTemp = MetaPrefix + "convert"
)

// Make puts a whiteout of target into directory dir. It is no error if there
// is one already. An overlay whiteout takes the place of the name, so anything
// else there is an error that matches fs.ErrExist.
//
// [Overlay] and [OverlayUser] need Linux 5.8 to work without CAP_MKNOD. For
// the forms with Xattr the directory is marked as holding whiteouts; the
// kernel also wants the mark on the root of the layer, see [MarkRoot].
func Make(dir *os.File, target string, f Form) error {
	if err := checkForm(f); err != nil {
		return err
	}
	return makeWhiteout(int(dir.Fd()), target, f)
}

func makeWhiteout(dir int, target string, f Form) error {
	if reason := badBase(target); reason != "" {
		return &NameError{target, reason}
	}
	switch f {
	case AUFS:
		name, err := Name(target)
		if err != nil {
			return err
		}
		return makeFile(dir, name)
	case Overlay, OverlayUser:
		err := unix.Mknodat(dir, target, unix.S_IFCHR, 0)
		if err == unix.EEXIST && isWhiteoutNow(dir, target, f) {
			return nil
		}
		return pathError("mknodat", target, err)
	}
	if err := markXattrs(dir, f); err != nil {
		return err
	}
	// The file gets its xattr before its name: it must never be seen as an
	// empty file.
	const tmp = makeTemp
	unix.Unlinkat(dir, tmp, 0)
	if err := makeFile(dir, tmp); err != nil {
		return err
	}
	err := sys.SetxattrAt(dir, tmp, f.Prefix()+whiteoutAttr, []byte("y"), 0)
	if err == nil {
		err = pathError("renameat2", target, unix.Renameat2(dir, tmp, dir, target, unix.RENAME_NOREPLACE))
	}
	if err != nil {
		unix.Unlinkat(dir, tmp, 0)
		if errors.Is(err, unix.EEXIST) && isWhiteoutNow(dir, target, f) {
			return nil
		}
	}
	return err
}

func isWhiteoutNow(dir int, name string, f Form) bool {
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return false
	}
	is, err := isOverlayWhiteout(dir, name, &st, f)
	return is && err == nil
}

// makeFile makes an empty file as AUFS's whiteouts are, mode 0444.
func makeFile(dir int, name string) error {
	fd, err := sys.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o444)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if serr := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); serr == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			return nil
		}
	}
	if err != nil {
		return err
	}
	return pathError("close", name, unix.Close(fd))
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

// Remove removes the whiteout of target from directory dir. It is no error if
// there is none; what is not a whiteout is left alone.
func Remove(dir *os.File, target string, f Form) error {
	if err := checkForm(f); err != nil {
		return err
	}
	if reason := badBase(target); reason != "" {
		return &NameError{target, reason}
	}
	d := int(dir.Fd())
	name := target
	if f == AUFS {
		var err error
		if name, err = Name(target); err != nil {
			return err
		}
	} else if !isWhiteoutNow(d, target, f) {
		return nil
	}
	err := unix.Unlinkat(d, name, 0)
	if err == unix.ENOENT {
		return nil
	}
	return pathError("unlinkat", name, err)
}

// SetOpaque marks directory dir opaque.
func SetOpaque(dir *os.File, f Form) error {
	if err := checkForm(f); err != nil {
		return err
	}
	return setOpaque(int(dir.Fd()), f)
}

func setOpaque(dir int, f Form) error {
	if f == AUFS {
		return makeFile(dir, OpaqueName)
	}
	return sys.SetxattrAt(dir, "", f.OpaqueXattr(), []byte("y"), 0)
}

// ClearOpaque takes the mark away. It is no error if there is none.
func ClearOpaque(dir *os.File, f Form) error {
	if err := checkForm(f); err != nil {
		return err
	}
	d := int(dir.Fd())
	opaque, err := isOpaqueDir(d, f)
	if err != nil || !opaque {
		return err
	}
	return clearMarks(d, f)
}

// clearMarks removes all marks of a form from a directory.
func clearMarks(dir int, f Form) error {
	if f == AUFS {
		if err := unix.Unlinkat(dir, OpaqueName, 0); err != unix.ENOENT {
			return pathError("unlinkat", OpaqueName, err)
		}
		return nil
	}
	if err := removexattr(dir, "", f.OpaqueXattr()); err != nil {
		return err
	}
	return removexattr(dir, "", f.Prefix()+whiteoutsAttr)
}

// MarkRoot says on the root of a layer that it holds xattr whiteouts, which is
// where Linux looks before it looks for any. The other forms need no mark.
func MarkRoot(root *os.File, f Form) error {
	if err := checkForm(f); err != nil {
		return err
	}
	if !f.xattrWhiteouts() {
		return nil
	}
	return markXattrs(int(root.Fd()), f)
}

// markXattrs marks a directory as holding xattr whiteouts, for Linux 6.8
// (opaque=x) and for 6.7.0 (whiteouts). An opaque directory needs none.
func markXattrs(dir int, f Form) error {
	v, _, err := getxattr(dir, "", f.OpaqueXattr())
	if err != nil || v == "y" {
		return err
	}
	if v != "x" {
		if err := sys.SetxattrAt(dir, "", f.OpaqueXattr(), []byte("x"), 0); err != nil {
			return err
		}
	}
	return sys.SetxattrAt(dir, "", f.Prefix()+whiteoutsAttr, []byte("y"), 0)
}

// Convert changes all whiteouts and opaque marks below root from one form to
// another, in place. root must not be mounted, nor be changed by others
// meanwhile; it may hold anything: no symlink is followed.
//
// Every step leaves a tree in which each entry is in one of the two forms, the
// new mark being made before the old one goes, so Convert can be run again
// after a crash or a cancelled context, with the same result as if it had not
// been interrupted. Times of directories are kept, but for the one that was
// worked on when it was interrupted. Whiteouts inside an opaque
// directory are dropped, since they hide nothing: overlayfs would list them.
//
// Memory grows with the largest directory; the cost is that of a walk.
//
// The error matches [layerfs.ErrMalformed] for malformed AUFS whiteouts, for a
// whiteout next to an entry of its name in AUFS form, and for files that
// cannot be kept in AUFS form because they have a reserved name. AUFS's own
// files (see [IsMeta]) are left where they are by a conversion from AUFS.
func Convert(ctx context.Context, root string, from, to Form) (Stats, error) {
	if err := errors.Join(checkForm(from), checkForm(to)); err != nil {
		return Stats{}, err
	}
	c := converter{from: from, to: to, root: root}
	if from == to {
		return Stats{}, nil
	}
	err := tree.Walk(ctx, root, func(e *tree.Entry) error {
		c.stats.Entries++
		if !e.IsDir() {
			return nil
		}
		if from == AUFS && e.Dir >= 0 && IsMeta(e.Name) {
			return nil
		}
		return c.dir(ctx, e)
	})
	if err == nil && c.stats.Whiteouts > 0 && to.xattrWhiteouts() {
		err = c.markRoot()
	}
	if err != nil {
		return c.stats, fmt.Errorf("convert %s from %v to %v: %w", root, from, to, err)
	}
	return c.stats, nil
}

type converter struct {
	from, to Form
	root     string
	stats    Stats
}

func (c *converter) markRoot() error {
	f, err := os.OpenFile(c.root, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return MarkRoot(f, c.to)
}

// dir converts the entries and the marks of one directory. The walk reads the
// names of the directory only after, so it does not meet what is gone.
func (c *converter) dir(ctx context.Context, e *tree.Entry) error {
	wasOpaque, err := isOpaqueDir(e.Self, c.from)
	if err != nil {
		return at(e.Path, err)
	}
	isOpaque, err := isOpaqueDir(e.Self, c.to) // by an interrupted conversion
	if err != nil {
		return at(e.Path, err)
	}
	opaque := wasOpaque || isOpaque
	whiteouts, err := c.find(ctx, e)
	if err != nil {
		return err
	}
	if wasOpaque {
		c.stats.Opaques++
		if err := setOpaque(e.Self, c.to); err != nil {
			return at(e.Path, err)
		}
	}
	for _, name := range whiteouts {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.whiteout(e.Self, name, opaque); err != nil {
			return at(e.Path+"/"+name, err)
		}
	}
	if err := c.clear(e.Self, wasOpaque); err != nil {
		return at(e.Path, err)
	}
	if len(whiteouts) > 0 || wasOpaque {
		err = sys.Futimens(e.Self, e.Stat.Atim, e.Stat.Mtim)
	}
	return at(e.Path, err)
}

func at(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("/%s: %w", path, err)
}

// clear takes the old marks away, except where both forms share them.
func (c *converter) clear(dir int, wasOpaque bool) error {
	if c.from == AUFS {
		return clearMarks(dir, AUFS)
	}
	if c.from.Prefix() != c.to.Prefix() {
		return clearMarks(dir, c.from)
	}
	if wasOpaque || c.to.xattrWhiteouts() {
		return nil
	}
	return clearMarks(dir, c.from)
}

// find returns the targets of the whiteouts in a directory, and refuses names
// that cannot be converted before anything is changed in it.
func (c *converter) find(ctx context.Context, e *tree.Entry) (targets []string, err error) {
	f, err := dirFile(e.Self, e.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for {
		names, err := f.Readdirnames(512)
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			target, err := c.check(e.Self, name)
			if err != nil {
				return nil, at(e.Path+"/"+name, err)
			}
			if target != "" {
				targets = append(targets, target)
			}
		}
		if len(names) == 0 {
			return targets, ignoreEOF(err)
		}
	}
}

// check returns what name hides in the old form, if anything.
func (c *converter) check(dir int, name string) (target string, err error) {
	if name == makeTemp || name == convertTemp {
		return "", pathError("unlinkat", name, unix.Unlinkat(dir, name, 0))
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return "", pathError("fstatat", name, err)
	}
	entry, err := read(dir, name, &st, c.from)
	if err != nil {
		return "", err
	}
	switch {
	case entry.Kind == Whiteout && c.from == AUFS:
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return "", fmt.Errorf("%w: a whiteout that is not a regular file", layerfs.ErrMalformed)
		}
		// An entry of that name can only be the whiteout that an interrupted
		// conversion made.
		var there unix.Stat_t
		if unix.Fstatat(dir, entry.Target, &there, unix.AT_SYMLINK_NOFOLLOW) == nil && !isWhiteoutNow(dir, entry.Target, c.to) {
			return "", fmt.Errorf("%w: whiteout and entry of one name", layerfs.ErrMalformed)
		}
	case entry.Kind == Whiteout && c.to == AUFS:
		_, err = Name(entry.Target)
	case entry.Kind == Plain && c.to == AUFS && IsReserved(name):
		// Whiteouts and marks of an interrupted conversion are fine.
		if IsWhiteout(name) || IsOpaque(name) {
			if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 {
				return "", nil
			}
		}
		return "", fmt.Errorf("%w: name reserved for whiteouts", layerfs.ErrMalformed)
	}
	if err != nil || entry.Kind != Whiteout {
		return "", err
	}
	return entry.Target, nil
}

// whiteout converts one whiteout; in an opaque directory it is dropped.
func (c *converter) whiteout(dir int, target string, opaque bool) error {
	old := target
	if c.from == AUFS {
		old = Prefix + target
	}
	if opaque {
		c.stats.Dropped++
		if c.from == AUFS && isWhiteoutNow(dir, target, c.to) {
			if err := unix.Unlinkat(dir, target, 0); err != nil {
				return pathError("unlinkat", target, err)
			}
		}
		return pathError("unlinkat", old, unix.Unlinkat(dir, old, 0))
	}
	c.stats.Whiteouts++
	if c.from == AUFS || c.to == AUFS {
		if err := makeWhiteout(dir, target, c.to); err != nil {
			return err
		}
		return pathError("unlinkat", old, unix.Unlinkat(dir, old, 0))
	}
	return c.exchange(dir, target)
}

// exchange replaces an overlay whiteout by one of the other kind, which has
// the same name: a new one is made beside it and renamed over it.
func (c *converter) exchange(dir int, target string) error {
	const tmp = convertTemp
	if err := unix.Unlinkat(dir, tmp, 0); err != nil && err != unix.ENOENT {
		return pathError("unlinkat", tmp, err)
	}
	if err := makeWhiteout(dir, tmp, c.to); err != nil {
		return err
	}
	return pathError("renameat", target, unix.Renameat(dir, tmp, dir, target))
}

// dirFile opens a directory again, with a position of its own.
func dirFile(fd int, path string) (*os.File, error) {
	own, err := sys.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(own), path), nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
