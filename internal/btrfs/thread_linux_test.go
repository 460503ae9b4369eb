package btrfs

import "runtime"

// lockForever gives the goroutine a thread that ends with it, because its
// identity will not be restored.
func lockForever() { runtime.LockOSThread() }
