package fusesrv

import (
	"math"
	"runtime"

	"golang.org/x/sys/unix"
)

// pollName is the file with which ProtocolServer lets the kernel ask for POLL.
const pollName = "/.go-fuse-epoll-hack"

// refusePoll makes the kernel learn that files here cannot be polled. Else it
// would ask when a goroutine of this very process opens a file in the mount:
// epoll_ctl(2) waits for the answer with the lock of the runtime's epoll
// instance held, on which the readers wait for requests.
//
// It is a use of the mount by its own server. A thread that waits for an
// answer cannot be killed, and keeps the descriptors of its process open; one
// of them is the connection, whose end it waits for. So the thread that asks
// has a descriptor table of its own with nothing in it.
func (s *Server) refusePoll() {
	done := make(chan error)
	go onOwnThread(func() {
		err := emptyTable(unix.CloseRange)
		if err == nil {
			err = askPoll(s.cfg.Target + pollName)
		}
		done <- err
	})
	if err := <-done; err != nil {
		s.log.Warn("poll file", "err", err)
	}
}

// onOwnThread calls f on a thread that ends with it and is not the first one
// of the process, whose descriptors are what /proc/self/fd shows.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // locked, so the thread ends
	}
	// While this goroutine waits, its thread runs nothing else.
	done := make(chan struct{})
	go func() {
		defer close(done)
		onOwnThread(f)
	}()
	<-done
	runtime.UnlockOSThread()
}

// emptyTable gives the calling thread a descriptor table without descriptors:
// close_range(2) where there is one (Linux 5.9).
func emptyTable(closeRange func(first, last uint, flags uint) error) error {
	err := closeRange(0, math.MaxUint32, unix.CLOSE_RANGE_UNSHARE)
	if err == nil {
		return nil
	}
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	for fd := range int(min(rl.Max, 1<<20)) {
		unix.Close(fd)
	}
	return nil
}

func askPoll(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return unix.Close(fd)
}
