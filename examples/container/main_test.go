//go:build linux

package main

import (
	"archive/tar"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// program is what runs in the container. It is built without cgo, so that the
// tree needs nothing else.
const program = `package main

import (
	"fmt"
	"os"
)

func main() {
	entries, _ := os.ReadDir("/")
	for _, e := range entries {
		fmt.Println("sees", e.Name())
	}
	if err := os.WriteFile("/etc/made", []byte("x"), 0o644); err != nil {
		panic(err)
	}
	if err := os.Remove("/etc/old"); err != nil {
		panic(err)
	}
}
`

func TestRun(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	src := filepath.Join(dir, "main.go")
	require.NoError(t, os.WriteFile(src, []byte(program), 0o644))
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "prog"), src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	rootfs := filepath.Join(dir, "rootfs.tar")
	writeRootfs(t, rootfs, filepath.Join(dir, "prog"))

	root := filepath.Join(dir, "layers")
	for range 2 { // the second run finds the base, and no trace of the first
		var got strings.Builder
		require.NoError(t, run(t.Context(), root, rootfs, []string{"/prog"}, &got))
		assert.Equal(t, "sees etc\nsees prog\nC /etc\nA /etc/made\nD /etc/old\n", got.String())
	}
	err = run(t.Context(), root, rootfs, []string{"/none"}, io.Discard)
	assert.ErrorIs(t, err, os.ErrNotExist)
	assert.ErrorContains(t, run(t.Context(), root, rootfs, []string{"sh"}, io.Discard), "by its path")
	assert.Error(t, run(t.Context(), filepath.Join(dir, "other"), src, []string{"/prog"}, io.Discard), "no tar stream")
}

func writeRootfs(t *testing.T, name, prog string) {
	t.Helper()
	f, err := os.Create(name)
	require.NoError(t, err)
	defer f.Close()
	content, err := os.ReadFile(prog)
	require.NoError(t, err)
	w := tar.NewWriter(f)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}))
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "etc/old", Mode: 0o644}))
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "prog", Mode: 0o755, Size: int64(len(content))}))
	_, err = w.Write(content)
	require.NoError(t, err)
	require.NoError(t, w.Close())
}
