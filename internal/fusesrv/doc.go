// Package fusesrv serves a unionfs.FS as a FUSE mount.
//
// The protocol is go-fuse's experimental ProtocolServer; the loop that reads
// /dev/fuse, the notifications and the backing files are here, since a mount
// must not cost a thread and node ids must be under our control:
//
//   - A descriptor waits in the runtime's poller. A reader serves most requests
//     itself and is replaced by another when a request takes long, which one
//     goroutine looks for while there are requests, or is known to. Requests
//     that come in storms do not go through ProtocolServer (see quick).
//   - A kernel inode has one passthrough backing file as long as it is open
//     (fs/fuse/passthrough.c, Linux 6.9). After a copy-up the old inode keeps
//     the lower file, and an open is answered with ESTALE: the kernel looks
//     the name up again and gets a new node id with the same st_ino.
//   - Notifications take locks that a client may hold while it waits for us,
//     so they are never sent by a handler.
//
// What a server knows can be kept in a [State], with which [Resume] goes on in
// another process; see docs/decisions/0013-union-helper.md.
//
// The process must not use the mounts it serves in the goroutines that serve
// them, nor rely on them for its own exit.
//
// Sources: Documentation/filesystems/fuse.rst, fs/fuse of Linux 6.18,
// include/uapi/linux/fuse.h 7.45.
package fusesrv
