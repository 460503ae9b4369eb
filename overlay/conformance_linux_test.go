package overlay_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/overlaymount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	if status, program := overlaymount.Main(os.Args); program {
		os.Exit(status)
	}
	drivertest.Child(harness(), redirecting(), united())
	os.Exit(testenv.Main(m))
}

// Overlayfs copies up one name of a file at a time: overlayfs.rst, "Inode
// properties", "Non-standard behavior".
const links = "a file with several names is torn apart by the copy-up of one, overlayfs.rst, Non-standard behavior"

func harness() drivertest.Harness {
	h := withOptions("overlay", &overlay.Options{Durability: layerfs.DurabilityNone})
	h.Deviates["RenameLowerDirectory"] = "EXDEV without redirect_dir, overlayfs.rst"
	return h
}

func redirecting() drivertest.Harness {
	return withOptions("overlay-redirect", &overlay.Options{
		Durability: layerfs.DurabilityFull, RedirectDir: "on", Metacopy: "on", XIno: "auto",
	})
}

// united mounts by package union.
func united() drivertest.Harness {
	h := withOptions("overlay-union", nil)
	h.New = func(root string) (layerfs.Driver, error) {
		program, err := layerfsProgram(root)
		if err != nil {
			return nil, err
		}
		return overlay.New(root, &overlay.Options{Durability: layerfs.DurabilityNone, MountProgram: program})
	}
	delete(h.Deviates, "HardLinkCounts") // whose layers change no file with several names
	h.Deviates["RenameLowerDirectory"] = "EXDEV without redirect_dir, overlayfs.rst"
	h.Deviates["OpenFileSeesWrites"] = "a file opened before its copy-up keeps the old content while data is passed through, package union"
	return h
}

// layerfsProgram gives this test program the name that makes it the mount
// program layerfs.
func layerfsProgram(dir string) (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	link := filepath.Join(dir, "layerfs")
	if err := os.Symlink(exe, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return link, nil
}

func withOptions(name string, opts *overlay.Options) drivertest.Harness {
	h := drivertest.Harness{
		Name:     name,
		New:      func(root string) (layerfs.Driver, error) { return overlay.New(root, opts) },
		Home:     func(root string) string { return filepath.Join(root, "overlay") },
		Deviates: map[string]string{},
	}
	for _, name := range []string{
		"HardLinkAcrossLayers", "HardLinkCounts", "HardLinkToLower", "HardLinkDirtyNames", "FSSuite",
	} {
		h.Deviates[name] = links
	}
	return h
}

func TestConformance(t *testing.T) {
	requireOverlay(t)
	drivertest.Run(t, harness())
}

func TestConformanceRedirect(t *testing.T) {
	requireOverlay(t)
	drivertest.Run(t, redirecting())
}

// TestConformanceUnion does not need overlayfs. Each mount is two processes
// more, which takes time.
func TestConformanceUnion(t *testing.T) {
	if testing.Short() {
		t.Skip("mounts thousands of times; TestUnionProgram is the short form")
	}
	testenv.RequireFUSE(t, "overlay-union")
	drivertest.Run(t, united())
}

func requireOverlay(t *testing.T) {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := overlay.New(t.TempDir(), nil)
	testenv.SkipUnsupported(t, err, "overlay")
	require.NoError(t, err)
	require.NoError(t, d.Close())
}

func TestCross(t *testing.T) {
	requireOverlay(t)
	copies := drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	}
	drivertest.Cross(t, harness(), copies)
}

func BenchmarkDriver(b *testing.B) { drivertest.RunBenchmarks(b, harness()) }
