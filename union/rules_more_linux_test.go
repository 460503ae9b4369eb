package union_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// More of the rules, by section as in rules_linux_test.go.

func TestBranchLimits(t *testing.T) {
	t.Run("O2/rr-is-not-watched", func(t *testing.T) {
		s := prepare(t, 2, "l0/a x", "l1/b x")
		s.mount(t, union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.RR}, {Path: s.lower(1, "")}}})
		names(t, s.mnt)
		assert.True(t, missing(s.path("c")))
		assert.True(t, missing(s.path("d")))
		build(t, s.dir, "l0/c x", "l1/d x")
		require.NoError(t, s.Sync(bg))
		assert.True(t, missing(s.path("c")))
		assert.Equal(t, "x", s.read(t, "d"))
	})
	t.Run("O5/500-branches", func(t *testing.T) {
		const n = 500
		s := prepare(t, n, fmt.Sprintf("l%d/deep/f bottom", n-1), "l0/deep/g top", fmt.Sprintf("l%d/deep/h middle", n/2))
		s.mount(t, union.Config{})
		assert.Equal(t, []string{"f", "g", "h"}, names(t, s.path("deep")))
		assert.Equal(t, "bottom", s.read(t, "deep/f"))
		s.write(t, "deep/f", "changed")
		assert.Equal(t, "changed", s.read(t, "deep/f"))
		require.NoError(t, os.Remove(s.path("deep/f")))
		assert.True(t, missing(s.path("deep/f")))
		assert.Len(t, s.Branches(), n+1)
	})
}

func TestCreateFurther(t *testing.T) {
	t.Run("B1/on-the-writable-branch", func(t *testing.T) {
		s := mustMount(t, 2, "l0/d/e/a x", "l1/d/e/b x", "l1/o/c x")
		for _, p := range []string{"d/e/new", "o/new", "new"} {
			s.write(t, p, "x")
			assert.False(t, missing(s.rw(p)), p)
		}
		assert.Equal(t, []string{"d", "new", "o"}, branchNames(t, s.rw("")))
		assert.Equal(t, []string{"d"}, names(t, s.lower(0, "")))
		assert.Equal(t, []string{"d", "o"}, names(t, s.lower(1, "")))
	})
	t.Run("B1/on-the-topmost-of-several", func(t *testing.T) {
		s := prepare(t, 2, "l0/d/mid x", "l0/.wh.gone ", "l1/gone x", "l1/d/low x", "l1/d/lower x")
		s.mount(t, union.Config{Branches: []union.Branch{
			{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.RW}, {Path: s.lower(1, "")},
		}})
		// Also where only a lower branch has the directory, or a whiteout.
		s.write(t, "d/new", "x")
		s.write(t, "gone", "y")
		assert.Equal(t, []string{"d", "gone"}, branchNames(t, s.rw("")))
		assert.Equal(t, []string{"new"}, names(t, s.rw("d")))
		assert.Equal(t, []string{".wh.gone", "d"}, branchNames(t, s.lower(0, "")))
		// What lies on a writable branch is changed there; what lies below all
		// is copied to the topmost, and goes by a whiteout there.
		s.write(t, "d/mid", "changed")
		s.write(t, "d/low", "changed")
		require.NoError(t, os.Remove(s.path("d/lower")))
		assert.Equal(t, []string{".wh.lower", "low", "new"}, names(t, s.rw("d")))
		assert.Equal(t, []string{"mid"}, names(t, s.lower(0, "d")))
		b, err := os.ReadFile(s.lower(0, "d/mid"))
		require.NoError(t, err)
		assert.Equal(t, "changed", string(b))
		assert.Equal(t, []string{"low", "mid", "new"}, names(t, s.path("d")))
		assert.Equal(t, "y", s.read(t, "gone"))
	})
}

