package union_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/union"
)

// The names of these tests are sections and rules of aufs(5) and of the
// aufs-standalone sources; each says what its subtest checks.

func TestNames(t *testing.T) {
	t.Run("F1-F6/files-of-a-writable-branch", func(t *testing.T) {
		s := mustMount(t, 1)
		st := lstat(t, s.rw(".wh..wh.aufs"))
		assert.Equal(t, uint32(unix.S_IFREG|0o444), st.Mode)
		for _, d := range []string{".wh..wh.plnk", ".wh..wh.orph"} {
			assert.Equal(t, uint32(unix.S_IFDIR|0o700), lstat(t, s.rw(d)).Mode)
		}
		assert.Empty(t, names(t, s.mnt))
	})
	t.Run("F2/longest-name-is-242", func(t *testing.T) {
		s := mustMount(t, 1)
		n := strings.Repeat("n", 242)
		s.write(t, n, "x")
		require.NoError(t, os.Remove(s.path(n)))
		err := os.WriteFile(s.path(n+"n"), nil, 0o600)
		assert.ErrorIs(t, err, unix.ENAMETOOLONG)
		_, err = os.Stat(s.path(n + "n"))
		assert.ErrorIs(t, err, unix.ENAMETOOLONG)
		var sf unix.Statfs_t
		require.NoError(t, unix.Statfs(s.mnt, &sf))
		assert.EqualValues(t, 242, sf.Namelen)
	})
	t.Run("F3/reserved-names-are-EPERM", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a x", "l0/d/")
		for what, err := range map[string]error{
			"create": os.WriteFile(s.path(".wh.x"), nil, 0o600),
			"mkdir":  os.Mkdir(s.path(".wh.x"), 0o700),
			"rename": unix.Rename(s.path("a"), s.path("d/.wh.a")),
			"link":   unix.Link(s.path("a"), s.path(".wh..wh.x")),
			"stat":   unix.Lstat(s.path(".wh..wh.aufs"), new(unix.Stat_t)),
		} {
			assert.ErrorIs(t, err, unix.EPERM, what)
		}
	})
}

func TestBranches(t *testing.T) {
	t.Run("O1-O4/refused", func(t *testing.T) {
		s := prepare(t, 2, "l0/sub/")
		for name, bs := range map[string][]union.Branch{
			"none":      {},
			"duplicate": {{Path: s.lower(0, "")}, {Path: s.lower(0, "")}},
			"below":     {{Path: s.lower(0, "")}, {Path: s.lower(0, "sub")}},
			"above":     {{Path: s.lower(0, "sub")}, {Path: s.dir}},
			"missing":   {{Path: s.path("nothing")}},
			"proc":      {{Path: "/proc"}},
			"unknown":   {{Path: s.lower(0, ""), Perm: "rwx"}},
		} {
			h, err := union.Mount(bg, s.mnt, &union.Config{Branches: bs})
			if !assert.Error(t, err, name) {
				h.Unmount(bg)
			}
		}
		assert.Empty(t, names(t, s.mnt))
	})
	t.Run("O2/ro-holds-no-whiteouts", func(t *testing.T) {
		s := prepare(t, 2, "l0/.wh.a ", "l1/a x")
		s.mount(t, union.Config{})
		assert.Equal(t, "x", s.read(t, "a"))
		assert.Equal(t, []string{"a"}, names(t, s.mnt))
	})
	t.Run("O2/ro+wh-honours-whiteouts", func(t *testing.T) {
		s := prepare(t, 2, "l0/.wh.a ", "l1/a x", "l1/b y")
		s.mount(t, union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.ROWH}, {Path: s.lower(1, "")}}})
		assert.True(t, missing(s.path("a")))
		assert.Equal(t, []string{"b"}, names(t, s.mnt))
	})
	t.Run("O8/one-writer-per-branch", func(t *testing.T) {
		s := mustMount(t, 1)
		o := prepare(t, 0)
		_, err := union.Mount(bg, o.mnt, &union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}}})
		assert.ErrorIs(t, err, unix.EBUSY)
	})
	t.Run("writable-lower-is-never-written", func(t *testing.T) {
		s := mustMount(t, 1, "l0/f lower", "l0/g lower")
		// The descriptor of the lower file, opened for writing again by its
		// magic link after the copy-up, must not reach the lower branch.
		old, err := os.Open(s.path("f"))
		require.NoError(t, err)
		defer old.Close()
		s.write(t, "f", "upper")
		if w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", old.Fd()), os.O_WRONLY, 0); err == nil {
			w.WriteString("through the old descriptor")
			w.Close()
		} else {
			assert.ErrorIs(t, err, unix.ESTALE)
		}
		// Readers and writers at once.
		r1, err := os.Open(s.path("g"))
		require.NoError(t, err)
		defer r1.Close()
		w, err := os.OpenFile(s.path("g"), os.O_RDWR, 0)
		require.NoError(t, err)
		_, err = w.WriteAt([]byte("UPPER"), 0)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		assert.Equal(t, "UPPER", s.read(t, "g"))
		for _, n := range []string{"f", "g"} {
			b, err := os.ReadFile(s.lower(0, n))
			require.NoError(t, err)
			assert.Equal(t, "lower", string(b))
		}
	})
}

