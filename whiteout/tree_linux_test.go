package whiteout_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// One layer in each form, written by hand after the kernel's document and
// aufs(5), with the same meaning: gone and d/gone are hidden, op is opaque.
var forms = map[whiteout.Form][]string{
	whiteout.AUFS: {
		"file .wh.gone", "chmod .wh.gone 0444", "file d/.wh.gone", "chmod d/.wh.gone 0444", "file op/.wh..wh..opq", "chmod op/.wh..wh..opq 0444",
	},
	whiteout.Overlay:     {"char gone 0 0 0", "char d/gone 0 0 0", "dir op", "xattr op trusted.overlay.opaque y"},
	whiteout.OverlayUser: {"char gone 0 0 0", "char d/gone 0 0 0", "dir op", "xattr op user.overlay.opaque y"},
	whiteout.OverlayXattr: {
		"file gone", "xattr gone trusted.overlay.whiteout y", "file d/gone", "xattr d/gone trusted.overlay.whiteout y", "dir op", "xattr op trusted.overlay.opaque y",
		"chmod gone 0444", "chmod d/gone 0444",
		"xattr . trusted.overlay.opaque x", "xattr d trusted.overlay.opaque x", "xattr . trusted.overlay.whiteouts y", "xattr d trusted.overlay.whiteouts y",
	},
	whiteout.OverlayUserXattr: {
		"file gone", "xattr gone user.overlay.whiteout y", "file d/gone", "xattr d/gone user.overlay.whiteout y", "dir op", "xattr op user.overlay.opaque y",
		"chmod gone 0444", "chmod d/gone 0444",
		"xattr . user.overlay.opaque x", "xattr d user.overlay.opaque x", "xattr . user.overlay.whiteouts y", "xattr d user.overlay.whiteouts y",
	},
}

var own = []string{
	"file d/own x", "file op/own x", "file empty", "symlink out ..", "char null 1 3", "fifo p",
	"mtime d 5.5", "mtime op 6.6", "mtime . 7.7",
}

func buildForm(t *testing.T, root string, f whiteout.Form) {
	tree.Build(t, root, append(append([]string{}, forms[f]...), own...)...)
}

func same(t *testing.T, want, got string) {
	t.Helper()
	diffs, err := tree.Compare(want, got, &tree.CompareOptions{
		// Whiteouts have no time of their own.
		IgnoreTimes: true,
	})
	require.NoError(t, err)
	for _, d := range diffs {
		t.Error(d)
	}
	for name, sec := range map[string]int64{"d": 5, "op": 6, "": 7} {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(got, name), &st))
		assert.Equal(t, sec, st.Mtim.Sec, "mtime of /%s", name)
	}
}

func TestConvert(t *testing.T) {
	testenv.RequireRoot(t)
	for from := whiteout.AUFS; from <= whiteout.OverlayUserXattr; from++ {
		for to := whiteout.AUFS; to <= whiteout.OverlayUserXattr; to++ {
			t.Run(fmt.Sprintf("%v/%v", from, to), func(t *testing.T) {
				dir, want := testenv.Tmpfs(t)+"/l", testenv.Tmpfs(t)+"/w"
				buildForm(t, dir, from)
				buildForm(t, want, to)
				if to == whiteout.Overlay || to == whiteout.OverlayUser {
					chmodWhiteouts(t, dir, want)
				}
				st, err := whiteout.Convert(t.Context(), dir, from, to)
				require.NoError(t, err)
				if from != to {
					assert.Equal(t, int64(2), st.Whiteouts)
					assert.Equal(t, int64(1), st.Opaques)
				}
				same(t, want, dir)
				_, err = whiteout.Convert(t.Context(), dir, from, to)
				require.NoError(t, err, "again")
				same(t, want, dir)
			})
		}
	}
}

// chmodWhiteouts does nothing but keep the modes of device whiteouts equal:
// the kernel makes them 0000 as we do.
func chmodWhiteouts(t *testing.T, _, want string) {
	for _, n := range []string{"gone", "d/gone"} {
		require.NoError(t, os.Chmod(filepath.Join(want, n), 0))
	}
}

