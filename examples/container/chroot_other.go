//go:build !unix

package main

import "syscall"

// inTree does nothing here: there is no chroot.
func inTree(string) *syscall.SysProcAttr { return nil }
