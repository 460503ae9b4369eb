package union_test

import (
	"os"
	"testing"
	"testing/fstest"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/union"
)

// TestPOSIX runs go-fuse's checks of file system behaviour.
func TestPOSIX(t *testing.T) {
	for name, f := range posixtest.All {
		if name == "FcntlFlockLocksFile" {
			continue // wants a process's own locks to conflict, against fcntl(2)
		}
		for _, pass := range []bool{true, false} {
			t.Run(name+map[bool]string{true: "/passthrough", false: "/served"}[pass], func(t *testing.T) {
				s := prepare(t, 1).mount(t, union.Config{NoPassthrough: !pass})
				f(t, s.mnt)
			})
		}
	}
}

// TestFS runs the standard library's checks of fs.FS, as root and with no
// mount.
func TestFS(t *testing.T) {
	dir := t.TempDir()
	build(t, dir, "l0/a top", "l1/a bottom", "l1/d/f deep", "l0/d/g shallow", "l1/gone x", "l0/.wh.gone ",
		"l1/o/hidden x", "l0/o/.wh..wh..opq ", "l0/o/shown y", "l1/link -> d/f", "l1/abs -> /d/g", "l1/up -> ../../a")
	f, err := union.NewFS(union.Branch{Path: dir + "/l0", Perm: union.ROWH}, union.Branch{Path: dir + "/l1"})
	require.NoError(t, err)
	defer func() { require.NoError(t, f.Close()) }()
	require.NoError(t, fstest.TestFS(f, "a", "d/f", "d/g", "o/shown", "link", "abs", "up"))
	for name, want := range map[string]string{"a": "top", "link": "deep", "abs": "shallow", "up": "top"} {
		b, err := f.ReadFile(name)
		require.NoError(t, err, name)
		assert.Equal(t, want, string(b), name)
	}
	for _, name := range []string{"gone", "o/hidden", ".wh.gone", "a/x", "nothing"} {
		_, err := f.Stat(name)
		assert.Error(t, err, name)
	}
	for _, name := range []string{"gone", ".wh.gone", "nothing"} {
		_, err := f.Open(name)
		assert.ErrorIs(t, err, os.ErrNotExist, name)
	}
	target, err := f.ReadLink("link")
	require.NoError(t, err)
	assert.Equal(t, "d/f", target)
}
