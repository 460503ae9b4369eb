//go:build linux

package unionfs

import (
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestReplaced checks that a file that was looked up can be opened after
// another took its name: a name that is replaced never is not there.
func TestReplaced(t *testing.T) {
	for _, side := range []string{"upper", "lower"} {
		t.Run(side, func(t *testing.T) {
			root := t.TempDir()
			rw, ro := root+"/rw", root+"/ro"
			at := map[string]string{"upper": rw, "lower": ro}[side]
			require.NoError(t, os.Mkdir(rw, 0o755))
			require.NoError(t, os.Mkdir(ro, 0o755))
			require.NoError(t, os.WriteFile(at+"/f", []byte("old"), 0o644))
			require.NoError(t, os.Symlink("target", at+"/l"))
			for i := range 3 {
				require.NoError(t, os.WriteFile(fmt.Sprint(rw, "/new", i), []byte("new"), 0o644))
			}
			fs := mustOpen(t, &Config{Branches: []BranchSpec{{rw, RW}, {ro, RO}}})
			var st unix.Stat_t
			f, err := fs.Lookup(fs.Root(), "f", &st)
			require.NoError(t, err)
			l, err := fs.Lookup(fs.Root(), "l", &st)
			require.NoError(t, err)
			require.NoError(t, fs.Rename(fs.Root(), "new0", fs.Root(), "f", 0))
			require.NoError(t, fs.Rename(fs.Root(), "new1", fs.Root(), "l", 0))
			read := func() string { return contentOf(t, fs, f) }
			assert.Equal(t, "old", read())
			target, err := fs.Readlink(l)
			require.NoError(t, err)
			assert.Equal(t, "target", target)
			require.NoError(t, fs.GetAttr(f, &st))
			assert.EqualValues(t, 3, st.Size)
			assert.Zero(t, st.Nlink)
			// Writing goes to a copy that nobody else sees.
			h, err := fs.OpenFile(f, unix.O_WRONLY, false)
			require.NoError(t, err)
			_, err = unix.Pwrite(h.FD(), []byte("mine"), 0)
			require.NoError(t, err)
			h.Close()
			assert.Equal(t, "mine", read())
			if side == "lower" {
				b, err := os.ReadFile(ro + "/f")
				require.NoError(t, err)
				assert.Equal(t, "old", string(b))
			}
			fs.Forget(f, 1)
			fs.Forget(l, 1)
			for _, b := range fs.stack {
				assert.Zero(t, b.files.Load(), "%s is in use", b.path)
			}
			// Nothing is held of what nobody knows.
			require.NoError(t, fs.Rename(fs.Root(), "new2", fs.Root(), "f", 0))
			assert.Zero(t, fs.stack[0].files.Load())
		})
	}
}

// TestReplacedLinked checks a file that has another name which nobody knew when
// one was taken from it: once that is looked up, only what is open keeps the
// branch in use.
func TestReplacedLinked(t *testing.T) {
	for name, noPlink := range map[string]bool{"pseudo-links": false, "none": true} {
		for _, side := range []string{"upper", "lower"} {
			t.Run(name+"/"+side, func(t *testing.T) { testReplacedLinked(t, noPlink, side) })
		}
	}
}

func testReplacedLinked(t *testing.T, noPlink bool, side string) {
	root := t.TempDir()
	at := root + "/" + side
	for _, d := range []string{root + "/upper", root + "/lower"} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	require.NoError(t, os.WriteFile(at+"/f", []byte("old"), 0o644))
	require.NoError(t, os.Link(at+"/f", at+"/g"))
	require.NoError(t, os.WriteFile(root+"/upper/new", []byte("new"), 0o644))
	fs := mustOpen(t, &Config{Branches: []BranchSpec{{root + "/upper", RW}, {root + "/lower", RO}}, NoPlink: noPlink})
	files := func() (n int64) {
		for _, b := range fs.stack {
			n += b.files.Load()
		}
		return n
	}
	var st unix.Stat_t
	f, err := fs.Lookup(fs.root, "f", &st)
	require.NoError(t, err)
	h, err := fs.OpenFile(f, unix.O_RDONLY, false)
	require.NoError(t, err)
	require.NoError(t, fs.Rename(fs.root, "new", fs.root, "f", 0))
	g, err := fs.Lookup(fs.root, "g", &st)
	require.NoError(t, err)
	if side == "lower" && !noPlink {
		assert.Same(t, f, g)
	}
	h.Close()
	fs.Forget(f, 1)
	assert.Zero(t, files(), "nothing is open")
	assert.Equal(t, "old", contentOf(t, fs, g))
	fs.Forget(g, 1)
	assert.Zero(t, files())
}

// TestOrphanOfLinked checks that a copy of a file that lost its name does not
// take another name with it that the file has on the lower branch.
func TestOrphanOfLinked(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.Mkdir(root+"/rw", 0o755))
	require.NoError(t, os.Mkdir(root+"/ro", 0o755))
	require.NoError(t, os.WriteFile(root+"/ro/f", []byte("old"), 0o644))
	require.NoError(t, os.Link(root+"/ro/f", root+"/ro/g"))
	fs := mustOpen(t, &Config{Branches: []BranchSpec{{root + "/rw", RW}, {root + "/ro", RO}}})
	var st unix.Stat_t
	f, err := fs.Lookup(fs.root, "f", &st)
	require.NoError(t, err)
	h, err := fs.OpenFile(f, unix.O_RDONLY, false)
	require.NoError(t, err)
	require.NoError(t, fs.Unlink(fs.root, "f"))
	w, err := fs.OpenFile(f, unix.O_WRONLY|unix.O_TRUNC, false)
	require.NoError(t, err)
	h.Close()
	g, err := fs.Lookup(fs.root, "g", &st)
	require.NoError(t, err)
	assert.EqualValues(t, 3, st.Size)
	r, err := fs.OpenFile(g, unix.O_RDONLY, false)
	require.NoError(t, err)
	r.Close()
	w.Close()
	require.NoError(t, fs.GetAttr(f, &st))
	assert.Zero(t, st.Size)
	fs.Forget(f, 1)
	fs.Forget(g, 1)
	for _, b := range fs.stack {
		assert.Zero(t, b.files.Load(), b.path)
	}
}

