//go:build !layerfs_portable

package copyup

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// plain is a tree that any user can make; everything is what root alone can.
var plain = []string{
	"dir a 0750", "file a/f hello", "link a/g a/f", "link z/deep/h a/f", "symlink a/s ../nowhere", "fifo a/p 0620", "sock a/k 0700",
	"sparse holes 4K@64K 4K@1M 0@3M", "sparse tail 5000@0 0@1M", "sparse allhole 0@2M", "sparse lead 8K@200K",
	"data big 3M 7", "data odd 131073 8", "data edge 131072 9", "file empty", `file "na me\n\xff" x`,
	"file suid x", "chmod suid 06755", "file none x", "chmod none 0", "dir sticky 01777", "dir sgid 02775", "file sgid/f x",
	"dir ro/sub 0755", "file ro/sub/f x", "chmod ro/sub 0555", "chmod ro 0555", "file wide x", "chmod wide 0666",
	"mtime a 1.000000001", "mtime a/f 1e9", "mtime a/s 3.3", "mtime a/p 4.999999999", "mtime a/k 5", "mtime empty 6", "mtime ro/sub 7",
	"mtime ro 8", "mtime holes 2200000000.000000003", "mtime . 9.9", "mtime sgid 10",
}

const (
	// An ACL with u:1000:r-- and mask rwx: version 2, entries of tag, permission, id; linux/posix_acl_xattr.h.
	acl = "0x02000000" + "01000600ffffffff" + "02000400e8030000" + "04000400ffffffff" + "10000700ffffffff" + "20000400ffffffff"
	// cap_net_raw=ep, revision 2; linux/capability.h.
	capability = "0x0100000200200000000000000000000000000000"
)

var everything = append([]string{
	"char dev/null 1 3 0666", "block dev/loop 7 200 0660", "chown dev/null 3:4", "char dev/zero 0 0 0",
	"file owned x", "chown owned 1234:5678", "chmod owned 06755", "file capable x", "chown capable 12:13", "xattr capable security.capability " + capability,
	"symlink lowned x", "chown lowned 77:88", "xattr lowned trusted.onlink v", "file acl x", "chmod acl 0640", "xattr acl system.posix_acl_access " + acl,
	"dir dacl", "xattr dacl system.posix_acl_default " + acl, "file dacl/f x", "dir dacl/d", "rmxattr dacl/f system.posix_acl_access", "chmod dacl/f 0604",
	"dir odir 0700 9:9", "xattr odir trusted.t v", "xattr odir user.empty 0x", "xattr dev/null trusted.dev v", "mtime dev/null 77.7", "mtime lowned 78.8",
	"fifo ofifo 0600", "chown ofifo 5:6", "link hdev dev/null", "link hsym lowned", "xattr . user.root v", "chown . 3:3",
}, replaceBadTime(plain)...)

func replaceBadTime(lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = strings.Replace(l, "1e9", "1000000000.5", 1)
	}
	return out
}

func same(t *testing.T, a, b string, opts *tree.CompareOptions) {
	t.Helper()
	diffs, err := tree.Compare(a, b, opts)
	require.NoError(t, err)
	for _, d := range diffs {
		t.Error(d)
	}
}

func TestTree(t *testing.T) {
	testenv.RequireRoot(t)
	fss := map[string]func(*testing.T) string{
		"tmpfs": func(t *testing.T) string { return testenv.Tmpfs(t) },
		"ext4":  func(t *testing.T) string { return testenv.Ext4(t, 64) },
		"btrfs": func(t *testing.T) string { return testenv.Btrfs(t, 256) },
		"xfs":   func(t *testing.T) string { return testenv.XFS(t, 320) },
	}
	forces := map[string]force{
		"default":        {},
		"reflink=off":    {noClone: true},
		"range=off":      {noClone: true, noCopyRange: true},
		"seekhole=off":   {noClone: true, noSeek: true},
		"tmpfile=off":    {noTmpfile: true},
		"everything=off": {true, true, true, true},
	}
	for name, mkfs := range fss {
		t.Run(name, func(t *testing.T) {
			dir := mkfs(t)
			src := filepath.Join(dir, "src")
			tree.Build(t, src, everything...)
			other := t.TempDir()
			for fname, f := range forces {
				for _, workers := range []int{1, 4} {
					t.Run(fmt.Sprintf("%s/workers=%d", fname, workers), func(t *testing.T) {
						for _, dst := range []string{filepath.Join(dir, "dst"), filepath.Join(other, "dst")} {
							st, err := Tree(t.Context(), dst, src, &Options{Workers: workers, force: f})
							require.NoError(t, err)
							same(t, src, dst, nil)
							if name != "xfs" && name != "btrfs" && strings.HasPrefix(dst, dir) {
								// Others round data ranges to extents of their own.
								holes(t, src, dst)
							}
							assert.Equal(t, int64(countNames(t, src)), st.Entries)
							assert.Equal(t, int64(4), st.Links)
							if fname == "default" && (name == "btrfs" || name == "xfs") && strings.HasPrefix(dst, dir) {
								assert.Positive(t, st.Shared)
							} else if f.noClone {
								assert.Zero(t, st.Shared)
							}
							require.NoError(t, os.RemoveAll(dst))
						}
					})
				}
			}
		})
	}
}

