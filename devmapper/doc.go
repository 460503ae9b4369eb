// Package devmapper keeps each layer as a thin device with a file system of its
// own, in a pool of the kernel's device mapper.
//
// A new layer is a snapshot of its parent's device: constant work, nothing is
// copied. A write copies one block of the pool, not the file, so large files
// that are changed in place are cheap. Every layer has a size of its own and
// can grow while it is used. Pages in memory are not shared between layers.
//
// # Layout
//
//	ROOT/devicemapper/devicemapper/data      the pool's data, a sparse file,
//	ROOT/devicemapper/devicemapper/metadata  and its metadata, unless
//	                                         Options name devices
//	ROOT/devicemapper/pool.json              what the pool is, its transaction
//	                                         and the next free device number
//	ROOT/devicemapper/metadata/ID            JSON: number and size of the
//	                                         layer's device
//	ROOT/devicemapper/metadata/.apply-ID     a device that is to replace the one
//	                                         of the layer
//	ROOT/devicemapper/metadata/.delete-N     device N is to be deleted
//	ROOT/devicemapper/metadata/.snap-UUID    a snapshot that a process reads,
//	                                         which holds a lock of that name
//	ROOT/devicemapper/mnt/ID                 where Get mounts the layer
//	ROOT/devicemapper/.layerfs               records and locks
//
// Names of device-mapper devices are PREFIX-MAJOR:MINOR-INODE-ID, with the
// device and inode of ROOT/devicemapper, so that roots never collide; the pool
// is PREFIX-MAJOR:MINOR-INODE-pool. An id that does not fit, or that is "pool",
// is cut and followed by "+" and a hash. The uuid of a device holds the
// identity of the root, so that a foreign device of the same name is told.
//
// # The life of a device
//
// The number of a device is in a file before the device is made, and the file
// goes after the device went. So whatever a crash leaves has a file, and New
// deletes what has no layer. The files are synced as [Options.Durability]
// says; after a power failure New compares them with the pool's metadata and
// deletes devices that no file claims.
//
// Numbers are reserved in batches. Each batch is one transaction: pool.json is
// written and synced with the transaction's id, then the pool is told the id.
// At New the pool may be one behind, which is completed. Any other difference
// means that pool and root are not of the same time (one of them was restored
// from a copy) and is refused.
//
// A layer's device is active only while somebody uses it. Its removal is
// ordered as soon as it is mounted, and the kernel carries it out when the last
// user is gone, also after a crash. With [Options.NoDeferredRemoval] the driver
// removes it, and New what a crash left.
//
// The pool is active while a driver is open on the root or a layer is in use;
// the last driver to close takes it down. Apply and Rollback fill a new
// snapshot and put it in the layer's place in one step.
//
// # A full pool
//
// What writers get is said at [Options.ErrorIfNoSpace]. Make the pool larger while
// the layers that were being written are mounted: they then go on with what is in
// memory. When the pool's metadata is full, ext4 gives its journal up if it is
// unmounted: on Linux 6.1 a layer that was Put then and mounted again when there
// was room had lost files, also such as had been synced.
//
// # Lock order
//
// The lock of a layer, then ".origin" of its parent (one snapshot of an active
// device at a time), then ".pool" (pool.json, the pool's table, its metadata
// snapshot). Both are keys of layerdir.Locks and hold across processes.
//
// # Kernel
//
// Linux 5.2 with dm-thin-pool, loop and ext4 or xfs, and root. mkfs.ext4 or
// mkfs.xfs is run once for each root; thin_check only if the kernel asks for
// it. Sources: Documentation/admin-guide/device-mapper/thin-provisioning.rst,
// drivers/md/dm-thin.c, Linux 6.1.
package devmapper