func TestLookup(t *testing.T) {
	t.Run("B1-B2/order-and-merge", func(t *testing.T) {
		s := prepare(t, 3, "rw/.wh.w ", "l0/w x", "l0/d/1 0", "l1/d/1 1", "l1/d/2 1", "l1/d/.wh..wh..opq ", "l2/d/3 2", "l2/e 2", "l1/.wh.e ")
		s.mount(t, union.Config{Branches: []union.Branch{
			{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, "")}, {Path: s.lower(1, ""), Perm: union.ROWH}, {Path: s.lower(2, "")},
		}})
		assert.True(t, missing(s.path("w")))
		assert.True(t, missing(s.path("e")))
		assert.Equal(t, []string{"1", "2"}, names(t, s.path("d")))
		assert.Equal(t, "0", s.read(t, "d/1"))
	})
	t.Run("B3/other-type-is-skipped", func(t *testing.T) {
		s := mustMount(t, 3, "l0/d/a 0", "l1/d file", "l2/d/b 2")
		assert.Equal(t, []string{"a", "b"}, names(t, s.path("d")))
	})
	t.Run("B4/entry-and-whiteout-is-EIO", func(t *testing.T) {
		s := mustMount(t, 1)
		build(t, s.dir, "rw/x x", "rw/.wh.x ")
		_, err := os.Stat(s.path("x"))
		assert.ErrorIs(t, err, unix.EIO)
	})
	t.Run("B5/attributes-of-the-topmost", func(t *testing.T) {
		s := prepare(t, 2, "l0/d/", "l1/d/")
		require.NoError(t, os.Chmod(s.lower(0, "d"), 0o711))
		require.NoError(t, os.Chmod(s.lower(1, "d"), 0o750))
		s.mount(t, union.Config{})
		assert.Equal(t, uint32(unix.S_IFDIR|0o711), lstat(t, s.path("d")).Mode)
	})
	t.Run("B6/nlink-of-a-merged-directory", func(t *testing.T) {
		s := mustMount(t, 2, "l0/d/a/", "l1/d/b/", "l1/d/c/")
		assert.GreaterOrEqual(t, lstat(t, s.path("d")).Nlink, uint64(5))
	})
	t.Run("B7/mounts-in-a-branch-are-not-crossed", func(t *testing.T) {
		s := prepare(t, 1, "l0/m/under x")
		require.NoError(t, unix.Mount("tmpfs", s.lower(0, "m"), "tmpfs", 0, ""))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(s.lower(0, "m"), 0)) })
		s.mount(t, union.Config{})
		assert.Equal(t, []string{"under"}, names(t, s.path("m")))
	})
	t.Run("symlinks-do-not-lead-out-of-a-branch", func(t *testing.T) {
		s := prepare(t, 2, "l1/d/f x")
		require.NoError(t, os.Symlink("/", s.lower(0, "d")))
		s.mount(t, union.Config{})
		st := lstat(t, s.path("d"))
		assert.Equal(t, uint32(unix.S_IFLNK), st.Mode&unix.S_IFMT)
	})
}

func TestReaddir(t *testing.T) {
	t.Run("B1-B3/each-name-once-with-its-inode", func(t *testing.T) {
		s := mustMount(t, 3, "l0/a 0", "l1/a 1", "l1/b 1", "l2/b 2", "l2/c/", "rw/.wh.gone ", "l2/gone x")
		s.write(t, "b", "copied up")
		f, err := os.Open(s.mnt)
		require.NoError(t, err)
		defer f.Close()
		buf := make([]byte, 8192)
		n, err := unix.Getdents(int(f.Fd()), buf)
		require.NoError(t, err)
		seen := map[string]uint64{}
		for b := buf[:n]; len(b) > 0; {
			// struct linux_dirent64: ino, off, reclen, type, name.
			l := binary.NativeEndian.Uint16(b[16:])
			name, _, _ := strings.Cut(string(b[19:l]), "\x00")
			_, twice := seen[name]
			assert.False(t, twice, name)
			seen[name] = binary.NativeEndian.Uint64(b)
			b = b[l:]
		}
		assert.Len(t, seen, 5)
		for _, n := range []string{"a", "b", "c", "."} {
			assert.Equal(t, lstat(t, s.path(n)).Ino, seen[n], n)
		}
	})
	t.Run("attributes-come-with-the-listing", func(t *testing.T) {
		s := prepare(t, 1)
		const n = 3000
		for i := range n {
			require.NoError(t, os.WriteFile(s.lower(0, fmt.Sprint("file", i)), nil, 0o600))
		}
		s.mount(t, union.Config{})
		require.Len(t, names(t, s.mnt), n)
		known := s.Stats().Nodes
		assert.Greater(t, known, 1500)
		assert.Less(t, known, 2500) // but not those of everything
		before := s.Stats().Requests
		for i := range n {
			lstat(t, s.path(fmt.Sprint("file", i)))
		}
		assert.Less(t, s.Stats().Requests-before, int64(1500))
	})
	t.Run("B2/a-long-listing-survives-removals", func(t *testing.T) {
		s := mustMount(t, 1)
		const n = 5000
		for i := range n {
			require.NoError(t, os.WriteFile(s.path(fmt.Sprintf("file-with-a-longer-name-%d", i)), nil, 0o600))
		}
		d, err := os.Open(s.mnt)
		require.NoError(t, err)
		defer d.Close()
		seen := 0
		for {
			ns, err := d.Readdirnames(100)
			for _, x := range ns {
				require.NoError(t, os.Remove(s.path(x)))
				seen++
			}
			if err != nil {
				break
			}
		}
		assert.Equal(t, n, seen)
		assert.Empty(t, names(t, s.mnt))
	})
}

