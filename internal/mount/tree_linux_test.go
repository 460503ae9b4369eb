package mount_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestOverlayOpen(t *testing.T) {
	testenv.RequireRoot(t)
	for _, m := range []mount.Method{mount.Auto, mount.NewAPI, mount.Classic, mount.Descriptors} {
		t.Run("method="+m.String(), func(t *testing.T) {
			requireMethod(t, m)
			dir := t.TempDir()
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			var lowers []string
			for _, n := range []string{"a", "b"} {
				l := filepath.Join(dir, n)
				require.NoError(t, os.Mkdir(l, 0o755))
				require.NoError(t, os.WriteFile(filepath.Join(l, n), []byte(n), 0o644))
				lowers = append(lowers, l)
			}
			o := &mount.Overlay{Lowers: lowers, Method: m, Flags: mount.ReadOnly}
			f, err := o.Open()
			require.NoError(t, err)
			defer f.Close()
			names, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
			require.NoError(t, err)
			require.Len(t, names, 2)
			under, err := mount.Under(dir)
			require.NoError(t, err)
			require.Empty(t, under, "the mount must be nowhere")
			left, err := filepath.Glob(filepath.Join(temp, "*"))
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}
