package aufs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/union"
)

// mustNew opens a driver with the FUSE engine and this program as its helper.
func mustNew(t testing.TB, root string, opts Options) *Driver {
	t.Helper()
	testenv.RequireRoot(t)
	opts.Engine = FUSE
	if !opts.InProcess {
		opts.Helper = helper
	}
	d, err := New(root, &opts)
	testenv.SkipUnsupported(t, err, name)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

func mustGet(t testing.TB, d *Driver, id string) string {
	t.Helper()
	path, err := d.Get(t.Context(), id, nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		err := d.Put(context.Background(), id)
		if err != nil && !errors.Is(err, layerfs.ErrNotExist) {
			require.ErrorIs(t, err, layerfs.ErrNotHeld)
		}
	})
	return path
}

// stack makes a base with a few files and a layer on it.
func stack(t testing.TB, d *Driver) {
	t.Helper()
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	tree.Build(t, mustGet(t, d, "base"), "dir d 0755", "file d/f one", "file g two", "file h x", "link i h")
	require.NoError(t, d.Put(t.Context(), "base"))
	require.NoError(t, d.Create(t.Context(), "top", "base", nil))
}

func changes(t testing.TB, d *Driver, id, base string) []layerfs.Change {
	t.Helper()
	var list []layerfs.Change
	for c, err := range d.Changes(t.Context(), id, base) {
		require.NoError(t, err)
		list = append(list, c)
	}
	return list
}

func TestLayout(t *testing.T) {
	root := t.TempDir()
	d := mustNew(t, root, Options{})
	stack(t, d)
	require.NoError(t, d.Create(t.Context(), "upmost", "top", nil))
	for id, want := range map[string]string{"base": "", "top": "base\n", "upmost": "top\nbase\n"} {
		b, err := os.ReadFile(filepath.Join(root, "aufs/layers", id))
		require.NoError(t, err)
		require.Equal(t, want, string(b))
		require.DirExists(t, filepath.Join(root, "aufs/diff", id))
		require.DirExists(t, filepath.Join(root, "aufs/mnt", id))
	}
	for _, id := range []string{"upmost", "top", "base"} {
		require.NoError(t, d.Remove(t.Context(), id))
	}
	for _, dir := range []string{"diff", "layers", "mnt"} {
		left, err := os.ReadDir(filepath.Join(root, "aufs", dir))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// TestFindDamage: what is missing of a layer is told by Check.
func TestFindDamage(t *testing.T) {
	for name, damage := range map[string]func(home string) error{
		"branch":   func(home string) error { return os.RemoveAll(home + "/diff/top") },
		"ancestry": func(home string) error { return os.WriteFile(home+"/layers/top", []byte("other\n"), 0o600) },
		"mnt":      func(home string) error { return os.Remove(home + "/mnt/top") },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			d := mustNew(t, root, Options{})
			stack(t, d)
			require.NoError(t, damage(root+"/aufs"))
			found, err := d.Check(t.Context())
			require.NoError(t, err)
			require.Len(t, found, 1)
			require.Equal(t, "top", found[0].ID)
			require.NoError(t, d.Remove(t.Context(), "top"))
		})
	}
}

