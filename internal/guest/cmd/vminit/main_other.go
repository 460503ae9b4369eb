//go:build !linux

// Command vminit is process 1 of a test guest, which runs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "vminit: runs on Linux only")
	os.Exit(1)
}
