package union

import (
	"fmt"
	"io/fs"
	"log/slog"
)

// Perm says what a branch may be used for.
type Perm string

// The permissions, in the notation of aufs(5).
const (
	RW   Perm = "rw"    // read-write; whiteouts are honoured and made
	RO   Perm = "ro"    // read-only, holds no whiteouts
	ROWH Perm = "ro+wh" // read-only, whiteouts are honoured
	RR   Perm = "rr"    // as RO, and never changes: not watched
)

// A Branch is one directory of a union.
type Branch struct {
	Path string
	Perm Perm // "": RO
}

// UDBA (user's direct branch access) says how changes made directly on
// a branch that is not writable are noticed. The content of a file is always
// that of the branch, so it needs no notice.
//
// A writable branch belongs to its union. It is not watched, since inotify
// does not tell the union's own changes from others', and each would cost
// a round through the queue; what is changed there directly may show at any
// time, or not before [Handle.Refresh].
type UDBA string

// The modes.
const (
	// Notify watches the branches with inotify; a change shows within
	// milliseconds, [Handle.Sync] waits for it. The default.
	Notify UDBA = "notify"
	// None trusts caches: changes may never show.
	None UDBA = "none"
	// Reval asks again after a second.
	Reval UDBA = "reval"
	// Strict asks each time, which makes path walks many times slower.
	Strict UDBA = "strict"
)

// Format is how whiteouts and opaque directories are written on a branch.
type Format string

// The formats.
const (
	// AUFS writes files named .wh.NAME. The default.
	AUFS Format = "aufs"
	// Overlay is what overlayfs writes: device 0/0 and trusted.overlay xattrs.
	// Layers with metacopy or redirect_dir are not understood. Hard links break
	// on copy-up, and lower branches without a Perm are ROWH.
	Overlay Format = "overlay"
	// OverlayUser is Overlay with user.overlay xattrs (mount option userxattr).
	OverlayUser Format = "overlay-userxattr"
)

// Config describes a mount. Only Branches is required.
type Config struct {
	// Branches, top first. Several may be RW; new files go to the topmost.
	Branches []Branch
	// Format is AUFS if empty.
	Format Format
	// UDBA is Notify if empty.
	UDBA UDBA
	// Watcher is shared by mounts of one process; nil gives the mount its own.
	// A user may have few inotify instances (128 by default), so whoever makes
	// many mounts shares one.
	Watcher *Watcher
	// ReadOnly mounts read-only, whatever the branches allow.
	ReadOnly bool
	// NoPassthrough moves file data through this process. A descriptor opened
	// before a copy-up then sees the new content, as in AUFS.
	NoPassthrough bool
	// NoXattr hides extended attributes and ACLs, which saves a request for
	// each file created: for build and scratch trees.
	NoXattr bool
	// NoPlink breaks hard links on copy-up.
	NoPlink bool
	// SumFree makes statfs(2) add up the branches.
	SumFree bool
	// Private keeps other users out.
	Private bool
	// AllowSuid and AllowDev honour set-user-id bits and device files.
	AllowSuid, AllowDev bool
	// NoExec forbids to execute files.
	NoExec bool
	// Source is what mountinfo shows as the mount's source; "union" if empty.
	Source string
	// Logger gets what has no other way back; nil: nobody.
	Logger *slog.Logger
}

// Repaired is one leftover of a crash that was mended when a branch was opened
// for writing: a whiteout beside its entry, a temporary name, a pseudo-link,
// an orphan.
type Repaired struct {
	Branch string // path of the branch
	Path   string // below it
	Action string // in words
}

// Stats are counters of a mount.
type Stats struct {
	Requests    int64 // of the kernel
	Nodes       int   // inodes the kernel knows
	OpenFiles   int
	Backings    int // files registered for passthrough
	Passthrough bool
	Lookups     int64 // in the branches
	CopyUps     int64
	CopyUpBytes int64 // copied byte by byte; clones are not counted
	Whiteouts   int64 // made
	Invalidated int64 // direct changes told to the kernel
	Lost        int64 // times that so much changed at once that everything was invalidated
}

func (p Perm) check() error {
	switch p {
	case "", RW, RO, ROWH, RR:
		return nil
	}
	return fmt.Errorf("branch permission %q: %w", string(p), fs.ErrInvalid)
}

func (f Format) check() error {
	switch f {
	case "", AUFS, Overlay, OverlayUser:
		return nil
	}
	return fmt.Errorf("union format %q: %w", string(f), fs.ErrInvalid)
}

func (u UDBA) check() error {
	switch u {
	case "", Notify, None, Reval, Strict:
		return nil
	}
	return fmt.Errorf("udba %q: %w", string(u), fs.ErrInvalid)
}
