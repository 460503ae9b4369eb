// Package btrfstest makes random histories of changes for the tests of btrfs.
package btrfstest

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// History makes random changes in a tree: creations, writes, truncations, holes,
// clones, renames over and across directories and in exchange, links, removals,
// attributes, special files, and changes that end up where they began. The same
// seed gives the same history.
type History struct {
	Log []string // what was done since it was last emptied

	rng  *rand.Rand
	root string
}

// New returns the history of a seed in the directory root, which must not be
// shared. It changes nothing yet.
func New(seed uint64, root string) *History {
	return &History{rng: rand.New(rand.NewPCG(seed, 0)), root: root}
}

// N returns a random number below n.
func (h *History) N(n int) int { return h.rng.IntN(n) }

// Move says that the tree is at another path now.
func (h *History) Move(root string) { h.root = root }

// paths lists everything in the tree, the root first, in order.
func (h *History) paths() (all, dirs, files []string) {
	_ = filepath.WalkDir(h.root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, p)
		} else if d.Type().IsRegular() {
			files = append(files, p)
		}
		all = append(all, p)
		return nil
	})
	return all, dirs, files
}

func (h *History) pick(s []string) string {
	if len(s) == 0 {
		return h.root
	}
	return s[h.rng.IntN(len(s))]
}

// fresh is a path that may be taken: few names, so that they collide.
func (h *History) fresh(dirs []string) string {
	return filepath.Join(h.pick(dirs), "n"+strconv.Itoa(h.rng.IntN(7)))
}

func (h *History) bytes(n int) []byte {
	b := make([]byte, n+7)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], h.rng.Uint64())
	}
	return b[:n]
}

// Step makes one change. Errors are part of the game (EEXIST, EINVAL for a
// directory into itself): what was done is what counts.
func (h *History) Step() {
	all, dirs, files := h.paths()
	one, two, file := h.pick(all), h.pick(all), h.pick(files)
	var st unix.Stat_t
	_ = unix.Lstat(one, &st)
	keepTimes := func(p string, f func() error) error {
		var st unix.Stat_t
		_ = unix.Lstat(p, &st)
		err := f()
		_ = unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
		return err
	}
	var err error
	var what string
	switch k := h.rng.IntN(30); k {
	case 0, 1, 2:
		what = "create " + h.fresh(dirs)
		p := strings.TrimPrefix(what, "create ")
		err = h.pwrite(p, 0, h.bytes(h.rng.IntN(20000)))
	case 3, 4:
		p := h.fresh(dirs)
		what, err = "mkdir "+p, unix.Mkdir(p, 0o755)
	case 5:
		what, err = "write "+file, h.pwrite(file, int64(h.rng.IntN(100000)), h.bytes(1+h.rng.IntN(9000)))
	case 6:
		what, err = "truncate "+file, unix.Truncate(file, int64(h.rng.IntN(60000)))
	case 7, 8, 9:
		p := h.fresh(dirs)
		what, err = "rename "+one+" "+p, unix.Rename(one, p)
	case 10, 11:
		what, err = "rename "+one+" over "+two, unix.Rename(one, two)
	case 12, 13:
		what = "exchange " + one + " " + two
		err = unix.Renameat2(unix.AT_FDCWD, one, unix.AT_FDCWD, two, unix.RENAME_EXCHANGE)
	case 14, 15:
		p := h.fresh(dirs)
		what, err = "link "+file+" "+p, unix.Link(file, p)
	case 16, 17:
		what, err = "unlink "+one, unix.Unlink(one)
	case 18:
		if one != h.root { // an empty subvolume can be removed
			what, err = "rmdir "+one, unix.Rmdir(one)
		}
	case 19:
		if one != h.root {
			what, err = "rm -r "+one, os.RemoveAll(one)
		}
	case 20:
		what = "setxattr " + one
		err = unix.Lsetxattr(one, "trusted.t"+strconv.Itoa(h.rng.IntN(3)), h.bytes(h.rng.IntN(40)), 0)
	case 21:
		what, err = "removexattr "+one, unix.Lremovexattr(one, "trusted.t"+strconv.Itoa(h.rng.IntN(3)))
	case 22:
		what, err = "chmod "+one, unix.Fchmodat(unix.AT_FDCWD, one, uint32(h.rng.IntN(0o10000)), unix.AT_SYMLINK_NOFOLLOW)
	case 23:
		what, err = "chown "+one, unix.Lchown(one, h.rng.IntN(3), h.rng.IntN(3))
	case 24:
		p := h.fresh(dirs)
		kind := []uint32{unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK}[h.rng.IntN(4)]
		what, err = "mknod "+p, unix.Mknod(p, kind|0o600, h.rng.IntN(5))
	case 25:
		p := h.fresh(dirs)
		what, err = "symlink "+p, unix.Symlink("t"+strconv.Itoa(h.rng.IntN(4)), p)
	case 26:
		p := h.fresh(dirs)
		what = "sparse " + p
		if err = h.pwrite(p, int64(h.rng.IntN(1<<18)), h.bytes(100)); err == nil {
			err = unix.Truncate(p, int64(1<<18+h.rng.IntN(1<<18)))
		}
	case 27:
		p := h.fresh(dirs)
		what, err = "clone "+file+" "+p, clone(file, p)
	case 28:
		// Back to what it was, or nearly: only the comparison can tell.
		switch h.rng.IntN(4) {
		case 0:
			what = "rewrite " + file
			err = keepTimes(file, func() error {
				b, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				if err := unix.Unlink(file); err != nil {
					return err
				}
				return h.pwrite(file, 0, b)
			})
		case 1:
			what = "flip a byte of " + file
			err = keepTimes(file, func() error { return h.pwrite(file, 0, h.bytes(1)) })
		case 2:
			what = "chmod twice " + one
			err = unix.Fchmodat(unix.AT_FDCWD, one, 0o4711, unix.AT_SYMLINK_NOFOLLOW)
			_ = unix.Fchmodat(unix.AT_FDCWD, one, st.Mode&0o7777, unix.AT_SYMLINK_NOFOLLOW)
		case 3:
			tmp := filepath.Join(h.root, "swap")
			what = "rename twice " + one
			err = keepTimes(h.root, func() error {
				return keepTimes(filepath.Dir(one), func() error {
					if err := unix.Rename(one, tmp); err != nil {
						return err
					}
					return unix.Rename(tmp, one)
				})
			})
		}
	case 29:
		what = "punch " + file
		f, e := os.OpenFile(file, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err = e; err == nil {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(h.rng.IntN(8))<<12, int64(1+h.rng.IntN(8))<<12)
			_ = f.Close()
		}
	}
	if err == nil {
		h.Log = append(h.Log, strings.ReplaceAll(what, h.root, ""))
	}
}

