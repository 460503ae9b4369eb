//go:build !linux

package layerdir

import "time"

func uptime() (time.Duration, bool) { return 0, false }

func wall() time.Time { return time.Now() }
