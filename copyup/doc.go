// Package copyup copies files and trees with everything they have: data with
// its holes, owner, mode, every xattr (ACLs and capabilities are such),
// nanosecond times, hard links, devices, fifos and sockets.
//
// On Linux data is shared with the source where the file system can (FICLONE),
// else copied inside the kernel (copy_file_range), else read and written. Trees
// are walked with descriptors, in parallel and without following any symlink,
// so a source may be hostile and may change meanwhile: what the copy of a
// changing file holds is undefined then, but nothing outside the source is
// read and nothing outside the destination is written.
//
// A copy that fails, or is cancelled, is removed: see the functions for when
// it can be seen before.
//
// On other systems a portable implementation keeps content, modes, times,
// symlinks and hard links, and owners where the system has them; see each
// function. What it cannot copy, such as devices, is an error.
package copyup
