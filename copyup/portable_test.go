package copyup_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/copyup"
)

// These tests use nothing but package os. They run on every system, and for
// the portable implementation on Linux with -tags layerfs_portable.

type file struct {
	path, content, target string
	mode                  fs.FileMode
}

func build(t *testing.T, root string) []file {
	files := []file{
		{path: "d", mode: fs.ModeDir | 0o755},
		{path: "d/e", mode: fs.ModeDir | 0o700},
		{path: "d/e/f", content: "hello", mode: 0o640},
		{path: "empty", mode: 0o644},
		{path: "big", content: string(make([]byte, 1<<20)), mode: 0o600},
	}
	if runtime.GOOS != "windows" { // where links need a privilege and modes are one bit
		files = append(files,
			file{path: "link", target: "../nowhere", mode: fs.ModeSymlink},
			file{path: "ro", mode: fs.ModeDir | 0o555},
			file{path: "suid", content: "x", mode: fs.ModeSetuid | 0o755})
	}
	require.NoError(t, os.MkdirAll(root, 0o755))
	for _, f := range files {
		p := filepath.Join(root, filepath.FromSlash(f.path))
		switch {
		case f.mode.IsDir():
			require.NoError(t, os.Mkdir(p, 0o755))
		case f.target != "":
			require.NoError(t, os.Symlink(f.target, p))
		default:
			require.NoError(t, os.WriteFile(p, []byte(f.content), 0o600))
		}
	}
	require.NoError(t, os.Link(filepath.Join(root, "d", "e", "f"), filepath.Join(root, "again")))
	for i := len(files) - 1; i >= 0; i-- {
		p := filepath.Join(root, filepath.FromSlash(files[i].path))
		if files[i].target == "" {
			require.NoError(t, os.Chtimes(p, when, when))
			require.NoError(t, os.Chmod(p, files[i].mode&^fs.ModeDir))
		}
	}
	return files
}

var when = time.Date(2020, 1, 2, 3, 4, 5, 600, time.UTC)

func check(t *testing.T, root string, files []file) {
	t.Helper()
	for _, f := range files {
		p := filepath.Join(root, filepath.FromSlash(f.path))
		fi, err := os.Lstat(p)
		require.NoError(t, err)
		assert.Equal(t, f.mode.Type(), fi.Mode().Type(), f.path)
		if f.target != "" {
			got, err := os.Readlink(p)
			require.NoError(t, err)
			assert.Equal(t, f.target, got)
			continue
		}
		assert.Equal(t, when.Truncate(time.Microsecond), fi.ModTime().UTC().Truncate(time.Microsecond), f.path)
		if runtime.GOOS != "windows" {
			assert.Equal(t, f.mode, fi.Mode(), f.path)
		}
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			require.NoError(t, err)
			assert.True(t, f.content == string(b), f.path)
		}
	}
}

func TestPortableTree(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	files := build(t, src)
	st, err := copyup.Tree(t.Context(), dst, src, nil)
	require.NoError(t, err)
	check(t, dst, files)
	assert.Equal(t, int64(len(files)+2), st.Entries)
	assert.Equal(t, int64(1), st.Links)
	a, err := os.Stat(filepath.Join(dst, "again"))
	require.NoError(t, err)
	b, err := os.Stat(filepath.Join(dst, "d", "e", "f"))
	require.NoError(t, err)
	assert.True(t, os.SameFile(a, b))

	_, err = copyup.Tree(t.Context(), dst, src, nil)
	assert.Error(t, err, "not empty")
	check(t, dst, files)
	_, err = copyup.Tree(t.Context(), filepath.Join(src, "d", "new"), src, nil)
	assert.Error(t, err, "inside")
	assert.NoDirExists(t, filepath.Join(src, "d", "new"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = copyup.Tree(ctx, dst+"2", src, nil)
	assert.ErrorIs(t, err, context.Canceled)
	assert.NoDirExists(t, dst+"2")
}

func TestPortableFile(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), t.TempDir()
	files := build(t, src)
	for _, f := range files {
		if f.mode.IsDir() {
			assert.Error(t, copyup.File(t.Context(), filepath.Join(dst, "x"), filepath.Join(src, f.path), nil))
			continue
		}
		to := filepath.Join(dst, filepath.Base(f.path))
		require.NoError(t, copyup.File(t.Context(), to, filepath.Join(src, filepath.FromSlash(f.path)), nil))
		check(t, dst, []file{{filepath.Base(f.path), f.content, f.target, f.mode}})
		assert.ErrorIs(t, copyup.File(t.Context(), to, filepath.Join(src, filepath.FromSlash(f.path)), nil), fs.ErrExist)
	}
	size := int64(3)
	require.NoError(t, copyup.File(t.Context(), filepath.Join(dst, "part"), filepath.Join(src, "again"), &copyup.Options{Size: &size}))
	b, err := os.ReadFile(filepath.Join(dst, "part"))
	require.NoError(t, err)
	assert.Equal(t, "hel", string(b))
}

func TestPortableUp(t *testing.T) {
	src, up := filepath.Join(t.TempDir(), "src"), t.TempDir()
	files := build(t, src)
	for range 2 {
		require.NoError(t, copyup.Up(t.Context(), up, []string{t.TempDir(), src}, "d/e/f", nil))
		check(t, up, files[:3])
	}
	assert.ErrorIs(t, copyup.Up(t.Context(), up, []string{src}, "d/absent", nil), fs.ErrNotExist)
	assert.ErrorIs(t, copyup.Up(t.Context(), up, []string{src}, "../x", nil), fs.ErrInvalid)
}