func TestCreateAndRemove(t *testing.T) {
	t.Run("F2/create-removes-the-whiteout", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a x", "l0/b x", "l0/c x", "l0/d x")
		for _, n := range []string{"a", "b", "c", "d"} {
			require.NoError(t, os.Remove(s.path(n)))
		}
		assert.Equal(t, []string{".wh.a", ".wh.b", ".wh.c", ".wh.d"}, branchNames(t, s.rw("")))
		s.write(t, "a", "new")
		require.NoError(t, os.Symlink("t", s.path("b")))
		require.NoError(t, unix.Mknod(s.path("c"), unix.S_IFIFO|0o600, 0))
		require.NoError(t, os.Link(s.path("a"), s.path("d")))
		assert.Equal(t, []string{"a", "b", "c", "d"}, branchNames(t, s.rw("")))
	})
	t.Run("F3/mkdir-over-a-whiteout-is-opaque", func(t *testing.T) {
		s := mustMount(t, 1, "l0/d/f x")
		require.NoError(t, os.RemoveAll(s.path("d")))
		require.NoError(t, os.Mkdir(s.path("d"), 0o755))
		assert.Empty(t, names(t, s.path("d")))
		assert.Equal(t, []string{".wh..wh..opq"}, names(t, s.rw("d")))
		require.NoError(t, os.Mkdir(s.path("e"), 0o755))
		assert.Empty(t, names(t, s.rw("e")))
	})
	t.Run("F3/mkdir-merges-with-a-branch-added-later", func(t *testing.T) {
		s := prepare(t, 1, "late/d/f x")
		s.mount(t, union.Config{})
		require.NoError(t, os.Mkdir(s.path("d"), 0o755))
		assert.Empty(t, names(t, s.path("d")))
		require.NoError(t, s.Append(bg, union.Branch{Path: s.dir + "/late"}))
		assert.Equal(t, []string{"f"}, names(t, s.path("d")))
	})
	t.Run("F4/whiteout-only-if-something-is-below", func(t *testing.T) {
		s := mustMount(t, 1, "l0/both x", "l0/low x", "rw/both y", "rw/up y", "l0/p/q x")
		for _, n := range []string{"both", "low", "up", "p/q"} {
			require.NoError(t, os.Remove(s.path(n)))
		}
		assert.Equal(t, []string{".wh.both", ".wh.low", "p"}, branchNames(t, s.rw("")))
		assert.Equal(t, []string{".wh.q"}, names(t, s.rw("p")))
	})
	t.Run("F5/whiteouts-are-links-of-the-base", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a x")
		require.NoError(t, os.Remove(s.path("a")))
		assert.Equal(t, lstat(t, s.rw(".wh..wh.aufs")).Ino, lstat(t, s.rw(".wh.a")).Ino)
	})
	t.Run("B6/rmdir", func(t *testing.T) {
		s := mustMount(t, 1, "l0/d/f x", "l0/d/g x")
		assert.ErrorIs(t, unix.Rmdir(s.path("d")), unix.ENOTEMPTY)
		require.NoError(t, os.Remove(s.path("d/f")))
		require.NoError(t, os.Remove(s.path("d/g")))
		require.NoError(t, unix.Rmdir(s.path("d")))
		assert.Equal(t, []string{".wh.d"}, branchNames(t, s.rw("")))
	})
	t.Run("B7/times-of-parents", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/e/f x")
		old := time.Unix(1000, 5)
		for _, d := range []string{"d/e", "d"} {
			require.NoError(t, os.Chtimes(s.lower(0, d), old, old))
		}
		s.mount(t, union.Config{})
		f, err := os.OpenFile(s.path("d/e/f"), os.O_WRONLY, 0)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		for _, d := range []string{"d/e", "d"} {
			st := lstat(t, s.path(d))
			assert.Equal(t, old, time.Unix(st.Mtim.Unix()), d)
		}
		require.NoError(t, os.Remove(s.path("d/e/f")))
		st := lstat(t, s.path("d/e"))
		assert.Greater(t, st.Mtim.Sec, int64(1000))
	})
	t.Run("B7/copy-up-of-special-files-is-no-change-of-the-parent", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/l -> x", "rw/d/")
		for n, typ := range map[string]uint32{"p": unix.S_IFIFO, "s": unix.S_IFSOCK, "c": unix.S_IFCHR} {
			require.NoError(t, unix.Mknod(s.lower(0, "d/"+n), typ|0o644, int(unix.Mkdev(1, 3))))
		}
		old := time.Unix(1000, 5)
		require.NoError(t, os.Chtimes(s.rw("d"), old, old))
		s.mount(t, union.Config{})
		for _, n := range []string{"l", "p", "s", "c"} {
			require.NoError(t, os.Lchown(s.path("d/"+n), 7, 7))
			assert.Equal(t, lstat(t, s.lower(0, "d/"+n)).Mode, lstat(t, s.rw("d/"+n)).Mode, n)
			for _, d := range []string{s.rw("d"), s.path("d")} {
				st := lstat(t, d)
				assert.Equal(t, old, time.Unix(st.Mtim.Unix()), n)
			}
		}
		assert.Equal(t, []string{"c", "l", "p", "s"}, names(t, s.rw("d")))
	})
	t.Run("B7/joining-and-leaving-is-no-change-of-the-root", func(t *testing.T) {
		s := prepare(t, 1, "l0/f x")
		old := time.Unix(1000, 5)
		require.NoError(t, os.Chtimes(s.rw(""), old, old))
		for _, plink := range []bool{true, false} {
			s.mount(t, union.Config{NoPlink: !plink})
			st := lstat(t, s.mnt)
			assert.Equal(t, old, time.Unix(st.Mtim.Unix()))
			require.NoError(t, s.Unmount(bg))
			st = lstat(t, s.rw(""))
			assert.Equal(t, old, time.Unix(st.Mtim.Unix()))
		}
	})
	t.Run("owner-is-the-creator", func(t *testing.T) {
		s := mustMount(t, 1, "l0/low/")
		require.NoError(t, os.Chmod(s.path("."), 0o777))
		require.NoError(t, os.Chmod(s.path("low"), 0o777))
		sh(t, `cd "$1"; setpriv --reuid 1234 --regid 4321 --clear-groups sh -ec 'umask 027; echo x >f; mkdir d; ln -s x l; mkfifo p; echo y >low/g; echo z >d/h'`, s.mnt)
		for n, mode := range map[string]uint32{"f": 0o640, "d": 0o750, "l": 0o777, "p": 0o640, "low/g": 0o640, "d/h": 0o640} {
			st := lstat(t, s.rw(n))
			assert.Equal(t, []uint32{1234, 4321, mode}, []uint32{st.Uid, st.Gid, st.Mode & 0o777}, n)
		}
	})
}

