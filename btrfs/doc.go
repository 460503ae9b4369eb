// Package btrfs keeps layers as subvolumes of a btrfs file system.
//
// A new layer is a snapshot of its parent, whatever that holds. A file of a
// lower layer that is written is not copied: only the blocks that change are
// new. The file system itself tells what changed, so Changes and Diff cost what
// was changed and not what the tree holds.
//
// # Layout
//
//	ROOT/btrfs/subvolumes/ID         the layer, a subvolume: the whole tree,
//	                                 there also while nobody holds it
//	ROOT/btrfs/.layerfs/build/ID     a subvolume that takes the place of a layer
//	                                 when it is complete (Apply, Rollback)
//	ROOT/btrfs/.layerfs/snapshots/…  read-only snapshots of layers whose changes
//	                                 are being read; New removes those of
//	                                 processes that died
//	ROOT/btrfs/.layerfs              records, locks; as in every driver
//
// # Frozen layers
//
// A frozen layer has btrfs's read-only flag, so that nobody can write it, also
// by its path and as root. The flag is set when the first child is made, when a
// layer created read-only is filled, and by a read-only Get; it is cleared by
// the next writable Get, after the layer is no longer frozen. So there is no
// moment at which a crash leaves a child whose parent can be written: the flag
// is set before the snapshot is taken. A flag too many is only seen in a layer
// that nobody holds. Get mounts nothing, except to map owners.
//
// # Snapshot semantics
//
// A child has what the parent holds when Create is called, also what was not
// yet written back. What has a file of the parent open for writing since
// before that can write to the parent still, but not to the child.
//
// A subvolume that a container makes within a layer is part of the layer's
// tree: Create, Clone and Apply take a snapshot of it too, and Remove deletes
// it. Only the flag of frozen layers does not reach it. Native Changes, which
// cannot see it, are replaced by a walk for such a layer, and Send and
// BlockDiff refuse it.
//
// Removing a layer leaves its open files working; the space is free when they
// are closed. The kernel frees space in the background.
//
// # Quotas
//
// Limits are those of btrfs's qgroups on what a layer holds for itself (its
// exclusive bytes), so the parent does not count. Quotas have a price for the
// whole file system, so they are only turned on by [Options.Quotas].
//
// A limit is on the subvolume of the layer alone. One that a container makes
// within it, for which the right to write in a directory is enough, has a qgroup
// of its own without a limit, in children and clones of the layer too: limits for
// each of them would not bound their sum, nor those that are made after them.
// Stat counts their bytes as the layer's. Whoever needs limits to hold keeps
// containers from BTRFS_IOC_SUBVOL_CREATE and BTRFS_IOC_SNAP_CREATE, as by a
// seccomp filter, or takes a driver whose layers are devices.
//
// # Privileges
//
// Layers can be made, filled and read by any user who owns the directory.
// Without CAP_SYS_ADMIN, Changes walks, and removal of a layer takes as long as
// removal of its files unless the file system is mounted with
// user_subvol_rm_allowed; Status says so.
//
// The lock order is that of the shared life cycle; the package has no lock of
// its own. A temporary snapshot has a lock under its own name, which is taken
// after those of layers.
//
// # Kernel
//
// Linux 4.18 or later; exchange of subvolumes since 5.16 makes Apply one step,
// before it a failure in the last moment leaves the layer incomplete. Sources:
// the btrfs documentation (btrfs-subvolume.rst, btrfs-quota.rst, ch-balance-intro.rst)
// and fs/btrfs/{ioctl,inode,send,qgroup}.c of Linux 6.18.
package btrfs
