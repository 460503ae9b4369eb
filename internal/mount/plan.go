package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Method selects the system calls that execute a plan.
type Method uint8

// The methods.
const (
	// Auto tries NewAPI and then Classic, or Descriptors if the options do not
	// fit a page. Overlays skip NewAPI before Linux 6.8.
	Auto Method = iota
	// NewAPI is fsopen and its relatives, or open_tree for a bind mount.
	NewAPI
	// Classic is mount(2). The options must fit a page.
	Classic
	// Descriptors is mount(2) for overlays whose options do not fit a page:
	// the layers are opened and named by the numbers of their descriptors,
	// relative to /proc/thread-self/fd, on a thread of its own.
	Descriptors
)

// String returns auto, newapi, classic or descriptors.
func (m Method) String() string {
	switch m {
	case Auto:
		return "auto"
	case NewAPI:
		return "newapi"
	case Classic:
		return "classic"
	case Descriptors:
		return "descriptors"
	}
	return fmt.Sprintf("Method(%d)", uint8(m))
}

// Flags are the properties of one mount, as opposed to its file system.
type Flags uint32

// The flags. The access time is relatime unless one of the three is set.
const (
	ReadOnly Flags = 1 << iota // also of the superblock, for a new file system
	NoSuid
	NoDev
	NoExec
	NoAtime
	NoDirAtime
	StrictAtime
	NoSymFollow // Linux 5.10
	Recursive   // bind mounts only: with the mounts below the source
)

// ErrNotMounted says that a path is not a mount point. It also matches
// EINVAL, which is what the kernel says.
var ErrNotMounted = errors.New("not mounted")

// IgnoreNotMounted returns err unless it matches [ErrNotMounted]: nil then.
func IgnoreNotMounted(err error) error {
	if errors.Is(err, ErrNotMounted) {
		return nil
	}
	return err
}

// PageLimit is the number of bytes of options mount(2) takes on every
// architecture: a page of 4 KiB with its terminating NUL.
const PageLimit = 4095

// MaxLowers is the number of lower layers the kernel allows in one overlay:
// OVL_MAX_STACK, fs/overlayfs/params.h, since Linux 4.0.
const MaxLowers = 500

// Overlay is an overlay mount as a plan. The zero value of each optional
// field leaves the choice to the kernel.
type Overlay struct {
	// Lowers are the read-only layers, the top one first. At least one, or
	// two if there is no Upper.
	Lowers []string
	// Upper and Work are the writable layer and its work directory, which
	// must be on one file system. Both or none.
	Upper, Work string

	// Files has descriptors to use in place of looking up the layer of the
	// same path, such as one of OpenTreeMapped. The caller keeps them. A
	// descriptor of a detached tree needs Linux 6.15 (clone_private_mount in
	// anonymous mount namespaces); before that it must be attached.
	Files map[string]*os.File

	Source string // first column of df; default "overlay"
	Flags  Flags

	UserXattr   bool   // user.overlay.* instead of trusted.overlay.* (Linux 5.11)
	Volatile    bool   // never sync (Linux 5.10)
	Metacopy    string // on, off (4.19)
	RedirectDir string // on, off, follow, nofollow (4.10)
	Index       string // on, off (4.13)
	NFSExport   string // on, off (4.16)
	XIno        string // on, off, auto (4.17)
	Label       string // SELinux context of all files

	// Options are further options, "key=value" or "flag". A value is taken as
	// it is; escapes are added as needed.
	Options []string

	Method Method
}

// Setting is one call of fsconfig(2).
type Setting struct {
	Key   string
	Value string // of a string option; the path of a layer
	Flag  bool   // the option has no value
	Layer bool   // Value is a path of a layer, as it is
}

// String returns the option as mount(8) shows it.
func (s Setting) String() string {
	if s.Flag {
		return s.Key
	}
	return s.Key + "=" + s.Value
}

// Validate returns everything that is wrong with the plan itself; it does not
// look at the file system.
func (o *Overlay) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch {
	case len(o.Lowers) == 0:
		bad("overlay has no lower layer")
	case len(o.Lowers) == 1 && o.Upper == "":
		// ovl_fs_params_verify, fs/overlayfs/params.c: "at least 2 lowerdir
		// are needed while upperdir nonexistent".
		bad("overlay without upper layer needs two lower layers, not one")
	case len(o.Lowers) > MaxLowers:
		bad("overlay has %d lower layers, more than %d", len(o.Lowers), MaxLowers)
	}
	if (o.Upper == "") != (o.Work == "") {
		bad("overlay needs both upper (%q) and work (%q) or none", o.Upper, o.Work)
	}
	for _, p := range o.Lowers {
		if p == "" {
			bad("overlay has an empty lower layer")
			break
		}
	}
	for _, s := range o.all() {
		if strings.IndexByte(s.Key, 0) >= 0 || strings.IndexByte(s.Value, 0) >= 0 {
			bad("overlay option %q has a NUL byte", s.String())
		}
		if s.Key == "" {
			bad("overlay has an empty option")
		}
	}
	if o.Flags&Recursive != 0 {
		bad("overlay cannot be recursive")
	}
	return errors.Join(errs...)
}

// Settings returns the calls of fsconfig that make the overlay, in order,
// without escapes.
func (o *Overlay) Settings() []Setting {
	list := make([]Setting, 0, len(o.Lowers)+8+len(o.Options))
	for _, p := range o.Lowers {
		list = append(list, Setting{Key: "lowerdir+", Value: p, Layer: true})
	}
	if o.Upper != "" {
		list = append(list,
			Setting{Key: "upperdir", Value: o.Upper, Layer: true},
			Setting{Key: "workdir", Value: o.Work, Layer: true})
	}
	return append(list, o.extras()...)
}