func TestCopyUpFurther(t *testing.T) {
	t.Run("B5/ancestors-that-the-caller-may-not-write", func(t *testing.T) {
		s := prepare(t, 1, "l0/a/b/f x")
		require.NoError(t, os.Chown(s.lower(0, "a/b/f"), 1234, 1234))
		s.mount(t, union.Config{})
		as := `setpriv --reuid 1234 --regid 1234 --clear-groups sh -ec "$2" sh "$1"`
		sh(t, as, s.path("a/b"), `echo mine >"$1/f"; ! touch "$1/new" 2>/dev/null; ! rm -f "$1/f" 2>/dev/null`)
		assert.Equal(t, "mine\n", s.read(t, "a/b/f"))
		for _, d := range []string{"a", "a/b"} {
			st := lstat(t, s.rw(d))
			assert.Equal(t, []uint32{0, 0, 0o755}, []uint32{st.Uid, st.Gid, st.Mode & 0o7777}, d)
		}
	})
	t.Run("B10/locks-survive", func(t *testing.T) {
		for _, pass := range []bool{true, false} {
			s := prepare(t, 1, "l0/f x").mount(t, union.Config{NoPassthrough: !pass})
			old, err := os.Open(s.path("f"))
			require.NoError(t, err)
			defer old.Close()
			require.NoError(t, unix.Flock(int(old.Fd()), unix.LOCK_EX))
			require.NoError(t, os.Chmod(s.path("f"), 0o600)) // copies up
			o, err := os.Open(s.path("f"))
			require.NoError(t, err)
			defer o.Close()
			err = unix.Flock(int(o.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if pass && s.Stats().Passthrough {
				assert.NoError(t, err) // as said in the package comment
			} else {
				assert.ErrorIs(t, err, unix.EWOULDBLOCK)
			}
			// Locks of those who opened the copy meet.
			n, err := os.Open(s.path("f"))
			require.NoError(t, err)
			defer n.Close()
			require.NoError(t, old.Close())
			require.NoError(t, unix.Flock(int(o.Fd()), unix.LOCK_EX))
			assert.ErrorIs(t, unix.Flock(int(n.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
		}
	})
	t.Run("times-and-owner-of-a-link", func(t *testing.T) {
		s := mustMount(t, 1, "l0/l -> nowhere")
		when := []unix.Timespec{{Sec: 5, Nsec: 6}, {Sec: 7, Nsec: 8}}
		require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, s.path("l"), when, unix.AT_SYMLINK_NOFOLLOW))
		up := lstat(t, s.rw("l"))
		assert.Equal(t, when[1], up.Mtim)
		got, err := os.Readlink(s.rw("l"))
		require.NoError(t, err)
		assert.Equal(t, "nowhere", got)
	})
}

func TestLinksFurther(t *testing.T) {
	t.Run("B7/a-branch-added-later-does-not-follow", func(t *testing.T) {
		s := prepare(t, 1, "l0/a text", "l0/b = a", "late/c other").mount(t, union.Config{})
		s.write(t, "a", "changed")
		require.NoError(t, s.Append(bg, union.Branch{Path: s.dir + "/late"}))
		assert.Equal(t, "changed", s.read(t, "b"))
		assert.Equal(t, "other", s.read(t, "c"))
	})
}

// TestFlush checks rule 7 B3 and its O4: links that are known in memory only
// are made real when the union ends, however it does.
func TestFlush(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, s *stage)
	}{
		{"B3-O4/Unmount", func(t *testing.T, s *stage) { require.NoError(t, s.Unmount(bg)) }},
		{"B3-O4/umount(2)", func(t *testing.T, s *stage) { require.NoError(t, unix.Unmount(s.mnt, 0)) }},
		{"B3-O4/Detach", func(t *testing.T, s *stage) {
			f, err := os.Open(s.path("d/b"))
			require.NoError(t, err)
			require.NoError(t, unix.Unmount(s.mnt, unix.MNT_DETACH))
			require.NoError(t, f.Close())
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := mustMount(t, 1, "l0/a text", "l0/d/b = a", "l0/e/c = a")
			s.write(t, "a", "changed")
			require.NoError(t, os.Remove(s.path("e/c")))
			assert.True(t, missing(s.rw("d/b")))
			tt.end(t, s)
			select {
			case <-s.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the union does not end")
			}
			a, b := lstat(t, s.rw("a")), lstat(t, s.rw("d/b"))
			assert.Equal(t, a.Ino, b.Ino)
			assert.EqualValues(t, 2, a.Nlink)
			assert.Empty(t, names(t, s.rw(".wh..wh.plnk")))
			// Nothing is left to mend, and the names are one file.
			s.mount(t, union.Config{})
			assert.Empty(t, s.Repaired())
			s.write(t, "d/b", "again")
			assert.Equal(t, "again", s.read(t, "a"))
			assert.EqualValues(t, 2, lstat(t, s.path("a")).Nlink)
			assert.True(t, missing(s.path("e/c")))
		})
	}
	t.Run("B3/without-plinks-the-other-names-keep-the-lower-content", func(t *testing.T) {
		s := prepare(t, 1, "l0/a text", "l0/b = a").mount(t, union.Config{})
		s.write(t, "a", "changed")
		assert.Equal(t, "changed", s.read(t, "b"))
		require.NoError(t, s.Unmount(bg))
		// What an unmount without the flush would have left.
		require.NoError(t, os.Remove(s.rw("b")))
		s.mount(t, union.Config{})
		assert.Equal(t, "changed", s.read(t, "a"))
		assert.Equal(t, "text", s.read(t, "b"))
	})
}

func TestRenameFurther(t *testing.T) {
	t.Run("B6-B8/a-failure-changes-nothing", func(t *testing.T) {
		s := mustMount(t, 1, "l0/d/sub/x x", "l0/e/y y", "rw/up/z z", "l0/f f")
		before := shot(t, s.mnt)
		for _, r := range [][2]string{{"up", "e"}, {"up", "f"}, {"f", "e"}, {"d", "new"}, {"up", "up/in"}, {"none", "f"}, {"up", "nodir/x"}} {
			assert.Error(t, unix.Rename(s.path(r[0]), s.path(r[1])), "%v", r)
			assert.Equal(t, before, shot(t, s.mnt), "%v", r)
		}
		for _, n := range branchNames(t, s.rw("")) {
			assert.False(t, strings.HasPrefix(n, ".wh."), n)
		}
	})
}

func TestSeveralWritable(t *testing.T) {
	t.Run("8-B6/links-and-renames-stay-where-the-source-is", func(t *testing.T) {
		s := prepare(t, 2, "rw/e/", "l0/g text", "l0/h text", "l1/low text")
		s.mount(t, union.Config{Branches: []union.Branch{
			{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.RW}, {Path: s.lower(1, "")},
		}})
		require.NoError(t, os.Link(s.path("g"), s.path("e/g2")))
		require.NoError(t, os.Rename(s.path("h"), s.path("e/h2")))
		require.NoError(t, os.Link(s.path("low"), s.path("e/low2")))
		s.write(t, "g", "changed")
		assert.Equal(t, "changed", s.read(t, "e/g2"))
		assert.EqualValues(t, 2, lstat(t, s.path("g")).Nlink)
		assert.Equal(t, []string{"g2", "h2"}, names(t, s.lower(0, "e")))
		assert.Equal(t, []string{"low2"}, names(t, s.rw("e")))
		assert.Equal(t, []string{"g2", "h2", "low2"}, names(t, s.path("e")))
	})
	for _, tt := range []struct{ name, mark string }{
		{"an-opaque-directory", "rw/d/.wh..wh..opq "},
		{"a-whiteout-of-the-directory", "l0/.wh.d "},
		{"a-whiteout-of-the-name", "rw/d/.wh.new "},
	} {
		t.Run("8-B6/nothing-goes-out-of-sight-below-"+tt.name, func(t *testing.T) {
			s := prepare(t, 2, "rw/d/", tt.mark, "l1/f text")
			s.mount(t, union.Config{Branches: []union.Branch{
				{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, ""), Perm: union.ROWH}, {Path: s.lower(1, ""), Perm: union.RW},
			}})
			before := shot(t, s.mnt)
			assert.ErrorIs(t, unix.Rename(s.path("f"), s.path("d/new")), unix.EXDEV)
			assert.ErrorIs(t, unix.Link(s.path("f"), s.path("d/new")), unix.EXDEV)
			assert.Equal(t, before, shot(t, s.mnt))
			sh(t, `mv "$1/f" "$1/d/new"`, s.mnt) // which copies then
			assert.Equal(t, "text", s.read(t, "d/new"))
			assert.False(t, missing(s.rw("d/new")))
		})
	}
	t.Run("5-B1/nothing-is-made-out-of-sight", func(t *testing.T) {
		s := prepare(t, 2, "l0/d/.wh..wh..opq ", "l0/d/seen x", "l0/.wh.gone ", "l1/d/hidden x", "l1/gone x", "l1/f x")
		s.mount(t, union.Config{Branches: []union.Branch{
			{Path: s.lower(0, ""), Perm: union.ROWH}, {Path: s.rw(""), Perm: union.RW}, {Path: s.lower(1, "")},
		}})
		for what, err := range map[string]error{
			"create":  os.WriteFile(s.path("d/new"), nil, 0o600),
			"mkdir":   os.Mkdir(s.path("d/new"), 0o700),
			"symlink": os.Symlink("x", s.path("d/new")),
			"rename":  unix.Rename(s.path("f"), s.path("d/new")),
			"link":    unix.Link(s.path("f"), s.path("d/new")),
			"over":    os.WriteFile(s.path("gone"), nil, 0o600),
		} {
			assert.ErrorIs(t, err, unix.EROFS, what)
		}
		assert.Equal(t, []string{"seen"}, names(t, s.path("d")))
		assert.True(t, missing(s.rw("d")))
		s.write(t, "new", "x")
		assert.Equal(t, []string{"d", "f", "new"}, names(t, s.mnt))
	})
}