// TestAccessTimes checks that they are kept, and those of source files too.
func TestAccessTimes(t *testing.T) {
	src, dst := t.TempDir(), filepath.Join(t.TempDir(), "dst")
	tree.Build(t, src, "file d/f x", "file g x", "mtime d/f 11.1", "mtime g 12.2", "mtime d 13.3")
	_, err := Tree(t.Context(), dst, src, nil)
	require.NoError(t, err)
	for name, want := range map[string]unix.Timespec{"d/f": {Sec: 11, Nsec: 1e8}, "g": {Sec: 12, Nsec: 2e8}, "d": {Sec: 13, Nsec: 3e8}} {
		var a, b unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(src, name), &a))
		require.NoError(t, unix.Stat(filepath.Join(dst, name), &b))
		assert.Equal(t, want, b.Atim, name)
		if name != "d" {
			assert.Equal(t, want, a.Atim, name)
		}
	}
}

func countNames(t *testing.T, root string) int {
	n := 0
	require.NoError(t, filepath.WalkDir(root, func(string, fs.DirEntry, error) error { n++; return nil }))
	return n
}

// holes checks that no copy takes noticeably more room than its source.
func holes(t *testing.T, src, dst string) {
	t.Helper()
	for _, f := range []string{"holes", "tail", "allhole", "lead"} {
		var a, b unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(src, f), &a))
		require.NoError(t, unix.Stat(filepath.Join(dst, f), &b))
		assert.LessOrEqual(t, b.Blocks, a.Blocks+block/512, f) // zeros are looked for in blocks of that size
	}
}

func TestTreeUnprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
		lines := replaceBadTime(plain)
		tree.Build(t, src, append(lines, "rm none")...)
		t.Cleanup(func() { // or the directory could not be removed
			for _, d := range []string{src, dst} {
				removeAll(d, true)
			}
		})
		_, err := Tree(t.Context(), dst, src, nil)
		require.NoError(t, err)
		same(t, src, dst, nil)

		tree.Build(t, src, "file none x", "chmod none 0")
		_, err = Tree(t.Context(), dst+"2", src, nil)
		if os.Geteuid() != 0 {
			assert.ErrorIs(t, err, fs.ErrPermission)
			assert.ErrorContains(t, err, "none")
			assert.NoFileExists(t, dst+"2")
		}
	})
	t.Run("owners", func(t *testing.T) {
		testenv.Unprivileged(t, func(t *testing.T) {
			if os.Geteuid() == 0 {
				t.Skip("is root")
			}
			dir := t.TempDir()
			err := File(t.Context(), filepath.Join(dir, "passwd"), "/etc/passwd", nil)
			assert.ErrorIs(t, err, fs.ErrPermission)
			assert.ErrorContains(t, err, "fchown")
			assert.Empty(t, names(t, dir))
			require.NoError(t, File(t.Context(), filepath.Join(dir, "passwd"), "/etc/passwd", &Options{IgnoreOwners: true}))
			same(t, "/etc/passwd", filepath.Join(dir, "passwd"), &tree.CompareOptions{IgnoreOwners: true})
		})
	})
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestTreeRefuses(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	tree.Build(t, src, "file a/f x")
	tree.Build(t, dir, "file full/x y", "file file y", "dir empty 0711", "mtime empty 5")
	for _, tt := range []struct {
		name, dst, src string
		want           error
	}{
		{"not-empty", "full", "src", unix.ENOTEMPTY},
		{"file", "file", "src", unix.ENOTDIR},
		{"source-missing", "new", "absent", fs.ErrNotExist},
		{"source-file", "new", "file", unix.ENOTDIR},
		{"parent-missing", "absent/new", "src", fs.ErrNotExist},
		{"inside", "src/a/new", "src", unix.EINVAL},
		{"itself", "empty", "empty", unix.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := t.TempDir()
			_, err := Tree(t.Context(), before+"/c", dir, nil)
			require.NoError(t, err)
			_, err = Tree(t.Context(), filepath.Join(dir, tt.dst), filepath.Join(dir, tt.src), nil)
			assert.ErrorIs(t, err, tt.want)
			same(t, before+"/c", dir, &tree.CompareOptions{IgnoreDirTime: tt.name == "inside"})
		})
	}
}

