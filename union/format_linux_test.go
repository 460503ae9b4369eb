package union_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// TestOverlayFormat does random histories to a union in the formats of
// overlayfs. Kernel overlayfs then shows the same tree from the same branches.
func TestOverlayFormat(t *testing.T) {
	for _, f := range []struct {
		format union.Format
		option string
	}{{union.Overlay, ""}, {union.OverlayUser, ",userxattr"}} {
		for seed := range uint64(15) {
			t.Run(fmt.Sprintf("%s/seed=%d", f.format, seed), func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 3))
				s := prepare(t, 2)
				for i := range 2 {
					for k := range 30 {
						randomStep(r, k, false).do(s.lower(i, ""))
					}
				}
				s.mount(t, union.Config{Format: f.format})
				for k := range 80 {
					randomStep(r, 100+k, false).do(s.mnt)
				}
				want := shot(t, s.mnt)
				require.NoError(t, s.Unmount(bg))
				over := s.dir + "/over"
				sh(t, `mkdir "$1" "$1.work"`, over)
				opt := "lowerdir=" + s.lower(0, "") + ":" + s.lower(1, "") + ",upperdir=" + s.rw("") + ",workdir=" + over + ".work" + f.option
				require.NoError(t, unix.Mount("overlay", over, "overlay", 0, opt))
				defer func() { require.NoError(t, unix.Unmount(over, 0)) }()
				assert.Equal(t, want, shot(t, over))
			})
		}
	}
}

// TestOverlayLayers reads layers that kernel overlayfs wrote.
func TestOverlayLayers(t *testing.T) {
	for seed := range uint64(10) {
		r := rand.New(rand.NewPCG(seed, 4))
		s := prepare(t, 1)
		for k := range 40 {
			randomStep(r, k, false).do(s.lower(0, ""))
		}
		over := s.dir + "/over"
		sh(t, `mkdir "$1" "$1.rw" "$1.work"`, over)
		require.NoError(t, unix.Mount("overlay", over, "overlay", 0, "lowerdir="+s.lower(0, "")+",upperdir="+over+".rw,workdir="+over+".work"))
		for k := range 60 {
			randomStep(r, 100+k, false).do(over)
		}
		want := shot(t, over)
		require.NoError(t, unix.Unmount(over, 0))
		s.mount(t, union.Config{Format: union.Overlay, Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: over + ".rw"}, {Path: s.lower(0, "")}}})
		assert.Equal(t, want, shot(t, s.mnt), "seed %d", seed)
	}
}

// TestOverlayFileBetween: a file on a branch between ends the merging of the
// directories of its name, also where none is opaque: kernel overlayfs shows
// the same tree.
func TestOverlayFileBetween(t *testing.T) {
	s := prepare(t, 3)
	sh(t, `mkdir -p "$1/a/b" "$3/a/b/sub"; echo 1 >"$1/a/b/high"; mkdir "$2/a"; echo 2 >"$2/a/b"; echo 3 >"$3/a/b/low"`,
		s.lower(0, ""), s.lower(1, ""), s.lower(2, ""))
	over := s.dir + "/over"
	sh(t, `mkdir "$1"`, over)
	require.NoError(t, unix.Mount("overlay", over, "overlay", unix.MS_RDONLY, "lowerdir="+s.lower(0, "")+":"+s.lower(1, "")+":"+s.lower(2, "")))
	want := shot(t, over)
	require.NoError(t, unix.Unmount(over, 0))
	require.NoFileExists(t, over+"/a/b/low")
	s.mount(t, union.Config{Format: union.Overlay})
	assert.Equal(t, want, shot(t, s.mnt))
	sh(t, `touch "$1/a/b/new"; rm "$1/a/b/high"`, s.mnt) // the directory is copied up
	sh(t, `test "$(ls "$1/a/b")" = new && rm -r "$1/a"`, s.mnt)
}
