//go:build linux

package unionfs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// hostile are names and kinds of entries a branch may hold to confuse a union.
var hostile = []string{
	"a", "b", ".wh.", ".wh..", ".wh...", ".wh.a", ".wh.b", ".wh..wh.", ".wh..wh..opq", ".wh..wh.aufs", ".wh..wh.plnk", ".wh..wh.orph",
	".wh..wh.mounted", ".wh..wh.a.12ef", ".wh..wh.dr.x", "\xff\n", ".wh.\xff\n", "etc",
}

// FuzzBranch builds branches from the input, four branches at most, and walks
// and changes the union. Nothing may panic, hang, leave the branches, or change
// the lower ones; errors are errno values.
func FuzzBranch(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 0, 5, 1, 0, 0, 0, 8, 1}, uint8(0))
	f.Add([]byte{0, 8, 1, 1, 0, 1, 2, 0, 3, 1, 10, 2, 0, 12, 0, 0, 0, 1}, uint8(1))
	f.Add([]byte{0, 9, 1, 0, 9, 2, 0, 10, 0, 0, 11, 3, 0, 13, 1}, uint8(2))
	f.Fuzz(func(t *testing.T, in []byte, kind uint8) {
		dir := t.TempDir()
		secret := filepath.Join(dir, "secret")
		require.NoError(t, os.WriteFile(secret, []byte("secret"), 0o600))
		roots := []string{dir + "/rw", dir + "/l0", dir + "/l1"}
		for _, r := range roots {
			require.NoError(t, os.Mkdir(r, 0o755))
		}
		dirs := append([]string(nil), roots...)
		for ; len(in) >= 3 && len(dirs) < 40; in = in[3:] {
			p := filepath.Join(dirs[int(in[0])%len(dirs)], hostile[int(in[1])%len(hostile)])
			if _, err := os.Lstat(p); err == nil {
				unix.Lsetxattr(p, "user.overlay.opaque", []byte("xy")[in[2]%2:in[2]%2+1], 0)
				continue
			}
			switch in[2] % 6 {
			case 0:
				if os.Mkdir(p, 0o755) == nil {
					dirs = append(dirs, p)
				}
			case 1:
				os.WriteFile(p, []byte("x"), 0o644)
			case 2:
				os.Symlink("../../secret", p)
			case 3:
				os.Symlink("/", p)
			case 4:
				unix.Mkfifo(p, 0o644)
			case 5:
				os.WriteFile(p, nil, 0o644)
				unix.Lsetxattr(p, "user.overlay.whiteout", []byte("y"), 0)
			}
		}
		format := []Format{AUFS{}, Overlay{User: true}, AUFS{NoLink: true}}[kind%3]
		before := plainTree(t, roots[1])
		fs, _, err := Open(&Config{Format: format, Branches: []BranchSpec{{roots[0], RW}, {roots[1], ROWH}, {roots[2], RO}}})
		if err != nil {
			return // such as a directory in place of the whiteout base
		}
		u := &user{fs: fs}
		var walk func(n *Node, depth int)
		walk = func(n *Node, depth int) {
			ents, err := fs.ReadDir(n, 0)
			if err != nil || depth > 6 {
				return
			}
			for i := range ents {
				var st unix.Stat_t
				e := ents[i]
				k, err := fs.LookupEntry(n, &e, &st)
				if err != nil {
					require.NotZero(t, Errno(err))
					continue
				}
				if k.Type() == unix.S_IFREG {
					f, err := fs.OpenFile(k, unix.O_RDONLY, false)
					if err == nil {
						b := make([]byte, 10)
						c, _ := unix.Pread(f.FD(), b, 0)
						require.NotEqual(t, "secret", string(b[:max(c, 0)]))
						f.Close()
					}
				}
				walk(k, depth+1)
				mode := uint32(0o700)
				_ = fs.SetAttr(k, nil, &SetAttr{Mode: &mode}, &st)
				_ = fs.Rename(n, e.Name, fs.root, "moved", 0)
				_ = fs.Unlink(n, e.Name)
				_ = fs.Rmdir(n, e.Name)
				if k, err := fs.Mkdir(n, e.Name, 0o755, Cred{}, &st); err == nil {
					fs.Forget(k, 1)
				}
				fs.Forget(k, 1)
			}
		}
		walk(fs.root, 0)
		_ = u.write("/a/b/new", "y", unix.O_CREAT)
		_ = fs.FlushLinks()
		require.NoError(t, fs.Close())
		require.Equal(t, before, plainTree(t, roots[1]))
		b, err := os.ReadFile(secret)
		require.NoError(t, err)
		require.Equal(t, "secret", string(b))
		st := unix.Stat_t{}
		require.NoError(t, unix.Lstat(secret, &st))
		require.EqualValues(t, unix.S_IFREG|0o600, st.Mode)
	})
}