func TestCopyUp(t *testing.T) {
	t.Run("B1/reading-copies-nothing", func(t *testing.T) {
		s := mustMount(t, 1, "l0/f x")
		s.read(t, "f")
		lstat(t, s.path("f"))
		assert.Empty(t, branchNames(t, s.rw("")))
	})
	t.Run("B2/everything-is-copied", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/f content")
		f := s.lower(0, "d/f")
		require.NoError(t, os.Chown(f, 12, 34))
		require.NoError(t, unix.Chmod(f, 0o6751))
		sh(t, `setfattr -n user.x -v y "$1"; setfacl -m u:77:r "$1"; setfattr -n trusted.t -v v "$1"; setfacl -d -m u:88:rwx "$2"; chmod 2775 "$2"`, f, s.lower(0, "d"))
		when := []unix.Timespec{{Sec: 1111, Nsec: 11}, {Sec: 2222, Nsec: 22}}
		for _, n := range []string{f, s.lower(0, "d")} {
			require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, n, when, 0))
		}
		want, wantDir := lstat(t, f), lstat(t, s.lower(0, "d"))
		s.mount(t, union.Config{})
		require.NoError(t, unix.Setxattr(s.path("d/f"), "user.new", []byte("1"), 0))
		got, gotDir := lstat(t, s.rw("d/f")), lstat(t, s.rw("d"))
		for _, p := range [][2]unix.Stat_t{{want, got}, {wantDir, gotDir}} {
			assert.Equal(t, fmt.Sprintf("%o %d %d %v", p[0].Mode, p[0].Uid, p[0].Gid, p[0].Mtim), fmt.Sprintf("%o %d %d %v", p[1].Mode, p[1].Uid, p[1].Gid, p[1].Mtim))
		}
		dump := `cd "$1"; getfattr -d -m - -- d d/f 2>/dev/null | grep -v user.new; getfacl -n d d/f`
		assert.Equal(t, sh(t, dump, s.lower(0, "")), sh(t, dump, s.rw("")))
		assert.Equal(t, sh(t, dump, s.lower(0, "")), sh(t, dump, s.mnt))
	})
	t.Run("B2/holes-stay-holes", func(t *testing.T) {
		s := prepare(t, 1)
		f, err := os.Create(s.lower(0, "f"))
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("start"), 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("end"), 64<<20)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		s.mount(t, union.Config{})
		require.NoError(t, os.Chmod(s.path("f"), 0o600))
		st := lstat(t, s.rw("f"))
		assert.EqualValues(t, 64<<20+3, st.Size)
		assert.Less(t, st.Blocks*512, int64(1<<20))
		sh(t, `cmp "$1" "$2"`, s.lower(0, "f"), s.path("f"))
	})
	t.Run("B3/truncation-copies-no-more", func(t *testing.T) {
		s := mustMount(t, 1, "l0/f "+strings.Repeat("x", 1<<20), "l0/g "+strings.Repeat("x", 1<<20))
		require.NoError(t, os.Truncate(s.path("f"), 10))
		s.write(t, "g", "new")
		assert.LessOrEqual(t, s.Stats().CopyUpBytes, int64(4096))
		assert.Equal(t, "xxxxxxxxxx", s.read(t, "f"))
	})
	t.Run("B4/default-ACL-does-not-leak-in", func(t *testing.T) {
		s := prepare(t, 1, "l0/f x", "l0/d/g x")
		s.mount(t, union.Config{})
		sh(t, `setfacl -d -m u:88:rwx "$1"`, s.mnt)
		require.NoError(t, os.Chmod(s.path("f"), 0o640))
		s.write(t, "d/g", "y")
		assert.NotContains(t, sh(t, `getfacl -n "$1/f" "$1/d" "$1/d/g"`, s.rw("")), "user:88:")
		s.write(t, "new", "y")
		assert.Contains(t, sh(t, `getfacl -n "$1/new"`, s.mnt), "user:88:")
	})
	t.Run("B6/inode-number-stays", func(t *testing.T) {
		s := mustMount(t, 1, "l0/d/f x", "l0/d/l -> f")
		for _, n := range []string{"d/f", "d/l", "d"} {
			before := lstat(t, s.path(n))
			require.NoError(t, unix.Lchown(s.path(n), 5, 5))
			after := lstat(t, s.path(n))
			assert.Equal(t, before.Ino, after.Ino, n)
			assert.Equal(t, before.Dev, after.Dev, n)
		}
		// Also when the kernel has forgotten everything.
		ino := lstat(t, s.path("d/f")).Ino
		require.NoError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
		assert.Equal(t, ino, lstat(t, s.path("d/f")).Ino)
	})
	t.Run("B7/old-descriptors", func(t *testing.T) {
		for _, pass := range []bool{true, false} {
			s := prepare(t, 1, "l0/f old").mount(t, union.Config{NoPassthrough: !pass})
			f, err := os.Open(s.path("f"))
			require.NoError(t, err)
			defer f.Close()
			s.write(t, "f", "new")
			buf := make([]byte, 10)
			n, _ := f.ReadAt(buf, 0)
			want := "new"
			if pass && s.Stats().Passthrough {
				want = "old" // as overlayfs: data goes past us
			}
			assert.Equal(t, want, string(buf[:n]))
			assert.Equal(t, "new", s.read(t, "f"))
			require.NoError(t, f.Close())
		}
	})
	t.Run("B8/special-files", func(t *testing.T) {
		s := prepare(t, 1)
		require.NoError(t, unix.Mknod(s.lower(0, "p"), unix.S_IFIFO|0o644, 0))
		require.NoError(t, unix.Mknod(s.lower(0, "c"), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))))
		require.NoError(t, unix.Mknod(s.lower(0, "s"), unix.S_IFSOCK|0o644, 0))
		s.mount(t, union.Config{})
		for _, n := range []string{"p", "c", "s"} {
			require.NoError(t, os.Chmod(s.path(n), 0o600))
			up, low := lstat(t, s.rw(n)), lstat(t, s.lower(0, n))
			assert.Equal(t, low.Mode&unix.S_IFMT|0o600, up.Mode)
			assert.Equal(t, low.Rdev, up.Rdev)
		}
	})
	t.Run("B9/removed-while-open", func(t *testing.T) {
		s := mustMount(t, 1, "l0/f content")
		f, err := os.Open(s.path("f"))
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, os.Remove(s.path("f")))
		require.NoError(t, f.Chmod(0o600))
		fi, err := f.Stat()
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), fi.Mode())
		assert.EqualValues(t, 0, fi.Sys().(*syscall.Stat_t).Nlink)
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
		if err == nil {
			_, err = w.WriteAt([]byte("C"), 0)
			require.NoError(t, err)
			buf := make([]byte, 7)
			_, err = w.ReadAt(buf, 0)
			require.NoError(t, err)
			assert.Equal(t, "Content", string(buf))
			require.NoError(t, w.Close())
		} else {
			assert.ErrorIs(t, err, unix.ESTALE)
		}
		assert.Empty(t, names(t, s.rw(".wh..wh.orph")))
		assert.Equal(t, []string{".wh.f"}, branchNames(t, s.rw("")))
	})
	t.Run("no-reader-sees-half-a-file", func(t *testing.T) {
		const size = 8 << 20
		s := mustMount(t, 1, "l0/f "+strings.Repeat("x", size))
		stop, bad := make(chan struct{}), make(chan string, 1)
		go func() {
			defer close(bad)
			for {
				select {
				case <-stop:
					return
				default:
				}
				b, err := os.ReadFile(s.path("f"))
				if err != nil || len(b) != size {
					bad <- fmt.Sprint(len(b), err)
					return
				}
			}
		}()
		time.Sleep(10 * time.Millisecond)
		require.NoError(t, os.Chmod(s.path("f"), 0o600))
		time.Sleep(10 * time.Millisecond)
		close(stop)
		assert.Empty(t, <-bad)
	})
}

