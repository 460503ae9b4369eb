// Package overlaymount makes a program one that mounts in place of the
// kernel's overlayfs, with the command line that fuse-overlayfs has:
//
//	layerfs mount-overlay -o lowerdir=B:A,upperdir=U,workdir=W[,OPTION…] TARGET
//
// The tree is merged by the engine of package union and served over FUSE by a
// process of its own, which ends with the mount; the command ends when the mount
// is there. Package overlay does not use that command, but mounts itself: see
// package ask.
//
// # Options
//
// Commas, colons and backslashes in paths stand behind a backslash, as the
// kernel has it (fs/overlayfs/super.c before Linux 6.5: ovl_next_opt,
// ovl_split_lowerdirs, ovl_unescape). An option that is not known is an error.
//
//	lowerdir=…               lower directories, top first; they must not change
//	upperdir=…               what is written goes here; read-only without
//	workdir=…                taken as callers give it, and not used
//	userxattr                marks in user.overlay.* xattrs
//	ro, rw                   ro does not touch upperdir
//	suid, nosuid, dev, nodev, exec, noexec
//	                         suid, dev and exec are the default
//	allow_other, default_permissions
//	                         always so
package overlaymount