// TestChangesOracle compares what the branches tell with a double walk of the
// mounted trees, against every ancestor.
func TestChangesOracle(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{})
	ctx := t.Context()
	layers := [][]string{
		{"dir a 0755", "dir a/b 0755", "file a/b/c 1", "file f 1", "file l x", "link m l", "symlink s f", "dir e 0755", "file e/x 1"},
		{"rm a/b", "file a/b now-a-file", "rm s", "dir s 0755", "file s/in 1", "append l more", "rm e", "dir e 0700", "file e/y 2"},
		{"rm a/b", "dir a/b 0755", "file a/b/d 2", "rm f", "rm s", "file s x", "rename m n"},
		{"chmod a 0700", "rm e", "file f 1", "rm n"},
	}
	parent := ""
	for i, steps := range layers {
		id := fmt.Sprintf("l%d", i)
		require.NoError(t, d.Create(ctx, id, parent, nil))
		path, err := d.Get(ctx, id, nil)
		require.NoError(t, err)
		tree.Build(t, path, steps...)
		require.NoError(t, d.Put(ctx, id))
		parent = id
	}
	for i := range layers {
		chain, err := d.m.chain(fmt.Sprintf("l%d", i))
		require.NoError(t, err)
		newer, err := d.m.View(ctx, chain)
		require.NoError(t, err)
		for at := 1; at <= len(chain); at++ {
			base, older := "", t.TempDir()
			if at < len(chain) {
				base = chain[at].ID
				v, err := d.m.View(ctx, chain[at:])
				require.NoError(t, err)
				older = v.Path
				t.Cleanup(func() { require.NoError(t, v.Release()) })
			}
			want, err := tree.Changes(older, newer.Path)
			require.NoError(t, err)
			if base == "" && len(want) > 0 && want[0].Path == "/" {
				want = want[1:] // of the directory that stands for the empty tree
			}
			require.Equal(t, want, changes(t, d, chain[0].ID, base), "l%d against %q", i, base)
			require.NotEmpty(t, want)
		}
		require.NoError(t, newer.Release())
	}
}

// TestPlinksInDiff: links of a lower file that was changed are in the diff
// while the layer is mounted, whoever serves it.
func TestPlinksInDiff(t *testing.T) {
	root := t.TempDir()
	d := mustNew(t, root, Options{})
	stack(t, d)
	top := mustGet(t, d, "top")
	require.NoError(t, os.WriteFile(top+"/h", []byte("changed"), 0o644))
	want := []string{"C /h", "C /i"}
	other := mustNew(t, root, Options{}) // which does not serve it
	for name, d := range map[string]*Driver{"elsewhere": other, "here": d} {
		var got []string
		for _, c := range changes(t, d, "top", "base") {
			got = append(got, c.String())
		}
		require.Equal(t, want, got, name)
	}
}

// TestUncovered: a directory over a file over a directory shows nothing of the
// latter, also if a stream made it.
func TestUncovered(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	tree.Build(t, mustGet(t, d, "a"), "dir d 0755", "file d/old 1", "dir d/sub 0755", "file d/sub/old 1")
	require.NoError(t, d.Put(ctx, "a"))
	require.NoError(t, d.Create(ctx, "b", "a", nil))
	tree.Build(t, mustGet(t, d, "b"), "rm d", "file d x")
	require.NoError(t, d.Put(ctx, "b"))
	require.NoError(t, d.Create(ctx, "src", "", nil))
	tree.Build(t, mustGet(t, d, "src"), "dir d 0755", "file d/new 1", "dir d/sub 0755", "mtime d 1000000000.5")
	require.NoError(t, d.Put(ctx, "src"))
	r, err := d.Diff(ctx, "src", "", nil)
	require.NoError(t, err)
	defer r.Close()
	require.NoError(t, d.Create(ctx, "c", "b", nil))
	_, err = d.Apply(ctx, "c", r, nil)
	require.NoError(t, err)
	diffs, err := tree.Compare(d.m.branch("src"), mustGet(t, d, "c"), nil)
	require.NoError(t, err)
	require.Empty(t, diffs)
}

func TestPersistRefused(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{InProcess: true})
	stack(t, d)
	_, err := d.Get(t.Context(), "top", &layerfs.GetOptions{Persist: true})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "served by this process")
	_, err = d.Get(t.Context(), "base", &layerfs.GetOptions{Persist: true})
	require.NoError(t, err)
	require.NoError(t, d.Put(t.Context(), "base"))
}

