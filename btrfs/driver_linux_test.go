package btrfs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	ioctl "github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// newRoot returns an empty directory on a new file system.
func newRoot(tb testing.TB, mib int, opts ...string) string {
	tb.Helper()
	root := filepath.Join(testenv.Btrfs(tb, mib, append([]string{"-m single"}, opts...)...), "root")
	require.NoError(tb, os.Mkdir(root, 0o755))
	return root
}

// fill creates a layer and builds a tree in it.
func fill(tb testing.TB, d *btrfs.Driver, id, parent string, lines ...string) (path string) {
	tb.Helper()
	require.NoError(tb, d.Create(tb.Context(), id, parent, nil))
	return edit(tb, d, id, lines...)
}

func edit(tb testing.TB, d *btrfs.Driver, id string, lines ...string) (path string) {
	tb.Helper()
	path, err := d.Get(tb.Context(), id, nil)
	require.NoError(tb, err)
	tree.Build(tb, path, lines...)
	require.NoError(tb, d.Put(tb.Context(), id))
	return path
}

func changes(tb testing.TB, d *btrfs.Driver, id, base string) string {
	tb.Helper()
	var list []layerfs.Change
	for c, err := range d.Changes(tb.Context(), id, base) {
		require.NoError(tb, err)
		list = append(list, c)
	}
	return tree.FormatChanges(list)
}

func walked(tb testing.TB, older, newer string) string {
	tb.Helper()
	list, err := tree.Changes(older, newer)
	require.NoError(tb, err)
	return tree.FormatChanges(list)
}

// subvolumes returns all below the top level.
func subvolumes(tb testing.TB, root string) (paths []string) {
	tb.Helper()
	list, err := ioctl.Nested(filepath.Dir(root))
	require.NoError(tb, err)
	for _, n := range list {
		paths = append(paths, n.Path)
	}
	return paths
}

func TestNotBtrfs(t *testing.T) {
	root := testenv.Tmpfs(t)
	_, err := btrfs.New(root, nil)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "tmpfs")
	left, err := os.ReadDir(filepath.Join(root, "btrfs"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestFrozenIsReadOnly(t *testing.T) {
	d := mustNew(t, newRoot(t, 256), nil)
	ctx := t.Context()
	base := fill(t, d, "base", "", "file f 1")
	write := func() error { return os.WriteFile(filepath.Join(base, "g"), nil, 0o600) }
	require.NoError(t, write())
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	require.ErrorIs(t, write(), unix.EROFS, "by its path, as root, without Get")
	require.NoError(t, d.Remove(ctx, "top"))
	edit(t, d, "base", "file h 2")

	require.NoError(t, d.Create(ctx, "sealed", "base", &layerfs.CreateOptions{ReadOnly: true}))
	_, err := d.Apply(ctx, "sealed", bytes.NewReader(tarOf(t, "x", 10)), nil)
	require.NoError(t, err)
	info, err := d.Stat(ctx, "sealed", nil)
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(info.Path, "x"))
	require.ErrorIs(t, os.WriteFile(filepath.Join(info.Path, "y"), nil, 0o600), unix.EROFS)
}

// tarOf returns a stream with one file.
func tarOf(tb testing.TB, name string, size int) []byte {
	tb.Helper()
	b, err := tarWith(name, size)
	require.NoError(tb, err)
	return b
}

func tarWith(name string, size int) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	herr := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)})
	_, err := w.Write(bytes.Repeat([]byte{1}, size))
	err = errors.Join(herr, err, w.Close())
	return b.Bytes(), err
}

