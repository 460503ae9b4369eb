package overlay

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/overlaymount/ask"
)

// Options are the options of [New]. The zero value, and nil, are the defaults.
type Options struct {
	// Durability is what is on stable storage when a call returns; default
	// [layerfs.DurabilityMetadata].
	Durability layerfs.Durability

	// Logger is told what has no other way back; default silent.
	Logger *slog.Logger

	// UserXattr keeps the marks of overlayfs in user.overlay.* instead of
	// trusted.overlay.*: "on", "off", or "" for what the caller's user
	// namespace needs. A root keeps what it was first opened with.
	UserXattr string

	// RedirectDir is overlayfs's redirect_dir: "on" lets directories of lower
	// layers be renamed, "off" makes that EXDEV, "follow" and "nofollow" are
	// as in overlayfs.rst. Default "" is "off", or "follow" where an earlier
	// opening of the root used "on".
	RedirectDir string

	// Metacopy is overlayfs's metacopy: "on" copies up a file's metadata
	// without its content when only that changes; it needs RedirectDir "on".
	// Default "" is "off", or "on" where an earlier opening used it.
	Metacopy string

	// XIno is overlayfs's xino: "on", "off" or "auto". Default is the kernel's.
	XIno string

	// Volatile mounts writable layers without ever syncing them. A reboot
	// after such a mount makes the layer incomplete.
	Volatile bool

	// MountOptions are further options of every overlay mount, "key=value" or
	// "flag", unescaped. Options that this package sets itself are refused.
	MountOptions []string

	// Quota is the quota of layers that are created without one.
	Quota layerfs.Quota

	// MountProgram is the path of a program that mounts in place of the
	// kernel, such as fuse-overlayfs, for hosts that refuse overlayfs. It is
	// called as "PROGRAM -o OPTIONS TARGET" and must write overlayfs's form,
	// or AUFS's where it cannot make devices.
	//
	// A program of the name layerfs, and what Main of package
	// github.com/layerfs/layerfs/overlay/union returns, which is this very
	// program, is the engine of package union. It serves what this process
	// mounts, which needs /dev/fuse and CAP_SYS_ADMIN. It always writes
	// overlayfs's form, and keeps names that begin with ".wh..wh." for itself:
	// in the tree they cannot be made, and are not seen. It serves each mount
	// from a process of its own, which ends with the mount; Get mounts again if
	// it was killed before. What these processes say is in
	// ROOT/overlay/.layerfs/mount-program.log.
	//
	// It has a layer as long as there is a mount of it that is writable: also
	// after the last Put while a file is open in the tree, and while a mount
	// namespace that was made meanwhile keeps a private copy of the mount, which
	// no unmounting here reaches. Until then a writable Get, Apply, Rollback and Remove
	// fail, and so do Changes and Diff unless the layer is mounted again, with
	// errors that match [layerfs.ErrInUse].
	//
	// Any other program whose caller is killed while it mounts may be done
	// after the next caller has looked for mounts. The layer then stays in use
	// until somebody unmounts it by hand.
	MountProgram string
}

// union reports whether the mount program is that of package union.
func (o *Options) union() bool {
	return o.MountProgram == ask.Self || filepath.Base(o.MountProgram) == "layerfs"
}

// validate returns all that is wrong with the options themselves.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	oneOf := func(name, value string, allowed ...string) {
		for _, a := range allowed {
			if value == a || value == "" {
				return
			}
		}
		bad("%s %q is not one of %s", name, value, strings.Join(allowed, ", "))
	}
	if o.Durability > layerfs.DurabilityFull {
		bad("durability %v is unknown", o.Durability)
	}
	oneOf("UserXattr", o.UserXattr, "on", "off")
	oneOf("RedirectDir", o.RedirectDir, "on", "off", "follow", "nofollow")
	oneOf("Metacopy", o.Metacopy, "on", "off")
	oneOf("XIno", o.XIno, "on", "off", "auto")
	if o.Metacopy == "on" && o.RedirectDir != "on" {
		bad("Metacopy needs RedirectDir on")
	}
	if o.UserXattr == "on" && (o.RedirectDir == "on" || o.Metacopy == "on") {
		bad("UserXattr excludes RedirectDir and Metacopy: an unprivileged writer could forge them")
	}
	if o.Quota.Bytes < 0 || o.Quota.Inodes < 0 {
		bad("quota of %d bytes and %d inodes is negative", o.Quota.Bytes, o.Quota.Inodes)
	}
	if o.MountProgram != "" {
		if !filepath.IsAbs(o.MountProgram) {
			bad("MountProgram %q is not an absolute path", o.MountProgram)
		}
		if o.Volatile || o.RedirectDir != "" || o.Metacopy != "" || o.XIno != "" {
			bad("MountProgram excludes Volatile, RedirectDir, Metacopy and XIno, which are the kernel's")
		}
	}
	for _, opt := range o.MountOptions {
		key, _, _ := strings.Cut(opt, "=")
		switch key {
		case "":
			bad("mount option %q has no name", opt)
		case "lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir", "source", "ro", "rw":
			bad("mount option %q is the driver's own", opt)
		case "index", "nfs_export":
			// An indexed hard link is whole in the mount that made it and
			// nowhere else: in a child of the layer, or in its diff, some of
			// its names would have the old content.
			bad("mount option %q is refused: layers would lose changes to hard links", opt)
		case "userxattr", "redirect_dir", "metacopy", "xino", "volatile":
			bad("mount option %q has a field of its own", opt)
		}
		if strings.ContainsRune(opt, 0) {
			bad("mount option %q has a NUL byte", opt)
		}
	}
	return errors.Join(errs...)
}
