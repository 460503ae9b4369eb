// Package zfs keeps layers as ZFS file systems: a new layer is a clone of a
// snapshot of its parent, whatever that holds.
//
// The datasets are made with the programs zfs and zpool, never with libzfs,
// which is tied to a version of the module. OpenZFS (Linux and FreeBSD) and
// zfs-fuse work; what either can do is found out by trying, see [New].
//
// # Layout
//
//	PARENT                       a dataset of the user; nothing of it is changed
//	PARENT/ID                    a layer: canmount=noauto, so nobody but this
//	                             package mounts it
//	PARENT/ID@layerfs-HASH-RANDOM
//	                             what the children of ID are cloned from; marked
//	                             for deferred destruction, so it goes with the
//	                             last of them. HASH is of the first child's id
//	PARENT/ID@layerfs-now-RANDOM
//	                             for as long as Changes, Send or BlockDiff reads
//	                             ID
//	ROOT/zfs/graph/ID            where Get mounts a layer
//	ROOT/zfs/.layerfs            records, locks
//	ROOT/zfs/.layerfs/zfs.json   the parent dataset and the mark of this root
//	ROOT/zfs/.layerfs/views      private mounts for Diff and Changes, and notes
//	                             that name the snapshots of Changes, Send and
//	                             BlockDiff; one directory for each open driver
//	ROOT/zfs/.layerfs/received/ID
//	                             the snapshot that ID was received as, until
//	                             the layer is written
//	ROOT/zfs/.layerfs/stage/ID   where the zfs-fuse daemon mounts a layer before
//	                             it is shown elsewhere
//
// Each dataset of a layer has the user property org.layerfs:layer with the
// mark of its root and its id. A dataset without it was made by somebody else
// and is never mounted, changed or destroyed.
//
// # Order of locks
//
// The layer's lock, as in the shared life cycle; private mounts take it too.
// The package has no other lock across processes.
//
// # Changes
//
// On Linux, where zfs diff works, it names what may have changed, and only that is
// compared in both trees; the result is that of a walk through both.
//
// zfs diff knows a file by at most one name, and by none if the name that was
// linked last went. So the changed objects of "zfs send -i" are read too, and
// those that zfs diff does not explain are looked for by their inode numbers in
// the directories of the newer tree, without looking at files. Changes thus costs
// four calls, or two if the layer has a child, and reads from the pool what was
// written to the layer.
//
// # Streams
//
// Send, Receive and BlockDiff are "zfs send" and "zfs receive". Snapshots that
// children were cloned from are what streams are relative to; a child that was
// removed and made again is another snapshot.
//
// # Failures
//
// A pool that is suspended answers no call: each fails with [ErrSuspended], at once
// where the kernel tells that it is (Linux), else after some seconds, and a process
// that waits in the kernel is left behind. What it does when the pool lives again is
// undone by the next New, or by the next Create of the same layer. Status tells the
// health all the same, and what Remove has committed stays.
//
// # zfs-fuse
//
// One call, mount or unmount at a time is asked of the daemon, by all processes
// together: they lock a file beside its socket, and give up after a minute. Send
// is one call until its stream has been read. A call whose context is done is
// left to end, as the daemon would go on with it anyway.
//
// A mount is only given up when all that was asked of it has been answered. So Put of a
// layer with open files moves the mount out of sight, where it stays until they
// are closed and the layer is put or removed again; if the mount around the root
// is shared that is impossible, and Put fails with an error that matches
// [github.com/layerfs/layerfs.ErrInUse]. The daemon should be started with
// --enable-xattr and with attribute and entry timeouts of zero: the settings that
// distributions ship let the kernel keep what a file was like for an hour. A
// request that is interrupted by a signal may leave the daemon waiting until
// another one comes to the same file system; Go programs avoid most of these
// signals with GODEBUG=asyncpreemptoff=1.
//
// # What is tested
//
// OpenZFS 2.1 on Linux 6.1: the conformance suite, random histories of changes
// and the faults run in a virtual machine whose pool is a file; the suite's long
// cases only without -short. zfs-fuse 0.7 on the host: all tests and the whole
// suite, each with a daemon of its own (TestFuse, LAYERFS_TEST_ZFS_FUSE=1), but
// for a full pool in the middle of a write and a pool that is suspended, at which
// the daemon ends or hangs; it has no zfs diff. FreeBSD: the package builds; it was never run there. Nor was
// OpenZFS 2.2 or later, so that exchanged names and cloned blocks are in no
// history.
//
// # Sources
//
// zfs-create(8), zfs-clone(8), zfs-destroy(8), zfs-diff(8), zfs-send(8),
// zfs-program(8), zfsprops(7) of OpenZFS 2.1; lib/libzfs/libzfs_diff.c,
// include/sys/zfs_ioctl.h and module/os/linux/zfs/zpl_super.c of the same;
// zfs(8) of zfs-fuse 0.7.
package zfs