// TestApplyRollsBack: a stream that ends early changes nothing, to the inode.
func TestApplyRollsBack(t *testing.T) {
	for name, open := range map[string]func(string, *btrfs.Options) (*btrfs.Driver, error){
		"exchange=true": btrfs.New, "exchange=false": btrfs.NewNoExchange,
	} {
		t.Run(name, func(t *testing.T) {
			root := newRoot(t, 256)
			d, err := open(root, nil)
			require.NoError(t, err)
			defer d.Close()
			ctx := t.Context()
			fill(t, d, "base", "", "file f 1")
			path := fill(t, d, "top", "base", "file g 2")
			before, err := ioctl.Info(path)
			require.NoError(t, err)
			same := filepath.Join(root, "same")
			require.NoError(t, ioctl.Snapshot(same, path, false))
			stream := tarOf(t, "big", 1<<20)
			_, err = d.Apply(ctx, "top", bytes.NewReader(stream[:1<<19]), nil)
			require.ErrorIs(t, err, layerfs.ErrMalformed)
			after, err := ioctl.Info(path)
			require.NoError(t, err)
			require.Equal(t, before.UUID, after.UUID)
			diffs, err := tree.Compare(same, path, nil)
			require.NoError(t, err)
			require.Empty(t, diffs)
			noSnapshots(t, root)

			_, err = d.Apply(ctx, "top", bytes.NewReader(stream), nil)
			require.NoError(t, err)
			require.Equal(t, "C /\nA /big\nA /g", strings.TrimSpace(changes(t, d, "top", "base")))
			require.NoError(t, d.Rollback(ctx, "top"))
			require.Empty(t, changes(t, d, "top", "base"))
			noSnapshots(t, root)
		})
	}
}

// TestNested: subvolumes that a container makes in its layer belong to it.
func TestNested(t *testing.T) {
	root := newRoot(t, 256)
	d := mustNew(t, root, nil)
	ctx := t.Context()
	base := fill(t, d, "base", "", "file f 1", "dir d 0755")
	require.NoError(t, ioctl.Create(base+"/d/vol"))
	tree.Build(t, base, "file d/vol/g 2")
	require.NoError(t, ioctl.Create(base+"/d/vol/deep"))
	tree.Build(t, base, "file d/vol/deep/h 3")
	require.NoError(t, ioctl.SetReadOnly(base+"/d/vol/deep", true))

	require.NoError(t, d.Create(ctx, "top", "base", nil))
	info, err := d.Stat(ctx, "top", nil)
	require.NoError(t, err)
	diffs, err := tree.Compare(base, info.Path, nil)
	require.NoError(t, err)
	require.Empty(t, diffs, "a child starts as its parent")
	require.Empty(t, changes(t, d, "top", "base"))
	ro, err := ioctl.IsReadOnly(info.Path + "/d/vol/deep")
	require.NoError(t, err)
	require.True(t, ro)

	edit(t, d, "top", "file d/vol/i 4", "file j 5")
	require.Equal(t, walked(t, base, info.Path), changes(t, d, "top", "base"))
	_, err = d.Apply(ctx, "top", bytes.NewReader(tarOf(t, "d/vol/k", 10)), nil)
	require.NoError(t, err)
	require.FileExists(t, info.Path+"/d/vol/deep/h", "Apply loses nothing")
	require.Contains(t, changes(t, d, "top", "base"), "A /d/vol/k")
	require.NoError(t, d.Clone(ctx, "clone", "top", nil))

	require.ErrorIs(t, d.Send(ctx, io.Discard, "top", "base", nil), errors.ErrUnsupported)
	for _, err := range d.BlockDiff(ctx, "top", "base") {
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}

	f, err := os.Open(info.Path + "/d/vol/g")
	require.NoError(t, err)
	defer f.Close()
	for _, id := range []string{"clone", "top", "base"} {
		require.NoError(t, d.Remove(ctx, id))
	}
	b, err := io.ReadAll(f)
	require.NoError(t, err)
	require.Equal(t, "2", string(b), "open files go on working")
	require.Empty(t, subvolumes(t, root))
}

