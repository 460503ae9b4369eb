package devmapper

import (
	"time"

	"github.com/layerfs/layerfs"
)

// throttle returns a function that passes progress on, some ten times a second
// and when it is the last.
func throttle(fn layerfs.ProgressFunc) func(p layerfs.Progress, last bool) {
	if fn == nil {
		return func(layerfs.Progress, bool) {}
	}
	var next time.Time
	return func(p layerfs.Progress, last bool) {
		if now := time.Now(); last || now.After(next) {
			next = now.Add(100 * time.Millisecond)
			fn(p)
		}
	}
}
