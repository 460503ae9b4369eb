// Package sys holds ioctl numbers, kernel structures and raw calls. It is the
// only user of unsafe: one function per call, which forces close-on-exec,
// retries EINTR and returns an *os.PathError with the name of the syscall.
package sys