func TestInodeNumbers(t *testing.T) {
	t.Run("B1-B2/different-files-have-different-numbers", func(t *testing.T) {
		// Branches on file systems whose own numbers are the same.
		s := prepare(t, 2)
		for i := range 2 {
			require.NoError(t, unix.Mount("tmpfs", s.lower(i, ""), "tmpfs", 0, ""))
			t.Cleanup(func() { require.NoError(t, unix.Unmount(s.lower(i, ""), 0)) })
			for k := range 20 {
				build(t, s.dir, fmt.Sprintf("l%d/f%d-%d x", i, i, k))
			}
		}
		s.mount(t, union.Config{})
		seen := map[uint64]string{}
		for _, n := range names(t, s.mnt) {
			ino := lstat(t, s.path(n)).Ino
			assert.Empty(t, seen[ino], n)
			seen[ino] = n
		}
		assert.Len(t, seen, 40)
		for ino, n := range seen {
			require.NoError(t, os.Chmod(s.path(n), 0o600))
			assert.Equal(t, ino, lstat(t, s.path(n)).Ino, n)
		}
	})
}

// TestInodeNumbersStay checks what rule 9 [D] has beyond AUFS: files that were
// never copied up have their numbers again at the next mount.
func TestInodeNumbersStay(t *testing.T) {
	t.Run("D/across-mounts", func(t *testing.T) {
		s := prepare(t, 2, "l0/a x", "l0/d/b x", "l0/d/l -> b", "l0/h = a", "rw/up/f x", "l0/copied x")
		require.NoError(t, unix.Mount("tmpfs", s.lower(1, ""), "tmpfs", 0, ""))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(s.lower(1, ""), 0)) })
		build(t, s.dir, "l1/other x", "l1/m/f x")
		numbers := func(order func([]string)) map[string]uint64 {
			files := []string{".", "a", "h", "d", "d/b", "d/l", "up", "up/f", "other", "m", "m/f"}
			order(files)
			m := map[string]uint64{}
			for _, n := range files {
				m[n] = lstat(t, s.path(n)).Ino
			}
			return m
		}
		s.mount(t, union.Config{})
		first := numbers(slices.Sort)
		assert.Equal(t, first["a"], first["h"])
		s.write(t, "copied", "changed")
		s.write(t, "new", "x")
		for _, cfg := range []union.Config{{}, {NoPassthrough: true}, {UDBA: union.None}} {
			require.NoError(t, s.Unmount(bg))
			s.mount(t, cfg)
			// Whatever is looked up first.
			assert.Equal(t, first, numbers(slices.Reverse))
		}
	})
}

