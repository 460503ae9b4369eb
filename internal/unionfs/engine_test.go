//go:build linux

package unionfs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func mustOpen(t testing.TB, cfg *Config) *FS {
	t.Helper()
	fs, _, err := Open(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		if fs.stack != nil {
			require.NoError(t, fs.Close())
		}
	})
	return fs
}

// A user does what a kernel would do with an FS, by path.
type user struct {
	fs   *FS
	open map[string]*File
}

// walk returns the node at path, which its caller forgets.
func (u *user) walk(path string) (*Node, error) {
	n := u.fs.root
	n.refs.Add(1)
	for _, c := range strings.Split(path, "/") {
		if c == "" || c == "." {
			continue
		}
		var st unix.Stat_t
		if !n.IsDir() {
			defer u.fs.Forget(n, 1)
			return nil, notDir(n)
		}
		k, err := u.fs.Lookup(n, c, &st)
		u.fs.Forget(n, 1)
		if err != nil {
			return nil, err
		}
		n = k
	}
	return n, nil
}

func (u *user) in(path string, f func(dir *Node, name string) error) error {
	d, err := u.walk(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer u.fs.Forget(d, 1)
	if !d.IsDir() {
		return notDir(d)
	}
	return f(d, filepath.Base(path))
}

// notDir is what a path through n ends with; all symbolic links dangle.
func notDir(n *Node) error {
	if n.Type() == unix.S_IFLNK {
		return unix.ENOENT
	}
	return unix.ENOTDIR
}

func (u *user) on(path string, f func(n *Node) error) error {
	n, err := u.walk(path)
	if err != nil {
		return err
	}
	defer u.fs.Forget(n, 1)
	return f(n)
}

func (u *user) write(path, data string, flags int) error {
	return u.in(path, func(d *Node, name string) error {
		var st unix.Stat_t
		n, err := u.fs.Lookup(d, name, &st)
		var f *File
		switch {
		case err == unix.ENOENT && flags&unix.O_CREAT != 0:
			n, f, err = u.fs.Create(d, name, unix.O_RDWR, 0o644, Cred{}, &st)
		case err == nil && flags&unix.O_EXCL != 0:
			u.fs.Forget(n, 1)
			return unix.EEXIST
		case err == nil && n.Type() == unix.S_IFLNK:
			u.fs.Forget(n, 1)
			return unix.ELOOP
		case err == nil && n.IsDir():
			u.fs.Forget(n, 1)
			return unix.EISDIR
		case err == nil:
			f, err = u.fs.OpenFile(n, unix.O_WRONLY|flags&(unix.O_TRUNC|unix.O_APPEND), false)
		}
		if n != nil {
			defer u.fs.Forget(n, 1)
		}
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = unix.Write(f.FD(), []byte(data))
		return err
	})
}

func (u *user) read(path string) (string, error) {
	var out string
	err := u.on(path, func(n *Node) error {
		if n.IsDir() {
			return unix.EISDIR
		}
		f, err := u.fs.OpenFile(n, unix.O_RDONLY, false)
		if err != nil {
			return err
		}
		defer f.Close()
		buf := make([]byte, 1<<16)
		k, err := unix.Pread(f.FD(), buf, 0)
		out = string(buf[:max(k, 0)])
		return err
	})
	return out, err
}

// A tree says what a directory tree looks like, one line a file.
type line struct {
	path, what string
	nlink      uint64 // of a regular file
}

// group names hard links by their first path.
type groups map[uint64]string

func (g groups) of(ino uint64, path string) string {
	if p, ok := g[ino]; ok {
		return p
	}
	g[ino] = path
	return path
}

func describe(st *unix.Stat_t, content, link string, g groups, path string) string {
	s := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		s += fmt.Sprintf(" %q mtime=%d.%d same=%s", content, st.Mtim.Sec, st.Mtim.Nsec, g.of(st.Ino, path))
	case unix.S_IFLNK:
		s += " -> " + link
	}
	return s
}

func regular(st *unix.Stat_t) uint64 {
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return uint64(st.Nlink)
	}
	return 0
}

func (u *user) tree(t testing.TB) []line {
	t.Helper()
	var out []line
	g := groups{}
	var walk func(n *Node, path string)
	walk = func(n *Node, path string) {
		ents, err := u.fs.ReadDir(n, 0)
		require.NoError(t, err, path)
		ents = slices.Clone(ents)
		slices.SortFunc(ents, func(a, b DirEntry) int { return strings.Compare(a.Name, b.Name) })
		for i := range ents {
			p := path + "/" + ents[i].Name
			var st, st2 unix.Stat_t
			k, err := u.fs.Lookup(n, ents[i].Name, &st)
			require.NoError(t, err, p)
			require.NoError(t, u.fs.GetAttr(k, &st2), p)
			require.Equal(t, ents[i].Ino, st.Ino, "d_ino of %s", p)
			require.Equal(t, st.Ino, st2.Ino, p)
			require.Equal(t, st.Nlink, st2.Nlink, p)
			var content, target string
			switch k.Type() {
			case unix.S_IFREG:
				content, err = u.read(p)
				require.NoError(t, err, p)
			case unix.S_IFLNK:
				target, err = u.fs.Readlink(k)
				require.NoError(t, err, p)
			}
			out = append(out, line{p, describe(&st2, content, target, g, p), regular(&st2)})
			if k.IsDir() {
				walk(k, p)
			}
			u.fs.Forget(k, 1)
		}
	}
	walk(u.fs.root, "")
	return out
}

func plainTree(t testing.TB, root string) []line {
	t.Helper()
	var out []line
	g := groups{}
	var walk func(path string)
	walk = func(path string) {
		ents, err := os.ReadDir(root + path)
		require.NoError(t, err)
		for _, e := range ents {
			p := path + "/" + e.Name()
			var st unix.Stat_t
			require.NoError(t, unix.Lstat(root+p, &st))
			var content, target string
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
				b, err := os.ReadFile(root + p)
				require.NoError(t, err)
				content = string(b)
			case unix.S_IFLNK:
				target, _ = os.Readlink(root + p)
			}
			out = append(out, line{p, describe(&st, content, target, g, p), regular(&st)})
			if e.IsDir() {
				walk(p)
			}
		}
	}
	walk("")
	return out
}

// seedTree fills a plain directory with a random tree.
func seedTree(t testing.TB, r *rand.Rand, root string, links bool) {
	t.Helper()
	dirs := []string{""}
	var files []string
	for i := range 6 + r.IntN(10) {
		d := dirs[r.IntN(len(dirs))]
		p := d + "/" + string(rune('a'+r.IntN(6)))
		if _, err := os.Lstat(root + p); err == nil {
			continue
		}
		switch r.IntN(8) {
		case 0, 1, 2:
			require.NoError(t, os.Mkdir(root+p, 0o755))
			dirs = append(dirs, p)
		case 3:
			require.NoError(t, os.Symlink("x"+p, root+p))
		case 4:
			if links && len(files) > 0 {
				require.NoError(t, os.Link(root+files[r.IntN(len(files))], root+p))
				continue
			}
			fallthrough
		default:
			require.NoError(t, os.WriteFile(root+p, []byte(fmt.Sprint("lower", i)), 0o640))
			require.NoError(t, os.Chtimes(root+p, unixTime(int64(1000+i)), unixTime(int64(1000+i))))
			files = append(files, p)
		}
	}
}