func TestLinks(t *testing.T) {
	linked := func(t *testing.T, cfg union.Config) *stage {
		return prepare(t, 1, "l0/a text", "l0/d/b = a", "l0/c = a").mount(t, cfg)
	}
	t.Run("B1/names-stay-linked", func(t *testing.T) {
		s := linked(t, union.Config{})
		s.write(t, "a", "changed")
		for _, n := range []string{"a", "d/b", "c"} {
			assert.Equal(t, "changed", s.read(t, n), n)
			st := lstat(t, s.path(n))
			assert.Equal(t, lstat(t, s.path("a")).Ino, st.Ino, n)
			assert.EqualValues(t, 3, st.Nlink, n)
		}
		require.NoError(t, os.Remove(s.path("a")))
		assert.Equal(t, "changed", s.read(t, "c"))
		assert.EqualValues(t, 2, lstat(t, s.path("c")).Nlink)
	})
	t.Run("B1/hidden-names-do-not-count", func(t *testing.T) {
		// Of ten names one is under a whiteout, one under a file, two in an
		// opaque directory, one in a directory under a whiteout, and one in
		// a directory under a file.
		s := prepare(t, 2, "l1/1 text", "l1/2 = 1", "l1/3 = 1", "l1/d/4 = 1", "l1/o/5 = 1", "l1/o/s/6 = 1", "l1/w/7 = 1", "l1/f/8 = 1",
			"l1/d/9 = 1", "l1/10 = 1", "rw/.wh.2 ", "l0/3 other", "rw/o/.wh..wh..opq ", "rw/.wh.w ", "rw/f file", "l0/d/other ")
		count := func(want int) {
			t.Helper()
			for _, n := range []string{"1", "d/4"} {
				assert.EqualValues(t, want, lstat(t, s.path(n)).Nlink, n)
			}
		}
		s.mount(t, union.Config{NoPlink: true})
		count(4)
		require.NoError(t, os.Remove(s.path("10")))
		count(3)
		s.write(t, "d/9", "a copy hides its name")
		count(2)
		require.NoError(t, s.Unmount(bg))
		s.mount(t, union.Config{})
		count(2)
		require.NoError(t, os.Rename(s.path("f"), s.path("1")))
		assert.EqualValues(t, 1, lstat(t, s.path("d/4")).Nlink)
		s.write(t, "d/4", "changed")
		assert.EqualValues(t, 1, lstat(t, s.path("d/4")).Nlink)
	})
	t.Run("F2/form-of-a-plink", func(t *testing.T) {
		s := linked(t, union.Config{})
		s.write(t, "a", "changed")
		up := lstat(t, s.rw("a"))
		name := fmt.Sprintf("%d.%d", lstat(t, s.path("a")).Ino, up.Ino)
		assert.Equal(t, []string{name}, names(t, s.rw(".wh..wh.plnk")))
		assert.Equal(t, up.Ino, lstat(t, s.rw(".wh..wh.plnk/"+name)).Ino)
	})
	t.Run("O4/flush-makes-real-links", func(t *testing.T) {
		s := linked(t, union.Config{})
		s.write(t, "a", "changed")
		require.NoError(t, s.FlushLinks(bg))
		assert.Empty(t, names(t, s.rw(".wh..wh.plnk")))
		for _, n := range []string{"a", "d/b", "c"} {
			assert.Equal(t, lstat(t, s.rw("a")).Ino, lstat(t, s.rw(n)).Ino, n)
			assert.Equal(t, "changed", s.read(t, n), n)
		}
		assert.EqualValues(t, 3, lstat(t, s.rw("a")).Nlink)
	})
	t.Run("B5/noplink-breaks-links", func(t *testing.T) {
		s := linked(t, union.Config{NoPlink: true})
		s.write(t, "a", "changed")
		assert.Equal(t, "changed", s.read(t, "a"))
		assert.Equal(t, "text", s.read(t, "c"))
		assert.EqualValues(t, 1, lstat(t, s.path("a")).Nlink)
		assert.True(t, missing(s.rw(".wh..wh.plnk")))
	})
	t.Run("B6/link-of-a-lower-file", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a text")
		require.NoError(t, os.Link(s.path("a"), s.path("n")))
		s.write(t, "n", "changed")
		assert.Equal(t, "changed", s.read(t, "a"))
		assert.Equal(t, lstat(t, s.path("a")).Ino, lstat(t, s.path("n")).Ino)
		assert.EqualValues(t, 2, lstat(t, s.path("a")).Nlink)
	})
}

