package testenv

import (
	"fmt"
	"os"
	"slices"
	"testing"
)

// Main runs the tests of a package and returns its exit code, for
//
//	func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }
//
// It fails the package, and says what is left and where it was made, if a
// passed run leaves open descriptors, child processes, or, below the temporary
// directory that it makes for this run, mounts, loop devices or device-mapper
// devices on top of those. What other processes do at the same time is not
// looked at.
//
// All of TMPDIR, and so t.TempDir, is below that directory during the run; it
// is removed at the end. Benchmarks and fuzzing run the same way.
func Main(m *testing.M) int {
	// The workers of go test -fuzz are ended without notice: the directory
	// would stay. The process that starts them is checked.
	if slices.Contains(os.Args, "-test.fuzzworker") {
		return m.Run()
	}
	// Each child that the race detector watches takes a second to end, else.
	if err := os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return run(m.Run, os.Stderr)
}

func run(tests func() int, out *os.File) int {
	before, err := takeSnapshot("")
	if err != nil {
		fmt.Fprintln(out, "leak check:", err)
		return 2
	}
	dir, err := os.MkdirTemp("", "layerfs-test-")
	if err != nil {
		fmt.Fprintln(out, err)
		return 2
	}
	// The variable of this process only, and only while it runs tests: it is
	// what t.TempDir goes by.
	old, had := os.LookupEnv("TMPDIR")
	os.Setenv("TMPDIR", dir)
	code := tests()
	if had {
		os.Setenv("TMPDIR", old)
	} else {
		os.Unsetenv("TMPDIR")
	}
	leaks := settle(before, dir)
	for _, l := range leaks {
		fmt.Fprintln(out, "LEAK:", l)
	}
	if len(leaks) > 0 {
		release(dir)
		if code == 0 {
			code = 1
		}
	}
	if err := os.RemoveAll(dir); err != nil && len(leaks) == 0 {
		fmt.Fprintln(out, "LEAK:", err)
		code = max(code, 1)
	}
	return code
}
