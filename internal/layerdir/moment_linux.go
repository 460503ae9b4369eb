package layerdir

import (
	"time"

	"golang.org/x/sys/unix"
)

func uptime() (time.Duration, bool) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}

// wall is the clock that inodes are stamped with: of the last timer tick, which
// a busy virtual machine may get late by any time. The stamps of Linux 6.13 and
// later are that or later ones.
func wall() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		return time.Now()
	}
	return time.Unix(ts.Unix())
}
