// Package mount makes, finds and removes mounts.
//
// What is to be mounted is a value ([Overlay], [BindMount], [FS]) that can be
// printed and tested; its Mount method executes it. The new mount API
// (fsopen, fsconfig, fsmount, open_tree, move_mount; Linux 5.2) is tried
// first: it has no limit of one page for the options, takes any byte in a
// path, attaches a mount only when it is complete, and explains its errors.
// Where a kernel or a seccomp filter lacks it, mount(2) gives the same result.
// [Method] forces either one.
//
// # Propagation
//
// A mount that is attached below a shared mount becomes shared itself and
// appears in every peer: in other mount namespaces it may stay, and keep the
// layers busy, after it was unmounted here with MNT_DETACH by somebody else.
// systemd makes / shared. [Shared] tells whether a directory is affected and
// [MakePrivate] puts an end to it for a directory.
package mount
