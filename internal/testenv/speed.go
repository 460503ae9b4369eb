package testenv

import (
	"fmt"
	"os"
	"testing"
)

// Idle reports whether the host is said to do nothing else, so that times can be
// compared.
func Idle() bool { return os.Getenv("LAYERFS_IDLE") != "" }

// RequireIdle skips a test that compares times unless [Idle].
func RequireIdle(tb testing.TB) {
	tb.Helper()
	if !Idle() {
		tb.Skip("compares times, which other work on the machine spoils; LAYERFS_IDLE=1 runs it")
	}
}

// Goal prints a row of the table of scripts/bench.
func Goal(what, took, against, ratio, wanted string, reached bool) {
	verdict := "reached"
	if !reached {
		verdict = "**not reached**"
	}
	fmt.Printf("goal: | %s | %s | %s | %s | %s | %s |\n", what, took, against, ratio, wanted, verdict)
}
