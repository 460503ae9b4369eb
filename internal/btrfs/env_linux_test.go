package btrfs

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// mountBtrfs returns the root of a new btrfs file system of a size in MiB.
// Metadata is kept once, so that small file systems have room.
func mountBtrfs(tb testing.TB, mib int, options ...string) string {
	tb.Helper()
	return testenv.Btrfs(tb, mib, append([]string{"-m single"}, options...)...)
}

func write(tb testing.TB, path, content string) {
	tb.Helper()
	check(tb, os.WriteFile(path, []byte(content), 0o644))
}

func check(tb testing.TB, err error) {
	tb.Helper()
	require.NoError(tb, err)
}

// collect reads all changes.
func collect(tb testing.TB, oldSnap, newSnap string) []layerfs.Change {
	tb.Helper()
	var out []layerfs.Change
	for c, err := range Changes(tb.Context(), oldSnap, newSnap) {
		check(tb, err)
		out = append(out, c)
	}
	return out
}