// TestUsage: what a layer takes is the same whether the kernel is asked or both
// trees are walked, as where subvolumes are nested, and ancestors never count.
func TestUsage(t *testing.T) {
	const mib = 1 << 20
	for _, quotas := range []string{"", btrfs.QuotasFull, btrfs.QuotasSimple} {
		for _, nested := range []bool{false, true} {
			t.Run(fmt.Sprintf("quotas=%s,nested=%t", quotas, nested), func(t *testing.T) {
				d, err := btrfs.New(newRoot(t, 512), &btrfs.Options{Quotas: quotas})
				testenv.SkipUnsupported(t, err, "btrfs")
				require.NoError(t, err)
				defer d.Close()
				ctx := t.Context()
				base := fill(t, d, "base", "", "data old 8388608 1", "dir d 0755", "file d/f x")
				if nested {
					require.NoError(t, ioctl.Create(base+"/vol"))
				} else {
					require.NoError(t, os.Mkdir(base+"/vol", 0o755))
				}
				tree.Build(t, base, "data vol/old 8388608 2")
				usage := func(id string) layerfs.Usage {
					t.Helper()
					info, err := d.Stat(ctx, id, &layerfs.StatOptions{Usage: true})
					require.NoError(t, err)
					return *info.Usage
				}
				u := usage("base")
				require.EqualValues(t, 6, u.Inodes)
				require.InDelta(t, 16*mib, u.Bytes, mib/2)

				require.NoError(t, d.Create(ctx, "top", "base", nil))
				u = usage("top")
				require.Zero(t, u.Inodes)
				require.Less(t, u.Bytes, int64(mib/2), "of the metadata only")

				edit(t, d, "top", "data new 2097152 3", "link d/again new", "symlink d/s ../old", "data vol/new 1048576 4", "rm d/f")
				u = usage("top")
				require.EqualValues(t, 6, u.Inodes, "/, /d, /vol and three files, one of which has two names")
				require.InDelta(t, 3*mib, u.Bytes, mib/2)
			})
		}
	}
}

func TestQuota(t *testing.T) {
	const mib = 1 << 20
	for _, mode := range []string{btrfs.QuotasFull, btrfs.QuotasSimple} {
		t.Run(mode, func(t *testing.T) {
			root := newRoot(t, 512)
			d, err := btrfs.New(root, &btrfs.Options{Quotas: mode, Size: 8 * mib, MinSpace: mib})
			testenv.SkipUnsupported(t, err, "btrfs")
			require.NoError(t, err)
			defer d.Close()
			ctx := t.Context()
			fill(t, d, "base", "", "file f 1")
			path := fill(t, d, "top", "base", "file g 2")
			info, err := d.Stat(ctx, "top", nil)
			require.NoError(t, err)
			require.Equal(t, layerfs.Quota{Bytes: 8 * mib}, info.Quota)

			_, err = d.Apply(ctx, "top", bytes.NewReader(tarOf(t, "big", 24*mib)), nil)
			require.ErrorIs(t, err, layerfs.ErrQuota)
			require.NoFileExists(t, path+"/big")
			require.FileExists(t, path+"/g")
			noSnapshots(t, root)

			require.ErrorIs(t, write(path+"/big", 24*mib), unix.EDQUOT)
			require.NoError(t, os.Remove(path+"/big"))
			require.NoError(t, d.SetQuota(ctx, "top", layerfs.Quota{Bytes: 64 * mib}))
			require.NoError(t, write(path+"/big", 24*mib))

			require.ErrorContains(t, d.SetQuota(ctx, "top", layerfs.Quota{Bytes: mib - 1}), "minimum")
			require.ErrorIs(t, d.SetQuota(ctx, "top", layerfs.Quota{Inodes: 5}), errors.ErrUnsupported)

			// The other mode would lose these limits.
			other := map[string]string{btrfs.QuotasFull: btrfs.QuotasSimple, btrfs.QuotasSimple: btrfs.QuotasFull}[mode]
			_, err = btrfs.New(root, &btrfs.Options{Quotas: other})
			require.ErrorIs(t, err, unix.EBUSY)
			off, err := btrfs.New(root, &btrfs.Options{Quotas: btrfs.QuotasOff})
			require.NoError(t, err)
			require.False(t, off.Features().Quota)
			require.NotEmpty(t, off.Features().Reasons["Quota"])
			require.NoError(t, off.Close())
			same, err := btrfs.New(root, nil)
			require.NoError(t, err)
			require.True(t, same.Features().Quota)
			require.NoError(t, same.Close())
		})
	}
}

