// Package overlay keeps layers as directories that the kernel's overlayfs
// merges.
//
// A new layer is four directories, whatever its parent holds; a file is copied
// when it is first written. All layers on one base share its page cache.
//
// # Layout
//
//	ROOT/overlay/ID/upper      what the layer changes, in overlayfs's form
//	ROOT/overlay/ID/lower-id   the parent's id; none in a base layer
//	ROOT/overlay/ID/work       overlayfs's scratch space; none in a base layer
//	ROOT/overlay/ID/merged     where Get mounts the layer
//	ROOT/overlay/ID/volatile   the boot that mounted the layer with Options.Volatile
//	ROOT/overlay/.layerfs      records, locks; see below
//	ROOT/overlay/.layerfs/overlay.json
//	                           how the layers of this root were written: the
//	                           name space of the xattrs, and whether redirects
//	                           and metacopy may occur
//	ROOT/overlay/.layerfs/mount-program.log
//	                           what the servers of Options.MountProgram say;
//	                           mount-program.log.old is what it was before it
//	                           became longer than 1 MiB
//
// A base layer is shown by a bind mount of its upper directory, other layers
// by an overlay whose lower directories are the upper directories of the
// ancestors. Changes and Diff read the upper directories by the rules of
// overlayfs, redirect_dir and metacopy included, so they cost what the layer
// holds and not what the tree does.
//
// The lock order is that of the shared life cycle; the package has no lock of
// its own.
//
// # Kernel
//
// Linux 4.0 or later with root, 5.11 inside a user namespace (userxattr). More
// than one page of mount options, any byte in paths and up to 500 lower layers
// work everywhere. Sources: Documentation/filesystems/overlayfs.rst, Linux
// 6.12; fs/overlayfs/{namei,params,super}.c.
package overlay
