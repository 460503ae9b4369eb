package merged

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/tree"
)

// dashed is a format made up for the test: "-NAME" hides NAME, a directory with
// an entry "--" hides what is below it, and xattrs of user.own are its own.
type dashed struct{}

func (dashed) Name(entry string) (string, bool) {
	if entry == "--" {
		return "", false
	}
	return strings.TrimPrefix(entry, "-"), true
}

func (dashed) Xattr(stored string) (string, bool) { return stored, stored != "user.own" }

func (dashed) Opaque(dir *os.File) (bool, error) { return has(dir, "--") }

func (r dashed) Lookup(d *Directory, name string) (*Node, error) {
	var found *Node
	for _, o := range d.Places {
		if gone, err := has(o.File, "-"+name); gone || err != nil {
			return found, err
		}
		f, err := OpenAt(o.File, name, unix.O_PATH)
		if errors.Is(err, unix.ENOENT) {
			continue
		} else if err != nil {
			return nil, err
		}
		defer f.Close()
		n := &Node{Data: Place{o.Layer, filepath.Join(o.Path, name)}}
		if err := unix.Fstat(int(f.Fd()), &n.Stat); err != nil {
			return nil, err
		}
		if found == nil {
			found = n
		} else if !n.IsDir() {
			return found, nil
		}
		found.Places = append(found.Places, n.Data)
		if !n.IsDir() {
			return found, nil
		}
		if opaque, err := r.Opaque(f); opaque || err != nil {
			return found, err
		}
	}
	return found, nil
}

func has(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// stack has a base, a layer on it, and what both make, all with equal times.
func stack(t *testing.T) (base, upper, both string) {
	dir := t.TempDir()
	base, upper, both = filepath.Join(dir, "base"), filepath.Join(dir, "upper"), filepath.Join(dir, "both")
	build := func(root string, lines ...string) {
		require.NoError(t, os.Mkdir(root, 0o755))
		tree.Build(t, root, lines...)
	}
	build(base,
		"dir d 0755", "file d/kept one", "file d/gone two", "file d/same three", "file d/changed four",
		"dir old 0755", "file old/x x", "file old/y y",
		"dir untouched 0755", "file untouched/f f",
		"file becomes-dir z", "dir becomes-file 0755", "file becomes-file/in i", "symlink l kept", "fifo p 0644")
	build(upper,
		"dir d 0755", "file d/-gone ", "file d/same three", "file d/changed FOUR", "file d/new n",
		"dir old 0755", "file old/-- ", "file old/y Y",
		"dir becomes-dir 0755", "file becomes-dir/in i", "file becomes-file z", "symlink l moved", "fifo p 0644",
		"dir fresh 0755", "dir fresh/deep 0755", "file fresh/deep/f f", "file -never ")
	build(both,
		"dir d 0755", "file d/kept one", "file d/same three", "file d/changed FOUR", "file d/new n",
		"dir old 0755", "file old/y Y", "dir untouched 0755", "file untouched/f f",
		"dir becomes-dir 0755", "file becomes-dir/in i", "file becomes-file z", "symlink l moved", "fifo p 0644",
		"dir fresh 0755", "dir fresh/deep 0755", "file fresh/deep/f f")
	require.NoError(t, unix.Setxattr(upper+"/d/same", "user.own", []byte("1"), 0))
	require.NoError(t, unix.Setxattr(upper+"/d/changed", "user.shown", []byte("1"), 0))
	require.NoError(t, unix.Setxattr(both+"/d/changed", "user.shown", []byte("1"), 0))
	sameTimes(t, base, upper, both)
	return base, upper, both
}

func sameTimes(t *testing.T, roots ...string) {
	times := []unix.Timespec{{Sec: 1e9}, {Sec: 1e9}}
	for _, root := range roots {
		require.NoError(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
			return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, p, times, unix.AT_SYMLINK_NOFOLLOW))
		}))
	}
}

// TestChanges compares with the double walk of the trees built by hand.
func TestChanges(t *testing.T) {
	base, upper, both := stack(t)
	empty := t.TempDir()
	for _, test := range []struct {
		name       string
		dirs       []string
		base       int
		older, new string
	}{
		{"one layer", []string{upper, base}, 1, base, both},
		{"against nothing", []string{upper, base}, 2, "", both},
		{"base against nothing", []string{base}, 1, "", base},
		{"nothing changed", []string{emptyLayer(t), base}, 1, base, base},
		{"two layers", []string{emptyLayer(t), upper, base}, 2, base, both},
		{"upper two", []string{emptyLayer(t), upper, base}, 1, both, both},
		{"no layers", nil, 0, "", empty},
	} {
		t.Run(test.name, func(t *testing.T) {
			want, err := tree.Changes(test.older, test.new)
			require.NoError(t, err)
			var got []layerfs.Change
			for c, err := range Changes(t.Context(), dashed{}, test.dirs, test.base) {
				require.NoError(t, err)
				got = append(got, c)
			}
			assert.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got))
		})
	}
}

func emptyLayer(t *testing.T) string {
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o755))
	sameTimes(t, dir)
	return dir
}

// TestCompareLayer says where what is new lies, which a diff needs.
func TestCompareLayer(t *testing.T) {
	base, upper, _ := stack(t)
	top := emptyLayer(t)
	tree.Build(t, top, "file -old ", "file mine m")
	sameTimes(t, top)
	got := map[string]int{}
	for d, err := range Compare(t.Context(), dashed{}, []string{top, upper, base}, 2) {
		require.NoError(t, err)
		got[d.Path] = d.Layer
	}
	assert.Equal(t, 0, got["/mine"])
	assert.Equal(t, 1, got["/fresh/deep/f"])
	assert.Equal(t, 1, got["/d/new"])
	assert.NotContains(t, got, "/old/y", "below what was deleted")
	assert.Contains(t, got, "/old")
}

func TestCompareEnds(t *testing.T) {
	base, upper, _ := stack(t)
	t.Run("by the consumer", func(t *testing.T) {
		n := 0
		for range Changes(t.Context(), dashed{}, []string{upper, base}, 1) {
			n++
			break
		}
		assert.Equal(t, 1, n)
	})
	t.Run("by the context", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cause := errors.New("enough")
		cancel(cause)
		var last error
		for _, err := range Changes(ctx, dashed{}, []string{upper, base}, 1) {
			last = err
		}
		assert.ErrorIs(t, last, cause)
	})
	t.Run("by a layer that is not there", func(t *testing.T) {
		missing := filepath.Join(base, "missing")
		n := 0
		for _, err := range Changes(t.Context(), dashed{}, []string{upper, missing}, 1) {
			n++
			assert.ErrorIs(t, err, unix.ENOENT)
			assert.ErrorContains(t, err, missing)
		}
		assert.Equal(t, 1, n)
	})
}

// TestOpenAtLinks: a directory that was made a link meanwhile is an error.
func TestOpenAtLinks(t *testing.T) {
	base, upper, _ := stack(t)
	m, err := Open(dashed{}, []string{upper, base})
	require.NoError(t, err)
	defer m.Close()
	root, err := m.Root(0)
	require.NoError(t, err)
	d, err := m.Dir(root.Places)
	require.NoError(t, err)
	defer d.Close()
	n, err := d.Lookup("untouched")
	require.NoError(t, err)
	require.NoError(t, os.RemoveAll(base+"/untouched"))
	require.NoError(t, os.Symlink("/etc", base+"/untouched"))
	_, err = m.Dir(n.Places)
	require.ErrorIs(t, err, unix.ENOTDIR)
	assert.ErrorContains(t, err, base+"/untouched")
}
