// Command bench measures this project beside containerd, moby/go-archive,
// go.podman.io/storage, GNU tar and the bare system calls, on the same data in
// one run, and prints the result as Markdown. scripts/bench builds and runs it.
//
//	bench [-rounds N] [-only REGEXP] [-dir DIR]
//
// # How
//
// Every measurement is a process of its own, in its own mount namespace, that
// times one operation on a fresh directory of a tmpfs; what it needs is made
// before and removed after, outside the time. Rounds go through all
// contestants of a task, each time starting with another one, so that what
// else the machine does hits all alike. A table gives the median and the
// fastest round, and the median CPU time of all threads and child processes,
// which on a host that does other work tells more. "Peak" is the process's
// VmHWM, so it includes the program itself; that of other programs (tar, cp) is
// not measured, and "full copy" of this project includes filling the parent.
//
// All peers are used the way their own daemons do it, with the same sink: a
// stream that is read and dropped. Apply reads the layer from a file that is in
// the page cache. The bare rows are one thread making only the system calls
// that the job cannot do without, from a list made before; nothing portable or
// safe could be written that way.
package main