// TestTreeHostile copies trees made to lead a naive copy astray.
func TestTreeHostile(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	tree.Build(t, dir, "file secret s")
	tree.Build(t, src, "symlink up ..", "symlink root /", "symlink loop loop", "symlink f ../secret", "file d/x y")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // a directory that keeps turning into a link to the outside
		for {
			select {
			case <-stop:
				return
			default:
			}
			os.Rename(src+"/d", src+"/d2")
			os.Symlink("..", src+"/d")
			os.Remove(src + "/d")
			os.Rename(src+"/d2", src+"/d")
		}
	})
	for range 300 {
		_, err := Tree(t.Context(), dst, src, nil)
		if err == nil {
			for _, n := range names(t, dst) {
				fi, err := os.Lstat(filepath.Join(dst, n))
				require.NoError(t, err)
				if fi.IsDir() {
					assert.Subset(t, []string{"x"}, names(t, filepath.Join(dst, n)))
				}
			}
		}
		require.NoError(t, os.RemoveAll(dst))
	}
	close(stop)
	wg.Wait()
}

func TestTreeDefaultACL(t *testing.T) {
	testenv.RequireRoot(t)
	dir := testenv.Tmpfs(t)
	tree.Build(t, dir, "dir src", "file src/f x", "dir src/d/e", "fifo src/p")
	tree.Build(t, dir, "dir parent", "xattr parent system.posix_acl_default "+acl)
	dst := filepath.Join(dir, "parent", "dst")
	_, err := Tree(t.Context(), dst, filepath.Join(dir, "src"), nil)
	require.NoError(t, err)
	same(t, filepath.Join(dir, "src"), dst, nil)
	for _, n := range []string{"f", "p"} {
		require.NoError(t, File(t.Context(), filepath.Join(dir, "parent", n), filepath.Join(dir, "src", n), nil))
		same(t, filepath.Join(dir, "src", n), filepath.Join(dir, "parent", n), nil)
	}
	require.NoError(t, Up(t.Context(), filepath.Join(dir, "parent"), []string{filepath.Join(dir, "src")}, "d/e", nil))
	same(t, filepath.Join(dir, "src/d"), filepath.Join(dir, "parent/d"), nil)
}

func TestTreeNoSpace(t *testing.T) {
	testenv.RequireRoot(t)
	src := t.TempDir()
	tree.Build(t, src, "data a/big 3M 1", "file b/small x", "data c/big 3M 2")
	for name, opts := range map[string][]string{"bytes": {"size=2m"}, "inodes": {"nr_inodes=4"}} {
		t.Run(name, func(t *testing.T) {
			small := testenv.Tmpfs(t, opts...)
			_, err := Tree(t.Context(), small+"/dst", src, nil)
			assert.ErrorIs(t, err, unix.ENOSPC)
			assert.Empty(t, names(t, small))
			require.NoError(t, os.Mkdir(small+"/dst", 0o751))
			_, err = Tree(t.Context(), small+"/dst", src, nil)
			assert.ErrorIs(t, err, unix.ENOSPC)
			assert.Empty(t, names(t, small+"/dst"))
			fi, err := os.Stat(small + "/dst")
			require.NoError(t, err)
			assert.Equal(t, fs.FileMode(0o751), fi.Mode().Perm())
			if name == "bytes" {
				for _, f := range []force{{}, {noTmpfile: true}} {
					assert.ErrorIs(t, File(t.Context(), small+"/f", src+"/a/big", &Options{force: f}), unix.ENOSPC)
					assert.Equal(t, []string{"dst"}, names(t, small))
				}
			}
		})
	}
}

