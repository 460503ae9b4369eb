package safepath_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/safepath"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func open(t *testing.T, dir string, walk bool) *safepath.Root {
	t.Helper()
	r, err := safepath.OpenRoot(dir, &safepath.Options{NoOpenat2: walk})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, r.Close()) })
	return r
}

func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

func TestOpen(t *testing.T) {
	top := t.TempDir()
	tree.Build(t, top,
		"file secret out", "file root/f in", "file root/d/f ind", "file root/secret inside",
		"symlink root/abs /d/f", "symlink root/rel d/f", "symlink root/up ../../../../secret", "symlink root/d/up ../../../f",
		"symlink root/host "+top+"/secret", "symlink root/dir d", "symlink root/dirslash d/", "symlink root/fileslash f/",
		"symlink root/a b", "symlink root/b a", "symlink root/dangling nowhere", "symlink root/self .", "symlink root/chain dir",
		"symlink root/root /", "fifo root/fifo")
	for i := range 45 {
		tree.Build(t, top, fmt.Sprintf("symlink root/c%d c%d", i, i+1))
	}
	tree.Build(t, top, "file root/c45 end")
	for _, tt := range []struct {
		path string
		want string // content; empty for an error
		err  unix.Errno
	}{
		{"f", "in", 0}, {"/f", "in", 0}, {"///d//f", "ind", 0}, {"./d/./f", "ind", 0}, {"d/../f", "in", 0},
		{"../f", "in", 0}, {"../../../secret", "inside", 0}, {"d/../../secret", "inside", 0},
		{"abs", "ind", 0}, {"rel", "ind", 0}, {"up", "inside", 0}, {"d/up", "in", 0}, {"dir/f", "ind", 0}, {"dir/../f", "in", 0},
		{"dirslash/f", "ind", 0}, {"chain/f", "ind", 0}, {"self/self/self/f", "in", 0}, {"root/../root/secret", "inside", 0},
		{"host", "", unix.ENOENT}, {"dangling", "", unix.ENOENT}, {"nowhere/x", "", unix.ENOENT}, {"f/x", "", unix.ENOTDIR},
		{"f/", "", unix.ENOTDIR}, {"fileslash", "", unix.ENOTDIR}, {"a", "", unix.ELOOP}, {"a/x", "", unix.ELOOP}, {"f/..", "", unix.ENOTDIR},
		{"c5", "end", 0}, {"c4", "", unix.ELOOP}, {"x\x00y", "", unix.EINVAL}, {strings.Repeat("n", 256), "", unix.ENAMETOOLONG},
	} {
		t.Run(strings.Trim(tt.path, "\x00"), func(t *testing.T) {
			testenv.WithAndWithout(t, "openat2", func(t *testing.T, on bool) {
				f, err := open(t, filepath.Join(top, "root"), !on).Open(tt.path, unix.O_RDONLY)
				if tt.want == "" {
					assert.ErrorIs(t, err, tt.err)
					return
				}
				require.NoError(t, err)
				defer f.Close()
				b := make([]byte, 100)
				n, _ := f.Read(b)
				assert.Equal(t, tt.want, string(b[:n]))
			})
		})
	}
	for path, want := range map[string]error{
		"f": nil, "d/f": nil, "/d/../f": nil, ".": nil, "/": nil, "d/..": nil, "abs": unix.ELOOP, "dir/f": unix.ELOOP, "../f": unix.EXDEV, "d/../../f": unix.EXDEV, "none": unix.ENOENT,
	} {
		t.Run("exact "+path, func(t *testing.T) {
			testenv.WithAndWithout(t, "openat2", func(t *testing.T, on bool) {
				f, err := open(t, filepath.Join(top, "root"), !on).OpenExact(path, unix.O_RDONLY)
				if want != nil {
					got := errno(err)
					// A link as a directory: openat tells ENOTDIR, openat2 ELOOP.
					if want == unix.ELOOP && got == unix.ENOTDIR {
						got = unix.ELOOP
					}
					assert.Equal(t, want, got)
					return
				}
				require.NoError(t, err)
				require.NoError(t, f.Close())
			})
		})
	}
	testenv.WithAndWithout(t, "openat2", func(t *testing.T, on bool) {
		r := open(t, filepath.Join(top, "root"), !on)
		f, err := r.OpenExact("abs", unix.O_PATH|unix.O_NOFOLLOW)
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(int(f.Fd()), &st))
		assert.Equal(t, uint32(unix.S_IFLNK), st.Mode&unix.S_IFMT)
		require.NoError(t, f.Close())
		_, err = r.Open("f", unix.O_RDWR|unix.O_CREAT)
		assert.ErrorIs(t, err, unix.EINVAL)
	})
}

