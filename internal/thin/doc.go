// Package thin reads the metadata of a thin pool: which blocks a device has
// mapped, and in which blocks two devices differ.
//
// # What may be read
//
// The metadata of a live pool changes under a reader. Take a metadata snapshot
// first (the message reserve_metadata_snap), open the block that the pool's
// status names as held root, and release it afterwards. The metadata of a pool
// that is not active is read from block 0. The kernel writes below the page
// cache, so a device is opened with [OpenDevice], not with os.Open.
//
// # Cost
//
// A device is a B-tree from its blocks to blocks of the pool; a snapshot
// shares every node that neither side has changed since. [Metadata.Diff] walks
// two trees side by side and skips what is the same node, so its cost grows
// with the changes and not with the size of the devices.
//
// # Bad metadata
//
// Every node is checked: checksum, own block number, sizes, order of keys, and
// that its keys lie in the range its parent gives. So a walk sees no block
// twice and ends after at most as many reads as the metadata has blocks,
// whatever is in them.
//
// # Source
//
// drivers/md/dm-thin-metadata.c and drivers/md/persistent-data/dm-btree*.c,
// dm-block-manager.c, Linux 6.1. Metadata versions 1 and 2 are read, which are
// all there are.
package thin
