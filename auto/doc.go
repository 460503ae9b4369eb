// Package auto opens the driver that fits a root directory.
//
//	d, err := auto.Open("/var/lib/layerfs", nil)
//
// # Choice
//
// A driver that is named in [Options] is opened, or the error says why it
// cannot be. Otherwise the driver whose layers are in the root already is
// opened, and no other: an image store must not seem empty because a module was
// not loaded. In a root without layers the first driver of a priority list is
// opened that works there: overlay, btrfs, zfs, aufs, devicemapper, vfs, as far
// as this version has them; see [Drivers].
//
// [Probe] tells for each driver what it could do below a root and why not.
//
// # Adding a backend
//
// A backend is one entry in the table of backends.go and one field in Options.
package auto
