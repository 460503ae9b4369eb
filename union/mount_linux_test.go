package union_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/union"
)

// bg is the context of calls that are not to be cut short.
var bg = context.Background()

// A bench is a union with its branches, in a directory of its own.
type stage struct {
	*union.Handle
	dir, mnt string
}

func (s *stage) path(p string) string { return filepath.Join(s.mnt, p) }

// rw and lower are paths on the branches; lower 0 is the topmost.
func (s *stage) rw(p string) string           { return filepath.Join(s.dir, "rw", p) }
func (s *stage) lower(i int, p string) string { return filepath.Join(s.dir, fmt.Sprint("l", i), p) }

// needMount skips where nobody may mount, which is a failure if LAYERFS_REQUIRE
// lists "union", or "aufs", whose engine this is.
func needMount(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: "mounting", Reason: "needs root"}, "union", "aufs", "root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: "FUSE", Reason: err.Error()}, "union", "aufs")
	}
}

// prepare makes the branches: "l0/a/f text" is a file, "l0/a/" a directory,
// "l0/x -> y" a symbolic link, "l0/x = a/f" a hard link within the branch.
func prepare(t testing.TB, lowers int, specs ...string) *stage {
	t.Helper()
	needMount(t)
	dir, err := os.MkdirTemp("/dev/shm", "union")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755)) // other users take part
	s := &stage{dir: dir, mnt: filepath.Join(dir, "mnt")}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	for _, d := range []string{"mnt", "rw"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	for i := range lowers {
		require.NoError(t, os.Mkdir(s.lower(i, ""), 0o755))
	}
	build(t, dir, specs...)
	return s
}

func build(t testing.TB, dir string, specs ...string) {
	t.Helper()
	for _, spec := range specs {
		name, rest, _ := strings.Cut(spec, " ")
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		switch {
		case strings.HasSuffix(name, "/"):
			require.NoError(t, os.MkdirAll(p, 0o755))
		case strings.HasPrefix(rest, "-> "):
			require.NoError(t, os.Symlink(rest[3:], p))
		case strings.HasPrefix(rest, "= "):
			branch, _, _ := strings.Cut(name, "/")
			require.NoError(t, os.Link(filepath.Join(dir, branch, rest[2:]), p))
		default:
			require.NoError(t, os.WriteFile(p, []byte(rest), 0o644))
		}
	}
}

// mount mounts the stage's branches, and takes care that neither the mount
// nor a request stuck in it survives the test.
func (s *stage) mount(t testing.TB, cfg union.Config) *stage {
	t.Helper()
	if cfg.Branches == nil {
		cfg.Branches = []union.Branch{{Path: s.rw(""), Perm: union.RW}}
		for i := 0; ; i++ {
			if _, err := os.Stat(s.lower(i, "")); err != nil {
				break
			}
			cfg.Branches = append(cfg.Branches, union.Branch{Path: s.lower(i, "")})
		}
	}
	h, err := union.Mount(bg, s.mnt, &cfg)
	require.NoError(t, err)
	s.Handle = h
	var st unix.Stat_t
	dog := time.AfterFunc(6*time.Minute, func() { abort(st.Dev) })
	require.NoError(t, unix.Stat(s.mnt, &st))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(bg, 10*time.Second)
		defer cancel()
		err := h.Unmount(ctx)
		if err != nil {
			abort(st.Dev)
			h.Detach(ctx)
		}
		dog.Stop()
		assert.NoError(t, err)
	})
	return s
}

// abort ends a connection with everybody who waits in it.
func abort(dev uint64) {
	dir, err := os.MkdirTemp("", "fusectl")
	if err != nil {
		return
	}
	defer os.Remove(dir)
	if unix.Mount("fusectl", dir, "fusectl", 0, "") == nil {
		defer unix.Unmount(dir, unix.MNT_DETACH)
		os.WriteFile(fmt.Sprintf("%s/%d/abort", dir, unix.Minor(dev)), []byte("1"), 0)
	}
}

func mustMount(t testing.TB, lowers int, specs ...string) *stage {
	t.Helper()
	return prepare(t, lowers, specs...).mount(t, union.Config{})
}

func (s *stage) read(t testing.TB, p string) string {
	t.Helper()
	b, err := os.ReadFile(s.path(p))
	require.NoError(t, err)
	return string(b)
}

func (s *stage) write(t testing.TB, p, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(s.path(p), []byte(text), 0o644))
}

// names lists a directory.
func names(t testing.TB, p string) []string {
	t.Helper()
	es, err := os.ReadDir(p)
	require.NoError(t, err)
	out := []string{}
	for _, e := range es {
		out = append(out, e.Name())
	}
	sort.Strings(out)
	return out
}

// branchNames lists a branch directory without what every writable one has.
func branchNames(t testing.TB, p string) []string {
	t.Helper()
	out := []string{}
	for _, n := range names(t, p) {
		switch n {
		case ".wh..wh.aufs", ".wh..wh.plnk", ".wh..wh.orph", ".wh..wh.mounted":
		default:
			out = append(out, n)
		}
	}
	return out
}

func lstat(t testing.TB, p string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(p, &st), p)
	return st
}

func missing(p string) bool {
	_, err := os.Lstat(p)
	return errors.Is(err, os.ErrNotExist)
}

func sh(t testing.TB, script string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(bg, 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-ec", script, "sh"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Run(), "%s\n%s", script, &out)
	return out.String()
}

func TestMount(t *testing.T) {
	s := mustMount(t, 2, "l0/a top", "l1/a bottom", "l1/d/f deep", "l0/d/g shallow")
	assert.Equal(t, "top", s.read(t, "a"))
	assert.Equal(t, "deep", s.read(t, "d/f"))
	assert.Equal(t, []string{"f", "g"}, names(t, s.path("d")))
	s.write(t, "new", "written")
	assert.Equal(t, "written", s.read(t, "new"))
	b, err := os.ReadFile(s.rw("new"))
	require.NoError(t, err)
	assert.Equal(t, "written", string(b))
	s.write(t, "d/f", "changed")
	assert.Equal(t, "changed", s.read(t, "d/f"))
	b, err = os.ReadFile(s.lower(1, "d/f"))
	require.NoError(t, err)
	assert.Equal(t, "deep", string(b))
	require.NoError(t, os.Remove(s.path("a")))
	assert.True(t, missing(s.path("a")))
	assert.Equal(t, []string{".wh.a", "d", "new"}, branchNames(t, s.rw("")))
	t.Logf("%+v", s.Stats())
}
