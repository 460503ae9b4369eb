// Package layerfs is the contract of an embeddable library of union and
// copy-on-write file system drivers.
//
// A container image is a stack of layers; a container is one more, writable,
// layer on top. A [Driver] makes such a stack look like one directory tree, in
// milliseconds and without copying, and tells afterwards what was changed.
// This package holds the interface and the types that go through it and
// depends on nothing but the standard library. The mechanisms are packages of
// their own:
//
//	backend     mechanism                      new layer   needs
//	aufs        union with live lower branches constant    Linux with FUSE or AUFS, root
//	overlay     kernel overlayfs               constant    Linux 4.0, 5.11 without root
//	btrfs       subvolume snapshots            constant    Linux, a btrfs file system
//	devmapper   thin-provisioned snapshots     constant    Linux with dm-thin, root
//	zfs         dataset snapshots and clones   constant    OpenZFS or zfs-fuse
//	vfs         full copies (reflinks)         the tree    any system
//
// No package registers itself: a program opens the driver it wants with that
// package's New, or lets package auto choose one.
//
// # Layers
//
// A layer has an id (see [CheckID]) and at most one parent. It is writable
// until it gets a child or is created read-only; from then on it is frozen:
// [Driver.Get] gives a read-only tree and [Driver.Apply] fails with
// [ErrReadOnly].
//
// # Roots
//
// A driver keeps its layers and its records in a directory of its own name in
// the root. One that has something and no records, as it is another program's or
// was not restored whole from a backup, is not opened; the error matches
// [io/fs.ErrExist], or [io/fs.ErrNotExist] if a part of the state is missing.
//
// # Several processes
//
// Any number of drivers, in any number of processes of one mount namespace,
// may use one root at once. The records on disk are the truth. What a process
// has got is held by kernel locks, so a process that dies releases it.
//
// # Errors
//
// Every error of a driver is an [*Error] naming operation, driver, layer and
// path. Callers branch with errors.Is on the sentinels of this package, or on
// [errors.ErrUnsupported] for what this host cannot do.
package layerfs
