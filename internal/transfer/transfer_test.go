package transfer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/transfer"
	"github.com/layerfs/layerfs/vfs"
)

func TestMain(m *testing.M) {
	aufs.Main() // this program is the helper of the tests
	os.Exit(testenv.Main(m))
}

func open(t *testing.T, name string) layerfs.Driver {
	t.Helper()
	root := t.TempDir()
	if name == "btrfs" {
		testenv.RequireRoot(t)
		root = testenv.Btrfs(t, 128)
	}
	d, err := auto.Open(root, &auto.Options{
		Driver: name, Durability: layerfs.DurabilityNone,
		VFS:  &vfs.Options{IgnoreOwners: os.Geteuid() != 0},
		AUFS: &aufs.Options{Helper: []string{"/proc/self/exe"}},
	})
	testenv.SkipUnsupported(t, err, name)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, d.Close()) })
	return d
}

// source makes a driver with a base of a tree, a layer on it and a container.
func source(t *testing.T, name string) layerfs.Driver {
	t.Helper()
	d := open(t, name)
	dir := t.TempDir()
	write(t, dir, "etc/passwd", "root")
	write(t, dir, "usr/lib/big", strings.Repeat("x", 1<<20))
	write(t, dir, "tmp/gone", "y")
	ctx := t.Context()
	res, err := transfer.Import(ctx, d, "base", "", transfer.Tree(dir), &layerfs.CreateOptions{Labels: map[string]string{"a": "b"}}, nil)
	require.NoError(t, err)
	assert.Positive(t, res.Entries)
	_, err = transfer.Import(ctx, d, "app", "base", transfer.Stream(tarOf(t, "app/bin", "#!", "tmp/.wh.gone", "")), &layerfs.CreateOptions{ReadOnly: true}, &layerfs.ApplyOptions{IgnoreOwners: true})
	require.NoError(t, err)
	require.NoError(t, d.Create(ctx, "c", "app", nil))
	path, err := d.Get(ctx, "c", nil)
	require.NoError(t, err)
	write(t, path, "etc/passwd", "user")
	require.NoError(t, os.Remove(filepath.Join(path, "app/bin")))
	require.NoError(t, d.Put(ctx, "c"))
	return d
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(name))
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func tarOf(t *testing.T, pairs ...string) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: pairs[i], Mode: 0o644, Size: int64(len(pairs[i+1]))}))
		_, err := io.WriteString(w, pairs[i+1])
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return &b
}

func TestCopy(t *testing.T) {
	for _, from := range auto.Drivers() {
		for _, to := range auto.Drivers() {
			t.Run(from+"-to-"+to, func(t *testing.T) {
				src, dst := source(t, from), open(t, to)
				var got []string
				opts := &transfer.Options{Verify: true, As: "copy", Copied: func(l transfer.Layer) {
					assert.True(t, l.Verified)
					assert.False(t, l.Existed)
					got = append(got, l.From+">"+l.ID+" on "+l.Parent)
				}}
				require.NoError(t, transfer.Copy(t.Context(), src, dst, "c", opts))
				assert.Equal(t, []string{"base>base on ", "app>app on base", "c>copy on app"}, got)
				info, err := dst.Stat(t.Context(), "base", nil)
				require.NoError(t, err)
				assert.Equal(t, map[string]string{"a": "b"}, info.Labels)
				info, err = dst.Stat(t.Context(), "app", nil)
				require.NoError(t, err)
				assert.True(t, info.ReadOnly)
				// What Verify says is seen by the plain eye, too.
				path, err := dst.Get(t.Context(), "copy", nil)
				require.NoError(t, err)
				content, err := os.ReadFile(filepath.Join(path, "etc/passwd"))
				assert.NoError(t, err)
				assert.Equal(t, "user", string(content))
				assert.NoFileExists(t, filepath.Join(path, "app/bin"))
				assert.NoFileExists(t, filepath.Join(path, "tmp/gone"))
				require.NoError(t, dst.Put(t.Context(), "copy"))
			})
		}
	}
}

