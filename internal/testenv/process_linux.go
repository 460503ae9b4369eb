package testenv

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Processes returns the processes whose command line has substr in it. There is
// a NUL behind each argument: "\x00NAME\x00" is the argument NAME.
func Processes(tb testing.TB, substr string) (pids []int) {
	tb.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		tb.Fatal(err)
	}
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(b), substr) {
			continue // it may have ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err != nil {
			tb.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// Stop stops a process and returns when none of its threads runs. The function
// it returns lets it go on, which the end of the test does too.
func Stop(tb testing.TB, pid int) (resume func()) {
	tb.Helper()
	resume = func() { _ = unix.Kill(pid, unix.SIGCONT) }
	tb.Cleanup(resume)
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		tb.Fatal(err)
	}
	for start := time.Now(); !stopped(pid); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			tb.Fatalf("process %d does not stop", pid)
		}
	}
	return resume
}

// stopped reports whether all threads of a process are stopped, proc_pid_stat(5).
func stopped(pid int) bool {
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(all) == 0 {
		return false
	}
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil {
			return false
		}
		// The name of the program, in parentheses, may have any bytes.
		if i := bytes.LastIndexByte(b, ')'); i < 0 || !bytes.HasPrefix(b[i:], []byte(") T")) {
			return false
		}
	}
	return true
}
