package layerfs

import (
	"fmt"
	"time"
)

// Durability says what must be on stable storage when a mutation returns.
type Durability uint8

// The durability policies. Whatever the policy, a crash of the process loses
// nothing and leaves no half-made layer; they differ in what a crash of the
// machine may take.
const (
	// DurabilityDefault is DurabilityMetadata.
	DurabilityDefault Durability = iota
	// DurabilityNone syncs nothing: after a power failure recent layers may
	// be missing or damaged. For caches and tests.
	DurabilityNone
	// DurabilityMetadata syncs records and their directories, so that the
	// list of layers is right; file data is written back by the kernel in
	// its own time.
	DurabilityMetadata
	// DurabilityFull also syncs the layer's file system before a Create or
	// Apply commits, so that a layer in the list is whole.
	DurabilityFull
)

// String returns none, metadata or full.
func (d Durability) String() string {
	switch d {
	case DurabilityDefault, DurabilityMetadata:
		return "metadata"
	case DurabilityNone:
		return "none"
	case DurabilityFull:
		return "full"
	}
	return fmt.Sprintf("Durability(%d)", uint8(d))
}

// ParseDurability is the inverse of [Durability.String]; empty is the default.
func ParseDurability(s string) (Durability, error) {
	switch s {
	case "":
		return DurabilityDefault, nil
	case "none":
		return DurabilityNone, nil
	case "metadata":
		return DurabilityMetadata, nil
	case "full":
		return DurabilityFull, nil
	}
	return 0, fmt.Errorf("durability %q is not one of none, metadata, full", s)
}

// CreateOptions are the options of [Driver.Create].
type CreateOptions struct {
	// ReadOnly freezes the layer as soon as it is made: nothing but one
	// Apply, before it has children, can fill it.
	ReadOnly bool

	// Labels are kept with the layer and have no meaning for the driver.
	Labels map[string]string

	// Quota limits the layer; zero fields do not limit.
	Quota Quota

	// MountLabel is the SELinux label of the tree; empty means none.
	MountLabel string

	// Progress is called during long work (vfs).
	Progress ProgressFunc
}

// Quota limits what a layer may take for itself.
type Quota struct {
	Bytes  int64 // 0 means no limit
	Inodes int64 // 0 means no limit
}

// GetOptions are the options of [Driver.Get].
type GetOptions struct {
	// ReadOnly asks for a read-only tree. It is an error where the driver
	// has no ReadOnlyViews.
	ReadOnly bool

	// Persist keeps the tree after this process ends, until a Put by any
	// process or until the machine restarts.
	Persist bool

	// IDMap shows the tree with its owners mapped: an id stored as
	// ContainerID is shown as HostID.
	IDMap *IDMap
}

// StatOptions are the options of [Driver.Stat].
type StatOptions struct {
	// Usage asks for [Info.Usage]; it may walk the layer.
	Usage bool
}

// IDMap maps owners between a container and its host.
type IDMap struct {
	UIDs []IDRange
	GIDs []IDRange
}

// IDRange maps Size ids from ContainerID to HostID and up, as a line of
// /proc/PID/uid_map does.
type IDRange struct {
	ContainerID, HostID, Size uint32
}

// ToHost returns the host's ids for a container's, and false if one has none.
// A nil map maps every id to itself.
func (m *IDMap) ToHost(uid, gid uint32) (huid, hgid uint32, ok bool) {
	if m == nil {
		return uid, gid, true
	}
	huid, uok := mapID(m.UIDs, uid, func(r IDRange) (from, to uint32) { return r.ContainerID, r.HostID })
	hgid, gok := mapID(m.GIDs, gid, func(r IDRange) (from, to uint32) { return r.ContainerID, r.HostID })
	return huid, hgid, uok && gok
}

// ToContainer is the inverse of [IDMap.ToHost].
func (m *IDMap) ToContainer(uid, gid uint32) (cuid, cgid uint32, ok bool) {
	if m == nil {
		return uid, gid, true
	}
	cuid, uok := mapID(m.UIDs, uid, func(r IDRange) (from, to uint32) { return r.HostID, r.ContainerID })
	cgid, gok := mapID(m.GIDs, gid, func(r IDRange) (from, to uint32) { return r.HostID, r.ContainerID })
	return cuid, cgid, uok && gok
}

