package layerdir

import (
	"sync"
	"time"
)

// listing answers at the price of a look at the directory itself what is not
// in it. It is for directories that are small and rarely change: that a layer
// has no persistent gets, and no children, is asked by every verb.
//
// It remembers the names for as long as the directory's times stay the same.
type listing struct {
	mu    sync.Mutex
	state state           // guarded by mu: of the directory, as last seen
	read  bool            // guarded by mu: the names were read, or are too many
	names map[string]bool // guarded by mu: in that state; nil if unknown
}

const (
	// fewNames bounds what reading the names again costs after a change.
	fewNames = 64

	// tick is more than the granularity of a file system's times, which is
	// that of the kernel's clock interrupt, at most 10 ms: a directory changed
	// less than that before its names were read may have been changed since
	// without its times showing it.
	tick = 20 * time.Millisecond
)

// lacks reports whether it is certain that a name is not in the folder.
func (l *listing) lacks(f *folder, name string) bool {
	at, ok := f.state()
	if !ok {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != at {
		l.state, l.read, l.names = at, false, nil
	}
	if !l.read && at.before(time.Now().Add(-tick)) {
		// What is read may be newer than the times that were looked at; those
		// are other ones then the next time.
		l.read = true
		l.names = f.few(fewNames)
	}
	return l.names != nil && !l.names[name]
}