// TestConvertInterrupted cancels at each entry in turn and goes on after.
func TestConvertInterrupted(t *testing.T) {
	testenv.RequireRoot(t)
	for _, pair := range [][2]whiteout.Form{
		{whiteout.AUFS, whiteout.Overlay}, {whiteout.Overlay, whiteout.AUFS}, {whiteout.AUFS, whiteout.OverlayXattr},
		{whiteout.OverlayUserXattr, whiteout.Overlay},
	} {
		t.Run(fmt.Sprint(pair), func(t *testing.T) {
			want := testenv.Tmpfs(t) + "/w"
			buildForm(t, want, pair[1])
			dir := testenv.Tmpfs(t)
			for n := range 60 {
				root := fmt.Sprintf("%s/%d", dir, n)
				buildForm(t, root, pair[0])
				ctx := &countdown{Context: t.Context(), left: n}
				_, err := whiteout.Convert(ctx, root, pair[0], pair[1])
				if n < 5 {
					require.ErrorIs(t, err, context.Canceled)
				}
				_, err = whiteout.Convert(t.Context(), root, pair[0], pair[1])
				require.NoError(t, err)
				diffs, err := tree.Compare(want, root, &tree.CompareOptions{IgnoreTimes: true})
				require.NoError(t, err)
				assert.Empty(t, diffs, "cancelled at check %d", n)
			}
		})
	}
}

// countdown is a context that is cancelled after its error has been asked for
// some times.
type countdown struct {
	context.Context
	left int
}

func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

func TestConvertOpaque(t *testing.T) {
	testenv.RequireRoot(t)
	dir := testenv.Tmpfs(t)
	tree.Build(t, dir, "file o/.wh..wh..opq", "file o/.wh.a", "file o/b x")
	st, err := whiteout.Convert(t.Context(), dir, whiteout.AUFS, whiteout.Overlay)
	require.NoError(t, err)
	assert.Equal(t, int64(1), st.Dropped)
	assert.Zero(t, st.Whiteouts)
	entries, err := os.ReadDir(dir + "/o")
	require.NoError(t, err)
	require.Len(t, entries, 1)
	assert.Equal(t, "b", entries[0].Name())
}

func TestConvertMalformed(t *testing.T) {
	testenv.RequireRoot(t)
	for _, tt := range []struct {
		line     []string
		from, to whiteout.Form
	}{
		{[]string{"file .wh."}, whiteout.AUFS, whiteout.Overlay},
		{[]string{"file a/.wh.."}, whiteout.AUFS, whiteout.Overlay},
		{[]string{"file a/.wh..."}, whiteout.AUFS, whiteout.Overlay},
		{[]string{"file .wh.x", "file x y"}, whiteout.AUFS, whiteout.Overlay},
		{[]string{"dir .wh.x"}, whiteout.AUFS, whiteout.Overlay},
		{[]string{"symlink .wh.x y"}, whiteout.AUFS, whiteout.OverlayUser},
		{[]string{"file .wh.x y"}, whiteout.Overlay, whiteout.AUFS},
		{[]string{"dir .wh..wh.plnk"}, whiteout.Overlay, whiteout.AUFS},
		{[]string{"char .wh.x 0 0 0"}, whiteout.Overlay, whiteout.AUFS},
	} {
		t.Run(fmt.Sprint(tt.line), func(t *testing.T) {
			dir := testenv.Tmpfs(t)
			tree.Build(t, dir, tt.line...)
			before, err := tree.Changes("", dir)
			require.NoError(t, err)
			_, err = whiteout.Convert(t.Context(), dir, tt.from, tt.to)
			assert.ErrorIs(t, err, layerfs.ErrMalformed)
			after, err := tree.Changes("", dir)
			require.NoError(t, err)
			assert.Equal(t, before, after)
		})
	}
	_, err := whiteout.Convert(t.Context(), t.TempDir(), whiteout.AUFS, 99)
	assert.ErrorIs(t, err, fs.ErrInvalid)
}