// TestQuotaNested pins what limits do not reach, as the documentation of the
// package says: subvolumes within a layer.
func TestQuotaNested(t *testing.T) {
	const mib = 1 << 20
	for _, mode := range []string{btrfs.QuotasFull, btrfs.QuotasSimple} {
		t.Run(mode, func(t *testing.T) {
			d, err := btrfs.New(newRoot(t, 512), &btrfs.Options{Quotas: mode, Size: 8 * mib})
			testenv.SkipUnsupported(t, err, "btrfs")
			require.NoError(t, err)
			defer d.Close()
			ctx := t.Context()
			base := fill(t, d, "base", "")
			require.NoError(t, ioctl.Create(base+"/vol"))
			require.NoError(t, d.Create(ctx, "child", "base", nil))
			require.NoError(t, d.Clone(ctx, "clone", "child", nil))
			for _, id := range []string{"child", "clone"} {
				path := edit(t, d, id)
				require.ErrorIs(t, write(path+"/big", 24*mib), unix.EDQUOT, id)
				require.NoError(t, os.Remove(path+"/big"))
				require.NoError(t, write(path+"/vol/big", 24*mib), id)
				info, err := d.Stat(ctx, id, &layerfs.StatOptions{Usage: true})
				require.NoError(t, err)
				require.GreaterOrEqual(t, info.Usage.Bytes, int64(24*mib), "it can be seen")
			}
		})
	}
}

// TestQuotaIsDurable: when the record of a layer is on the disk, its limit is.
func TestQuotaIsDurable(t *testing.T) {
	const mib = 1 << 20
	inspect := testenv.RequireTool(t, "btrfs", "btrfs")
	root := newRoot(t, 512)
	d, err := btrfs.New(root, &btrfs.Options{Quotas: btrfs.QuotasFull, Size: 8 * mib})
	testenv.SkipUnsupported(t, err, "btrfs")
	require.NoError(t, err)
	defer d.Close()
	ctx := t.Context()
	image := filepath.Join(filepath.Dir(filepath.Dir(root)), "image")
	// What the last commit has, which is what a power failure leaves.
	limits := func(bytes int) int {
		t.Helper()
		out, err := exec.CommandContext(ctx, inspect, "inspect-internal", "dump-tree", "-t", "quota", image).CombinedOutput()
		require.NoError(t, err, "%s", out)
		return strings.Count(string(out), fmt.Sprintf("max_exclusive %d\n", bytes))
	}
	fill(t, d, "base", "", "file f 1")
	require.Equal(t, 1, limits(8*mib))
	require.NoError(t, d.Create(ctx, "top", "base", nil))
	require.Equal(t, 2, limits(8*mib))
	require.NoError(t, d.SetQuota(ctx, "top", layerfs.Quota{Bytes: 16 * mib}))
	require.Equal(t, 1, limits(16*mib))
	require.NoError(t, d.SetQuota(ctx, "top", layerfs.Quota{}))
	require.Equal(t, 0, limits(16*mib))
}

// TestQuotaWhileRead: a snapshot of the layer must not lift the limit.
func TestQuotaWhileRead(t *testing.T) {
	const mib = 1 << 20
	root := newRoot(t, 512)
	d := mustNew(t, root, &btrfs.Options{Quotas: btrfs.QuotasFull})
	ctx := t.Context()
	fill(t, d, "base", "", "file f 1")
	require.NoError(t, d.Create(ctx, "top", "base", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 16 * mib}}))
	path, err := d.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.NoError(t, write(path+"/one", 12*mib))
	for c, err := range d.Changes(ctx, "top", "base") {
		require.NoError(t, err)
		if c.Path == "/one" {
			require.ErrorIs(t, write(path+"/two", 12*mib), unix.EDQUOT)
		}
	}
	require.NoError(t, d.Put(ctx, "top"))
}

