package aufs_test

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

// helper is the command that makes this test program the helper.
var helper = []string{"/proc/self/exe"}

func TestMain(m *testing.M) {
	aufs.Main()
	drivertest.Child(harness(), live(), inProcess(), kernel())
	os.Exit(testenv.Main(m))
}

func harness() drivertest.Harness {
	return withOptions("aufs", &aufs.Options{Engine: aufs.FUSE, Helper: helper, Durability: layerfs.DurabilityNone})
}

func live() drivertest.Harness {
	return withOptions("aufs-live", &aufs.Options{Engine: aufs.FUSE, Helper: helper, Durability: layerfs.DurabilityFull, LiveBase: true})
}

func inProcess() drivertest.Harness {
	return withOptions("aufs-inprocess", &aufs.Options{Engine: aufs.FUSE, InProcess: true, Durability: layerfs.DurabilityNone})
}

func kernel() drivertest.Harness {
	return withOptions("aufs-kernel", &aufs.Options{Engine: aufs.Kernel})
}

// Rules are those of the AUFS documents, by section and number as in the tests
// of package union.
const (
	longName = "names of more than 242 bytes have no whiteout with a temporary name, rule 1 F2"
)

func withOptions(name string, opts *aufs.Options) drivertest.Harness {
	return drivertest.Harness{
		Name: name,
		New:  func(root string) (layerfs.Driver, error) { return aufs.New(root, opts) },
		Home: func(root string) string { return filepath.Join(root, "aufs") },
		Deviates: map[string]string{
			"RenameLowerDirectory": "EXDEV, rules 8 B2 and B3",
			"FSSuite":              "Basic renames a directory of a lower layer: EXDEV, rules 8 B2 and B3",
			"Names":                longName,
			"DeleteLongNames":      longName,
			"OpenFileSeesWrites":   "a file opened before its copy-up keeps the old content while data is passed through, rule 6 B7",
		},
	}
}

func requireEngine(t testing.TB, h drivertest.Harness) {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := h.New(t.TempDir())
	testenv.SkipUnsupported(t, err, h.Name)
	require.NoError(t, err)
	require.NoError(t, d.Close())
}

func TestConformance(t *testing.T) {
	requireEngine(t, harness())
	drivertest.Run(t, harness())
}

func TestConformanceInProcess(t *testing.T) {
	requireEngine(t, inProcess())
	endDead(t)
	drivertest.Run(t, inProcess())
}

// endDead is the other process that a process needs to end if it was killed
// while it waited for a union it serves: the suite waits for the end before it
// opens a driver again, which would do it.
func endDead(t *testing.T) {
	t.Helper()
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				if err := aufs.EndDead(os.TempDir()); err != nil {
					t.Error(err)
				}
			}
		}
	})
	t.Cleanup(func() { close(stop); done.Wait() })
}

func TestConformanceLiveBase(t *testing.T) {
	requireEngine(t, live())
	drivertest.Run(t, live())
}

// TestConformanceKernel needs a kernel with AUFS; no mainstream one has it.
func TestConformanceKernel(t *testing.T) {
	requireEngine(t, kernel())
	drivertest.Run(t, kernel())
}

func TestCross(t *testing.T) {
	requireEngine(t, harness())
	copies := drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	}
	drivertest.Cross(t, harness(), copies)
}

func BenchmarkDriver(b *testing.B) { drivertest.RunBenchmarks(b, harness()) }