func TestRefusedOptions(t *testing.T) {
	testenv.RequireRoot(t)
	for name, opts := range map[string]Options{
		"xino":     {Engine: FUSE, XIno: "/dev/shm/x"},
		"dirperm1": {Engine: FUSE, DirPerm1: "off"},
		"strict":   {Engine: Kernel, UDBA: union.Strict},
		"helper":   {Engine: FUSE, Helper: []string{"/nowhere/helper"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(t.TempDir(), &opts)
			require.ErrorIs(t, err, errors.ErrUnsupported)
		})
	}
	list, err := os.ReadFile("/proc/filesystems")
	require.NoError(t, err)
	if !hasFS(string(list), "aufs") { // else TestConformanceKernel runs
		_, err = New(t.TempDir(), &Options{Engine: Kernel})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, "/proc/filesystems")
	}
}

// TestLiveBase: a change of the base shows in every layer on it.
func TestLiveBase(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{LiveBase: true})
	ctx := t.Context()
	stack(t, d)
	require.True(t, d.Features().LiveBase)
	const n = 20
	var all []string
	for i := range n {
		id := fmt.Sprintf("c%d", i)
		require.NoError(t, d.Create(ctx, id, "base", nil))
		all = append(all, mustGet(t, d, id))
	}
	base := mustGet(t, d, "base")
	seen := func(what string, check func(mnt string) bool) {
		t.Helper()
		for i, mnt := range all {
			require.NoError(t, d.SyncBranches(ctx, fmt.Sprintf("c%d", i)))
			require.True(t, check(mnt), "%s in %s", what, mnt)
		}
	}
	holds := func(name, want string) func(string) bool {
		return func(mnt string) bool { b, err := os.ReadFile(mnt + "/" + name); return err == nil && string(b) == want }
	}
	missing := func(name string) func(string) bool {
		return func(mnt string) bool { _, err := os.Lstat(mnt + "/" + name); return errors.Is(err, os.ErrNotExist) }
	}
	seen("before", missing("new"))
	require.NoError(t, os.WriteFile(base+"/new", []byte("1"), 0o644))
	seen("create", holds("new", "1"))
	require.NoError(t, os.WriteFile(base+"/new", []byte("22"), 0o644))
	seen("write", holds("new", "22"))
	require.NoError(t, os.Rename(base+"/new", base+"/d/moved"))
	seen("rename", holds("d/moved", "22"))
	require.NoError(t, os.Remove(base+"/d/moved"))
	seen("unlink", missing("d/moved"))

	// What a layer has of its own wins.
	require.NoError(t, os.WriteFile(all[0]+"/g", []byte("mine"), 0o644))
	require.NoError(t, os.WriteFile(base+"/g", []byte("theirs"), 0o644))
	require.NoError(t, d.SyncBranches(ctx, "c0"))
	require.True(t, holds("g", "mine")(all[0]))
	require.True(t, holds("g", "theirs")(all[1]))

	// An Apply to the base is seen as well.
	require.NoError(t, d.Put(ctx, "base"))
	require.NoError(t, d.Create(ctx, "patch", "", nil))
	require.NoError(t, os.WriteFile(mustGet(t, d, "patch")+"/applied", []byte("p"), 0o644))
	r, err := d.Diff(ctx, "patch", "", nil)
	require.NoError(t, err)
	defer r.Close()
	_, err = d.Apply(ctx, "base", r, nil)
	require.NoError(t, err)
	seen("apply", holds("applied", "p"))
}

// TestLiveMiddle: a layer that is itself a union may be the live base.
func TestLiveMiddle(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{LiveBase: true})
	ctx := t.Context()
	stack(t, d)
	require.NoError(t, d.Create(ctx, "child", "top", nil))
	child, middle := mustGet(t, d, "child"), mustGet(t, d, "top")
	_, err := os.ReadFile(child + "/g")
	require.NoError(t, err)
	require.NoFileExists(t, child+"/new")
	require.NoError(t, os.WriteFile(middle+"/new", nil, 0o644))
	require.NoError(t, os.WriteFile(middle+"/g", []byte("middle"), 0o644))
	require.NoError(t, d.SyncBranches(ctx, "child"))
	b, err := os.ReadFile(child + "/g")
	require.NoError(t, err)
	require.Equal(t, "middle", string(b))
	require.FileExists(t, child+"/new")
}

