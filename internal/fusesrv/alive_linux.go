package fusesrv

import "golang.org/x/sys/unix"

// Alive reports whether requests are taken: it is false if one waits in the
// kernel, and none was taken since the last call found one waiting. How long a
// request takes that was taken says nothing, since a branch may be slow. It
// does not return if a lock is held for ever that is for memory only.
//
// It makes no system call that could wait for a request. Calls must not run at
// the same time.
func (s *Server) Alive() bool {
	s.mu.Lock()
	s.mu.Unlock() //nolint:staticcheck // to see that it is free
	if s.state != nil {
		_ = s.state.Err() // the same
	}
	waits, err := s.pending()
	if err != nil {
		return true // it has ended
	}
	taken := s.requests.Load()
	stuck := waits && s.waited && taken == s.taken
	s.waited, s.taken = waits, taken
	return !stuck
}

// Device calls f while the device, which the number of Serve or Resume still
// stands for, cannot be closed. The error says that it has been.
func (s *Server) Device(f func()) error {
	return s.raw.Control(func(uintptr) { f() })
}

// pending reports whether a request waits: fuse_dev_poll() gives POLLIN then.
func (s *Server) pending() (waits bool, err error) {
	err = s.raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		waits = err == nil && n == 1 && p[0].Revents&(unix.POLLIN|unix.POLLERR) == unix.POLLIN
	})
	return waits, err
}
