//go:build unix

package main

import (
	"archive/tar"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func TestBuild(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.tar")
	writeBase(t, base)
	root := filepath.Join(dir, "layers")
	steps := []string{"echo hello > greeting", "rm old; mkdir bin; echo run > bin/tool"}

	first, out := filepath.Join(dir, "1"), new(strings.Builder)
	require.NoError(t, os.Mkdir(first, 0o755))
	require.NoError(t, build(t.Context(), root, base, first, steps, out))
	assert.Equal(t, "step 1: done\nstep 2: done\n", out.String())
	assert.Equal(t, map[string]string{"./": "", "greeting": "hello\n"}, read(t, filepath.Join(first, "layer-1.tar.gz")))
	assert.Equal(t, map[string]string{"./": "", ".wh.old": "", "bin/": "", "bin/tool": "run\n"}, read(t, filepath.Join(first, "layer-2.tar.gz")))

	// The second step differs now: only the first is taken from before.
	second := filepath.Join(dir, "2")
	require.NoError(t, os.Mkdir(second, 0o755))
	out.Reset()
	require.NoError(t, build(t.Context(), root, base, second, []string{steps[0], "true"}, out))
	assert.Equal(t, "step 1: cached\nstep 2: done\n", out.String())

	// Another machine makes the same bytes.
	third := filepath.Join(dir, "3")
	require.NoError(t, os.Mkdir(third, 0o755))
	require.NoError(t, build(t.Context(), filepath.Join(dir, "elsewhere"), base, third, steps, io.Discard))
	for _, name := range []string{"layer-1.tar.gz", "layer-2.tar.gz"} {
		a, err := os.ReadFile(filepath.Join(first, name))
		require.NoError(t, err)
		b, err := os.ReadFile(filepath.Join(third, name))
		require.NoError(t, err)
		assert.Equal(t, a, b, name)
	}
}

// A step that fails leaves no layer, and the steps before it stay.
func TestBuild_failure(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.tar")
	writeBase(t, base)
	root := filepath.Join(dir, "layers")
	err := build(t.Context(), root, base, dir, []string{"true", "touch x; false"}, io.Discard)
	require.ErrorContains(t, err, "step 2")
	d, err := auto.Open(root, nil)
	require.NoError(t, err)
	defer d.Close()
	list, err := d.List(t.Context())
	require.NoError(t, err)
	assert.Len(t, list, 2, "the base and step 1")
}

func writeBase(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	require.NoError(t, err)
	defer f.Close()
	w := tar.NewWriter(f)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "old", Mode: 0o644, Uid: os.Geteuid(), Gid: os.Getegid()}))
	require.NoError(t, w.Close())
}

func read(t *testing.T, name string) map[string]string {
	t.Helper()
	f, err := os.Open(name)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	r := tar.NewReader(z)
	content := make(map[string]string)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return content
		}
		require.NoError(t, err)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		content[h.Name] = string(b)
	}
}