// TestFrozenWithoutLiveBase is the other way round.
func TestFrozenWithoutLiveBase(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{})
	stack(t, d)
	require.ErrorIs(t, os.WriteFile(mustGet(t, d, "base")+"/x", nil, 0o644), unix.EROFS)
}

func TestBranches(t *testing.T) {
	t.Run("helper", func(t *testing.T) { testBranches(t, Options{}) })
	t.Run("in-process", func(t *testing.T) { testBranches(t, Options{InProcess: true}) })
}

func testBranches(t *testing.T, opts Options) {
	root := t.TempDir()
	d := mustNew(t, root, opts)
	ctx := t.Context()
	stack(t, d)
	extra := union.Branch{Path: t.TempDir(), Perm: union.RO}
	require.NoError(t, os.WriteFile(extra.Path+"/extra", []byte("e"), 0o644))
	require.NoError(t, os.WriteFile(extra.Path+"/g", []byte("from-extra"), 0o644))
	require.ErrorIs(t, d.AddBranch(ctx, "top", extra, -1), layerfs.ErrNotHeld)
	top := mustGet(t, d, "top")
	read := func(name string) string { b, _ := os.ReadFile(top + "/" + name); return string(b) }

	require.NoError(t, d.AddBranch(ctx, "top", extra, -1))
	require.Equal(t, "e", read("extra"))
	require.Equal(t, "two", read("g"), "a branch below decides nothing")
	got, err := d.Branches(ctx, "top")
	require.NoError(t, err)
	require.Equal(t, []union.Branch{
		{Path: d.m.branch("top"), Perm: union.RW}, {Path: d.m.branch("base"), Perm: union.ROWH}, extra,
	}, got)
	require.ErrorIs(t, d.AddBranch(ctx, "top", extra, 0), unix.EINVAL, "twice")
	require.NoError(t, d.DeleteBranch(ctx, "top", extra.Path))
	require.Empty(t, read("extra"))

	require.NoError(t, d.AddBranch(ctx, "top", extra, 0))
	require.Equal(t, "from-extra", read("g"), "a branch above decides")
	require.NoError(t, d.SetBranchMode(ctx, "top", extra.Path, union.RW))
	require.NoError(t, os.WriteFile(top+"/made", []byte("m"), 0o644))
	require.FileExists(t, extra.Path+"/made", "new files go to the topmost writable branch")
	f, err := os.Open(top + "/made")
	require.NoError(t, err)
	require.ErrorIs(t, d.DeleteBranch(ctx, "top", extra.Path), unix.EBUSY)
	require.NoError(t, f.Close())
	require.NoError(t, d.SetBranchMode(ctx, "top", extra.Path, union.RO))
	require.Empty(t, changes(t, d, "top", "base"), "the layer itself has no changes")

	for _, id := range []string{"top", "base"} {
		require.ErrorIs(t, d.DeleteBranch(ctx, "top", d.m.branch(id)), errors.ErrUnsupported)
	}
	require.ErrorIs(t, d.AddBranch(ctx, "base", extra, -1), errors.ErrUnsupported)
	require.ErrorIs(t, d.AddBranch(ctx, "none", extra, -1), layerfs.ErrNotExist)
	require.Error(t, d.AddBranch(ctx, "top", union.Branch{Path: t.TempDir(), Perm: "rx"}, -1))
	if other := mustNew(t, root, Options{InProcess: true}); opts.InProcess {
		require.ErrorIs(t, other.AddBranch(ctx, "top", union.Branch{Path: t.TempDir()}, -1), errors.ErrUnsupported)
	}
	other, more := mustNew(t, root, Options{}), union.Branch{Path: t.TempDir()}
	if opts.InProcess {
		require.ErrorIs(t, other.AddBranch(ctx, "top", more, -1), errors.ErrUnsupported)
	} else {
		require.NoError(t, other.AddBranch(ctx, "top", more, -1))
		require.ErrorIs(t, other.AddBranch(ctx, "top", union.Branch{Path: top + "/d"}, -1), unix.EINVAL, "served by the same helper")
		require.NoError(t, other.DeleteBranch(ctx, "top", more.Path))
	}

	items, err := d.Status(ctx)
	require.NoError(t, err)
	i := slices.IndexFunc(items, func(i layerfs.StatusItem) bool { return i.Key == "Branches of top" })
	require.GreaterOrEqual(t, i, 0)
	require.True(t, strings.HasPrefix(items[i].Value, extra.Path+"=ro:"), items[i].Value)

	// The extra branch is the mount's, not the layer's.
	require.NoError(t, d.Put(ctx, "top"))
	mustGet(t, d, "top")
	require.Equal(t, "two", read("g"))
}

