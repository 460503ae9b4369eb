// Package ask mounts an overlay that another program serves; see package
// overlaymount, which is what that program does.
//
// The caller mounts, and not the program: so a caller that is killed while a
// mount is made has made it before its end, or nobody does. Whoever looks for
// mounts after its end, by its locks, finds all.
//
//	caller                                        program
//	opens /dev/fuse, makes a pair of sockets,
//	runs "PROGRAM mount-overlay-start TARGET" --> runs "mount-overlay-serve TARGET", ends
//	sends the Plan                            --> opens the directories
//	mount(2)                                  <-- says how to mount
//	says that it is there                     --> answers the kernel
//	returns                                   <-- says so
//
// The server ends when the mount does, and when its caller does before the mount
// is there.
package ask
