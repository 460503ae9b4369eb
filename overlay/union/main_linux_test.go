package union_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/overlay/union"
)

func TestMain(m *testing.M) {
	union.Main()
	os.Exit(testenv.Main(m))
}

// TestOwnProgram mounts by this program, and another driver of it takes over.
func TestOwnProgram(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	root, ctx := t.TempDir(), t.Context()
	open := func() *overlay.Driver {
		d, err := overlay.New(root, &overlay.Options{MountProgram: union.Main()})
		require.NoError(t, err)
		return d
	}
	d := open()
	defer func() { require.NoError(t, d.Close()) }()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	base, err := d.Get(ctx, "base", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(base+"/f", []byte("low"), 0o644))
	require.NoError(t, d.Put(ctx, "base"))
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	path, err := d.Get(ctx, "top", nil)
	require.NoError(t, err)
	st, err := mount.Query(path)
	require.NoError(t, err)
	require.EqualValues(t, unix.FUSE_SUPER_MAGIC, st.Magic)
	require.NoError(t, os.WriteFile(path+"/f", []byte("top"), 0o644))
	other := open()
	again, err := other.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.Equal(t, path, again)
	require.NoError(t, other.Put(ctx, "top"))
	require.NoError(t, other.Close())
	b, err := os.ReadFile(path + "/f")
	require.NoError(t, err)
	require.Equal(t, "top", string(b))
	require.NoError(t, d.Put(ctx, "top"))
	require.NoFileExists(t, path+"/f")
}

// Example is a program that needs no other to merge layers over FUSE.
func Example() {
	program := union.Main() // first of all
	d, err := overlay.New("/var/lib/layers", &overlay.Options{MountProgram: program})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Close()
}
