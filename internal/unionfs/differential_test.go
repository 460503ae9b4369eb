//go:build linux

package unionfs

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

func unixTime(s int64) time.Time { return time.Unix(s, 0) }

// An op is done to the union and to a plain directory; both must answer alike.
type op struct {
	name  string
	union func(u *user) error
	plain func(root string) error
}

func (o op) String() string { return o.name }

func randomOp(r *rand.Rand, k int) op {
	pick := func() string {
		p := ""
		for range 1 + r.IntN(3) {
			p += "/" + string(rune('a'+r.IntN(6)))
		}
		return p
	}
	a, b := pick(), pick()
	data := fmt.Sprint("data", k)
	when := unix.NsecToTimespec(int64(5000+k)*1e9 + 42)
	mtime := func(root, p string) {
		unix.UtimesNanoAt(unix.AT_FDCWD, root+p, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
	}
	stamp := func(u *user, p string) {
		u.on(p, func(n *Node) error {
			var st unix.Stat_t
			return u.fs.SetAttr(n, nil, &SetAttr{Atime: &when, Mtime: &when}, &st)
		})
	}
	rename := func(flags uint32) op {
		return op{
			fmt.Sprintf("rename(%s, %s, %d)", a, b, flags),
			func(u *user) error {
				return u.in(a, func(d1 *Node, n1 string) error {
					return u.in(b, func(d2 *Node, n2 string) error { return u.fs.Rename(d1, n1, d2, n2, flags) })
				})
			},
			func(root string) error {
				return unix.Renameat2(unix.AT_FDCWD, root+a, unix.AT_FDCWD, root+b, uint(flags))
			},
		}
	}
	// nofollow says whether the last component is a symbolic link, which the
	// engine's user does not follow and the calls on the plain directory would.
	write := func(flags int) op {
		return op{
			fmt.Sprintf("write(%s, %#x)", a, flags),
			func(u *user) error {
				err := u.write(a, data, flags)
				if err == nil {
					stamp(u, a)
				}
				return err
			},
			func(root string) error {
				f, err := os.OpenFile(root+a, os.O_WRONLY|flags|unix.O_NOFOLLOW, 0o644)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteString(data)
				mtime(root, a)
				return err
			},
		}
	}
	switch r.IntN(16) {
	case 0, 1:
		return write(os.O_CREATE)
	case 2:
		return write(os.O_APPEND)
	case 3:
		return write(os.O_CREATE | os.O_TRUNC)
	case 4:
		return op{"mkdir(" + a + ")", func(u *user) error {
			return u.in(a, func(d *Node, n string) error {
				var st unix.Stat_t
				k, err := u.fs.Mkdir(d, n, 0o755, Cred{}, &st)
				if err == nil {
					u.fs.Forget(k, 1)
				}
				return err
			})
		}, func(root string) error { return unix.Mkdir(root+a, 0o755) }}
	case 5, 6:
		return op{"unlink(" + a + ")", func(u *user) error { return u.in(a, u.fs.Unlink) },
			func(root string) error { return unix.Unlink(root + a) }}
	case 7:
		return op{"rmdir(" + a + ")", func(u *user) error { return u.in(a, u.fs.Rmdir) },
			func(root string) error { return unix.Rmdir(root + a) }}
	case 8, 9:
		return rename(0)
	case 10:
		return rename(unix.RENAME_NOREPLACE)
	case 11:
		return rename(unix.RENAME_EXCHANGE)
	case 12:
		return op{fmt.Sprintf("link(%s, %s)", a, b), func(u *user) error {
			return u.on(a, func(n *Node) error {
				return u.in(b, func(d *Node, name string) error {
					var st unix.Stat_t
					if n.IsDir() {
						if k, err := u.fs.Lookup(d, name, &st); err == nil {
							u.fs.Forget(k, 1)
							return unix.EEXIST // the kernel asks this first
						}
					}
					return u.fs.Link(n, d, name, &st)
				})
			})
		}, func(root string) error { return unix.Link(root+a, root+b) }}
	case 13:
		return op{"symlink(" + a + ")", func(u *user) error {
			return u.in(a, func(d *Node, n string) error {
				var st unix.Stat_t
				k, err := u.fs.Symlink(d, n, "to"+a, Cred{}, &st)
				if err == nil {
					u.fs.Forget(k, 1)
				}
				return err
			})
		}, func(root string) error { return unix.Symlink("to"+a, root+a) }}
	case 14:
		mode := uint32(0o600 + r.IntN(64))
		return op{fmt.Sprintf("chmod(%s, %o)", a, mode), func(u *user) error {
			return u.on(a, func(n *Node) error {
				if n.Type() == unix.S_IFLNK {
					return nil
				}
				var st unix.Stat_t
				return u.fs.SetAttr(n, nil, &SetAttr{Mode: &mode}, &st)
			})
		}, func(root string) error {
			if fi, err := os.Lstat(root + a); err == nil && fi.Mode()&os.ModeSymlink != 0 {
				return nil
			}
			return unix.Chmod(root+a, mode)
		}}
	default:
		uid := uint32(r.IntN(1000))
		return op{fmt.Sprintf("chown(%s, %d)", a, uid), func(u *user) error {
			return u.on(a, func(n *Node) error {
				var st unix.Stat_t
				return u.fs.SetAttr(n, nil, &SetAttr{UID: &uid, GID: &uid}, &st)
			})
		}, func(root string) error { return unix.Lchown(root+a, int(uid), int(uid)) }}
	}
}

func errText(err error) string {
	if err == nil {
		return "ok"
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return e.Error()
	}
	return err.Error()
}

// history runs one random history and compares after every step. EXDEV from
// the union is followed by a skip of the step on the plain side.
func history(t testing.TB, seed uint64, steps int, cfg func(*Config)) {
	historyOf(t, seed, steps, true, cfg)
}

func historyOf(t testing.TB, seed uint64, steps int, links bool, cfg func(*Config)) {
	r := rand.New(rand.NewPCG(seed, 1))
	base, err := os.MkdirTemp("/dev/shm", "unionfs")
	require.NoError(t, err)
	defer os.RemoveAll(base)
	nLower := 1 + r.IntN(3)
	plain := base + "/plain"
	var specs []BranchSpec
	require.NoError(t, os.Mkdir(base+"/rw", 0o755))
	specs = append(specs, BranchSpec{base + "/rw", RW})
	// The plain side is built by laying the branches over each other.
	for i := range nLower {
		require.NoError(t, os.Mkdir(fmt.Sprintf("%s/l%d", base, i), 0o755))
	}
	for i := range nLower {
		seedTree(t, r, fmt.Sprintf("%s/l%d", base, i), links)
		specs = append(specs, BranchSpec{fmt.Sprintf("%s/l%d", base, i), RO})
	}
	c := Config{Branches: specs}
	if cfg != nil {
		cfg(&c)
	}
	fs, _, err := Open(&c)
	require.NoError(t, err)
	u := &user{fs: fs}
	// A plain copy of the union as it is at first: what the random trees
	// merge to is checked by the lookup tests, here it is the start.
	copyOut(t, u, plain)
	var log []string
	check := func() {
		want, got := plainTree(t, plain), u.tree(t)
		for i := range max(len(want), len(got)) {
			var w, g line
			if i < len(want) {
				w = want[i]
			}
			if i < len(got) {
				g = got[i]
			}
			if g != w {
				t.Fatalf("seed %d after %s:\n plain %v\n union %v", seed, strings.Join(log, "\n"), w, g)
			}
		}
	}
	check()
	// Some nodes stay known, as a kernel keeps them.
	var kept []*Node
	for k := range steps {
		o := randomOp(r, k)
		if !links && strings.HasPrefix(o.name, "link") {
			continue
		}
		uerr := o.union(u)
		if uerr == unix.EXDEV {
			log = append(log, o.name+" = EXDEV")
			continue
		}
		perr := o.plain(plain)
		log = append(log, fmt.Sprintf("%s = %s", o.name, errText(uerr)))
		if errText(uerr) != errText(perr) {
			t.Fatalf("seed %d: %s: union %s, plain %s\n%s", seed, o, errText(uerr), errText(perr), strings.Join(log, "\n"))
		}
		if r.IntN(3) == 0 {
			p := "/" + string(rune('a'+r.IntN(6)))
			if n, err := u.walk(p); err == nil {
				kept = append(kept, n)
			}
		}
		if k%5 == 4 {
			check()
		}
	}
	check()
	for _, n := range kept {
		fs.Forget(n, 1)
	}
	require.Empty(t, fs.root.kids, "seed %d: nodes leaked", seed)
	// After a flush and a new mount everything is still the same.
	require.NoError(t, fs.FlushLinks())
	check()
	require.NoError(t, fs.Close())
	fs, rep, err := Open(&c)
	require.NoError(t, err)
	require.Empty(t, rep)
	u.fs = fs
	check()
	require.NoError(t, fs.Close())
}

// copyOut copies the union, hard links and all.
func copyOut(t testing.TB, u *user, to string) {
	t.Helper()
	require.NoError(t, os.Mkdir(to, 0o755))
	seen := map[uint64]string{}
	var walk func(n *Node, path string)
	walk = func(n *Node, path string) {
		ents, err := u.fs.ReadDir(n, 0)
		require.NoError(t, err)
		for i := range ents {
			p := path + "/" + ents[i].Name
			var st unix.Stat_t
			k, err := u.fs.Lookup(n, ents[i].Name, &st)
			require.NoError(t, err)
			switch k.Type() {
			case unix.S_IFDIR:
				require.NoError(t, os.Mkdir(to+p, 0o755))
				walk(k, p)
			case unix.S_IFLNK:
				target, err := u.fs.Readlink(k)
				require.NoError(t, err)
				require.NoError(t, os.Symlink(target, to+p))
			default:
				if first, ok := seen[st.Ino]; ok {
					require.NoError(t, os.Link(to+first, to+p))
					break
				}
				seen[st.Ino] = p
				s, err := u.read(p)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(to+p, []byte(s), 0o600))
			}
			if k.Type() != unix.S_IFLNK {
				require.NoError(t, os.Chmod(to+p, os.FileMode(st.Mode&0o777)))
				require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, to+p, []unix.Timespec{st.Atim, st.Mtim}, 0))
			}
			u.fs.Forget(k, 1)
		}
	}
	walk(u.fs.root, "")
}

