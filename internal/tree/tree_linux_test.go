package tree_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/tree"
)

var base = []string{
	"dir a 0750", "file a/f hello world", "link a/g a/f", "symlink a/s f", "fifo a/p 0600", "sock a/k",
	"sparse a/sp 4K@8K 4K@1M 0@2M", "xattr a/f user.k v", "dir a/empty", "file a.b x", `file "a/with blank" "line\n"`,
	"mtime a/f 100.5", "mtime a/s 101.000000001", "mtime a/p 102", "mtime a/k 103", "mtime a/sp 104", "mtime a/empty 105",
	"mtime a.b 106", `mtime "a/with blank" 107`, "mtime a 108", "mtime . 2020-01-02T03:04:05.000000006Z",
}

func TestBuild(t *testing.T) {
	root := t.TempDir()
	tree.Build(t, root, base...)
	b, err := os.ReadFile(filepath.Join(root, "a/g"))
	require.NoError(t, err)
	assert.Equal(t, "hello world", string(b))
	b, err = os.ReadFile(filepath.Join(root, "a/with blank"))
	require.NoError(t, err)
	assert.Equal(t, "line\n", string(b))
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(filepath.Join(root, "a"), &st))
	assert.Equal(t, uint32(unix.S_IFDIR|0o750), st.Mode)
	assert.Equal(t, unix.Timespec{Sec: 108}, st.Mtim)
	require.NoError(t, unix.Lstat(filepath.Join(root, "a/f"), &st))
	assert.Equal(t, uint64(2), uint64(st.Nlink))
	assert.Equal(t, unix.Timespec{Sec: 100, Nsec: 5e8}, st.Mtim)
	require.NoError(t, unix.Lstat(filepath.Join(root, "a/sp"), &st))
	assert.Equal(t, int64(2<<20), st.Size)
	assert.Less(t, st.Blocks*512, int64(64<<10))
	for _, bad := range []string{"", "file", "nonsense x", "mode x 0644", "chmod a", "chmod a 9", "link b absent", `file "x`, "rm absent"} {
		assert.Error(t, tree.Make(root, bad), bad)
	}
}

func TestCompare(t *testing.T) {
	for _, tt := range []struct {
		change string   // made in the second tree
		want   []string // differences
		opts   tree.CompareOptions
	}{
		{change: "touch .", want: nil, opts: tree.CompareOptions{IgnoreTimes: true}},
		{"chmod a/f 0600", []string{"/a/f: mode: 0644 != 0600", "/a/g: mode: 0644 != 0600"}, tree.CompareOptions{}},
		{"chmod a 04750", []string{"/a: mode: 0750 != 04750"}, tree.CompareOptions{}},
		{"chmod a 04750", nil, tree.CompareOptions{IgnoreModes: true}},
		{"append a.b y", []string{"/a.b: size: 1 != 2"}, tree.CompareOptions{IgnoreTimes: true}},
		{"file a.b y", []string{"/a.b: content: differs at byte 0 != "}, tree.CompareOptions{IgnoreTimes: true}},
		{"mtime a.b 106.000000001", []string{"/a.b: mtime: 106.000000000 != 106.000000001"}, tree.CompareOptions{}},
		{"mtime a.b 106.000000001", nil, tree.CompareOptions{WholeSeconds: true}},
		{"mtime a 1", nil, tree.CompareOptions{IgnoreDirTime: true}},
		{"mtime a/s 101", []string{"/a/s: mtime: 101.000000001 != 101.000000000"}, tree.CompareOptions{}},
		{"xattr a/f user.k w", []string{`/a/f: xattr user.k: "v" != "w"`, `/a/g: xattr user.k: "v" != "w"`}, tree.CompareOptions{}},
		{"xattr a/f user.l w", []string{`/a/f: xattr user.l: absent != "w"`, `/a/g: xattr user.l: absent != "w"`}, tree.CompareOptions{}},
		{"rmxattr a/f user.k", nil, tree.CompareOptions{IgnoreXattr: func(s string) bool { return s == "user.k" }}},
		{"link a/h a/f", []string{
			"/a/f: link count: 2 != 3", "/a/g: link count: 2 != 3", "/a/h: entry: absent != file"}, tree.CompareOptions{IgnoreTimes: true}},
		{"rm a/g", []string{"/a/f: link count: 2 != 1", "/a/g: entry: file != absent"}, tree.CompareOptions{IgnoreTimes: true}},
		{"rm a/empty", []string{"/a/empty: entry: dir != absent"}, tree.CompareOptions{IgnoreTimes: true}},
		{"rm a/empty", nil, tree.CompareOptions{IgnoreTimes: true, IgnorePath: func(p string) bool { return p == "/a/empty" }}},
		{"sparse a/sp 4K@8K 4K@1M 4K@1500K 0@2M", []string{"/a/sp: content: differs at byte 1536000 != "}, tree.CompareOptions{IgnoreTimes: true}},
	} {
		t.Run(tt.change, func(t *testing.T) {
			a, b := t.TempDir(), t.TempDir()
			tree.Build(t, a, base...)
			tree.Build(t, b, base...)
			diffs, err := tree.Compare(a, b, nil)
			require.NoError(t, err)
			require.Empty(t, diffs)
			tree.Build(t, b, tt.change)
			diffs, err = tree.Compare(a, b, &tt.opts)
			require.NoError(t, err)
			var got []string
			for _, d := range diffs {
				got = append(got, d.String())
			}
			assert.Equal(t, tt.want, got)
		})
	}
}