// TestQgroupsLeft: a qgroup that could not go with its subvolume, as others share
// the bytes, goes when the root is opened after that; those of other subvolumes,
// and those another file system's ids name, stay.
func TestQgroupsLeft(t *testing.T) {
	testenv.RequireKernel(t, "6.7", "btrfs simple quotas")
	root := newRoot(t, 512)
	simple := &btrfs.Options{Quotas: btrfs.QuotasSimple}
	d, err := btrfs.New(root, simple)
	require.NoError(t, err)
	noted := filepath.Join(root, "btrfs/.layerfs/qgroups")

	// A layer and a subvolume of somebody else, whose bytes a third one shares.
	keeper, theirs := filepath.Join(root, "keeper"), filepath.Join(root, "theirs")
	require.NoError(t, errors.Join(ioctl.Create(keeper), ioctl.Create(theirs)))
	path := fill(t, d, "ours", "", "data f 300000 1")
	id := func(path string) uint64 {
		info, err := ioctl.Info(path)
		require.NoError(t, err)
		return info.ID
	}
	ourID, theirID := id(path), id(theirs)
	require.NoError(t, write(theirs+"/f", 300_000))
	require.NoError(t, ioctl.Sync(root))
	for _, from := range []string{path, theirs} {
		out, err := exec.Command("cp", "--reflink=always", from+"/f", keeper+"/"+filepath.Base(from)).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	require.NoError(t, d.Remove(t.Context(), "ours"))
	require.NoError(t, d.Close())
	require.NoError(t, ioctl.Destroy(theirs))
	qgroups := func(want ...uint64) {
		t.Helper()
		require.NoError(t, ioctl.Sync(root))
		require.NoError(t, errors.Join(ioctl.WaitCleaned(t.Context(), root, ourID), ioctl.WaitCleaned(t.Context(), root, theirID)))
		require.NoError(t, ioctl.Sync(root))
		for _, id := range []uint64{ourID, theirID} {
			_, err := ioctl.ReadQgroup(root, id)
			if slices.Contains(want, id) {
				require.NoError(t, err, id)
			} else {
				require.ErrorIs(t, err, fs.ErrNotExist, id)
			}
		}
	}
	qgroups(ourID, theirID)
	open := func() {
		t.Helper()
		d, err := btrfs.New(root, simple)
		require.NoError(t, err)
		require.NoError(t, d.Close())
	}
	open()
	qgroups(ourID, theirID) // it still counts something

	require.NoError(t, errors.Join(os.RemoveAll(keeper+"/ours"), os.RemoveAll(keeper+"/theirs")))
	require.NoError(t, ioctl.Sync(root))
	qgroups(ourID, theirID) // nobody removes it

	// As in a root that was copied from another file system, and half a line.
	b, err := os.ReadFile(noted)
	require.NoError(t, err)
	foreign := fmt.Sprintf("\n%s %d\n", uuidOf(t, root, 1), theirID)
	require.NoError(t, os.WriteFile(noted, append([]byte(foreign), append(b, fmt.Sprintf("\n%s %d", uuidOf(t, root, 0), theirID)...)...), 0o600))
	open()
	qgroups(theirID)
	open()
	qgroups(theirID)
	b, err = os.ReadFile(noted)
	require.NoError(t, err)
	require.NotContains(t, string(b), fmt.Sprintf(" %d\n", ourID), "it is not looked at again")
	require.NotContains(t, string(b), fmt.Sprint(" ", theirID))
}

// uuidOf returns the UUID of the file system, off by so much.
func uuidOf(t *testing.T, root string, off byte) ioctl.UUID {
	info, err := ioctl.ReadFSInfo(root)
	require.NoError(t, err)
	info.UUID[0] += off
	return info.UUID
}

// TestQuotaInconsistent: limits hold while subvolumes are removed and cleaned
// up, and where somebody else made the kernel stop counting.
func TestQuotaInconsistent(t *testing.T) {
	const mib = 1 << 20
	root := newRoot(t, 512)
	d := mustNew(t, root, &btrfs.Options{Quotas: btrfs.QuotasFull})
	ctx := t.Context()
	fill(t, d, "base", "", "data shared 3000000 2")
	limited := func(id string) {
		t.Helper()
		require.NoError(t, d.Create(ctx, id, "base", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 8 * mib}}))
		path, err := d.Get(ctx, id, nil)
		require.NoError(t, err)
		require.ErrorIs(t, write(path+"/big", 24*mib), unix.EDQUOT)
		require.NoError(t, d.Put(ctx, id))
	}
	for i := range 20 {
		id := fmt.Sprint("l", i)
		fill(t, d, id, "base", "data big 3000000 1")
		require.NoError(t, d.Remove(ctx, id))
		// The kernel cleans up: at the latest now, while the next one is removed.
		require.NoError(t, ioctl.Sync(root))
		st, err := ioctl.ReadQuotaStatus(root)
		require.NoError(t, err)
		require.False(t, st.Inconsistent, "after %d removals", i+1)
	}
	limited("one")

	// A group gets a member whose files are shared with subvolumes outside: the
	// kernel cannot know the sum and stops counting.
	tool := testenv.RequireTool(t, "btrfs", "btrfs")
	info, err := ioctl.Info(filepath.Join(root, "btrfs", "subvolumes", "base"))
	require.NoError(t, err)
	for _, args := range [][]string{
		{"qgroup", "create", "1/100", root},
		{"qgroup", "assign", "--no-rescan", fmt.Sprint("0/", info.ID), "1/100", root},
	} {
		out, err := exec.Command(tool, args...).CombinedOutput()
		require.True(t, err == nil || strings.Contains(string(out), "inconsistent"), "%v: %v: %s", args, err, out)
	}
	require.NoError(t, ioctl.Sync(root))
	st, err := ioctl.ReadQuotaStatus(root)
	require.NoError(t, err)
	require.True(t, st.Inconsistent, "the test does not do what it is for")
	limited("two")
}

