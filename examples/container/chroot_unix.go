//go:build unix

package main

import "syscall"

func inTree(tree string) *syscall.SysProcAttr { return &syscall.SysProcAttr{Chroot: tree} }