func TestRename(t *testing.T) {
	t.Run("B1/file", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a x", "l0/b y", "l0/c z")
		require.NoError(t, os.Remove(s.path("c")))
		require.NoError(t, os.Rename(s.path("a"), s.path("c")))
		assert.Equal(t, "x", s.read(t, "c"))
		assert.Equal(t, []string{".wh.a", "c"}, branchNames(t, s.rw("")))
		require.NoError(t, os.Rename(s.path("c"), s.path("b")))
		assert.Equal(t, []string{".wh.a", ".wh.c", "b"}, branchNames(t, s.rw("")))
	})
	t.Run("B2-B3/directories-with-something-below-are-EXDEV", func(t *testing.T) {
		s := mustMount(t, 1, "l0/full/f x", "l0/empty/", "l0/both/", "rw/both/g y", "rw/up/h z")
		assert.ErrorIs(t, unix.Rename(s.path("full"), s.path("x")), unix.EXDEV)
		require.NoError(t, unix.Rename(s.path("empty"), s.path("e2")))
		require.NoError(t, unix.Rename(s.path("both"), s.path("b2")))
		require.NoError(t, unix.Rename(s.path("up"), s.path("u2")))
		assert.Equal(t, []string{"b2", "e2", "full", "u2"}, names(t, s.mnt))
		assert.Equal(t, []string{".wh.both", ".wh.empty", "b2", "e2", "u2"}, branchNames(t, s.rw("")))
		sh(t, `mv "$1/full" "$1/moved"; test "$(cat "$1/moved/f")" = x`, s.mnt)
	})
	t.Run("B4/onto-a-directory", func(t *testing.T) {
		s := mustMount(t, 1, "rw/src/f x", "l0/dst/low y")
		assert.ErrorIs(t, unix.Rename(s.path("src"), s.path("dst")), unix.ENOTEMPTY)
		require.NoError(t, os.Remove(s.path("dst/low")))
		require.NoError(t, unix.Rename(s.path("src"), s.path("dst")))
		assert.Equal(t, []string{"f"}, names(t, s.path("dst")))
		assert.Equal(t, []string{".wh..wh..opq", "f"}, names(t, s.rw("dst")))
	})
	t.Run("B7/dirren-is-refused", func(t *testing.T) {
		// What aufs dirren.c leaves of mv old new, where old lies below, too.
		s := prepare(t, 2, "l0/.wh..wh.hino 12345678", "l0/new/.wh..wh..dr.2_01234567-89abcdef_256 info", "l0/.wh.old ", "l1/old/f x")
		marked := union.Branch{Path: s.lower(0, ""), Perm: union.RW}
		before := shot(t, marked.Path)
		refused := func(err error) {
			t.Helper()
			assert.ErrorIs(t, err, unix.EINVAL)
			assert.ErrorContains(t, err, "dirren")
			assert.Equal(t, before, shot(t, marked.Path))
		}
		_, err := union.Mount(bg, s.mnt, &union.Config{Branches: []union.Branch{marked, {Path: s.lower(1, "")}}})
		refused(err)
		s.mount(t, union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(1, "")}}})
		refused(s.Append(bg, marked))
		require.NoError(t, s.Append(bg, union.Branch{Path: marked.Path, Perm: union.ROWH}))
		refused(s.Modify(bg, marked.Path, union.RW))
		assert.Equal(t, []string{"new", "old"}, names(t, s.mnt))
		assert.Empty(t, names(t, s.path("new")))
		// It is free for whoever removes the list.
		require.NoError(t, os.Remove(marked.Path+"/.wh..wh.hino"))
		require.NoError(t, s.Modify(bg, marked.Path, union.RW))
	})
	t.Run("B5/flags", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a A", "l0/b B")
		re := func(flags uint) error {
			return unix.Renameat2(unix.AT_FDCWD, s.path("a"), unix.AT_FDCWD, s.path("b"), flags)
		}
		assert.ErrorIs(t, re(unix.RENAME_NOREPLACE), unix.EEXIST)
		assert.ErrorIs(t, re(unix.RENAME_WHITEOUT), unix.EINVAL)
		require.NoError(t, re(unix.RENAME_EXCHANGE))
		assert.Equal(t, "B", s.read(t, "a"))
		assert.Equal(t, "A", s.read(t, "b"))
	})
}