// TestReplacedFound looks another name of a file up while its known one is
// replaced: whoever comes first, nothing is held that no one has open.
func TestReplacedFound(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"/rw", "/rw/d1", "/rw/d2"} {
		require.NoError(t, os.Mkdir(root+d, 0o755))
	}
	fs := mustOpen(t, &Config{Branches: []BranchSpec{{root + "/rw", RW}}})
	var st unix.Stat_t
	d1, err := fs.Lookup(fs.root, "d1", &st)
	require.NoError(t, err)
	defer fs.Forget(d1, 1)
	d2, err := fs.Lookup(fs.root, "d2", &st)
	require.NoError(t, err)
	defer fs.Forget(d2, 1)
	held, rounds := 0, 1000 // one in a hundred meets the wrong moment
	if testing.Short() {
		rounds = 300
	}
	for range rounds {
		require.NoError(t, os.WriteFile(root+"/rw/d1/f", []byte("old"), 0o644))
		require.NoError(t, os.Link(root+"/rw/d1/f", root+"/rw/d2/g"))
		require.NoError(t, os.WriteFile(root+"/rw/d1/new", []byte("new"), 0o644))
		f, err := fs.Lookup(d1, "f", &st)
		require.NoError(t, err)
		found := make(chan *Node)
		go func() {
			var st unix.Stat_t
			g, err := fs.Lookup(d2, "g", &st)
			assert.NoError(t, err)
			found <- g
		}()
		require.NoError(t, fs.Rename(d1, "new", d1, "f", 0))
		g := <-found
		fs.Forget(f, 1)
		if fs.stack[0].files.Load() != 0 {
			held++
		}
		assert.Equal(t, "old", contentOf(t, fs, g))
		fs.Forget(g, 1)
		require.NoError(t, os.Remove(root+"/rw/d2/g"))
	}
	assert.Zero(t, held, "renames that keep the branch in use")
}

// contentOf returns the first bytes of a file.
func contentOf(t *testing.T, fs *FS, n *Node) string {
	t.Helper()
	f, err := fs.OpenFile(n, unix.O_RDONLY, false)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, 10)
	k, err := unix.Pread(f.FD(), b, 0)
	require.NoError(t, err)
	return string(b[:k])
}