func TestOptions(t *testing.T) {
	t.Run("O6/statfs", func(t *testing.T) {
		for _, sum := range []bool{false, true} {
			s := prepare(t, 1)
			require.NoError(t, unix.Mount("tmpfs", s.lower(0, ""), "tmpfs", 0, "size=64m"))
			s.mount(t, union.Config{SumFree: sum})
			var rw, low, st unix.Statfs_t
			require.NoError(t, unix.Statfs(s.rw(""), &rw))
			require.NoError(t, unix.Statfs(s.lower(0, ""), &low))
			require.NoError(t, unix.Statfs(s.mnt, &st))
			want := rw.Blocks
			if sum {
				want += low.Blocks
			}
			assert.Equal(t, want, st.Blocks)
			require.NoError(t, s.Unmount(bg))
			require.NoError(t, unix.Unmount(s.lower(0, ""), 0))
		}
	})
}

func TestDirectAccess(t *testing.T) {
	t.Run("B1/none-trusts-caches", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/a x").mount(t, union.Config{UDBA: union.None})
		assert.True(t, missing(s.path("d/b")))
		build(t, s.dir, "l0/d/b x")
		time.Sleep(1200 * time.Millisecond)
		assert.True(t, missing(s.path("d/b")))
	})
	t.Run("B2/reval-shows-after-a-second", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/a x").mount(t, union.Config{UDBA: union.Reval})
		assert.True(t, missing(s.path("d/b")))
		assert.EqualValues(t, 0o644, lstat(t, s.path("d/a")).Mode&0o777)
		build(t, s.dir, "l0/d/b x")
		require.NoError(t, os.Chmod(s.lower(0, "d/a"), 0o600))
		require.Eventually(t, func() bool {
			return !missing(s.path("d/b")) && lstat(t, s.path("d/a")).Mode&0o777 == 0o600
		}, 3*time.Second, 20*time.Millisecond)
	})
	t.Run("B4/content-is-that-of-the-branch", func(t *testing.T) {
		for _, udba := range []union.UDBA{union.None, union.Notify, union.Reval, union.Strict} {
			s := prepare(t, 1, "l0/f "+strings.Repeat("a", 8192)).mount(t, union.Config{UDBA: udba})
			f, err := os.Open(s.path("f"))
			require.NoError(t, err)
			defer f.Close()
			m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
			require.NoError(t, err)
			defer unix.Munmap(m)
			assert.Equal(t, byte('a'), m[5000])
			w, err := os.OpenFile(s.lower(0, "f"), os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = w.WriteAt([]byte("Z"), 5000)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			if !s.Stats().Passthrough {
				continue // the kernel has pages of its own then
			}
			var b [1]byte
			_, err = f.ReadAt(b[:], 5000)
			require.NoError(t, err)
			assert.Equal(t, "Z", string(b[:]), string(udba))
			assert.Equal(t, byte('Z'), m[5000], string(udba))
		}
	})
	t.Run("B5/a-lower-directory-that-was-copied-up-goes-away", func(t *testing.T) {
		s := prepare(t, 1, "l0/d/low x", "l0/d/e/low x").mount(t, union.Config{})
		s.write(t, "d/e/up", "mine")
		require.NoError(t, os.RemoveAll(s.lower(0, "d")))
		require.NoError(t, s.Sync(bg))
		assert.Equal(t, []string{"e"}, names(t, s.path("d")))
		assert.Equal(t, []string{"up"}, names(t, s.path("d/e")))
		assert.Equal(t, "mine", s.read(t, "d/e/up"))
		s.write(t, "d/new", "x")
		require.NoError(t, os.RemoveAll(s.path("d")))
		assert.Empty(t, names(t, s.mnt))
	})
}

