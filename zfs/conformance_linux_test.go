package zfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

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
	if os.Getenv(fuseStageEnv) == stageInit {
		return fuseInit()
	}
	if slices.Contains(os.Args, "-test.fuzzworker") || os.Getenv(poolEnv) != "" {
		return testenv.Main(m)
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

// requireOpenZFS skips what cannot be tested with zfs-fuse, and says why.
func requireOpenZFS(tb testing.TB, why string) {
	tb.Helper()
	requirePool(tb)
	if !kernelMounts() {
		tb.Skip(why)
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
	requirePool(t)
	copies := drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	}
	h := harness()
	copies.WholeSeconds = h.WholeSeconds
	drivertest.Cross(t, h, copies)
	drivertest.Cross(t, copies, h)
}

func BenchmarkDriver(b *testing.B) {
	requirePool(b)
	drivertest.RunBenchmarks(b, harness())
}
