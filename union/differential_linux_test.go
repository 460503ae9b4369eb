package union_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// A step does one thing below a root.
type step struct {
	name string
	do   func(root string) error
}

func randomStep(r *rand.Rand, k int, links bool) step {
	pick := func() string {
		p := ""
		for range 1 + r.IntN(3) {
			p += "/" + string(rune('a'+r.IntN(5)))
		}
		return p
	}
	a, b := pick(), pick()
	data := fmt.Sprint("data", k)
	when := []unix.Timespec{{Sec: int64(5000 + k)}, {Sec: int64(5000 + k), Nsec: 7}}
	open := func(root string, flags int, use func(fd int) error) error {
		fd, err := unix.Open(root+a, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o640)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := use(fd); err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, root+a, when, unix.AT_SYMLINK_NOFOLLOW)
	}
	write := func(flags int) step {
		return step{fmt.Sprintf("write(%s, %#x)", a, flags), func(root string) error {
			return open(root, flags, func(fd int) error {
				_, err := unix.Write(fd, []byte(data))
				return err
			})
		}}
	}
	rename := func(flags uint) step {
		return step{fmt.Sprintf("rename(%s, %s, %d)", a, b, flags), func(root string) error {
			return unix.Renameat2(unix.AT_FDCWD, root+a, unix.AT_FDCWD, root+b, flags)
		}}
	}
	switch n := r.IntN(20); n {
	case 0, 1:
		return write(unix.O_WRONLY | unix.O_CREAT)
	case 2:
		return write(unix.O_RDWR | unix.O_APPEND)
	case 3:
		return write(unix.O_WRONLY | unix.O_CREAT | unix.O_TRUNC)
	case 4:
		return write(unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL)
	case 5, 6:
		return step{"mkdir(" + a + ")", func(root string) error { return unix.Mkdir(root+a, 0o755) }}
	case 7, 8:
		return step{"unlink(" + a + ")", func(root string) error { return unix.Unlink(root + a) }}
	case 9, 10:
		return step{"rmdir(" + a + ")", func(root string) error { return unix.Rmdir(root + a) }}
	case 11, 12:
		return rename(0)
	case 13:
		return rename(unix.RENAME_NOREPLACE)
	case 14:
		return rename(unix.RENAME_EXCHANGE)
	case 15:
		if links {
			return step{fmt.Sprintf("link(%s, %s)", a, b), func(root string) error { return unix.Link(root+a, root+b) }}
		}
		fallthrough
	case 16:
		return step{"symlink(" + a + ")", func(root string) error { return unix.Symlink("to"+a, root+a) }}
	case 17:
		return step{"chmod(" + a + ")", func(root string) error {
			var st unix.Stat_t
			if err := unix.Lstat(root+a, &st); err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
				return err
			}
			return unix.Chmod(root+a, 0o600+uint32(k%64))
		}}
	case 18:
		return step{"setxattr(" + a + ")", func(root string) error { return unix.Lsetxattr(root+a, "trusted.t", []byte(data), 0) }}
	default:
		size := int64(r.IntN(10))
		return step{fmt.Sprintf("truncate(%s, %d)", a, size), func(root string) error {
			return open(root, unix.O_RDWR, func(fd int) error { return unix.Ftruncate(fd, size) })
		}}
	}
}

// shot describes a tree, one line a file.
func shot(t testing.TB, root string) string {
	t.Helper()
	var out []string
	group := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		require.NoError(t, err, p)
		rel := strings.TrimPrefix(p, root)
		if rel == "" {
			return nil
		}
		st := lstat(t, p)
		l := fmt.Sprintf("%s %o %d:%d", rel, st.Mode, st.Uid, st.Gid)
		x := make([]byte, 64)
		if n, err := unix.Lgetxattr(p, "trusted.t", x); err == nil {
			l += " t=" + string(x[:n])
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			require.NoError(t, err)
			if group[st.Ino] == "" {
				group[st.Ino] = rel
			}
			l += fmt.Sprintf(" %q %d.%d %d links with %s", b, st.Mtim.Sec, st.Mtim.Nsec, st.Nlink, group[st.Ino])
		case unix.S_IFLNK:
			s, err := os.Readlink(p)
			require.NoError(t, err)
			l += " -> " + s
		}
		out = append(out, l)
		return nil
	})
	require.NoError(t, err)
	sort.Strings(out)
	return strings.Join(out, "\n")
}

// TestDifferential does random histories to a mounted union, to a plain copy,
// and, without hard links, to kernel overlayfs with the same lower directory.
// What one of the unions refuses with EXDEV is skipped everywhere.
func TestDifferential(t *testing.T) {
	n := 40
	if testing.Short() {
		n = 8
	}
	if s := os.Getenv("LAYERFS_HISTORIES"); s != "" {
		_, err := fmt.Sscan(s, &n)
		require.NoError(t, err)
	}
	for i := range n {
		t.Run(fmt.Sprint("seed=", i), func(t *testing.T) { differ(t, uint64(i), i%2 == 0, i%4 < 2) })
	}
}

func differ(t *testing.T, seed uint64, links, pass bool) {
	r := rand.New(rand.NewPCG(seed, 99))
	s := prepare(t, 1)
	low := s.lower(0, "")
	for k := range 40 {
		st := randomStep(r, k, links)
		if !strings.HasPrefix(st.name, "rename") && !strings.HasPrefix(st.name, "unlink") {
			st.do(low)
		}
	}
	plain, over := s.dir+"/plain", s.dir+"/over"
	sh(t, `cp -a "$1" "$2"; mkdir "$3" "$3.rw" "$3.work"`, low, plain, over)
	s.mount(t, union.Config{NoPassthrough: !pass})
	roots := []string{s.mnt, plain}
	if !links {
		require.NoError(t, unix.Mount("overlay", over, "overlay", 0, "lowerdir="+low+",upperdir="+over+".rw,workdir="+over+".work"))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(over, 0)) })
		roots = []string{s.mnt, over, plain}
	}
	var log []string
	check := func() {
		want := shot(t, plain)
		for _, root := range roots[:len(roots)-1] {
			if got := shot(t, root); got != want {
				t.Fatalf("seed %d after\n%s\n%s:\n%s\nplain:\n%s", seed, strings.Join(log, "\n"), root, got, want)
			}
		}
	}
	check()
	for k := range 80 {
		st := randomStep(r, 100+k, links)
		var errs []error
		for i, root := range roots {
			err := st.do(root)
			if errors.Is(err, unix.EXDEV) {
				if i > 0 {
					// The union did it. The rest of this history would differ.
					return
				}
				break
			}
			errs = append(errs, err)
		}
		log = append(log, fmt.Sprint(st.name, " = ", errs))
		if len(errs) == 0 {
			continue
		}
		for _, err := range errs {
			if !errors.Is(err, errs[len(errs)-1]) && err != errs[len(errs)-1] {
				t.Fatalf("seed %d: %s: %v (last is plain)\n%s", seed, st.name, errs, strings.Join(log, "\n"))
			}
		}
		if k%8 == 7 {
			check()
		}
	}
	check()
	require.NoError(t, s.Unmount(bg))
	h, err := union.Mount(bg, s.mnt, &union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: low}}})
	require.NoError(t, err)
	check()
	require.NoError(t, h.Unmount(bg))
}