func TestManagementFurther(t *testing.T) {
	t.Run("B5/another-type-put-in-front", func(t *testing.T) {
		s := prepare(t, 1, "l0/x file", "top/x/in x").mount(t, union.Config{})
		f, err := os.Open(s.path("x"))
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, s.Prepend(bg, union.Branch{Path: s.dir + "/top"}))
		assert.Equal(t, []string{"in"}, names(t, s.path("x")))
		b := make([]byte, 4)
		if _, err := f.ReadAt(b, 0); err == nil {
			assert.Equal(t, "file", string(b)) // never a mixture
		} else {
			assert.ErrorIs(t, err, unix.EIO)
		}
	})
	t.Run("B4/each-change-is-one-and-a-failed-one-is-none", func(t *testing.T) {
		s := prepare(t, 1, "l0/a 0", "late/b L", "used/c U").mount(t, union.Config{})
		used, late := s.dir+"/used", s.dir+"/late"
		o := prepare(t, 0)
		o.mount(t, union.Config{Branches: []union.Branch{{Path: o.rw(""), Perm: union.RW}, {Path: used, Perm: union.RW}}})
		open, err := os.Create(s.path("w"))
		require.NoError(t, err)
		defer open.Close()
		want := s.Branches()
		for _, step := range []struct {
			name string
			do   func() error
			err  error
			more []union.Branch
		}{
			{"add", func() error { return s.Append(bg, union.Branch{Path: late}) }, nil, []union.Branch{{Path: late, Perm: union.RO}}},
			{"add-again", func() error { return s.Prepend(bg, union.Branch{Path: late}) }, unix.EINVAL, nil},
			{"add-what-another-union-writes", func() error { return s.Append(bg, union.Branch{Path: used, Perm: union.RW}) }, unix.EBUSY, nil},
			{"add-it-read-only", func() error { return s.Append(bg, union.Branch{Path: used}) }, nil, []union.Branch{{Path: used, Perm: union.RO}}},
			{"make-it-writable", func() error { return s.Modify(bg, used, union.RW) }, unix.EBUSY, nil},
			{"make-the-top-read-only-while-open", func() error { return s.Modify(bg, s.rw(""), union.RO) }, unix.EBUSY, nil},
			{"delete-it-while-open", func() error { return s.Delete(bg, s.rw("")) }, unix.EBUSY, nil},
			{"delete-what-is-not-there", func() error { return s.Delete(bg, s.dir+"/none") }, unix.ENOENT, nil},
		} {
			assert.ErrorIs(t, step.do(), step.err, step.name)
			want = append(want, step.more...)
			assert.Equal(t, want, s.Branches(), step.name)
			_, err := open.WriteString("x")
			assert.NoError(t, err, step.name)
			s.write(t, "after", step.name)
			assert.Equal(t, step.name, s.read(t, "after"))
		}
		assert.Equal(t, []string{"a", "after", "b", "c", "w"}, names(t, s.mnt))
		o.write(t, "c", "changed") // the other union's still
		assert.Equal(t, "changed", o.read(t, "c"))
	})
	t.Run("B2/a-working-directory-does-not-block", func(t *testing.T) {
		s := prepare(t, 2, "l0/d/a x", "l1/d/b x").mount(t, union.Config{})
		d, err := os.Open(s.path("d"))
		require.NoError(t, err)
		defer d.Close()
		require.Eventually(t, func() bool { return s.Delete(bg, s.lower(1, "")) == nil }, 5*time.Second, 10*time.Millisecond)
		assert.Equal(t, []string{"a"}, names(t, s.path("d")))
	})
}

