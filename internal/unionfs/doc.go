// Package unionfs is a union file system engine: it merges branches (plain
// directories) into one tree, writes changes to the writable one, and knows
// nothing of FUSE. Package fusesrv puts it behind a mount, package union is
// its public face.
//
// What is written to a branch follows a [Format]. The first is that of AUFS,
// whose rules (aufs(5), aufs-standalone 6.x) are named in the tests.
//
// # How files are reached
//
// Every call names one component below a directory descriptor, so nothing a
// branch contains (symbolic links, "..", mounts) leads out of it. Directory
// descriptors are O_PATH, opened when needed and closed again when there are
// too many. Where the process may, each branch is a private clone of its mount
// (open_tree(2)), without the mounts below it and read-only unless the branch
// is writable: a lower branch cannot be written through any descriptor that
// starts from it.
//
// A lookup asks one branch after the other. Where direct changes of read-only
// branches are reported, a directory that lies on many of them gets an index of
// their names once lookups have cost as much as reading them, so that the cost
// does not grow with the number of branches.
//
// # Lock order
//
//	FS.stackMu (R by every operation, W by branch management)
//	FS.renameMu (renames between directories)
//	Node.copyMu (copy-up of one file)
//	Node.mu of directories: parents before children, and two unrelated
//	  ones only under renameMu, lower Node.id first
//	FS.hideMu (R by what hides a name of a lower file, W to count them)
//	inst.mu (child before parent), FS.tabMu: leaves
//
// Nothing is locked during the data phase of a copy-up but Node.copyMu.
package unionfs
