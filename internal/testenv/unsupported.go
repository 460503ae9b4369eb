//go:build !linux

package testenv

import "testing"

type snapshot map[string]string

// The leak check reads /proc and /sys, which other systems do not have.
func takeSnapshot(string) (snapshot, error)    { return nil, nil }
func settle(snapshot, string) (leaks []string) { return nil }
func release(string)                           {}

// Ext4 skips the test: only Linux has it.
func Ext4(tb testing.TB, sizeMiB int, opts ...string) string { tb.Helper(); return noLinux(tb) }

// XFS skips the test: only Linux has it.
func XFS(tb testing.TB, sizeMiB int, opts ...string) string { tb.Helper(); return noLinux(tb) }

// Btrfs skips the test: only Linux has it.
func Btrfs(tb testing.TB, sizeMiB int, opts ...string) string { tb.Helper(); return noLinux(tb) }

// Tmpfs skips the test: only Linux has it.
func Tmpfs(tb testing.TB, opts ...string) string { tb.Helper(); return noLinux(tb) }

// Unprivileged skips the test: only Linux is supported.
func Unprivileged(t *testing.T, fn func(t *testing.T)) { t.Helper(); noLinux(t) }

// InUserNamespace skips the test: only Linux has it.
func InUserNamespace(t *testing.T, fn func(t *testing.T)) { t.Helper(); noLinux(t) }

func noLinux(tb testing.TB) string {
	tb.Helper()
	tb.Skip("needs Linux")
	return ""
}
