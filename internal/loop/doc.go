// Package loop makes block devices of files.
//
// A device lives until it is detached, or with [Options.AutoClear] until its
// last user (a mount, a device-mapper device, a descriptor) is gone, so that a
// crash leaves none behind.
package loop