// TestMagicLinks: /proc/self/root would lead out of everything.
func TestMagicLinks(t *testing.T) {
	testenv.WithAndWithout(t, "openat2", func(t *testing.T, on bool) {
		r := open(t, "/proc/self", !on)
		for _, p := range []string{"root", "root/etc/passwd", "cwd", "fd/0", "exe"} {
			_, err := r.Open(p, unix.O_RDONLY)
			assert.ErrorIs(t, err, unix.ELOOP, p)
		}
	})
}

// TestWalkAgrees compares the two implementations on random trees and paths.
func TestWalkAgrees(t *testing.T) {
	top := t.TempDir()
	r := rand.New(rand.NewPCG(3, 4))
	names := []string{"a", "b", "c"}
	part := func() string {
		return []string{"a", "b", "c", "..", ".", "a", "b", "", "zz"}[r.IntN(9)]
	}
	path := func() string {
		parts := make([]string, 1+r.IntN(5))
		for i := range parts {
			parts[i] = part()
		}
		return strings.Join(parts, "/")
	}
	tree.Build(t, top, "dir root")
	root := filepath.Join(top, "root")
	dirs := []string{root}
	for range 120 {
		p := filepath.Join(dirs[r.IntN(len(dirs))], names[r.IntN(3)])
		switch r.IntN(5) {
		case 0, 1:
			if os.Mkdir(p, 0o755) == nil {
				dirs = append(dirs, p)
			}
		case 2:
			if _, err := os.Lstat(p); err != nil {
				require.NoError(t, os.WriteFile(p, []byte(p), 0o644))
			}
		default:
			if target := path(); target != "" {
				_ = os.Symlink(target, p)
			}
		}
	}
	kernel, walk := open(t, root, false), open(t, root, true)
	found := 0
	for range 5000 {
		p := path()
		for _, flags := range []int{unix.O_PATH, unix.O_PATH | unix.O_NOFOLLOW, unix.O_PATH | unix.O_DIRECTORY} {
			f, err := kernel.Open(p, flags)
			g, werr := walk.Open(p, flags)
			if err != nil || werr != nil {
				require.Equal(t, errno(err), errno(werr), "%q %#x", p, flags)
				continue
			}
			found++
			a, err := f.Stat()
			require.NoError(t, err)
			b, err := g.Stat()
			require.NoError(t, err)
			require.True(t, os.SameFile(a, b), "%q %#x", p, flags)
			require.NoError(t, f.Close())
			require.NoError(t, g.Close())
		}
	}
	require.Greater(t, found, 500)
}

// TestRenameRace swaps a directory with links to the outside, and moves one
// out, while paths through it are looked up.
func TestRenameRace(t *testing.T) {
	top := t.TempDir()
	tree.Build(t, top, "file secret out", "file root/secret inside", "dir root/d/e/f", "symlink root/swap ../..", "dir away")
	root := filepath.Join(top, "root")
	testenv.WithAndWithout(t, "openat2", func(t *testing.T, on bool) {
		r := open(t, root, !on)
		stop := make(chan struct{})
		var attacker sync.WaitGroup
		attacker.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_ = unix.Renameat2(unix.AT_FDCWD, root+"/swap", unix.AT_FDCWD, root+"/d/e", unix.RENAME_EXCHANGE)
				_ = os.Rename(root+"/d", top+"/away/d")
				_ = os.Rename(top+"/away/d", root+"/d")
			}
		})
		for range 20000 {
			f, err := r.Open("d/e/../../../../secret", unix.O_RDONLY)
			if err != nil {
				continue
			}
			b := make([]byte, 10)
			n, _ := f.Read(b)
			_ = f.Close()
			if string(b[:n]) != "inside" {
				t.Errorf("got %q", b[:n])
				break
			}
		}
		close(stop)
		attacker.Wait()
	})
}