// TestOptionsAct: each option of the FUSE engine does what it says.
func TestOptionsAct(t *testing.T) {
	t.Run("noplink", func(t *testing.T) {
		for off, want := range map[bool]string{false: "changed", true: "x"} {
			d := mustNew(t, t.TempDir(), Options{NoPlink: off})
			stack(t, d)
			top := mustGet(t, d, "top")
			require.NoError(t, os.WriteFile(top+"/h", []byte("changed"), 0o644))
			b, err := os.ReadFile(top + "/i")
			require.NoError(t, err)
			require.Equal(t, want, string(b), "NoPlink %v", off)
		}
	})
	t.Run("direct", func(t *testing.T) {
		d := mustNew(t, t.TempDir(), Options{})
		stack(t, d)
		f, err := os.OpenFile(mustGet(t, d, "top")+"/g", os.O_RDONLY|unix.O_DIRECT, 0)
		require.NoError(t, err)
		require.NoError(t, f.Close())
	})
	t.Run("sum", func(t *testing.T) {
		size := func(path string) uint64 {
			var st unix.Statfs_t
			require.NoError(t, unix.Statfs(path, &st))
			return st.Blocks * uint64(st.Bsize)
		}
		for _, sum := range []bool{false, true} {
			d := mustNew(t, t.TempDir(), Options{Sum: sum})
			stack(t, d)
			top := mustGet(t, d, "top")
			want := size(d.m.branch("top"))
			other := testenv.Tmpfs(t, "size=7m")
			require.NoError(t, d.AddBranch(t.Context(), "top", union.Branch{Path: other, Perm: union.RO}, -1))
			if sum {
				want += 7 << 20
			}
			require.Equal(t, want, size(top), "Sum %v", sum)
			require.NoError(t, d.DeleteBranch(t.Context(), "top", other))
		}
	})
}

// TestKernelSequence runs the mount of a stack that does not fit into a page
// against a recorder in place of mount(2).
func TestKernelSequence(t *testing.T) {
	type call struct {
		flags uintptr
		data  string
	}
	var calls []call
	fail := -1
	k := newKernel(settings{dio: true})
	k.call = func(source, target, fstype string, flags uintptr, data string) error {
		require.Equal(t, []string{"none", "/target", "aufs"}, []string{source, target, fstype})
		calls = append(calls, call{flags, data})
		if len(calls)-1 == fail {
			return unix.ENOSPC
		}
		return nil
	}
	p := plan{branches: stackOf(127, "/var/lib/layers/aufs/diff/"+strings.Repeat("f", 64)+"%04d"), readOnly: true}
	require.NoError(t, k.mount(t.Context(), p, "/target"))
	first, more, err := kernelData(p, k.set)
	require.NoError(t, err)
	want := []call{{unix.MS_RDONLY, first}}
	for _, m := range more {
		want = append(want, call{unix.MS_RDONLY | unix.MS_REMOUNT, m})
	}
	require.Greater(t, len(want), 2)
	require.Equal(t, want, calls)
	calls, fail = nil, 1
	require.ErrorIs(t, k.mount(t.Context(), p, "/target"), unix.ENOSPC)
	require.Len(t, calls, 2)
}

