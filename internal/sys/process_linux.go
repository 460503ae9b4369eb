package sys

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Inherited prepares the descriptors that a process was given on purpose, from 3
// up to the number last, of which some must not block, and closes all others it
// was started with: a pipe whose end somebody waits for, or a lock, would else
// stay as long as the process.
func Inherited(last int, nonblock ...int) error {
	// Whoever passes a descriptor on may make it block.
	for _, fd := range nonblock {
		if err := unix.SetNonblock(fd, true); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	for fd := 3; fd <= last; fd++ {
		unix.CloseOnExec(fd)
	}
	return Strangers(last+1, func(fd int) { unix.Close(fd) })
}

// Strangers calls f with each descriptor from one number up that this process
// was started with. Those it made since are closed on exec.
func Strangers(from int, f func(int)) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < from {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 {
			f(fd)
		}
	}
	return nil
}

// Environment is what of an environment a process gets that outlives its caller:
// what Go's runtime takes from there, what a command that starts others may need,
// and the names in more. The rest is the caller's own, and may be secret.
func Environment(all []string, more ...string) (env []string) {
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		switch name {
		case "PATH", "TMPDIR", "TZ", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS",
			"GODEBUG", "GOGC", "GOMEMLIMIT", "GOMAXPROCS", "GOTRACEBACK", "GORACE", "GOCOVERDIR":
			env = append(env, e)
		default:
			if slices.Contains(more, name) {
				env = append(env, e)
			}
		}
	}
	return env
}