func TestOtherFurther(t *testing.T) {
	for _, pass := range []bool{true, false} {
		t.Run(map[bool]string{true: "passthrough", false: "served"}[pass], func(t *testing.T) {
			s := prepare(t, 1, "l0/f text").mount(t, union.Config{NoPassthrough: !pass})
			t.Run("B1/space-and-holes", func(t *testing.T) {
				f, err := os.Create(s.path("sparse"))
				require.NoError(t, err)
				defer f.Close()
				fd := int(f.Fd())
				require.NoError(t, unix.Fallocate(fd, 0, 0, 1<<20))
				require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 0, 1<<20))
				_, err = f.WriteAt([]byte("end"), 1<<20-3)
				require.NoError(t, err)
				at, err := unix.Seek(fd, 0, unix.SEEK_DATA)
				require.NoError(t, err)
				assert.EqualValues(t, 1<<20-4096, at)
				at, err = unix.Seek(fd, 0, unix.SEEK_HOLE)
				require.NoError(t, err)
				assert.Zero(t, at)
			})
			t.Run("B1/O_TMPFILE-and-linkat", func(t *testing.T) {
				fd, err := unix.Open(s.mnt, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
				require.NoError(t, err)
				defer unix.Close(fd)
				_, err = unix.Write(fd, []byte("nameless"))
				require.NoError(t, err)
				err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, s.path("named"), unix.AT_SYMLINK_FOLLOW)
				require.NoError(t, err)
				assert.Equal(t, "nameless", s.read(t, "named"))
				assert.EqualValues(t, 1, lstat(t, s.path("named")).Nlink)
			})
			t.Run("B3/fsync-of-a-reader", func(t *testing.T) {
				f, err := os.Open(s.path("f"))
				require.NoError(t, err)
				defer f.Close()
				require.NoError(t, f.Sync())
				assert.True(t, missing(s.rw("f")))
			})
			t.Run("B4/endpoints-of-a-fifo-stay-joined", func(t *testing.T) {
				require.NoError(t, unix.Mkfifo(s.lower(0, fmt.Sprint("fifo", pass)), 0o600))
				require.NoError(t, s.Sync(bg))
				p := s.path(fmt.Sprint("fifo", pass))
				a, err := unix.Open(p, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
				require.NoError(t, err)
				defer unix.Close(a)
				b, err := unix.Open(p, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
				require.NoError(t, err)
				defer unix.Close(b)
				require.NoError(t, os.Chmod(p, 0o644)) // copies it up
				_, err = unix.Write(a, []byte("through"))
				require.NoError(t, err)
				buf := make([]byte, 16)
				n, err := unix.Read(b, buf)
				require.NoError(t, err)
				assert.Equal(t, "through", string(buf[:n]))
			})
			t.Run("B6/unlinked-but-open", func(t *testing.T) {
				s.write(t, "gone", "content")
				f, err := os.OpenFile(s.path("gone"), os.O_RDWR, 0)
				require.NoError(t, err)
				defer f.Close()
				require.NoError(t, os.Remove(s.path("gone")))
				var st unix.Stat_t
				require.NoError(t, unix.Fstat(int(f.Fd()), &st))
				assert.Zero(t, st.Nlink)
				_, err = f.WriteAt([]byte("C"), 0)
				require.NoError(t, err)
				again, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
				require.NoError(t, err)
				defer again.Close()
				b := make([]byte, 7)
				_, err = again.ReadAt(b, 0)
				require.NoError(t, err)
				assert.Equal(t, "Content", string(b))
				require.NoError(t, f.Truncate(3))
				fi, err := f.Stat()
				require.NoError(t, err)
				assert.EqualValues(t, 3, fi.Size())
			})
		})
	}
}