func TestCopy_again(t *testing.T) {
	src, dst := source(t, "vfs"), open(t, "vfs")
	require.NoError(t, transfer.Copy(t.Context(), src, dst, "app", nil))
	var existed []bool
	require.NoError(t, transfer.Copy(t.Context(), src, dst, "c", &transfer.Options{Copied: func(l transfer.Layer) { existed = append(existed, l.Existed) }}))
	assert.Equal(t, []bool{true, true, false}, existed)
	assert.ErrorIs(t, transfer.Copy(t.Context(), src, dst, "c", nil), layerfs.ErrExist)
}

func TestCopy_otherAncestor(t *testing.T) {
	src, dst := source(t, "vfs"), open(t, "vfs")
	require.NoError(t, dst.Create(t.Context(), "x", "", nil))
	require.NoError(t, dst.Create(t.Context(), "app", "x", nil))
	err := transfer.Copy(t.Context(), src, dst, "c", nil)
	assert.ErrorIs(t, err, layerfs.ErrExist)
	assert.ErrorContains(t, err, `parent is "x", not "base"`)
	_, err = dst.Stat(t.Context(), "c", nil)
	assert.ErrorIs(t, err, layerfs.ErrNotExist)
}

func TestCopy_unknown(t *testing.T) {
	assert.ErrorIs(t, transfer.Copy(t.Context(), source(t, "vfs"), open(t, "vfs"), "nobody", nil), layerfs.ErrNotExist)
}

// liar changes a byte on the way, which only a check of the digests or of the
// trees can find.
type liar struct {
	layerfs.Driver
	digest bool // the digest is a lie, too
}

func (l liar) Apply(ctx context.Context, id string, r io.Reader, opts *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := l.Driver.Apply(ctx, id, bytes.NewReader(bytes.Replace(b, []byte("root"), []byte("toor"), 1)), opts)
	if l.digest {
		res2, err2 := l.digestOf(ctx, b, opts)
		return res2, errors.Join(err, err2)
	}
	return res, err
}

func (l liar) digestOf(ctx context.Context, b []byte, opts *layerfs.ApplyOptions) (layerfs.ApplyResult, error) {
	if err := l.Create(ctx, "aside", "", nil); err != nil {
		return layerfs.ApplyResult{}, err
	}
	res, err := l.Driver.Apply(ctx, "aside", bytes.NewReader(b), opts)
	return res, errors.Join(err, l.Remove(ctx, "aside"))
}

func TestCopy_verifies(t *testing.T) {
	src := source(t, "vfs")
	dst := open(t, "vfs")
	err := transfer.Copy(t.Context(), src, liar{Driver: dst}, "base", nil)
	assert.ErrorContains(t, err, "the source sent sha256:")
	err = transfer.Copy(t.Context(), src, liar{Driver: dst, digest: true}, "base", &transfer.Options{Verify: true})
	assert.ErrorContains(t, err, `the trees differ in 1 places, such as "C /etc/passwd"`)
	list, err := dst.List(t.Context())
	require.NoError(t, err)
	assert.Empty(t, list, "what was not copied right is removed")
}

func TestImport_failures(t *testing.T) {
	bad := errors.New("bad disk")
	cancelled, cancel := context.WithCancel(t.Context())
	for _, tc := range []struct {
		name string
		ctx  context.Context
		src  transfer.Source
		is   error
	}{
		{"unreadable", t.Context(), func(context.Context) (io.ReadCloser, error) { return nil, bad }, bad},
		{"truncated", t.Context(), transfer.Stream(io.LimitReader(tarOf(t, "a", strings.Repeat("x", 4096)), 1000)), layerfs.ErrMalformed},
		{"missing-directory", t.Context(), transfer.Tree(filepath.Join(t.TempDir(), "none")), os.ErrNotExist},
		{"cancelled", cancelled, func(ctx context.Context) (io.ReadCloser, error) {
			cancel()
			return transfer.Tree(t.TempDir())(ctx)
		}, context.Canceled},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := open(t, "vfs")
			_, err := transfer.Import(tc.ctx, d, "l", "", tc.src, nil, nil)
			assert.ErrorIs(t, err, tc.is)
			list, err := d.List(t.Context())
			require.NoError(t, err)
			assert.Empty(t, list)
		})
	}
}
