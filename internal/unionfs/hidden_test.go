//go:build linux

package unionfs

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestHiddenDeep counts in branches deeper than there are descriptors: what was
// reached counts, and nothing stays open.
func TestHiddenDeep(t *testing.T) {
	base := t.TempDir()
	deep := strings.Repeat("/d", 200)
	for _, b := range []string{"/rw", "/l0"} {
		require.NoError(t, os.MkdirAll(base+b+deep, 0o755))
	}
	require.NoError(t, os.WriteFile(base+"/l0/a", nil, 0o600))
	for _, n := range []string{"/b", "/c"} {
		require.NoError(t, os.Link(base+"/l0/a", base+"/l0"+n))
	}
	require.NoError(t, os.WriteFile(base+"/rw/.wh.b", nil, 0o444))
	fs := mustOpen(t, &Config{Branches: []BranchSpec{{base + "/rw", RW}, {base + "/l0", RO}}, MaxDirFD: 64})
	before := openFDs(t)
	var st unix.Stat_t
	n, err := fs.Lookup(fs.Root(), "a", &st)
	require.NoError(t, err)
	require.EqualValues(t, 2, st.Nlink)
	require.True(t, fs.counted.Load())
	require.Equal(t, before, openFDs(t))
	fs.Forget(n, 1)
}

func openFDs(t *testing.T) int {
	ents, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(ents)
}