func TestCrash(t *testing.T) {
	t.Run("leftovers-are-mended-and-told", func(t *testing.T) {
		s := prepare(t, 1, "l0/a low", "l0/d/x low", "rw/.wh..wh.mounted ", "rw/a up", "rw/.wh.a ", "rw/d/.wh..wh.x.1a2b/.wh.y ",
			"rw/.wh..wh.orph/o x", "rw/.wh..wh.plnk/12.34 x", "rw/d/.wh.x ")
		s.mount(t, union.Config{})
		assert.Len(t, s.Repaired(), 4, "%v", s.Repaired())
		assert.Equal(t, "up", s.read(t, "a"))
		assert.Equal(t, []string{"a", "d"}, branchNames(t, s.rw("")))
		assert.Equal(t, []string{".wh.x"}, names(t, s.rw("d")))
		assert.Empty(t, names(t, s.rw(".wh..wh.orph")))
		assert.Empty(t, names(t, s.rw(".wh..wh.plnk")))
	})
	t.Run("a-clean-branch-is-not-searched", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a low")
		require.NoError(t, os.Remove(s.path("a")))
		require.NoError(t, s.Unmount(bg))
		assert.True(t, missing(s.rw(".wh..wh.mounted")))
		s.mount(t, union.Config{})
		assert.Empty(t, s.Repaired())
		assert.True(t, missing(s.path("a")))
	})
	t.Run("plinks-become-links", func(t *testing.T) {
		s := mustMount(t, 1, "l0/a text", "l0/b = a")
		s.write(t, "a", "changed")
		// What a crash would leave: the branch as it is now.
		sh(t, `cp -a "$1/rw" "$1/saved"`, s.dir)
		require.NoError(t, s.Unmount(bg))
		sh(t, `cd "$1"; find rw -mindepth 1 -delete; cp -a saved/. rw/`, s.dir)
		// The copy has other inodes, so the plink's second number is set right.
		old := names(t, s.rw(".wh..wh.plnk"))[0]
		first, _, _ := strings.Cut(old, ".")
		require.NoError(t, os.Rename(s.rw(".wh..wh.plnk/"+old), s.rw(fmt.Sprintf(".wh..wh.plnk/%s.%d", first, lstat(t, s.rw("a")).Ino))))
		s.mount(t, union.Config{})
		assert.Equal(t, "changed", s.read(t, "b"))
		assert.Equal(t, lstat(t, s.rw("a")).Ino, lstat(t, s.rw("b")).Ino)
		assert.Len(t, s.Repaired(), 1)
	})
}

func TestBranchManagement(t *testing.T) {
	t.Run("B1-B6/add", func(t *testing.T) {
		s := prepare(t, 1, "l0/a 0", "l0/d/x 0", "late/a L", "late/new L", "late/d/y L", "rw/.wh.hid ", "late/hid L")
		s.mount(t, union.Config{})
		assert.True(t, missing(s.path("new")))
		names(t, s.path("d"))
		require.NoError(t, s.Append(bg, union.Branch{Path: s.dir + "/late"}))
		assert.Equal(t, "L", s.read(t, "new"))
		assert.Equal(t, "0", s.read(t, "a"))
		assert.True(t, missing(s.path("hid")))
		assert.Equal(t, []string{"x", "y"}, names(t, s.path("d")))
		assert.Equal(t, []union.Branch{{Path: s.rw(""), Perm: "rw"}, {Path: s.lower(0, ""), Perm: "ro"}, {Path: s.dir + "/late", Perm: "ro"}}, s.Branches())
	})
	t.Run("B1/prepend-read-only", func(t *testing.T) {
		s := prepare(t, 1, "l0/a 0", "top/a T").mount(t, union.Config{})
		f, err := os.Open(s.path("a"))
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, s.Prepend(bg, union.Branch{Path: s.dir + "/top"}))
		assert.Equal(t, "T", s.read(t, "a"))
		b := make([]byte, 1)
		_, err = f.ReadAt(b, 0)
		require.NoError(t, err)
		assert.Equal(t, "0", string(b))
		assert.ErrorIs(t, os.WriteFile(s.path("a"), nil, 0o600), unix.EROFS)
		assert.ErrorIs(t, os.Remove(s.path("a")), unix.EROFS)
	})
	t.Run("B2/delete", func(t *testing.T) {
		s := prepare(t, 2, "l0/a 0", "l0/d/x 0", "l1/a 1", "l1/d/y 1", "l1/only 1").mount(t, union.Config{})
		f, err := os.Open(s.path("only"))
		require.NoError(t, err)
		assert.ErrorIs(t, s.Delete(bg, s.lower(1, "")), unix.EBUSY)
		require.NoError(t, f.Close())
		names(t, s.path("d"))
		require.Eventually(t, func() bool { return s.Delete(bg, s.lower(1, "")) == nil }, 5*time.Second, 10*time.Millisecond)
		assert.Equal(t, []string{"a", "d"}, names(t, s.mnt))
		assert.Equal(t, []string{"x"}, names(t, s.path("d")))
		assert.ErrorIs(t, s.Delete(bg, s.lower(1, "")), unix.ENOENT)
	})
	t.Run("B3/modify", func(t *testing.T) {
		s := prepare(t, 1, "l0/a 0").mount(t, union.Config{})
		f, err := os.Create(s.path("w"))
		require.NoError(t, err)
		assert.ErrorIs(t, s.Modify(bg, s.rw(""), union.ROWH), unix.EBUSY)
		require.NoError(t, f.Close())
		require.Eventually(t, func() bool { return s.Modify(bg, s.rw(""), union.ROWH) == nil }, 5*time.Second, 10*time.Millisecond)
		assert.ErrorIs(t, os.WriteFile(s.path("a"), nil, 0o600), unix.EROFS)
		require.NoError(t, s.Modify(bg, s.lower(0, ""), union.RW))
		require.NoError(t, os.WriteFile(s.path("new"), nil, 0o600))
		assert.False(t, missing(s.lower(0, "new")))
		require.NoError(t, s.Modify(bg, s.rw(""), union.RW))
		s.write(t, "a", "up")
		assert.True(t, missing(s.rw("a"))) // written where it lies
		require.NoError(t, os.Remove(s.path("a")))
		assert.Equal(t, []string{".wh..wh.aufs", ".wh..wh.mounted", ".wh..wh.orph", ".wh..wh.plnk", "new"}, names(t, s.lower(0, "")))
	})
	t.Run("B3/modify-that-is-refused-gives-nothing-up", func(t *testing.T) {
		// The reader came while the file that was created was open, so with
		// passthrough the kernel reads by a descriptor that may write.
		s := prepare(t, 1).mount(t, union.Config{})
		w, err := os.Create(s.path("f"))
		require.NoError(t, err)
		r, err := os.Open(s.path("f"))
		require.NoError(t, err)
		defer r.Close()
		require.NoError(t, w.Close())
		if !s.Stats().Passthrough {
			t.Skip("without passthrough the reader has a descriptor of its own")
		}
		other, err := os.Open(s.rw(""))
		require.NoError(t, err)
		defer other.Close()
		stop, taken := make(chan struct{}), make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					taken <- n
					return
				default:
				}
				if unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
					n++
					unix.Flock(int(other.Fd()), unix.LOCK_UN)
				}
			}
		}()
		for range 300 {
			assert.ErrorIs(t, s.Modify(bg, s.rw(""), union.RO), unix.EBUSY)
		}
		close(stop)
		assert.Zero(t, <-taken, "another union could have the branch rw")
		assert.False(t, missing(s.rw(".wh..wh.mounted")))
		s.write(t, "g", "x")
		o := prepare(t, 0)
		_, err = union.Mount(bg, o.mnt, &union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}}})
		assert.ErrorIs(t, err, unix.EBUSY)
		require.NoError(t, r.Close())
		require.Eventually(t, func() bool { return s.Modify(bg, s.rw(""), union.RO) == nil }, 5*time.Second, 10*time.Millisecond)
		assert.True(t, missing(s.rw(".wh..wh.mounted")))
	})
	t.Run("O4/index-out-of-range", func(t *testing.T) {
		s := prepare(t, 1, "late/").mount(t, union.Config{})
		assert.ErrorIs(t, s.Insert(bg, 7, union.Branch{Path: s.dir + "/late"}), unix.EDOM)
	})
}

