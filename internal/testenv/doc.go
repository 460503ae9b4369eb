// Package testenv gives tests what they need of the machine, and makes sure
// that a test is skipped only for a good reason and leaves nothing behind.
//
// # Environment
//
// LAYERFS_REQUIRE lists, separated by commas, what must be tested here: names
// of backends ("vfs,overlay,btrfs"), of tools ("mkfs.xfs"), or "root" and
// "all". A test that would be skipped for the lack of it fails instead, so a
// continuous integration cannot turn green by testing nothing.
package testenv
