package whiteout

import "strings"

// The prefixes of the xattrs overlayfs keeps for itself: TrustedPrefix, or
// UserPrefix on mounts with the option userxattr (Linux 5.11).
const (
	TrustedPrefix = "trusted.overlay."
	UserPrefix    = "user.overlay."
)

// What follows the prefix in the xattrs this package reads and writes.
const (
	opaqueAttr    = "opaque"    // y: opaque; x: holds xattr whiteouts (Linux 6.8)
	whiteoutAttr  = "whiteout"  // on an empty regular file (Linux 6.7)
	whiteoutsAttr = "whiteouts" // what Linux 6.7.0 had in place of opaque=x
)

// escape is what overlayfs puts behind the prefix of xattrs that belong to an
// overlay mounted on top of it (Linux 6.7, commit dad02fad84cb).
const escape = "overlay."

// privatePrefix returns the overlayfs prefix of an xattr name, or "".
func privatePrefix(name string) string {
	for _, p := range []string{TrustedPrefix, UserPrefix} {
		if strings.HasPrefix(name, p) {
			return p
		}
	}
	return ""
}

// IsPrivate reports whether overlayfs would use the xattr itself and hide it
// from those who look through the mount: it is in one of its name spaces and
// not escaped.
func IsPrivate(xattr string) bool {
	p := privatePrefix(xattr)
	return p != "" && !strings.HasPrefix(xattr[len(p):], escape)
}

// Escape returns the name under which a layer must store xattr so that it is
// seen as xattr through one overlay mount: trusted.overlay.opaque becomes
// trusted.overlay.overlay.opaque. Other names are returned as they are.
//
// One overlay escapes the names of its own name space only, so a name below
// [UserPrefix] needs no escape where the mount uses [TrustedPrefix]; escape
// only those that start with the prefix of the mount.
func Escape(xattr string) string {
	p := privatePrefix(xattr)
	if p == "" {
		return xattr
	}
	return p + escape + xattr[len(p):]
}

// Unescape is the inverse of [Escape]: what the xattr of a layer is called
// when seen through one overlay mount. ok is false, and the name is returned
// as it is, if the xattr is not escaped.
func Unescape(xattr string) (name string, ok bool) {
	p := privatePrefix(xattr)
	if p == "" || !strings.HasPrefix(xattr[len(p):], escape) {
		return xattr, false
	}
	return p + xattr[len(p)+len(escape):], true
}
