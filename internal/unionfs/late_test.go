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

// hooked calls probed after it looked for a name.
type hooked struct {
	AUFS
	probed func(name string)
}

func (h *hooked) Probe(fd int, name string, wh bool, st *unix.Stat_t) (Kind, error) {
	k, err := h.AUFS.Probe(fd, name, wh, st)
	if h.probed != nil {
		h.probed(name)
	}
	return k, err
}

// adds counts what is watched.
type adds struct{ n map[*Node]int }

func (a adds) Add(dir *Node, _ int) error { a.n[dir]++; return nil }
func (a adds) Remove(*Node)               {}

// TestWatchedAgain checks that a directory is watched again after a change of
// itself, with which its watch may have ended.
func TestWatchedAgain(t *testing.T) {
	lower := t.TempDir()
	require.NoError(t, os.Mkdir(lower+"/d", 0o755))
	w := adds{map[*Node]int{}}
	fs := mustOpen(t, &Config{Branches: []BranchSpec{{lower, RO}, {t.TempDir(), RO}}, Watch: w})
	var st unix.Stat_t
	d, err := fs.Lookup(fs.root, "d", &st)
	require.NoError(t, err)
	defer fs.Forget(d, 1)
	for _, change := range []struct {
		name string
		adds int
	}{{"x", 1}, {"", 2}, {"y", 2}, {"", 3}} {
		for range 2 {
			_, err = fs.Lookup(d, "none", &st)
			require.ErrorIs(t, err, unix.ENOENT)
		}
		fs.Changed(d, change.name)
		_, err = fs.ReadDir(d, 0)
		require.NoError(t, err)
		assert.Equal(t, change.adds, w.n[d], "after a change of %q", change.name)
	}
	fs.ChangedAll() // reports may have been lost
	_, err = fs.ReadDir(d, 0)
	require.NoError(t, err)
	assert.Equal(t, 4, w.n[d])
}

// TestLateChange makes a directory on another branch while it is looked up, and
// reports that before the lookup ends: the directory must merge both.
func TestLateChange(t *testing.T) {
	for name, branches := range map[string]int{"few-branches": 2, "indexed": indexMin} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			var specs []BranchSpec
			for k := range branches {
				p := fmt.Sprint(root, "/l", k)
				require.NoError(t, os.Mkdir(p, 0o755))
				specs = append(specs, BranchSpec{p, RO})
				require.NoError(t, os.WriteFile(fmt.Sprint(p, "/file", k), nil, 0o644))
			}
			last := specs[branches-1].Path
			h := &hooked{}
			fs := mustOpen(t, &Config{Branches: specs, Format: h})
			fs.KeepListings(true)
			var st unix.Stat_t
			change := func(t *testing.T, dir string) {
				asked := 1 // branches, before the change
				if branches < indexMin {
					asked = branches
				}
				h.probed = func(name string) {
					if name != dir {
						return
					}
					if asked--; asked > 0 {
						return
					}
					h.probed = nil
					require.NoError(t, os.Mkdir(specs[0].Path+"/"+dir, 0o700))
					fs.Changed(fs.root, dir)
				}
				t.Cleanup(func() { assert.Nil(t, h.probed, "nothing was changed") })
			}
			prepare := func(t *testing.T, dir string) {
				require.NoError(t, os.Mkdir(last+"/"+dir, 0o755))
				fs.Changed(fs.root, dir)
				fs.ChangedAll()
				for range 50 {
					_, err := fs.Lookup(fs.root, "none", &st)
					require.ErrorIs(t, err, unix.ENOENT)
				}
				require.Equal(t, branches >= indexMin, fs.root.index != nil)
			}
			merged := func(t *testing.T, n *Node) {
				t.Helper()
				assert.Len(t, n.instList(), 2)
				var st unix.Stat_t
				require.NoError(t, fs.GetAttr(n, &st))
				assert.EqualValues(t, 0o700, st.Mode&0o777)
			}
			t.Run("of-an-unknown-one", func(t *testing.T) {
				prepare(t, "a")
				change(t, "a")
				n, err := fs.Lookup(fs.root, "a", &st)
				require.NoError(t, err)
				defer fs.Forget(n, 1)
				assert.EqualValues(t, 0o700, st.Mode&0o777)
				merged(t, n)
			})
			t.Run("of-a-known-one", func(t *testing.T) {
				prepare(t, "b")
				n, err := fs.Lookup(fs.root, "b", &st)
				require.NoError(t, err)
				defer fs.Forget(n, 1)
				require.Len(t, n.instList(), 1)
				change(t, "b")
				again, err := fs.Lookup(fs.root, "b", &st)
				require.NoError(t, err)
				defer fs.Forget(again, 1)
				assert.Same(t, n, again)
				merged(t, n)
			})
			t.Run("when-it-is-found-again", func(t *testing.T) {
				prepare(t, "c")
				n, err := fs.Lookup(fs.root, "c", &st)
				require.NoError(t, err)
				defer fs.Forget(n, 1)
				change(t, "c")
				n.stale.Store(true)
				_, err = fs.ReadDir(n, 0)
				require.NoError(t, err)
				merged(t, n)
			})
			t.Run("an-entry-that-was-listed", func(t *testing.T) {
				prepare(t, "d")
				es, err := fs.ReadDir(fs.root, 0)
				require.NoError(t, err)
				h.probed = func(name string) { t.Error("searched for", name) }
				defer func() { h.probed = nil }()
				for k := range es {
					if es[k].many {
						continue
					}
					n, err := fs.LookupEntry(fs.root, &es[k], &st)
					require.NoError(t, err)
					fs.Forget(n, 1)
				}
			})
		})
	}
}
