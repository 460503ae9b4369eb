// Package btrfs drives a btrfs file system by its ioctls: subvolumes,
// snapshots, quotas, space, and the send stream. It needs neither the btrfs
// program nor a C library.
//
// The centre is [Changes]: the kernel is asked by BTRFS_IOC_SEND without file
// data what differs between two read-only snapshots. Its answer is a list of
// commands for a receiver, full of temporary names and of operations without
// effect. [Fold] replays the names and keeps which places were touched; only
// these are then compared in both snapshots. The cost grows with the changes,
// and the result is what a walk over both trees would give.
//
// # Nested subvolumes
//
// A subvolume below another is not part of it: snapshots hold an empty
// directory with inode number 2 in its place, whose times are made up on
// every look. The send stream leaves these out, and so does this package:
// for [Changes], [ChangedExtents], [Send] and [Receive] neither the nested
// subvolume nor its place exist. [DestroyAll] removes nested subvolumes with
// the one that holds them.
//
// # Privileges
//
// Send, tree search, quota control and deletion by id need CAP_SYS_ADMIN.
// Creation and snapshots need write access, deletion by name needs ownership
// and the mount option user_subvol_rm_allowed (or an empty subvolume, with
// rmdir, Linux 4.18). Errors say which one was missing.
//
// Sources: include/uapi/linux/btrfs.h, btrfs_tree.h and fs/btrfs/send.h of
// Linux 6.18; the stream is described in the btrfs documentation,
// dev/dev-send-stream.rst.
package btrfs