func write(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	chunk := bytes.Repeat([]byte{1, 2, 3, 4}, 1<<18)
	for n := 0; n < size; n += len(chunk) {
		if _, err := f.Write(chunk); err != nil {
			return err
		}
	}
	return f.Sync()
}

func TestBlockDiff(t *testing.T) {
	d := mustNew(t, newRoot(t, 256), nil)
	base := fill(t, d, "base", "", "data big 1000000 1", "data same 5000 2")
	path := fill(t, d, "top", "base", "data new 4096 3")
	f, err := os.OpenFile(path+"/big", os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("changed"), 500_000)
	require.NoError(t, errors.Join(err, f.Close()))
	fill(t, d, "above", "top")
	for _, c := range []struct {
		id, base string
		want     string
	}{
		{"top", "base", "[/big 499712 4096][/new 0 4096]"},
		{"above", "base", "[/big 499712 4096][/new 0 4096]"},
		{"above", "top", ""},
	} {
		require.Equal(t, c.want, ranges(t, d, c.id, c.base), "%s %s", c.id, c.base)
	}
	var whole int64
	for r, err := range d.BlockDiff(t.Context(), "base", "") {
		require.NoError(t, err)
		fi, err := os.Stat(base + r.Path)
		require.NoError(t, err)
		require.LessOrEqual(t, r.Offset+r.Length, fi.Size())
		whole += r.Length
	}
	require.EqualValues(t, 1_005_000, whole)
}

func ranges(tb testing.TB, d *btrfs.Driver, id, base string) string {
	tb.Helper()
	var b strings.Builder
	for r, err := range d.BlockDiff(tb.Context(), id, base) {
		require.NoError(tb, err)
		fmt.Fprintf(&b, "[%s %d %d]", r.Path, r.Offset, r.Length)
	}
	return b.String()
}

func TestSendReceive(t *testing.T) {
	here, there := newRoot(t, 256), newRoot(t, 256)
	a, b := mustNew(t, here, nil), mustNew(t, there, nil)
	ctx := t.Context()
	base := fill(t, a, "base", "", "file f 1", "dir d 0755", "data d/big 300000 1")
	top := fill(t, a, "top", "base", "file f 2", "rm d/big", "link h f")
	var full, more bytes.Buffer
	require.NoError(t, a.Send(ctx, &full, "base", "", nil))
	require.NoError(t, a.Send(ctx, &more, "top", "base", nil))
	require.Less(t, more.Len(), 5000)
	noSnapshots(t, here)

	same := func(want, id string) {
		t.Helper()
		info, err := b.Stat(ctx, id, nil)
		require.NoError(t, err)
		diffs, err := tree.Compare(want, info.Path, nil)
		require.NoError(t, err)
		require.Empty(t, diffs)
	}
	cut := full.Bytes()[:full.Len()-100]
	require.ErrorIs(t, b.Receive(ctx, bytes.NewReader(cut), "base", "", nil), layerfs.ErrMalformed)
	require.Empty(t, subvolumes(t, there), "all or nothing")
	require.NoError(t, b.Receive(ctx, bytes.NewReader(full.Bytes()), "base", "", nil))
	require.ErrorIs(t, b.Receive(ctx, bytes.NewReader(full.Bytes()), "base", "", nil), layerfs.ErrExist)
	same(base, "base")
	require.NoError(t, b.Receive(ctx, bytes.NewReader(more.Bytes()), "top", "base", nil))
	same(top, "top")
	require.Equal(t, changes(t, a, "top", "base"), changes(t, b, "top", "base"))

	// What was written to is no base any more.
	require.NoError(t, b.Remove(ctx, "top"))
	edit(t, b, "base", "file g other")
	require.Error(t, b.Receive(ctx, bytes.NewReader(more.Bytes()), "top", "base", nil))
	_, err := b.Stat(ctx, "top", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)
}