func (h *History) pwrite(path string, off int64, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(b, off)
	return err
}

func clone(from, to string) error {
	src, err := os.OpenFile(from, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	defer dst.Close()
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
}

// Seeds returns the range of seeds of the histories that a test runs: from
// LAYERFS_SEED (1) on as many as LAYERFS_HISTORIES says, by default few, and a
// tenth of that with -short.
func Seeds(tb testing.TB, few int) (first, end uint64) {
	tb.Helper()
	number := func(name string, otherwise uint64) uint64 {
		s := os.Getenv(name)
		if s == "" {
			return otherwise
		}
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			tb.Fatalf("%s: %v", name, err)
		}
		return n
	}
	if testing.Short() {
		few = max(1, few/10)
	}
	first = number("LAYERFS_SEED", 1)
	return first, first + number("LAYERFS_HISTORIES", uint64(few))
}

// HiddenReplacement reports whether a file was replaced by an equal one between
// two trees, list being their changes. That is no change by the rules of
// [layerfs.Change], so a diff cannot have it, and the names that were links of
// the file may be others than before.
func HiddenReplacement(older, newer string, list []layerfs.Change) (found bool, err error) {
	changed := map[string]bool{}
	for _, c := range list {
		changed[c.Path] = true
	}
	err = filepath.WalkDir(newer, func(p string, e os.DirEntry, err error) error {
		path := strings.TrimPrefix(p, newer)
		if err != nil || e.IsDir() || changed[path] {
			return err
		}
		var was, is unix.Stat_t
		if unix.Lstat(older+path, &was) == nil && unix.Lstat(p, &is) == nil && was.Ino != is.Ino {
			found = true
		}
		return nil
	})
	return found, err
}
