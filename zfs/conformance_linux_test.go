package zfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	drivertest.Child(harness())
	os.Exit(runTests(m))
}

// runTests has the pool made before and destroyed after everything that looks
// for leaks.
func runTests(m *testing.M) int {
	if slices.Contains(os.Args, "-test.fuzzworker") || os.Getenv(poolEnv) != "" {
		return testenv.Main(m)
	}
	if err := quietSignals(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	_, destroy, err := makePool()
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	code := testenv.Main(m)
	if destroy != nil {
		if err := destroy(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	return code
}

// quietSignals starts the test program again without the signals by which the
// runtime stops goroutines, where zfs-fuse is used. Each signal that meets a
// request to a FUSE file system sends an interrupt after it, and zfs-fuse hangs
// if that is withdrawn, as the request has been answered, between its poll and
// its read.
func quietSignals() error {
	const off = "asyncpreemptoff=1"
	if kernelMounts() || os.Getenv(fuseEnv) == "" || strings.Contains(os.Getenv("GODEBUG"), off) {
		return nil
	}
	if _, err := find("zfs-fuse", ""); err != nil {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	env := append(os.Environ(), "GODEBUG="+strings.Trim(os.Getenv("GODEBUG")+","+off, ","))
	return os.NewSyscallError("execve", unix.Exec(self, os.Args, env))
}

func harness() drivertest.Harness {
	probe := sharedProber()
	h := drivertest.Harness{
		Name: "zfs",
		New: func(root string) (layerfs.Driver, error) {
			return open(root, &Options{Durability: layerfs.DurabilityNone, Dataset: datasetOf(root)}, probe)
		},
		Root:  new(reuse).newRootDir,
		Home:  func(root string) string { return filepath.Join(root, "zfs") },
		Small: smallRoot,
	}
	if !kernelMounts() {
		onFuse(&h)
	}
	return h
}

// onFuse is what a harness differs by with zfs-fuse.
func onFuse(h *drivertest.Harness) {
	const (
		lazily = "a lazy unmount with an open file hangs the daemon: a thread of it spins on the closed connection"
		often  = "the daemon loses sight of one of many mounts that follow each other, and its users hang"
		names  = "the attributes of a file are cached for each of its names, so that a change by one is not seen by another"
		killed = "the daemon keeps a file system busy for good whose mounting process was killed"
	)
	h.WholeSeconds = true
	h.Small = nil // the daemon needs minutes to give a pool up
	h.Skip = map[string]string{
		"OpenFileAfterPut": lazily,
		"Reopen":           often,
		"Concurrent":       often,
		"RandomHistories":  often,
		"DiffStable":       often,
		"DiffIDMap":        often,
		"HardLinks":        names,
		"Clone":            names,
		"DiffProfileOCI":   names,
		"KilledWorker":     killed,
	}
}

// requireOpenZFS skips what cannot be run with zfs-fuse: its daemon hangs for
// good, with all its users, when a file system is unmounted while files are
// open, or when a request is interrupted by a signal, which child processes
// send. TestLifeCycle and its like are for both, and so is the conformance
// suite but for the cases in onFuse.
func requireOpenZFS(tb testing.TB) {
	tb.Helper()
	requirePool(tb)
	if !kernelMounts() {
		tb.Skip("zfs-fuse hangs on lazy unmounts; run this with OpenZFS")
	}
}

func TestConformance(t *testing.T) {
	requirePool(t)
	h := harness()
	if testing.Short() && kernelMounts() {
		h.Skip = map[string]string{}
		for _, name := range long {
			h.Skip[name] = "with -short: a guest without KVM takes some ten seconds for each"
		}
	}
	drivertest.Run(t, h)
}

// long are cases about trees that say more about archive and the walk, which
// are tested elsewhere, than about zfs: each has some 30 calls.
var long = []string{
	"ACLs", "AncestorsUntouched", "BigFiles", "Capabilities", "Chown", "DeepStack", "DeletedFilesInChild",
	"DirectoryPermission", "DirectoryReplacedByFile", "Empty", "Fifos", "FileReplacedByDirectory", "FileUpdate",
	"HardLinkBroken", "HardLinkCounts", "HardLinkDirtyNames", "HardLinkToLower", "LargeXattrs", "LongPaths",
	"ManyFiles", "Modes", "MoveFileFromLowerLayer", "Opaque", "RemoveAll", "RenameNewDirectory", "RootNames",
	"RootPermission", "SameSizeSameTime", "SymlinkReplacedByDirectory", "UnreadableFiles", "UserXattrs", "WhiteoutNames",
	"DiffProfileOCI", "DiffCompression", "DiffStable",
}

func TestCross(t *testing.T) {
	requireOpenZFS(t)
	copies := drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	}
	drivertest.Cross(t, harness(), copies)
	drivertest.Cross(t, copies, harness())
}

func BenchmarkDriver(b *testing.B) {
	requireOpenZFS(b)
	drivertest.RunBenchmarks(b, harness())
}
