package btrfs_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	crashChild()
	faultChild()
	userChild()
	drivertest.Child(plain(), limited(), simple())
	os.Exit(testenv.Main(m))
}

func plain() drivertest.Harness {
	return withOptions("btrfs", &btrfs.Options{Durability: layerfs.DurabilityNone})
}

// limited has qgroups and durability full.
func limited() drivertest.Harness {
	h := withOptions("btrfs-qgroups", &btrfs.Options{Durability: layerfs.DurabilityFull, Quotas: btrfs.QuotasFull})
	// On a file system this small the kernel may refuse even a rename, for want of
	// metadata to reserve for the accounting; see docs/decisions/0010-btrfs.md.
	h.Small = nil
	return h
}

func simple() drivertest.Harness {
	return withOptions("btrfs-simple", &btrfs.Options{Quotas: btrfs.QuotasSimple})
}

func withOptions(name string, opts *btrfs.Options) drivertest.Harness {
	return drivertest.Harness{
		Name:  name,
		New:   func(root string) (layerfs.Driver, error) { return btrfs.New(root, opts) },
		Home:  func(root string) string { return filepath.Join(root, "btrfs") },
		Small: small,
	}
}

// on gives the harness a file system for all of its roots.
func on(tb testing.TB, h drivertest.Harness) drivertest.Harness {
	mnt := testenv.Btrfs(tb, 2048, "-m single")
	h.Root = func(tb testing.TB) string {
		tb.Helper()
		dir, err := os.MkdirTemp(mnt, "root-")
		require.NoError(tb, err)
		return dir
	}
	return h
}

// small returns a file system with about the bytes asked for.
func small(tb testing.TB, bytes int64) string {
	tb.Helper()
	const overhead = 100 // MiB: chunks of metadata and system, which data cannot use
	root := filepath.Join(testenv.Btrfs(tb, int(bytes>>20)+overhead, "-m single"), "root")
	require.NoError(tb, os.Mkdir(root, 0o755))
	return root
}

func TestConformance(t *testing.T) { drivertest.Run(t, on(t, plain())) }

func TestConformanceQgroups(t *testing.T) { drivertest.Run(t, on(t, limited())) }

func TestConformanceSimpleQuotas(t *testing.T) {
	testenv.RequireKernel(t, "6.7", "btrfs simple quotas")
	drivertest.Run(t, on(t, simple()))
}

func TestCross(t *testing.T) {
	copies := drivertest.Harness{
		Name: "vfs",
		New: func(root string) (layerfs.Driver, error) {
			return vfs.New(root, &vfs.Options{Durability: layerfs.DurabilityNone})
		},
	}
	h := on(t, plain())
	drivertest.Cross(t, h, copies)
	drivertest.Cross(t, copies, h)
}

func BenchmarkDriver(b *testing.B) { drivertest.RunBenchmarks(b, on(b, plain())) }