func TestTreeCancel(t *testing.T) {
	src, dst := t.TempDir(), filepath.Join(t.TempDir(), "dst")
	for i := range 2000 {
		tree.Build(t, src, fmt.Sprintf("file d%d/f%d x", i%9, i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Tree(ctx, dst, src, &Options{XattrError: nil, Progress: func(p layerfs.Progress) {
		assert.Equal(t, "copy", p.Phase)
		cancel()
	}})
	assert.ErrorIs(t, err, context.Canceled)
	assert.NoDirExists(t, dst)
	assert.ErrorIs(t, File(ctx, dst, filepath.Join(src, "d0/f0"), nil), context.Canceled)
	assert.NoFileExists(t, dst)

	var last layerfs.Progress
	st, err := Tree(t.Context(), dst, src, &Options{Progress: func(p layerfs.Progress) { last = p }})
	require.NoError(t, err)
	assert.Equal(t, layerfs.Progress{Phase: "copy", Bytes: 2000, Entries: 2010}, last)
	assert.Equal(t, Stats{Entries: 2010, Bytes: 2000}, Stats{Entries: st.Entries, Bytes: st.Bytes})
}

func TestTreeManyLinks(t *testing.T) {
	testenv.RequireRoot(t)
	dir := testenv.Tmpfs(t)
	src, dst := dir+"/src", dir+"/dst"
	tree.Build(t, src, "file f x")
	const n = 100_000
	for i := range n {
		require.NoError(t, os.MkdirAll(fmt.Sprintf("%s/%d", src, i%10), 0o755))
		require.NoError(t, os.Link(src+"/f", fmt.Sprintf("%s/%d/%d", src, i%10, i)))
	}
	st, err := Tree(t.Context(), dst, src, nil)
	require.NoError(t, err)
	assert.Equal(t, int64(n), st.Links)
	var a, b unix.Stat_t
	require.NoError(t, unix.Stat(dst+"/f", &a))
	require.NoError(t, unix.Stat(fmt.Sprintf("%s/%d/%d", dst, 7, 77_777), &b))
	assert.Equal(t, uint64(n+1), uint64(a.Nlink))
	assert.Equal(t, a.Ino, b.Ino)
}

func TestTreeDeep(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	// Deeper than PATH_MAX, with links at both ends.
	require.NoError(t, os.Mkdir(src, 0o755))
	fd, err := unix.Open(src, unix.O_RDONLY, 0)
	require.NoError(t, err)
	top := fd
	defer unix.Close(top)
	name := strings.Repeat("d", 100)
	for range 60 {
		require.NoError(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_RDONLY, 0)
		require.NoError(t, err)
		if fd != top {
			unix.Close(fd)
		}
		fd = next
	}
	require.NoError(t, unix.Mknodat(fd, "bottom", unix.S_IFREG|0o644, 0))
	require.NoError(t, unix.Linkat(fd, "bottom", fd, "again", 0))
	unix.Close(fd)
	st, err := Tree(t.Context(), dst, src, nil)
	require.NoError(t, err)
	assert.Equal(t, int64(63), st.Entries)
	assert.Equal(t, int64(1), st.Links)
}

func TestXattrs(t *testing.T) {
	testenv.RequireRoot(t)
	src, dst := testenv.Tmpfs(t), testenv.Tmpfs(t)
	tree.Build(t, src, "file f x", "xattr f user.a 1", "xattr f user.b 2", "xattr f trusted.overlay.opaque y", "file empty", "xattr empty user.none 0x")
	require.NoError(t, unix.Setxattr(src+"/f", "user.big", []byte(strings.Repeat("v", 65536)), 0))
	require.NoError(t, unix.Setxattr(src+"/f", "user."+strings.Repeat("n", 250), []byte("v"), 0))
	_, err := Tree(t.Context(), dst+"/all", src, nil)
	require.NoError(t, err)
	same(t, src, dst+"/all", nil)
	_, err = Tree(t.Context(), dst+"/some", src, &Options{SkipXattr: tree.IgnoreOverlayXattrs})
	require.NoError(t, err)
	same(t, src, dst+"/some", &tree.CompareOptions{IgnoreXattr: tree.IgnoreOverlayXattrs})
	assert.ErrorIs(t, ignoreValue(unix.Getxattr(dst+"/some/f", "trusted.overlay.opaque", nil)), unix.ENODATA)

	ext4 := testenv.Ext4(t, 32) // holds no 64 KiB value
	_, err = Tree(t.Context(), ext4+"/dst", src, nil)
	assert.ErrorIs(t, err, unix.ENOSPC)
	assert.ErrorContains(t, err, "setxattr user.big")
	assert.NoDirExists(t, ext4+"/dst")
	var failed []string
	_, err = Tree(t.Context(), ext4+"/dst", src, &Options{XattrError: func(path, name string, err error) error {
		failed = append(failed, path+" "+name)
		return nil
	}, Workers: 1})
	require.NoError(t, err)
	assert.Equal(t, []string{"f user.big"}, failed)
	same(t, src, ext4+"/dst", &tree.CompareOptions{IgnoreXattr: func(n string) bool { return n == "user.big" }})
}

func ignoreValue(_ int, err error) error { return err }

func TestDevices(t *testing.T) {
	testenv.RequireRoot(t)
	src := testenv.Tmpfs(t)
	dst := testenv.Tmpfs(t)
	tree.Build(t, src, "char c 1 3 0620", "chown c 3:4", "link c2 c", "block b 7 9", "file f x")
	_, err := Tree(t.Context(), dst+"/d", src, &Options{Devices: layerfs.DevicesRefuse})
	assert.ErrorIs(t, err, fs.ErrPermission)
	assert.NoDirExists(t, dst+"/d")
	st, err := Tree(t.Context(), dst+"/skip", src, &Options{Devices: layerfs.DevicesSkip})
	require.NoError(t, err)
	assert.Equal(t, int64(3), st.Skipped)
	assert.Equal(t, []string{"f"}, names(t, dst+"/skip"))
	_, err = Tree(t.Context(), dst+"/rec", src, &Options{Devices: layerfs.DevicesRecord})
	require.NoError(t, err)
	buf := make([]byte, 100)
	for name, want := range map[string]string{"c": "3:4:0620:char-1-3", "c2": "3:4:0620:char-1-3", "b": "0:0:0644:block-7-9"} {
		n, err := unix.Lgetxattr(dst+"/rec/"+name, "user.containers.override_stat", buf)
		require.NoError(t, err)
		assert.Equal(t, want, string(buf[:n]))
	}
}

func TestInodeFlags(t *testing.T) {
	testenv.RequireRoot(t)
	for name, dir := range map[string]string{"ext4": testenv.Ext4(t, 32), "btrfs": testenv.Btrfs(t, 256)} {
		t.Run(name, func(t *testing.T) {
			src, dst := dir+"/src", dir+"/dst"
			tree.Build(t, src, "file d/imm x", "link imm2 d/imm", "file app x", "file dump x", "file plain x")
			flags := map[string]int{"d/imm": flagImmutable, "app": flagAppend, "dump": flagNoDump, "d": flagImmutable}
			set := func(root string, on bool) {
				for f, v := range flags {
					fd, err := unix.Open(root+"/"+f, unix.O_RDONLY, 0)
					require.NoError(t, err)
					if !on {
						v = 0
					}
					require.NoError(t, setFlags(fd, v, flagsCopied))
					unix.Close(fd)
				}
			}
			set(src, true)
			defer set(src, false)
			_, err := Tree(t.Context(), dst, src, &Options{InodeFlags: true})
			require.NoError(t, err)
			same(t, src, dst, &tree.CompareOptions{InodeFlags: true})
			set(dst, false)
			_, err = Tree(t.Context(), dst+"2", src, nil)
			require.NoError(t, err)
			same(t, src, dst+"2", nil)
			require.NoError(t, os.RemoveAll(dst+"2"))
		})
	}
}

func TestFile(t *testing.T) {
	testenv.RequireRoot(t)
	for name, dir := range map[string]string{"tmpfs": testenv.Tmpfs(t), "ext4": testenv.Ext4(t, 64), "btrfs": testenv.Btrfs(t, 256)} {
		src := dir + "/src"
		tree.Build(t, src, everything...)
		for fname, f := range map[string]force{"default": {}, "tmpfile=off": {noTmpfile: true}, "all=off": {true, true, true, true}} {
			t.Run(name+"/"+fname, func(t *testing.T) {
				dst := filepath.Join(dir, "dst")
				require.NoError(t, os.Mkdir(dst, 0o755))
				defer os.RemoveAll(dst)
				for _, n := range []string{"big", "holes", "empty", "suid", "none", "owned", "capable", "acl", "lowned", "dev/null", "ofifo", "a/k"} {
					to := filepath.Join(dst, filepath.Base(n))
					require.NoError(t, File(t.Context(), to, filepath.Join(src, n), &Options{force: f}))
					same(t, filepath.Join(src, n), to, &tree.CompareOptions{IgnoreLinks: true})
					assert.ErrorIs(t, File(t.Context(), to, filepath.Join(src, n), &Options{force: f}), fs.ErrExist)
				}
				assert.Len(t, names(t, dst), 12)
			})
		}
		assert.ErrorIs(t, File(t.Context(), dir+"/x", src+"/a", nil), unix.EISDIR)
		assert.ErrorIs(t, File(t.Context(), dir+"/x", src+"/absent", nil), fs.ErrNotExist)
		size := int64(100_000)
		require.NoError(t, File(t.Context(), dir+"/part", src+"/big", &Options{Size: &size}))
		whole, err := os.ReadFile(src + "/big")
		require.NoError(t, err)
		part, err := os.ReadFile(dir + "/part")
		require.NoError(t, err)
		assert.Equal(t, whole[:size], part)
	}
}

func TestUp(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	up, hi, lo := dir+"/up", dir+"/hi", dir+"/lo"
	tree.Build(t, up, "dir have 0700", "mtime have 5.5", "mtime . 6.6")
	tree.Build(t, hi, "dir a 0711 4:4", "xattr a user.from hi", "mtime a 11.1", "file a/top 1", "symlink link a", "file file x")
	tree.Build(t, lo, "dir a 0722 5:5", "dir a/b 0733 6:6", "file a/b/f content", "chown a/b/f 7:7", "file a/b/other y", "file have/g z",
		"mtime a/b/f 21.1", "mtime a/b 22.2", "file link/f x", "file file/f x")
	lowers := []string{hi, lo}

	for _, f := range []force{{}, {noTmpfile: true}} {
		require.NoError(t, Up(t.Context(), up, lowers, "a/b/f", &Options{force: f}))
		assert.Equal(t, []string{"a", "have"}, names(t, up))
		assert.Equal(t, []string{"b"}, names(t, up+"/a"))
		assert.Equal(t, []string{"f"}, names(t, up+"/a/b"))
		same(t, lo+"/a/b/f", up+"/a/b/f", nil)
		ignore := func(string) bool { return true }
		same(t, hi+"/a", up+"/a", &tree.CompareOptions{IgnorePath: ignore})
		same(t, lo+"/a/b", up+"/a/b", &tree.CompareOptions{IgnorePath: ignore})
		require.NoError(t, Up(t.Context(), up, lowers, "have/g", &Options{force: f}))
		for path, want := range map[string]unix.Timespec{up: {Sec: 6, Nsec: 6e8}, up + "/have": {Sec: 5, Nsec: 5e8}} {
			var st unix.Stat_t
			require.NoError(t, unix.Stat(path, &st))
			assert.Equal(t, want, st.Mtim, path)
		}
		tree.Build(t, up, "append a/b/f more")
		require.NoError(t, Up(t.Context(), up, lowers, "a/b/f", &Options{force: f}), "again")
		b, err := os.ReadFile(up + "/a/b/f")
		require.NoError(t, err)
		assert.Equal(t, "contentmore", string(b))
		require.NoError(t, os.RemoveAll(up))
		tree.Build(t, up, "dir have 0700", "mtime have 5.5", "mtime . 6.6")
	}
	for path, want := range map[string]error{
		"absent": fs.ErrNotExist, "a/absent": fs.ErrNotExist, "link/f": unix.ENOTDIR, "file/f": unix.ENOTDIR,
		"": fs.ErrInvalid, ".": fs.ErrInvalid, "../lo": fs.ErrInvalid, "/a": fs.ErrInvalid, "a//b": fs.ErrInvalid,
	} {
		assert.ErrorIs(t, Up(t.Context(), up, lowers, path, nil), want, path)
	}
	t.Run("concurrent", func(t *testing.T) {
		tree.Build(t, lo, "data x/y/z 2M 3")
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() { assert.NoError(t, Up(t.Context(), up, lowers, "x/y/z", nil)) })
		}
		wg.Wait()
		same(t, lo+"/x", up+"/x", nil)
	})
}