// TestMappedChanges: a mount with mapped owners does not show in Changes.
func TestMappedChanges(t *testing.T) {
	d := mustNew(t, newRoot(t, 256), nil)
	if !d.Features().IDMap {
		t.Skip(d.Features().Reasons["IDMap"])
	}
	ctx := t.Context()
	fill(t, d, "base", "", "file f 1")
	fill(t, d, "top", "base", "file g 2")
	want, whole := changes(t, d, "top", "base"), changes(t, d, "base", "")
	ids := []layerfs.IDRange{{ContainerID: 0, HostID: 100_000, Size: 65_536}}
	opts := &layerfs.GetOptions{IDMap: &layerfs.IDMap{UIDs: ids, GIDs: ids}}
	path, err := d.Get(ctx, "base", opts)
	require.NoError(t, err)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path+"/f", &st))
	require.EqualValues(t, 100_000, st.Uid)
	require.Equal(t, want, changes(t, d, "top", "base"))
	require.Equal(t, whole, changes(t, d, "base", ""))
	require.NoError(t, d.Put(ctx, "base"))
}

// TestLivingSnapshots: another New leaves the snapshots of the living alone.
func TestLivingSnapshots(t *testing.T) {
	root := newRoot(t, 256)
	d := mustNew(t, root, nil)
	fill(t, d, "base", "", "file f 1")
	fill(t, d, "top", "base", "file g 2", "file h 3")
	n := 0
	for _, err := range d.Changes(t.Context(), "top", "base") {
		require.NoError(t, err)
		if n++; n == 1 {
			other, err := btrfs.New(root, nil)
			require.NoError(t, err)
			require.NoError(t, other.Close())
			left, err := os.ReadDir(filepath.Join(root, "btrfs", ".layerfs", "snapshots"))
			require.NoError(t, err)
			require.Len(t, left, 1)
		}
	}
	require.Equal(t, 3, n)
	noSnapshots(t, root)
	// Also where the caller stops early.
	for range d.Changes(t.Context(), "top", "base") {
		break
	}
	noSnapshots(t, root)
}

// TestChunkExhaustion fills all chunks with data, most of which is removed: df
// shows space, but there is little for metadata. Status warns in time and names
// the balance that helps, and it does. Without it, Create fails with a clear
// error and leaves nothing.
func TestChunkExhaustion(t *testing.T) {
	balance := testenv.RequireTool(t, "btrfs", "btrfs")
	for _, heed := range []bool{true, false} {
		t.Run(fmt.Sprint("balance=", heed), func(t *testing.T) {
			root := filepath.Join(filepath.Dir(newRoot(t, 640)), "it's $HOME") // for a shell to take as it is
			d := mustNew(t, root, &btrfs.Options{Durability: layerfs.DurabilityNone})
			ctx := t.Context()
			fill(t, d, "base", "")
			fillChunks(t, root)
			path, err := d.Get(ctx, "base", nil)
			require.NoError(t, err)
			warning := fillMetadata(t, d, path)
			require.NoError(t, d.Put(ctx, "base"))
			require.Contains(t, warning, "btrfs balance start -dusage=", "%v", status(t, d))
			var fs unix.Statfs_t
			require.NoError(t, unix.Statfs(root, &fs))
			require.Greater(t, int64(fs.Bfree)*int64(fs.Bsize), int64(50<<20), "df shows space")
			if !heed {
				exhaust(t, d, root)
				return
			}
			_, command, _ := strings.Cut(warning, "btrfs balance start ")
			out, err := exec.CommandContext(ctx, "sh", "-c", balance+" balance start "+command).CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.NotContains(t, status(t, d), "Warning")
			fill(t, d, "after", "base", "data f 1000000 1")
		})
	}
}

