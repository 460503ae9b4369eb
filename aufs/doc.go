// Package aufs keeps layers as branches of a union in the form of AUFS.
//
// A new layer is one directory, whatever its parent holds; a file is copied
// when it is first written. All layers on one base share its page cache, and,
// unlike with overlayfs, the branches of a mounted layer may change and come
// and go: see [Options.LiveBase] and [Driver.AddBranch].
//
// # Engines
//
// The kernel's AUFS merges the branches where it exists. Everywhere else a
// helper process does, with the engine of package union, over FUSE. Both read
// and write one form on disk, and a root may be used by one today and by the
// other tomorrow.
//
// The helper is the program [Options.Helper] names: the layerfs tool, or the
// embedding program itself, which then calls [Main] first:
//
//	func main() {
//		helper := aufs.Main()
//		…
//		d, err := aufs.New(root, &aufs.Options{Helper: helper})
//
// It is started by the first Get, serves all layers of a root, and ends a few
// seconds after the last one was unmounted. It is two processes. One serves. If
// that is killed, or gives no sign of life for 30 s, the other starts it again
// with what it has kept, and files that are open go on: users of a mount wait
// for some milliseconds, and a little more for each file the kernel remembers.
// So mounts outlive the program that made them, and its upgrade
// ([Driver.ReplaceHelper]). Before Linux 6.9, and if both processes are killed,
// users of a mount get ENOTCONN instead; nothing that was synced is lost. The
// next Get by a driver that did not hold the layer, and every New, detaches
// such a mount, mends the branch and mounts it again. What the helper has to
// say is in ROOT/aufs/serve/log.
//
// With [Options.InProcess] the process whose Get mounted a layer serves it.
// Other processes that Get the layer share that mount. It goes on after the
// serving process has put the layer, as long as another one holds it, and ends
// with the serving process, however that ends.
//
// # Layout
//
//	ROOT/aufs/diff/ID     the branch: what the layer changes, in the form of AUFS
//	ROOT/aufs/layers/ID   the ids of the ancestors, nearest first, one a line;
//	                      empty for a base layer
//	ROOT/aufs/mnt/ID      where Get mounts the layer
//	ROOT/aufs/serve       socket, lock and log of the helper
//	ROOT/aufs/.probe-*    probes of New
//	ROOT/aufs/.view-*     read-only mounts that Diff reads from
//	ROOT/aufs/.layerfs    records and locks
//
// This is the layout of Docker's driver. A layer is mounted only while in use,
// as diff/ID=rw and its ancestors ro+wh. A base layer is shown by a bind mount
// of its branch. Changes and Diff read the branches, so they cost what the
// layer holds and not what the tree does.
//
// Names that start with ".wh." are reserved, and names are at most 242 bytes
// long, in every layer but a base layer.
//
// The lock order is that of the shared life cycle, then the lock of the engine
// over its table of mounts, which is not held across a system call.
//
// # Kernel
//
// FUSE engine: Linux 5.12 and CAP_SYS_ADMIN. Since 6.9 file data goes past the
// process that serves, the helper or with [Options.InProcess] this one, and
// files that are open survive the helper's crash. Kernel engine: AUFS 4 or
// later. Sources: aufs(5), aufs-util 4.9; design documents and
// ABI/testing/sysfs-aufs of aufs-standalone 6.x.
package aufs