// needRoot skips without root, which is a failure if LAYERFS_REQUIRE lists
// "union", or "aufs", whose engine this is.
func needRoot(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: what, Reason: "needs root"}, "union", "aufs", "root")
	}
}

func TestDifferentialPlain(t *testing.T) {
	needRoot(t, "chown")
	n := 300
	if testing.Short() {
		n = 30
	}
	if s := os.Getenv("LAYERFS_HISTORIES"); s != "" {
		_, err := fmt.Sscan(s, &n)
		require.NoError(t, err)
	}
	first := uint64(1)
	if s := os.Getenv("LAYERFS_SEED"); s != "" {
		_, err := fmt.Sscan(s, &first)
		require.NoError(t, err)
		n = 1
	}
	for seed := first; seed < first+uint64(n); seed++ {
		history(t, seed, 60, nil)
	}
}

// TestDifferentialOverlay is the same with the formats of overlayfs, whose
// copies break hard links, so the trees have none.
func TestDifferentialOverlay(t *testing.T) {
	needRoot(t, "trusted xattrs")
	for _, user := range []bool{false, true} {
		for seed := uint64(1); seed <= 150; seed++ {
			historyOf(t, seed, 60, false, func(c *Config) { c.Format = Overlay{User: user} })
		}
	}
}