func TestOther(t *testing.T) {
	t.Run("B2/copy_file_range-between-file-systems-is-EXDEV", func(t *testing.T) {
		s := prepare(t, 1, "l0/f text")
		other := testenv.Tmpfs(t)
		build(t, other, "g other")
		s.mount(t, union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, "")}, {Path: other}}})
		in, err := os.Open(s.path("g"))
		require.NoError(t, err)
		defer in.Close()
		out, err := os.Create(s.path("h"))
		require.NoError(t, err)
		defer out.Close()
		n, err := unix.CopyFileRange(int(in.Fd()), nil, int(out.Fd()), nil, 5, 0)
		// The kernel falls back to a copy of its own since Linux 5.19.
		if err == nil {
			assert.Equal(t, 5, n)
		} else {
			assert.ErrorIs(t, err, unix.EXDEV)
		}
		assert.True(t, missing(s.rw("g")))
	})
	t.Run("B7/writing-strips-suid-and-capabilities", func(t *testing.T) {
		for _, pass := range []bool{true, false} {
			s := prepare(t, 1, "l0/f text", "l0/g text", "l0/h text").mount(t, union.Config{NoPassthrough: !pass})
			for _, n := range []string{"f", "g", "h"} {
				require.NoError(t, unix.Chown(s.path(n), 1234, 1234))
				require.NoError(t, unix.Chmod(s.path(n), 0o6777))
			}
			as := `setpriv --reuid 1234 --regid 1234 --clear-groups sh -ec "$2" sh "$1"`
			sh(t, as, s.path("f"), `echo x >>"$1"`)
			sh(t, as, s.path("g"), `echo x >"$1"`)
			sh(t, as, s.path("h"), `chown 1234:1234 "$1"`)
			for _, n := range []string{"f", "g", "h"} {
				assert.Equal(t, uint32(0o777), lstat(t, s.path(n)).Mode&0o7777, n)
			}
			sh(t, `setcap cap_net_raw+ep "$1"; test -n "$(getcap "$1")"; echo x >>"$1"; test -z "$(getcap "$1")"`, s.path("f"))
		}
	})
	t.Run("read-only-mount", func(t *testing.T) {
		s := prepare(t, 1, "l0/f text").mount(t, union.Config{ReadOnly: true})
		assert.ErrorIs(t, os.WriteFile(s.path("f"), nil, 0o600), unix.EROFS)
		assert.ErrorIs(t, os.Mkdir(s.path("d"), 0o700), unix.EROFS)
		assert.Equal(t, "text", s.read(t, "f"))
	})
	t.Run("no-xattr", func(t *testing.T) {
		s := prepare(t, 1, "l0/f text").mount(t, union.Config{NoXattr: true})
		_, err := unix.Getxattr(s.path("f"), "user.x", nil)
		assert.ErrorIs(t, err, unix.EOPNOTSUPP)
	})
	t.Run("permissions-are-checked", func(t *testing.T) {
		s := prepare(t, 1, "l0/secret/f text", "l0/f text")
		require.NoError(t, os.Chmod(s.lower(0, "secret"), 0o700))
		require.NoError(t, os.Chmod(s.lower(0, "f"), 0o600))
		s.mount(t, union.Config{})
		s.read(t, "secret/f")
		sh(t, `setpriv --reuid 1234 --regid 1234 --clear-groups sh -c '! cat "$1/secret/f" && ! cat "$1/f" && ! rm -f "$1/f" && ls "$1"' sh "$1"`, s.mnt)
	})
	t.Run("mmap-and-exec", func(t *testing.T) {
		s := mustMount(t, 1)
		sh(t, `cp /bin/sh "$1/sh"; test "$("$1/sh" -c "echo hi")" = hi`, s.mnt)
		s.write(t, "m", strings.Repeat("a", 8192))
		f, err := os.OpenFile(s.path("m"), os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		require.NoError(t, err)
		m[5000] = 'Z'
		require.NoError(t, unix.Msync(m, unix.MS_SYNC))
		require.NoError(t, unix.Munmap(m))
		assert.Equal(t, byte('Z'), s.read(t, "m")[5000])
	})
}