func TestCompareLinks(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	tree.Build(t, a, "file x 1", "link y x", "file z 1", "link w z")
	tree.Build(t, b, "file x 1", "link z x", "file y 1", "link w y")
	diffs, err := tree.Compare(a, b, &tree.CompareOptions{IgnoreTimes: true})
	require.NoError(t, err)
	assert.Equal(t, []tree.Difference{{"/y", "link", "/x", "/w"}, {"/z", "link", "/w", "/x"}}, diffs)
}

func TestCompareHoles(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	tree.Build(t, a, "sparse f 4K@64K 0@1M")
	tree.Build(t, b, "sparse f 4K@64K 0@1M")
	f, err := os.OpenFile(filepath.Join(b, "f"), os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(make([]byte, 4096), 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	diffs, err := tree.Compare(a, b, &tree.CompareOptions{IgnoreTimes: true})
	require.NoError(t, err)
	assert.Empty(t, diffs)
	diffs, err = tree.Compare(a, b, &tree.CompareOptions{IgnoreTimes: true, Holes: true})
	require.NoError(t, err)
	require.Len(t, diffs, 1)
	assert.Equal(t, "data", diffs[0].What)
}

func TestChanges(t *testing.T) {
	for _, tt := range []struct {
		change []string
		want   string
	}{
		{nil, ""},
		{[]string{"touch ."}, "C /\n"},
		{[]string{"chmod a/f 0600"}, "C /a/f\nC /a/g\n"},
		{[]string{"file a.b y", "mtime a.b 106"}, "C /a.b\n"},
		{[]string{"mtime a.b 106.000000001"}, "C /a.b\n"},
		{[]string{"mtime a/s 1"}, "C /a/s\n"},
		{[]string{"xattr a/empty user.a b"}, "C /a/empty\n"},
		{[]string{"rm a"}, "C /\nD /a\n"},
		{[]string{"rm a", "file a x", "mtime . 2020-01-02T03:04:05.000000006Z"}, "C /a\n"},
		{[]string{"rm a.b", "file a.b/c/d x"}, "C /\nC /a.b\nA /a.b/c\nA /a.b/c/d\n"},
		{[]string{"file a/new x", "rm a/f", "file a-b x"}, "C /\nC /a\nD /a/f\nA /a/new\nA /a-b\n"},
		{[]string{"rm a/s", "symlink a/s g", "mtime a/s 101.000000001", "mtime a 108"}, "C /a/s\n"},
		{[]string{"link a/h a/f", "mtime a 108"}, "A /a/h\n"},
	} {
		t.Run(strings.Join(tt.change, ", "), func(t *testing.T) {
			a, b := t.TempDir(), t.TempDir()
			tree.Build(t, a, base...)
			tree.Build(t, b, base...)
			tree.Build(t, b, tt.change...)
			got, err := tree.Changes(a, b)
			require.NoError(t, err)
			assert.Equal(t, tt.want, tree.FormatChanges(got))
			assert.True(t, slices.IsSortedFunc(got, func(x, y layerfs.Change) int { return layerfs.ComparePaths(x.Path, y.Path) }))
		})
	}
	t.Run("empty", func(t *testing.T) {
		b := t.TempDir()
		tree.Build(t, b, "file d/f x", "file d.e x")
		got, err := tree.Changes("", b)
		require.NoError(t, err)
		assert.Equal(t, "A /d\nA /d/f\nA /d.e\n", tree.FormatChanges(got))
	})
}

// bushy makes a tree of n files with a big directory, a deep one and links
// that lead out of it.
func bushy(t *testing.T, n int) string {
	root := t.TempDir()
	var lines []string
	for i := range n {
		lines = append(lines, fmt.Sprintf("file big/f%d x", i), fmt.Sprintf("file d%d/e%d/f%d x", i%13, i%7, i))
	}
	tree.Build(t, root, lines...)
	tree.Build(t, root, "symlink out /", "symlink d0/up ..", "symlink loop loop", "fifo big/p", "dir d.0", "file d0-x y",
		"file "+strings.Repeat("deep/", 200)+"f x")
	return root
}

func oracle(t *testing.T, root string) []string {
	var want []string
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, path)
		want = append(want, strings.TrimPrefix(rel, "."+"/"))
		return err
	}))
	want[0] = ""
	slices.SortFunc(want, layerfs.ComparePaths)
	return want
}

