// Package whiteout knows how a layer says that something below it is gone.
//
// A whiteout hides one name of the layers below, an opaque mark hides all names
// below one directory. There are two families of notation:
//
//	form              whiteout of NAME                      opaque directory
//	AUFS              regular file .wh.NAME                 file .wh..wh..opq in it
//	Overlay           character device NAME, 0/0            trusted.overlay.opaque=y
//	OverlayUser       character device NAME, 0/0            user.overlay.opaque=y
//	OverlayXattr      empty file NAME with                  trusted.overlay.opaque=y
//	                  trusted.overlay.whiteout, in a
//	                  directory with trusted.overlay.opaque=x
//	OverlayUserXattr  the same below user.overlay           user.overlay.opaque=y
//
// AUFS names are also what layer archives carry (OCI image specification,
// layer.md). The functions on names and on xattr names are pure and work on
// every system; those that touch a tree need Linux.
//
// Sources: aufs(5) and aufs-standalone whout.c for the AUFS names;
// Documentation/filesystems/overlayfs.rst of Linux 6.12, sections "whiteouts
// and opaque directories" and "Nesting overlayfs mounts", for the others.
package whiteout
