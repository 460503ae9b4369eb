package archive_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

// TestApplyOnStack applies a layer on several lower layers that themselves
// have whiteouts, opaque directories and, made by the kernel, redirects. The
// oracle is the same stream applied to a copy of what the kernel shows of the
// stack.
func TestApplyOnStack(t *testing.T) {
	testenv.RequireRoot(t)
	work := scratch(t)
	sub := func(p string) string { return filepath.Join(work, p) }
	tree.Build(t, sub("l0"), "file d/a 0", "file d/s/deep/x 0x", "file gone/x 1", "file op/old 1", "symlink lk d", "file mv/in/side m",
		"file keep k", "chmod d/s 0711", "chown d/s/deep 5:6", "symlink absl /d/s", "file f2d f")
	tree.Build(t, sub("l1"), "char gone 0 0", "file op/new 2", "xattr op trusted.overlay.opaque y", "file d/b 1", "chmod d 0750", "char f2d 0 0")
	// The third layer is made through a mount, so that renames leave redirects.
	require.NoError(t, os.MkdirAll(sub("u2/upper"), 0o755))
	stackMount(t, work, sub("u2/upper"), []string{sub("l1"), sub("l0")}, func(m string) {
		require.NoError(t, os.Rename(m+"/mv", m+"/moved"))
		require.NoError(t, os.Rename(m+"/d/s", m+"/d/s2"))
		require.NoError(t, os.Rename(m+"/d/s2/deep", m+"/deep"))
	})
	lowers := []string{sub("u2/upper"), sub("l1"), sub("l0")}

	wh := func(name string) entry { return fileEntry(name, "") }
	layers := map[string][]entry{
		"implied through redirect": {fileEntry("moved/in/new", "n"), fileEntry("deep/new", "n"), fileEntry("d/s2/new", "n")},
		"link to redirected":       {linkEntry("l", "moved/in/side"), linkEntry("l2", "deep/x")},
		"through links":            {fileEntry("lk/n", "n"), fileEntry("lk/s2/n", "n"), wh("lk/.wh.a")},
		"whiteouts":                {wh(".wh.moved"), wh("d/.wh.b"), wh("deep/.wh.x"), wh("gone/.wh.x"), wh(".wh.nothing")},
		"opaque":                   {wh("d/.wh..wh..opq"), dirEntry("d", 0o755), fileEntry("d/z", "z")},
		"hidden below":             {fileEntry("gone/x", "again"), fileEntry("op/old", "again"), fileEntry("f2d/x", "dir now")},
		"hidden link target":       {dirEntry("gone", 0o700), linkEntry("op/l", "op/new")},
		"opaque root":              {wh(".wh..wh..opq"), dirEntry("d", 0o700), fileEntry("d/n", "n"), fileEntry("gone/y", "y")},
		"absolute link":            {fileEntry("absl/n", "n")},
	}
	for name, layer := range layers {
		t.Run(name, func(t *testing.T) {
			stream := makeTar(t, layer...)
			want := sub("want-" + name)
			stackMount(t, work, "", lowers, func(m string) { require.NoError(t, copyTree(m, want)) })
			require.NoError(t, applyBytes(t, want, stream, nil))
			for i, drop := range []bool{false, true} {
				upper := sub(fmt.Sprintf("upper-%s%d", strings.ReplaceAll(name, " ", "-"), i))
				require.NoError(t, os.Mkdir(upper, 0o755))
				opts := &archive.ApplyOptions{Form: whiteout.Overlay, Lowers: lowers, DropWhiteouts: drop}
				require.NoError(t, applyBytes(t, upper, stream, opts))
				stackMount(t, work, upper, lowers, func(m string) {
					requireSame(t, want, m, &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: tree.IgnoreOverlayXattrs})
				})
			}
		})
	}
	t.Run("missing link target", func(t *testing.T) {
		for _, target := range []string{"gone/x", "op/old", "mv/in/side", "f2d"} {
			upper := t.TempDir()
			err := applyBytes(t, upper, makeTar(t, linkEntry("l", target)), &archive.ApplyOptions{Form: whiteout.Overlay, Lowers: lowers})
			require.ErrorIs(t, err, unix.ENOENT, target)
		}
	})
}

func copyTree(from, to string) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	var b bytes.Buffer
	if _, err := archive.Write(context.Background(), &b, from, nil); err != nil {
		return err
	}
	_, err := archive.Apply(context.Background(), to, &b, nil)
	return err
}

// stackMount mounts layers read-only, or below upper.
func stackMount(t *testing.T, work, upper string, lowers []string, fn func(merged string)) {
	t.Helper()
	top, err := os.MkdirTemp(work, "mnt")
	require.NoError(t, err)
	m := filepath.Join(top, "m")
	require.NoError(t, os.MkdirAll(m, 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(top, "work"), 0o755))
	options := "redirect_dir=on,lowerdir=" + strings.Join(lowers, ":")
	if upper != "" {
		options += ",upperdir=" + upper + ",workdir=" + filepath.Join(top, "work")
	}
	require.NoError(t, unix.Mount("overlay", m, "overlay", 0, options))
	defer func() { require.NoError(t, unix.Unmount(m, 0)) }()
	fn(m)
}
