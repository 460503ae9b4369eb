package sys

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// WaitUnlocked waits until nobody has a file locked exclusively (flock(2)), and
// reports whether that came to be within patience. f has a shared lock then,
// until it is closed: others who wait like this get theirs too. The error is the
// cause of ctx, or an *os.PathError.
func WaitUnlocked(ctx context.Context, f *os.File, patience time.Duration) (free bool, err error) {
	end := time.Now().Add(patience)
	for wait := 200 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil:
			return true, nil
		case err != unix.EWOULDBLOCK:
			return false, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		case time.Now().After(end):
			return false, nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return false, context.Cause(ctx)
		}
	}
}
