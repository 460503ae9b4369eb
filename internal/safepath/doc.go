// Package safepath looks paths up that never leave a root directory, whatever
// symbolic links, ".." components and concurrent renames are in the way.
//
// [Root.Open] treats the root as chroot(2) would: absolute links start at it
// and ".." stops at it. [Root.OpenExact] follows no link at all. Both use
// openat2(2) (Linux 5.6), and where that is missing or forbidden a walk of our
// own, component by component, with the same results.
//
// The kernel does an openat2 atomically against renames: it fails with EAGAIN
// if a ".." met one, and is tried again. The walk keeps the descriptor of each
// directory it went through and takes ".." from these, so that a directory
// that is moved away cannot lead out of the root either.
package safepath
