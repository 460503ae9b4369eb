package whiteout

import "fmt"

// Form is a notation for whiteouts and opaque directories; see the table of
// the package.
type Form uint8

// The forms. The kernel reads those of overlayfs in layers of a mount, the
// ones with User in mounts with the option userxattr. The forms with Xattr can
// be stored where device 0/0 cannot: without privilege, and on top of another
// overlay; Linux 6.7 reads them, but neither in the upper nor in the lowest
// layer.
const (
	AUFS Form = iota + 1
	Overlay
	OverlayUser
	OverlayXattr
	OverlayUserXattr
)

// String returns aufs, overlay, overlay-user, overlay-xattr or
// overlay-user-xattr.
func (f Form) String() string {
	switch f {
	case AUFS:
		return "aufs"
	case Overlay:
		return "overlay"
	case OverlayUser:
		return "overlay-user"
	case OverlayXattr:
		return "overlay-xattr"
	case OverlayUserXattr:
		return "overlay-user-xattr"
	}
	return fmt.Sprintf("Form(%d)", uint8(f))
}

// ParseForm is the inverse of [Form.String].
func ParseForm(s string) (Form, error) {
	for f := AUFS; f <= OverlayUserXattr; f++ {
		if f.String() == s {
			return f, nil
		}
	}
	return 0, fmt.Errorf("whiteout form %q is not one of aufs, overlay, overlay-user, overlay-xattr, overlay-user-xattr", s)
}

// Prefix returns what the names of the form's xattrs start with, or "" for
// [AUFS].
func (f Form) Prefix() string {
	switch f {
	case Overlay, OverlayXattr:
		return TrustedPrefix
	case OverlayUser, OverlayUserXattr:
		return UserPrefix
	}
	return ""
}

// OpaqueXattr returns the name of the xattr that makes a directory opaque if
// its value is "y", or "" for [AUFS].
func (f Form) OpaqueXattr() string {
	if p := f.Prefix(); p != "" {
		return p + opaqueAttr
	}
	return ""
}

func (f Form) valid() bool { return f >= AUFS && f <= OverlayUserXattr }

// xattrWhiteouts reports whether the form makes whiteouts of files.
func (f Form) xattrWhiteouts() bool { return f == OverlayXattr || f == OverlayUserXattr }

// Kind is what a directory entry means to a union.
type Kind uint8

// The kinds of entries.
const (
	Plain    Kind = iota + 1 // a file of its own
	Whiteout                 // hides a name
	Opaque                   // marks the directory it is in (AUFS only)
	Meta                     // belongs to AUFS and hides nothing
)

// Entry is what one directory entry means.
type Entry struct {
	Kind   Kind
	Target string // of a Whiteout: the name it hides
}

// Stats tells what [Convert] did.
type Stats struct {
	Entries   int64 // visited
	Whiteouts int64 // converted
	Opaques   int64 // converted
	Dropped   int64 // whiteouts that hid nothing, being in an opaque directory
}