func TestWalk(t *testing.T) {
	root := bushy(t, 500)
	var got []string
	require.NoError(t, tree.Walk(t.Context(), root, func(e *tree.Entry) error {
		got = append(got, e.Path)
		return nil
	}))
	assert.Equal(t, oracle(t, root), got)

	t.Run("skip", func(t *testing.T) {
		n := 0
		require.NoError(t, tree.Walk(t.Context(), root, func(e *tree.Entry) error {
			n++
			if e.IsDir() && e.Path != "" {
				return fs.SkipDir
			}
			return nil
		}))
		assert.Equal(t, 1+13+1+1+1+1+1+1, n) // root, d0-12, big, d.0, deep, d0-x, loop, out
	})
	t.Run("error", func(t *testing.T) {
		want := errors.New("stop")
		assert.ErrorIs(t, tree.Walk(t.Context(), root, func(e *tree.Entry) error {
			if e.Name == "f7" {
				return want
			}
			return nil
		}), want)
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		err := tree.Walk(ctx, root, func(*tree.Entry) error {
			if n++; n == 100 {
				cancel()
			}
			return nil
		})
		assert.ErrorIs(t, err, context.Canceled)
		assert.Equal(t, 100, n)
	})
}

// recorder checks the order in which a parallel walk calls it.
type recorder struct {
	t       *testing.T
	mu      sync.Mutex
	paths   []string
	open    map[*tree.Dir]bool
	maxOpen int
	onEntry func() error
}

func (r *recorder) Enter(d *tree.Dir) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.True(r.t, d.Parent == nil || r.open[d.Parent])
	r.open[d] = true
	r.maxOpen = max(r.maxOpen, len(r.open))
	r.paths = append(r.paths, d.Path(""))
	return nil
}

func (r *recorder) Entry(d *tree.Dir, name string, typ uint8) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.True(r.t, r.open[d])
	assert.NotEqual(r.t, uint8(unix.DT_UNKNOWN), typ)
	r.paths = append(r.paths, d.Path(name))
	if r.onEntry != nil {
		return r.onEntry()
	}
	return nil
}

func (r *recorder) Leave(d *tree.Dir) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for o := range r.open {
		assert.True(r.t, o.Parent != d, "left %q before %q", d.Name, o.Name)
	}
	return nil
}

func (r *recorder) Release(d *tree.Dir) {
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.True(r.t, r.open[d])
	delete(r.open, d)
}

func TestWalkParallel(t *testing.T) {
	root := bushy(t, 3000)
	dir, err := os.Open(root)
	require.NoError(t, err)
	defer dir.Close()
	for _, workers := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			r := &recorder{t: t, open: map[*tree.Dir]bool{}}
			require.NoError(t, tree.WalkParallel(t.Context(), int(dir.Fd()), workers, r))
			slices.SortFunc(r.paths, layerfs.ComparePaths)
			assert.Equal(t, oracle(t, root), r.paths)
			assert.Empty(t, r.open)
			assert.LessOrEqual(t, r.maxOpen, 202+4*workers)
		})
	}
	t.Run("error", func(t *testing.T) {
		want := errors.New("stop")
		n := 0
		r := &recorder{t: t, open: map[*tree.Dir]bool{}}
		r.onEntry = func() error {
			if n++; n == 50 {
				return want
			}
			return nil
		}
		assert.ErrorIs(t, tree.WalkParallel(t.Context(), int(dir.Fd()), 4, r), want)
		assert.Empty(t, r.open)
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		r := &recorder{t: t, open: map[*tree.Dir]bool{}}
		r.onEntry = func() error {
			if n++; n == 50 {
				cancel()
			}
			return nil
		}
		assert.ErrorIs(t, tree.WalkParallel(ctx, int(dir.Fd()), 4, r), context.Canceled)
		assert.Empty(t, r.open)
		assert.Less(t, n, 60)
	})
}
