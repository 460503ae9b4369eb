// Package dm drives the kernel's device mapper through the ioctls of
// /dev/mapper/control: no libdevmapper, no cgo, no dmsetup.
//
// # Tables
//
// A device is a table of targets. [ThinPool], [Thin], [Linear] and
// [ErrorTarget] build lines of a table and parse them back; [ParsePoolStatus]
// and [ParseThinStatus] read what a thin target reports. All of this is plain
// data and works on every system. Lengths and offsets are in sectors of 512
// bytes unless they are said to be bytes or blocks.
//
// # Names and nodes
//
// A device is named in each call; names are global to the kernel, whatever
// mount or user namespace asks. A node to open or mount it is found by
// [Nodes], which takes the one that devtmpfs has and makes its own where there
// is none, so udev is not needed. Where udev runs it does no harm either: no
// cookie is passed, so udev makes its links when it likes and nothing here
// waits for them. But it opens a new device for a moment to look at it, so a
// [Control.Remove] right after may find it busy: retry, or remove deferred.
//
// # Events
//
// DM_DEV_WAIT blocks in the kernel and cannot be cancelled, so a [Watcher]
// waits with DM_DEV_ARM_POLL and poll(2): Linux 4.14.
//
// # Concurrency
//
// A [Control] is safe for concurrent use; the kernel serializes changes of one
// device. Errors are *fs.PathError with the ioctl as Op and the device as Path.
//
// Source: Documentation/admin-guide/device-mapper and
// include/uapi/linux/dm-ioctl.h, Linux 6.1 to 6.18.
package dm