// fillChunks has all chunks made for data, and leaves some in each, so that
// none is given back.
func fillChunks(t *testing.T, root string) {
	t.Helper()
	data := filepath.Join(filepath.Dir(root), "data")
	require.NoError(t, os.Mkdir(data, 0o755))
	n := 0
	for ; write(fmt.Sprintf("%s/%d", data, n), 1<<20) == nil; n++ {
	}
	require.NoError(t, ioctl.Sync(root))
	for i := range n + 1 {
		if i%8 != 0 {
			require.NoError(t, os.Remove(fmt.Sprintf("%s/%d", data, i)))
		}
	}
	require.NoError(t, ioctl.Sync(root))
}

// fillMetadata makes files until Status warns.
func fillMetadata(t *testing.T, d *btrfs.Driver, path string) (warning string) {
	t.Helper()
	for i := 1; warning == ""; i++ {
		require.Less(t, i, 20_000)
		// Small enough to be in the metadata.
		err := os.WriteFile(fmt.Sprintf("%s/%d", path, i), bytes.Repeat([]byte("x"), 2000), 0o600)
		if err != nil {
			// A commit gives back what was reserved and not needed.
			require.ErrorIs(t, err, unix.ENOSPC)
		}
		if err != nil || i%100 == 0 {
			require.NoError(t, ioctl.Sync(path))
			warning = status(t, d)["Warning"]
		}
	}
	return warning
}

// exhaust makes layers until there is no room for one.
func exhaust(t *testing.T, d *btrfs.Driver, root string) {
	t.Helper()
	ctx := t.Context()
	for i, full := 0, 0; full < 3; i++ {
		if err := os.WriteFile(fmt.Sprintf("%s/x%d", filepath.Dir(root), i), bytes.Repeat([]byte("x"), 2000), 0o600); err != nil {
			require.NoError(t, ioctl.Sync(root))
			full++
		}
	}
	for i := 0; ; i++ {
		require.Less(t, i, 5000, "Create goes on although nothing is left")
		id := fmt.Sprint("c", i)
		err := d.Create(ctx, id, "base", &layerfs.CreateOptions{Labels: map[string]string{"fill": strings.Repeat("x", 1500)}})
		if err == nil {
			continue
		}
		require.ErrorIs(t, err, unix.ENOSPC)
		_, err = d.Stat(ctx, id, nil)
		require.ErrorIs(t, err, layerfs.ErrNotExist)
		noSnapshots(t, root)
		// Changes needs a snapshot, for which there is no room; the walk does not.
		if i > 0 {
			require.Empty(t, changes(t, d, fmt.Sprint("c", i-1), "base"))
			info, err := d.Stat(ctx, fmt.Sprint("c", i-1), &layerfs.StatOptions{Usage: true})
			require.NoError(t, err)
			require.Equal(t, layerfs.Usage{}, *info.Usage)
		}
		return
	}
}

func status(tb testing.TB, d *btrfs.Driver) map[string]string {
	tb.Helper()
	items, err := d.Status(context.Background())
	require.NoError(tb, err)
	m := map[string]string{}
	for _, i := range items {
		require.NotContains(tb, m, i.Key)
		m[i.Key] = i.Value
	}
	return m
}

func TestStatus(t *testing.T) {
	s := status(t, mustNew(t, newRoot(t, 256), nil))
	for _, key := range []string{"Btrfs", "Root Dir", "Data, single", "Metadata, single", "System, single", "Unallocated", "Device 1"} {
		require.NotEmpty(t, s[key], "%s of %v", key, s)
	}
	require.Equal(t, "off", s["Quotas"])
	require.Equal(t, "in one step", s["Subvolume Removal"])
	require.Contains(t, s["Device 1"], "unallocated")
	require.NotContains(t, s, "Warning")
}
