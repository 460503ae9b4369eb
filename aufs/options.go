package aufs

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/union"
)

// Engine says what merges the branches.
type Engine string

// The engines.
const (
	Auto   Engine = "auto"   // the kernel's AUFS if a probe mount works, else FUSE
	Kernel Engine = "kernel" // the kernel's AUFS
	FUSE   Engine = "fuse"   // package union, served by a helper
)

// Options are the options of [New]. The zero value, and nil, are the defaults.
// What an engine cannot do is refused by New with an error that matches
// [errors.ErrUnsupported].
type Options struct {
	// Durability is what is on stable storage when a call returns; default
	// [layerfs.DurabilityMetadata].
	Durability layerfs.Durability

	// Logger is told what has no other way back; default silent.
	Logger *slog.Logger

	// Engine is [Auto] if empty.
	Engine Engine

	// Helper is the command of the program that serves the FUSE engine's mounts,
	// so that they outlive this process: one that calls [Main] first in its
	// main function, which returns the command for that very program. Its
	// arguments are followed by ours. Default is layerfs, the tool, if it is
	// in PATH. Where the service manager kills all processes of a service
	// with it, the command must lead out of that, as with
	// {"systemd-run", "--scope", "--quiet", "layerfs"}. The helper has the
	// oom_score_adj of this process, unless the command sets another, as
	// {"choom", "-n", "-500", "--", "layerfs"} does, and of its environment what
	// Go's runtime reads alone.
	Helper []string

	// InProcess lets this process serve the FUSE engine's mounts. They end
	// with it, however it ends, and users of them then get ENOTCONN until the
	// next New or Get; [layerfs.GetOptions.Persist] is for base layers alone.
	// It is for tests, and for programs that must not start others.
	InProcess bool

	// LiveBase lets layers that have children be held for writing. What is
	// changed in them shows in every mounted layer on top, at once or within
	// the time UDBA says. An Apply to such a layer is not one step: whoever
	// has a child mounted sees it grow, and if it fails, the layer and its
	// children are incomplete.
	LiveBase bool

	// UDBA (user's direct branch access) says how changes of the ancestors'
	// branches are noticed. Default is [union.Notify] with LiveBase and
	// [union.None] without, where ancestors do not change. [union.Strict] is
	// of the FUSE engine alone.
	UDBA union.UDBA

	// Dio lets the kernel's AUFS open files with O_DIRECT, which else is
	// EINVAL. The FUSE engine always lets them be opened so.
	Dio bool

	// NoPlink breaks the links of a file with several names when one of them
	// is copied up.
	NoPlink bool

	// DirPerm1 is AUFS's dirperm1: "on", and the permissions of a directory
	// are those of its topmost instance; "off", and all instances must
	// permit. Default "" is "on" where it is supported. The FUSE engine has
	// it always on.
	DirPerm1 string

	// Sum makes statfs(2) add up the file systems of the branches instead of
	// telling those of the topmost.
	Sum bool

	// XIno is the path of the file in which the kernel's AUFS keeps its table
	// of inode numbers; it is removed as soon as it is made. Default is
	// /dev/shm/aufs.xino, or a file in the root where that is no directory.
	// The FUSE engine has no such file.
	XIno string

	// Quota is the quota of layers that are created without one.
	Quota layerfs.Quota
}

// validate returns all that is wrong with the options themselves.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	oneOf := func(name, value string, allowed ...string) {
		if value != "" && !slices.Contains(allowed, value) {
			bad("%s %q is not one of %s", name, value, strings.Join(allowed, ", "))
		}
	}
	if o.Durability > layerfs.DurabilityFull {
		bad("durability %v is unknown", o.Durability)
	}
	oneOf("Engine", string(o.Engine), string(Auto), string(Kernel), string(FUSE))
	oneOf("UDBA", string(o.UDBA), string(union.None), string(union.Reval), string(union.Notify), string(union.Strict))
	oneOf("DirPerm1", o.DirPerm1, "on", "off")
	if o.LiveBase && o.UDBA == union.None {
		bad("LiveBase needs changes of branches to be noticed, and UDBA none notices none")
	}
	if o.Quota.Bytes < 0 || o.Quota.Inodes < 0 {
		bad("quota of %d bytes and %d inodes is negative", o.Quota.Bytes, o.Quota.Inodes)
	}
	if o.InProcess && len(o.Helper) > 0 {
		bad("a Helper has nothing to do InProcess")
	}
	if len(o.Helper) > 0 && o.Helper[0] == "" {
		bad("the command of the Helper is empty")
	}
	if o.XIno != "" {
		if !filepath.IsAbs(o.XIno) {
			bad("XIno %q is not an absolute path", o.XIno)
		}
		if err := checkPath(o.XIno); err != nil {
			bad("XIno: %w", err)
		}
	}
	return errors.Join(errs...)
}

// engines returns why the options exclude an engine, or nil.
func (o *Options) excludes(e Engine) error {
	no := func(feature, reason string) error {
		return &layerfs.UnsupportedError{Feature: feature + " with the " + string(e) + " engine", Reason: reason}
	}
	switch e {
	case Kernel:
		switch {
		case o.UDBA == union.Strict:
			return no("udba strict", "AUFS has none, reval and notify")
		case o.UDBA == union.Reval && o.LiveBase:
			return no("a live base with udba reval", "a name that was looked up before it was made in the base stays unseen (aufs(5), udba)")
		}
	case FUSE:
		switch {
		case o.XIno != "":
			return no("an xino file", "inode numbers are kept in memory")
		case o.DirPerm1 == "off":
			return no("dirperm1 off", "the kernel's FUSE checks the permissions of the topmost directory only")
		}
	}
	return nil
}
