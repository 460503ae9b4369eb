// Package timing takes the time of one step of a benchmark.
package timing

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// Cost is what a step took.
type Cost struct {
	Wall time.Duration
	CPU  time.Duration // user and system time of all threads and child processes
}

// Of runs f and returns its cost.
func Of(f func() error) (Cost, error) {
	before, err := cpuTime()
	if err != nil {
		return Cost{}, err
	}
	start := time.Now()
	err = f()
	wall := time.Since(start)
	after, cerr := cpuTime()
	return Cost{wall, after - before}, errors.Join(err, cerr)
}

// cpuTime returns what this process and the children it has waited for used.
func cpuTime() (time.Duration, error) {
	var sum int64
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += u.Utime.Nano() + u.Stime.Nano()
	}
	return time.Duration(sum), nil
}