func mapID(ranges []IDRange, id uint32, ends func(IDRange) (from, to uint32)) (uint32, bool) {
	for _, r := range ranges {
		from, to := ends(r)
		if id >= from && id-from < r.Size {
			return to + (id - from), true
		}
	}
	return 0, false
}

// Progress is the state of long work.
type Progress struct {
	Phase   string // "copy", "apply", "diff", "changes", "compare"
	Bytes   int64  // of file content (of the stream for apply) done so far
	Entries int64  // files of all types done so far
	Total   int64  // bytes expected; 0 if unknown
}

// ProgressFunc is called with the state of long work: at most some ten times a
// second, and once at the end. Calls do not overlap. It must not call the
// driver.
type ProgressFunc func(Progress)

// Profile selects what a tar stream of a layer carries.
type Profile uint8

// The profiles.
const (
	// ProfileFull keeps everything tar can hold: nanosecond times (also
	// access times), every xattr, ACLs, holes, devices.
	ProfileFull Profile = iota
	// ProfileOCI is what registries and other tools expect: times in whole
	// seconds, no access times, no trusted.* or system.* xattrs, no user or group
	// names, sparse files expanded.
	ProfileOCI
	// ProfileReproducible is ProfileOCI with times clamped to
	// DiffOptions.SourceDate, so that equal trees give equal bytes.
	ProfileReproducible
)

// String returns full, oci or reproducible.
func (p Profile) String() string {
	switch p {
	case ProfileFull:
		return "full"
	case ProfileOCI:
		return "oci"
	case ProfileReproducible:
		return "reproducible"
	}
	return fmt.Sprintf("Profile(%d)", uint8(p))
}

// Compression names the compression of a tar stream.
type Compression uint8

// The compressions. All are read; NoCompression, Gzip and Zstd are written.
const (
	NoCompression Compression = iota
	Gzip
	Zstd
	Bzip2
	XZ
)

// String returns none, gzip, zstd, bzip2 or xz.
func (c Compression) String() string {
	switch c {
	case NoCompression:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	case Bzip2:
		return "bzip2"
	case XZ:
		return "xz"
	}
	return fmt.Sprintf("Compression(%d)", uint8(c))
}

// DiffOptions are the options of [Driver.Diff].
type DiffOptions struct {
	Profile     Profile
	Compression Compression
	Level       int       // of the compression, 0 means its default
	SourceDate  time.Time // ProfileReproducible: no time is later; zero means 1970-01-01
	IDMap       *IDMap    // owners are written as the container's
	Progress    ProgressFunc
}

// DevicePolicy says what Apply does with device nodes.
type DevicePolicy uint8

// The policies for device nodes.
const (
	// DevicesMake makes them and fails where that is not permitted.
	DevicesMake DevicePolicy = iota
	// DevicesSkip leaves them out and counts them in ApplyResult.Skipped.
	DevicesSkip
	// DevicesRecord makes an empty regular file whose xattr
	// user.containers.override_stat records what it should have been, as
	// containers/storage and fuse-overlayfs do.
	DevicesRecord
	// DevicesRefuse fails on any device node, also where it could be made.
	DevicesRefuse
)

// Limits bound what an untrusted layer may do. Zero fields take the default
// that is given with each; a negative value means no limit.
type Limits struct {
	Bytes      int64 // of file content, holes included; default no limit
	Entries    int64 // default no limit
	PathLength int   // bytes of a path; default 4096
	XattrBytes int   // names and values of one entry; default 1 MiB
	Ratio      int64 // uncompressed bytes per compressed byte, once 64 MiB are out; default 1100
}

// ApplyOptions are the options of [Driver.Apply].
type ApplyOptions struct {
	Limits   Limits
	Devices  DevicePolicy
	IDMap    *IDMap // owners in the stream are the container's
	Progress ProgressFunc

	// IgnoreOwners makes every file belong to the caller, for users with a
	// single id.
	IgnoreOwners bool
}

// ApplyResult tells what [Driver.Apply] read and made.
type ApplyResult struct {
	Size    int64  // bytes of the uncompressed stream
	Bytes   int64  // bytes of file content
	Entries int64  // entries of the stream, whiteouts included
	Skipped int64  // device nodes left out
	Digest  string // of the uncompressed stream: the OCI DiffID, "sha256:…"
}
