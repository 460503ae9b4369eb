package whiteout

import (
	"fmt"
	"io/fs"
	"strings"

	"github.com/layerfs/layerfs"
)

// The names AUFS reserves. A tree with AUFS whiteouts cannot hold a file of
// its own whose name starts with Prefix.
const (
	Prefix     = ".wh."         // + NAME hides NAME
	MetaPrefix = ".wh..wh."     // names of AUFS's own files; they hide nothing
	OpaqueName = ".wh..wh..opq" // marks the directory that holds it opaque
	PlinkDir   = ".wh..wh.plnk" // pseudo-links, in the root of a branch
	BaseFile   = ".wh..wh.aufs" // what whiteouts are hard links to, in the root of a branch
	OrphanDir  = ".wh..wh.orph" // files that were removed while open, in the root of a branch
)

// maxName is NAME_MAX of Linux, in bytes.
const maxName = 255

// NameError says that a name cannot be, or cannot have, a whiteout. It matches
// [layerfs.ErrMalformed] and [fs.ErrInvalid].
type NameError struct {
	Name   string
	Reason string
}

// Error returns, for example, `whiteout name ".wh...": names the parent directory`.
func (e *NameError) Error() string { return fmt.Sprintf("whiteout name %q: %s", e.Name, e.Reason) }

// Is reports whether target is [layerfs.ErrMalformed] or [fs.ErrInvalid].
func (e *NameError) Is(target error) bool {
	return target == layerfs.ErrMalformed || target == fs.ErrInvalid
}

// Name returns the name of the AUFS whiteout that hides base, a single path
// component. The error is a [*NameError] if base is empty, "." or "..", has a
// slash or a NUL in it, starts with [Prefix] (the result would be one of
// AUFS's own files), or is too long to be prefixed (more than 251 bytes).
func Name(base string) (string, error) {
	if reason := badBase(base); reason != "" {
		return "", &NameError{base, reason}
	}
	if strings.HasPrefix(base, Prefix) {
		return "", &NameError{base, "starts with " + Prefix}
	}
	if len(Prefix)+len(base) > maxName {
		return "", &NameError{base, "too long"}
	}
	return Prefix + base, nil
}

// Target returns what the AUFS whiteout of that name hides. ok is false for
// names that are no whiteouts: ordinary ones, and those starting with
// [MetaPrefix], such as [OpaqueName].
//
// The error is a [*NameError] for names that would hide the directory itself
// or its parent (".wh.", ".wh..", ".wh...") and for those with a slash or a
// NUL in them; ok is false then.
func Target(name string) (base string, ok bool, err error) {
	if strings.ContainsAny(name, "/\x00") {
		return "", false, &NameError{name, "not a single path component"}
	}
	base, ok = strings.CutPrefix(name, Prefix)
	if !ok || IsMeta(name) {
		return "", false, nil
	}
	if reason := badBase(base); reason != "" {
		return "", false, &NameError{name, reason}
	}
	return base, true, nil
}

// badBase says why base is not the name of a directory entry; empty if it is.
func badBase(base string) string {
	switch {
	case base == "":
		return "hides nothing"
	case base == ".":
		return "names the directory itself"
	case base == "..":
		return "names the parent directory"
	case strings.ContainsAny(base, "/\x00"):
		return "not a single path component"
	}
	return ""
}

// IsReserved reports whether a tree in AUFS form must not use name for a file
// of its own: it is a whiteout, a meta file or a malformed whiteout.
func IsReserved(name string) bool { return strings.HasPrefix(name, Prefix) }

// IsWhiteout reports whether name is a well-formed AUFS whiteout.
func IsWhiteout(name string) bool {
	_, ok, err := Target(name)
	return ok && err == nil
}

// IsOpaque reports whether name is the AUFS opaque mark.
func IsOpaque(name string) bool { return name == OpaqueName }

// IsMeta reports whether name is one of AUFS's own files ("doubly
// whiteouted"): opaque marks, pseudo-links, the base file, orphans and
// temporary names. They never hide a file of that name.
func IsMeta(name string) bool { return strings.HasPrefix(name, MetaPrefix) }
