// Package vfs is a driver that keeps each layer as a full copy of its parent.
// It needs nothing of a system but files, so it works everywhere: it is the
// driver of last resort, and the reference that others are compared with.
//
// Copies share their blocks with the parent where the file system can
// (reflinks: xfs, btrfs, bcachefs), which makes them cheap in space. Their
// time still grows with the number of files.
//
// # Layout
//
//	vfs/dir/ID     the tree of a layer; also the path that Get returns
//	vfs/.layerfs   records and locks, see internal/layerdir
//
// A new layer is made in .layerfs/build and renamed into place.
//
// # Views
//
// A layer that can be written is shown as it is. A frozen one, on Linux with
// CAP_SYS_ADMIN, is mounted on itself read-only between Get and Put, so that the
// path stays the same; so is one whose owners are mapped (Linux 5.12). Without
// the privilege frozen layers are not protected: Features.ReadOnlyViews is
// false.
//
// # Apply
//
// Apply to an empty layer is all or nothing. In a layer that holds something
// it works in place: if it fails half-way, the layer is incomplete until
// Rollback or Remove.
//
// # Other systems
//
// On macOS, FreeBSD and Windows contents, modes, times, links and, where the
// system has them, owners are kept. There are no mounts, xattrs and quotas.
//
// # Locks
//
// Those of internal/lifecycle. The lock on the project ids of the root is
// taken last, and nothing else under it.
package vfs