func (o *Overlay) all() []Setting {
	return append(o.Settings(), Setting{Key: "source", Value: o.Source})
}

// extras are all options but the layers.
func (o *Overlay) extras() []Setting {
	var list []Setting
	flag := func(set bool, key string) {
		if set {
			list = append(list, Setting{Key: key, Flag: true})
		}
	}
	value := func(key, v string) {
		if v != "" {
			list = append(list, Setting{Key: key, Value: v})
		}
	}
	flag(o.UserXattr, "userxattr")
	flag(o.Volatile, "volatile")
	value("metacopy", o.Metacopy)
	value("redirect_dir", o.RedirectDir)
	value("index", o.Index)
	value("nfs_export", o.NFSExport)
	value("xino", o.XIno)
	value("context", o.Label)
	return append(list, parseSettings(o.Options)...)
}

func parseSettings(options []string) []Setting {
	var list []Setting
	for _, opt := range options {
		k, v, ok := strings.Cut(opt, "=")
		list = append(list, Setting{Key: k, Value: v, Flag: !ok})
	}
	return list
}

// Data returns the options as the data string of mount(2), for kernels from
// 4.0 on. It may be longer than [PageLimit].
//
// Paths are escaped as fs/overlayfs/super.c (before Linux 6.5) and params.c
// take them apart: ovl_next_opt skips a comma behind a backslash, the list of
// lower layers is split at colons that are not behind one, and ovl_unescape
// removes one level of backslashes from every path. Newlines, spaces and
// quotes need no escape, they reach the kernel as they are.
func (o *Overlay) Data() string {
	return strings.Join(o.MountOptions(), ",")
}

// MountOptions returns the options one by one as they are given to mount(8)
// or to containerd: "lowerdir=/b:/a", "upperdir=/c", "workdir=/w" and so on,
// escaped.
func (o *Overlay) MountOptions() []string { return o.mountOptions(escapePath) }

// mountOptions renders the layers with name.
func (o *Overlay) mountOptions(name func(string) string) []string {
	var b strings.Builder
	b.WriteString("lowerdir=")
	for i, p := range o.Lowers {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(name(p))
	}
	list := []string{b.String()}
	if o.Upper != "" {
		list = append(list, "upperdir="+name(o.Upper), "workdir="+name(o.Work))
	}
	for _, s := range o.extras() {
		list = append(list, classicOption(s))
	}
	return list
}

// classicOption renders an option that is no layer for a data string.
func classicOption(s Setting) string {
	if s.Flag {
		return s.Key
	}
	switch s.Key {
	case "context", "fscontext", "defcontext", "rootcontext":
		// SELinux takes these out before the file system sees the string, and
		// knows quotes and no backslashes: a context with categories has
		// commas. security/selinux/hooks.c, opt_len.
		if strings.Contains(s.Value, ",") && !strings.HasPrefix(s.Value, `"`) {
			return s.Key + `="` + s.Value + `"`
		}
		return s.String()
	}
	return s.Key + "=" + strings.ReplaceAll(s.Value, ",", `\,`)
}

// escapePath escapes a path for the data string of mount(2).
func escapePath(p string) string {
	if !strings.ContainsAny(p, `\:,`) {
		return p
	}
	var b strings.Builder
	for i := range len(p) {
		switch c := p[i]; c {
		case '\\', ':', ',':
			b.WriteByte('\\')
			fallthrough
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// FS is the mount of a file system other than overlay as a plan.
type FS struct {
	Type    string // such as "ext4"
	Source  string // block device, dataset or any text; default is Type
	Flags   Flags
	Options []string // "key=value" or "flag", for the file system; see [ParseOptions]
	Method  Method   // Auto, NewAPI or Classic
}

// BindMount is a bind mount as a plan.
type BindMount struct {
	Source string // symbolic links are followed
	Flags  Flags
	Method Method // Auto, NewAPI or Classic
}

// ParseOptions splits mount(8) options ("ro", "noatime", "discard", "a=b,c=d")
// into the flags of the mount and what is left for the file system. A later
// option overrides an earlier one; "defaults" and what only means something to
// mount(8) ("auto", "_netdev", "nofail", "x-…") is dropped.
func ParseOptions(options ...string) (Flags, []string) {
	var flags Flags
	var rest []string
	for _, list := range options {
		for opt := range strings.SplitSeq(list, ",") {
			set, clr, known := flagOption(opt)
			if known {
				flags = flags&^clr | set
				continue
			}
			rest = append(rest, opt)
		}
	}
	return flags, rest
}

func flagOption(opt string) (set, clr Flags, known bool) {
	const atime = NoAtime | StrictAtime
	switch opt {
	case "ro":
		return ReadOnly, 0, true
	case "rw":
		return 0, ReadOnly, true
	case "nosuid":
		return NoSuid, 0, true
	case "suid":
		return 0, NoSuid, true
	case "nodev":
		return NoDev, 0, true
	case "dev":
		return 0, NoDev, true
	case "noexec":
		return NoExec, 0, true
	case "exec":
		return 0, NoExec, true
	case "noatime":
		return NoAtime, atime, true
	case "atime", "relatime":
		return 0, atime, true
	case "strictatime":
		return StrictAtime, atime, true
	case "nodiratime":
		return NoDirAtime, 0, true
	case "diratime":
		return 0, NoDirAtime, true
	case "nosymfollow":
		return NoSymFollow, 0, true
	case "symfollow":
		return 0, NoSymFollow, true
	case "", "defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser":
		return 0, 0, true
	}
	return 0, 0, strings.HasPrefix(opt, "x-")
}
