package aufs_test

import (
	"flag"
	"fmt"
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

func TestMain(m *testing.M) {
	drivertest.Child(harness(), live(), kernel())
	if !testenv.Required("aufs") {
		withoutMounts()
	}
	os.Exit(testenv.Main(m))
}

// withoutMounts leaves the tests that need no mount. A test program that is
// killed while it serves a union and has files open in it waits for itself for
// ever, until somebody aborts the connection in /sys/fs/fuse/connections. Until
// unions are served by a process of their own, that is nothing to do to a
// machine unasked.
func withoutMounts() {
	flag.Parse()
	const pure = "^(TestKernelData|TestKernelDataPages|TestKernelSequence|TestReadBranches|TestVerb|TestParse.*|TestServer|TestOptions)$"
	if err := flag.Set("test.run", pure); err != nil {
		panic(err)
	}
	fmt.Println("aufs: only what needs no mount is tested; LAYERFS_REQUIRE=aufs tests all")
}

func harness() drivertest.Harness {
	return withOptions("aufs", &aufs.Options{Engine: aufs.FUSE, Durability: layerfs.DurabilityNone})
}

func live() drivertest.Harness {
	return withOptions("aufs-live", &aufs.Options{Engine: aufs.FUSE, Durability: layerfs.DurabilityFull, LiveBase: true})
}

func kernel() drivertest.Harness {
	return withOptions("aufs-kernel", &aufs.Options{Engine: aufs.Kernel})
}

// Rules are those of the AUFS documents, by section and number as in the tests
// of package union.
const (
	specials = "the union changes the times of a directory when it copies up a symbolic link, fifo, socket or device in it, against rule 5 B7"
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
			"HardLinkCounts":       "the union counts the names of a lower file that have whiteouts, too",
			"NanosecondTimes":      specials,
			"Chown":                specials,
			"Xattrs":               specials,
			"Specials":             specials,
			"Fifos":                specials,
			"UnixSockets":          specials,
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
	endDead(t)
	drivertest.Run(t, harness())
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
	endDead(t)
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
