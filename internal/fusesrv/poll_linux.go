package fusesrv

import (
	"runtime"
	"strconv"

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
// has a descriptor table of its own without any connection.
func (s *Server) refusePoll() {
	done := make(chan error)
	go onOwnThread(func() {
		err := dropConnections(s.fd)
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

// dropConnections gives the calling thread a descriptor table of its own and
// closes in it every descriptor of the device that fd is one of: two threads
// that wait must not hold each other's connection either. The others stay,
// since the runtime uses its epoll instance on whatever thread it is.
func dropConnections(fd int) error {
	var dev, st unix.Stat_t
	if err := unix.Fstat(fd, &dev); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	dir, err := unix.Open("/proc/thread-self/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	buf := make([]byte, 4096)
	var drop []int
	for {
		n, err := unix.ReadDirent(dir, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			i, err := strconv.Atoi(name)
			if err == nil && unix.Fstat(i, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == dev.Rdev {
				drop = append(drop, i)
			}
		}
	}
	for _, i := range drop {
		unix.Close(i)
	}
	return nil
}

// Connected reports whether the connection of a device has not ended. The
// number of one that has may be that of another by now. It does not wait.
//
// fuse_dev_poll() gives POLLERR for what was never or is no more connected.
func Connected(dev int) bool {
	for {
		p := []unix.PollFd{{Fd: int32(dev)}} // errors are always told
		_, err := unix.Poll(p, 0)
		if err != unix.EINTR {
			return err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) == 0
		}
	}
}

func askPoll(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return unix.Close(fd)
}
