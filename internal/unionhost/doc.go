// Package unionhost serves unions from a process of its own, so that they
// outlive the program that mounted them.
//
// The program mounts: it opens /dev/fuse, calls mount(2) in its own mount
// namespace, and hands the device to the worker of a helper (see package
// keeper), which serves it. The worker sees no mount it serves: it opens the
// branches, and nothing else, by path, and refuses a branch on a mount of its
// own. So it can always be killed.
//
// What another worker needs to go on is with the keeper: the device, the
// state of package fusesrv in a memfd, whose meta record has the configuration,
// and the locks of the writable branches; and a descriptor of each file that
// is open without a name.
//
// Unmounting needs no call: the kernel tells the worker.
package unionhost
