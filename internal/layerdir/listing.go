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
	settle time.Duration // how old a change must be to count as the last one
	local  bool          // a tick is enough where times are not of whole seconds
	mu     sync.Mutex
	state  state           // guarded by mu: of the directory, as last seen
	read   bool            // guarded by mu: the names were read, or are too many
	names  map[string]bool // guarded by mu: in that state; nil if unknown
}

const (
	// fewNames bounds what reading the names again costs after a change.
	fewNames = 1024

	// settled is more than the granularity of a file system's times: a
	// directory changed less than that before its names were read may have
	// been changed since without its times showing it. ext4 with inodes of 128
	// bytes, and ext2, keep whole seconds, and FAT every second one.
	settled = 3 * time.Second

	// tick is that of local file systems that keep parts of a second: that of
	// the clock interrupt, whose clock is asked (wall). A server has a clock of
	// its own.
	tick = 50 * time.Millisecond
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
	settle := l.settle
	if l.local && at.fine() {
		settle = min(settle, tick)
	}
	if !l.read && at.before(wall().Add(-settle)) {
		// What is read may be newer than the times that were looked at; those
		// are other ones then the next time.
		l.read = true
		l.names = f.few(fewNames)
	}
	return l.names != nil && !l.names[name]
}