func TestMakeReadRemove(t *testing.T) {
	testenv.RequireRoot(t)
	for f := whiteout.AUFS; f <= whiteout.OverlayUserXattr; f++ {
		t.Run(f.String(), func(t *testing.T) {
			got, err := whiteout.ParseForm(f.String())
			require.NoError(t, err)
			assert.Equal(t, f, got)
			path := testenv.Tmpfs(t)
			tree.Build(t, path, "file own x")
			dir, err := os.Open(path)
			require.NoError(t, err)
			defer dir.Close()
			name := "gone"
			if f == whiteout.AUFS {
				name = ".wh.gone"
			}
			for range 2 {
				require.NoError(t, whiteout.Make(dir, "gone", f))
				e, err := whiteout.Read(dir, name, f)
				require.NoError(t, err)
				assert.Equal(t, whiteout.Entry{Kind: whiteout.Whiteout, Target: "gone"}, e)
			}
			e, err := whiteout.Read(dir, "own", f)
			require.NoError(t, err)
			assert.Equal(t, whiteout.Entry{Kind: whiteout.Plain}, e)
			if f != whiteout.AUFS {
				assert.ErrorIs(t, whiteout.Make(dir, "own", f), fs.ErrExist)
				require.NoError(t, whiteout.Remove(dir, "own", f))
			}
			assert.FileExists(t, path+"/own")
			for range 2 {
				require.NoError(t, whiteout.Remove(dir, "gone", f))
				_, err = whiteout.Read(dir, name, f)
				assert.ErrorIs(t, err, fs.ErrNotExist)
			}
			for _, bad := range []string{"", ".", "..", "a/b"} {
				assert.ErrorIs(t, whiteout.Make(dir, bad, f), layerfs.ErrMalformed, bad)
				assert.ErrorIs(t, whiteout.Remove(dir, bad, f), layerfs.ErrMalformed, bad)
			}
			for _, want := range []bool{true, true, false, false} {
				if want {
					require.NoError(t, whiteout.SetOpaque(dir, f))
				} else {
					require.NoError(t, whiteout.ClearOpaque(dir, f))
				}
				got, err := whiteout.IsOpaqueDir(dir, f)
				require.NoError(t, err)
				assert.Equal(t, want, got)
			}
			entries, err := os.ReadDir(path)
			require.NoError(t, err)
			assert.Len(t, entries, 1)
		})
	}
}

// TestKernelOverlay shows converted layers to the kernel.
func TestKernelOverlay(t *testing.T) {
	testenv.RequireRoot(t)
	for to := whiteout.Overlay; to <= whiteout.OverlayUserXattr; to++ {
		t.Run(to.String(), func(t *testing.T) {
			dir := testenv.Tmpfs(t)
			tree.Build(t, dir, "file low/gone x", "file low/d/gone x", "file low/d/kept y", "file low/op/hidden z", "file low/top t", "dir m", "dir top")
			buildForm(t, dir+"/mid", whiteout.AUFS)
			_, err := whiteout.Convert(t.Context(), dir+"/mid", whiteout.AUFS, to)
			require.NoError(t, err)
			opts := fmt.Sprintf("lowerdir=%s/top:%s/mid:%s/low", dir, dir, dir)
			if to.Prefix() == whiteout.UserPrefix {
				opts += ",userxattr"
			}
			require.NoError(t, unix.Mount("overlay", dir+"/m", "overlay", unix.MS_RDONLY, opts))
			defer func() { require.NoError(t, unix.Unmount(dir+"/m", 0)) }()
			var got []string
			require.NoError(t, filepath.WalkDir(dir+"/m", func(p string, _ fs.DirEntry, err error) error {
				rel, _ := filepath.Rel(dir+"/m", p)
				got = append(got, rel)
				return err
			}))
			assert.Equal(t, []string{".", "d", "d/kept", "d/own", "empty", "null", "op", "op/own", "out", "p", "top"}, got)
			for _, gone := range []string{"gone", "d/gone", "op/hidden"} {
				_, err := os.Lstat(filepath.Join(dir, "m", gone))
				assert.True(t, errors.Is(err, fs.ErrNotExist), "%s: %v", gone, err)
			}
		})
	}
}

// TestKernelEscape checks Escape against what the kernel does with xattrs
// that are set through a mount.
func TestKernelEscape(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.RequireKernel(t, "6.7", "overlay xattr escapes")
	dir := testenv.Tmpfs(t)
	tree.Build(t, dir, "dir low", "dir up", "dir work", "dir m")
	require.NoError(t, unix.Mount("overlay", dir+"/m", "overlay", 0, fmt.Sprintf("lowerdir=%s/low,upperdir=%s/up,workdir=%s/work", dir, dir, dir)))
	defer func() { require.NoError(t, unix.Unmount(dir+"/m", 0)) }()
	tree.Build(t, dir+"/m", "dir d")
	for _, name := range []string{"trusted.overlay.opaque", "trusted.overlay.overlay.x", "trusted.other"} {
		require.NoError(t, unix.Setxattr(dir+"/m/d", name, []byte("v"), 0))
		var buf [8]byte
		n, err := unix.Getxattr(dir+"/up/d", whiteout.Escape(name), buf[:])
		require.NoError(t, err, name)
		assert.Equal(t, "v", string(buf[:n]))
	}
}
