// Package union merges directories into one tree.
//
// A union has branches, top first. What a higher branch has hides what the
// lower ones have under the same name; directories of one name are merged;
// whiteouts hide without replacing. Changes are written to the writable
// branch.
//
// # Formats
//
// The form of whiteouts and opaque directories on a branch is one of these, for
// all branches of a union ([Config.Format]):
//
//   - [AUFS], the default and that of [NewFS]: files named .wh.NAME, which is
//     also the form of image layer archives;
//   - [Overlay]: device files 0/0 and trusted.overlay xattrs, so that kernel
//     overlayfs shows the same tree from the same branches;
//   - [OverlayUser]: the same with user.overlay xattrs (mount option userxattr).
//
// # Mounts
//
// [Mount] makes a union a file system that every process sees. It is served by
// this process over FUSE: file data goes past it where the kernel can pass it
// through (Linux 6.9, root), so reading and writing cost what they cost on the
// branch. Unlike with overlayfs, lower branches may change while mounted, and
// branches may come and go. When the process ends, users of the mount get
// ENOTCONN.
//
// [NewFS] gives the same merged tree as a read-only [io/fs.FS], without any
// mount or privilege.
//
// # What differs from AUFS
//
// A file is copied up when it is opened for writing, and a descriptor opened
// before that keeps the old content while data is passed through; its locks do
// not meet those of descriptors opened after it (they do with
// [Config.NoPassthrough]). Directory permissions are those of the topmost
// instance (AUFS's dirperm1). New files, and copies of lower ones, go to the
// topmost writable branch, also if only a lower one has the directory, which
// AUFS would prefer (create=tdp). Renaming a directory that has something on
// a lower branch is EXDEV, as in AUFS without dirren; a branch that AUFS wrote
// with dirren is refused read-write.
package union