func TestReadBranches(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"br0": "/rw=rw\n", "br1": "/a=ro+wh\n", "br2": "/b=ro\n", "br10": "/k=rr\n",
		"brid0": "64\n", "xi_path": "/dev/shm/aufs.xino\n",
	} {
		require.NoError(t, os.WriteFile(dir+"/"+name, []byte(text), 0o600))
	}
	got, err := readBranches(dir)
	require.NoError(t, err)
	require.Equal(t, []union.Branch{
		{Path: "/rw", Perm: union.RW}, {Path: "/a", Perm: union.ROWH}, {Path: "/b", Perm: union.RO}, {Path: "/k", Perm: union.RR},
	}, got)
	require.NoError(t, os.WriteFile(dir+"/br3", []byte("nonsense"), 0o600))
	_, err = readBranches(dir)
	require.Error(t, err)
}

// TestLingering: a file that is open after the last Put keeps its union, which
// keeps the branch: the next Get waits, and says why it cannot.
func TestLingering(t *testing.T) {
	d := mustNew(t, t.TempDir(), Options{})
	ctx := t.Context()
	stack(t, d)
	f, err := os.Create(mustGet(t, d, "top") + "/open")
	require.NoError(t, err)
	require.NoError(t, d.Put(ctx, "top"))
	_, err = d.Get(ctx, "top", nil)
	require.ErrorIs(t, err, layerfs.ErrInUse)
	_, err = f.WriteString("still works")
	require.NoError(t, err)
	var closed atomic.Bool
	time.AfterFunc(100*time.Millisecond, func() { closed.Store(true); f.Close() })
	top := mustGet(t, d, "top")
	require.True(t, closed.Load())
	b, err := os.ReadFile(top + "/open")
	require.NoError(t, err)
	require.Equal(t, "still works", string(b))
}

// TestMended: what a union that was killed left in a branch is mended before
// anything is read from it.
func TestMended(t *testing.T) {
	for _, verb := range []string{"get", "changes", "diff"} {
		t.Run(verb, func(t *testing.T) {
			var told bytes.Buffer
			d := mustNew(t, t.TempDir(), Options{Logger: slog.New(slog.NewTextHandler(&told, nil))})
			ctx := t.Context()
			stack(t, d)
			require.NoError(t, os.WriteFile(mustGet(t, d, "top")+"/g", []byte("new"), 0o644))
			require.NoError(t, d.Put(ctx, "top"))
			// A whiteout beside its entry, and the mark of a mounted branch.
			for _, n := range []string{".wh.g", ".wh..wh.mounted"} {
				require.NoError(t, os.WriteFile(d.m.branch("top")+"/"+n, nil, 0o444))
			}
			switch verb {
			case "get":
				_, err := os.ReadFile(mustGet(t, d, "top") + "/g")
				require.True(t, err == nil || errors.Is(err, os.ErrNotExist), "%v", err)
				require.Contains(t, told.String(), "repaired")
				require.Contains(t, told.String(), "g")
				return
			case "changes":
				require.NotEmpty(t, changes(t, d, "top", "base"))
			case "diff":
				r, err := d.Diff(ctx, "top", "base", nil)
				require.NoError(t, err)
				var buf bytes.Buffer
				_, err = buf.ReadFrom(r)
				require.NoError(t, err)
				require.NoError(t, r.Close())
			}
			require.Contains(t, told.String(), "repaired")
			_, err := os.Lstat(d.m.branch("top") + "/.wh..wh.mounted")
			require.ErrorIs(t, err, os.ErrNotExist)
		})
	}
}

// TestScratchCleared: views whose process died are gone after New.
func TestScratchCleared(t *testing.T) {
	root := t.TempDir()
	mustNew(t, root, Options{})
	left := filepath.Join(root, "aufs", scratchPrefix+"left")
	require.NoError(t, os.MkdirAll(left+"/"+mountPoint, 0o700))
	require.NoError(t, mount.Mount("tmpfs", "tmpfs", left+"/"+mountPoint, 0, nil))
	mustNew(t, root, Options{})
	require.NoDirExists(t, left)
}
