// Package keeper keeps descriptors for a worker process, and starts the worker
// again if it dies.
//
// A worker that serves mounts gives the keeper, under a name, whatever another
// worker would need to go on: the connection to the kernel, a memfd with its
// state, locks. The keeper knows nothing of what they are for and uses none of
// them, so there is little in it that could fail, and nothing on which it
// could wait for its own worker. It holds
//
//	DIR/lock     a lock (flock) which says that there is a keeper, or a worker
//	             that is about to start one
//	DIR/socket   the socket on which the worker takes calls (seqpacket). Calls
//	             wait there while there is no worker.
//	DIR/log      what the two write to standard error; log.old is what it was
//	             before it became long
//
// Three processes take part: [Start] runs a starter, which runs the keeper in
// a session of its own and ends when that is ready, so that the caller has no
// child; and the keeper runs the worker. All three are the program that was
// given as the helper, which calls [Main] first in its main function.
//
// A worker that ends with status 0 when nothing is stored has nothing more to
// do; the keeper ends with it. Any other end makes the keeper start another: the
// same program as before, even if its file was replaced meanwhile, or after
// [Worker.Next] the one that was named there. After one that fails before it is
// ready comes the last that was; after one that fails later, the program of the
// keeper. A worker that does not show for [silence] that it does its work
// ([Duties]) is killed, and replaced. When workers die of their own fault again
// and again, the keeper aborts all FUSE connections: their users get an error
// instead of waiting.
//
// If the keeper is killed, or says nothing for [silence], the worker starts
// another, which takes over its lock and socket, and stores all again. Until that
// is done, which takes some milliseconds, what is not stored yet ends with the
// worker.
package keeper
