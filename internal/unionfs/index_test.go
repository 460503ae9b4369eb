//go:build linux

package unionfs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestIndex makes random changes on the branches and in the union, and compares
// each lookup of a union that keeps an index with one that asks every branch.
func TestIndex(t *testing.T) {
	for name, format := range map[string]Format{"aufs": AUFS{}, "overlay": Overlay{User: true}} {
		t.Run(name, func(t *testing.T) { testIndex(t, format, rand.New(rand.NewPCG(1, 2))) })
	}
}

func testIndex(t *testing.T, format Format, r *rand.Rand) {
	const lowers = 12
	root, err := os.MkdirTemp("/dev/shm", "index")
	require.NoError(t, err)
	defer os.RemoveAll(root)
	lower := func(k int) string { return fmt.Sprint(root, "/l", k) }
	specs := []BranchSpec{{lower(0), RW}}
	for k := range lowers {
		require.NoError(t, os.MkdirAll(lower(k)+"/d", 0o755))
		if k > 0 {
			specs = append(specs, BranchSpec{lower(k), []Perm{RO, ROWH, RR}[k%3]})
		}
	}
	fs := mustOpen(t, &Config{Branches: specs, Format: format})
	fs.KeepListings(true)
	plain := mustOpen(t, &Config{Branches: append([]BranchSpec{{lower(0), ROWH}}, specs[1:]...), Format: format})
	var st unix.Stat_t
	dir, err := fs.Lookup(fs.Root(), "d", &st)
	require.NoError(t, err)
	defer fs.Forget(dir, 1)
	names := make([]string, 40)
	for i := range names {
		names[i] = string(rune('a'+i%20)) + fmt.Sprint(i/20)
	}
	// change does something directly on a branch, and reports it as the watch
	// would if the branch is watched.
	change := func() {
		k := r.IntN(lowers)
		name := names[r.IntN(len(names))]
		if k > 0 && specs[k].Perm == RR {
			return // natively read-only
		}
		var touched []string
		at := func(n string) string { touched = append(touched, n); return filepath.Join(lower(k), "d", n) }
		white := func(n string) {
			if _, ok := format.(AUFS); ok {
				if _, err := os.Lstat(filepath.Join(lower(k), "d", n)); err == nil {
					return // both would be EIO
				}
				os.WriteFile(at(whPrefix+n), nil, 0o444)
				return
			}
			unix.Mknod(at(n), unix.S_IFCHR, 0)
		}
		shown := func(n string) {
			os.Remove(filepath.Join(lower(k), "d", whPrefix+n))
			touched = append(touched, whPrefix+n)
		}
		switch r.IntN(6) {
		case 0, 1:
			shown(name)
			os.WriteFile(at(name), []byte("x"), 0o644)
		case 2:
			os.RemoveAll(at(name))
		case 3:
			shown(name)
			os.Mkdir(at(name), 0o755)
		case 4:
			white(name)
		case 5:
			to := names[r.IntN(len(names))]
			shown(to)
			os.Rename(at(name), at(to))
		}
		for _, n := range touched {
			fs.Changed(dir, n)
		}
	}
	own := func() {
		name := names[r.IntN(len(names))]
		var s unix.Stat_t
		switch r.IntN(4) {
		case 0:
			if n, err := fs.Mkdir(dir, name, 0o755, Cred{}, &s); err == nil {
				fs.Forget(n, 1)
			}
		case 1:
			if n, f, err := fs.Create(dir, name, unix.O_RDWR, 0o644, Cred{}, &s); err == nil {
				f.Close()
				fs.Forget(n, 1)
			}
		case 2:
			fs.Unlink(dir, name)
		case 3:
			fs.Rmdir(dir, name)
		}
	}
	indexed := 0
	for step := range 3000 {
		switch k := r.IntN(100); {
		case k < 15:
			change()
		case k < 30:
			own()
		case k == 30 && step%7 == 0:
			fs.ChangedAll()
		}
		name := names[r.IntN(len(names))]
		var got, want unix.Stat_t
		n, err := fs.Lookup(dir, name, &got)
		if err == nil {
			fs.Forget(n, 1)
		}
		// Another FS has no nodes of before, so nothing it could know.
		pdir, perr := plain.Lookup(plain.Root(), "d", &want)
		require.NoError(t, perr)
		p, perr := plain.Lookup(pdir, name, &want)
		require.Equal(t, perr, err, "step %d: %s", step, name)
		if err == nil {
			require.Equal(t, want.Mode&unix.S_IFMT, got.Mode&unix.S_IFMT, "step %d: %s", step, name)
			pk, gk := keyAt(plain, p), keyAt(fs, n)
			require.Equal(t, pk, gk, "step %d: %s is another file", step, name)
			require.Equal(t, want.Nlink, got.Nlink, "step %d: %s", step, name)
			plain.Forget(p, 1)
		}
		plain.Forget(pdir, 1)
		plain.ChangedAll()
		if dir.index != nil {
			indexed++
		}
	}
	assert.Greater(t, indexed, 1000, "lookups with an index")
	assert.Equal(t, dir.index.size(), fs.indexed)
}

func keyAt(fs *FS, n *Node) key {
	if n.IsDir() {
		return key{0, 0} // its instances are compared by nlink
	}
	return n.keyNow()
}

// misses looks a name up that the root has not.
func misses(t *testing.T, fs *FS, n int) {
	t.Helper()
	var st unix.Stat_t
	for range n {
		_, err := fs.Lookup(fs.Root(), "none", &st)
		require.ErrorIs(t, err, unix.ENOENT)
	}
}

// TestIndexLimits checks when there is an index.
func TestIndexLimits(t *testing.T) {
	root := t.TempDir()
	var specs []BranchSpec
	for k := range indexMin + 1 {
		p := fmt.Sprint(root, "/l", k)
		require.NoError(t, os.MkdirAll(p, 0o755))
		specs = append(specs, BranchSpec{p, RO})
		for i := range 100 {
			require.NoError(t, os.WriteFile(fmt.Sprint(p, "/", k, "-", i), nil, 0o644))
		}
	}
	lookups := func(fs *FS, n int) {
		for i := range n {
			var st unix.Stat_t
			name := fmt.Sprint(i%len(specs), "-", i%100)
			k, err := fs.Lookup(fs.Root(), name, &st)
			require.NoError(t, err, name)
			fs.Forget(k, 1)
		}
	}
	t.Run("after-as-much-work", func(t *testing.T) {
		fs := mustOpen(t, &Config{Branches: specs})
		fs.KeepListings(true)
		lookups(fs, 1)
		assert.True(t, fs.root.index == nil)
		lookups(fs, 200)
		require.True(t, fs.root.index != nil)
		assert.Equal(t, 100*len(specs), fs.indexed)
		probed := fs.root.probes
		lookups(fs, 100)
		assert.Equal(t, probed, fs.root.probes)
		for i := range maxFresh + 1 {
			fs.Changed(fs.root, fmt.Sprint("new", i))
		}
		assert.True(t, fs.root.index == nil, "too much changed")
		assert.Zero(t, fs.indexed)
	})
	t.Run("counts-what-each-branch-has", func(t *testing.T) {
		root := t.TempDir()
		var same []BranchSpec
		for k := range indexMin {
			p := fmt.Sprint(root, "/l", k)
			require.NoError(t, os.Mkdir(p, 0o755))
			for i := range 10 {
				require.NoError(t, os.WriteFile(fmt.Sprint(p, "/f", i), nil, 0o644))
			}
			same = append(same, BranchSpec{p, RO})
		}
		fs := mustOpen(t, &Config{Branches: same})
		fs.KeepListings(true)
		misses(t, fs, 100)
		require.True(t, fs.root.index != nil)
		assert.Equal(t, 10*len(same), fs.indexed)
		fs.ChangedAll()
		assert.Zero(t, fs.indexed)
	})
	t.Run("not-where-nobody-reports", func(t *testing.T) {
		fs := mustOpen(t, &Config{Branches: specs})
		lookups(fs, 300)
		assert.True(t, fs.root.index == nil)
	})
	t.Run("not-of-few-branches", func(t *testing.T) {
		fs := mustOpen(t, &Config{Branches: specs[:indexMin-1]})
		fs.KeepListings(true)
		misses(t, fs, 300)
		assert.True(t, fs.root.index == nil)
	})
	t.Run("dropped-with-a-branch", func(t *testing.T) {
		fs := mustOpen(t, &Config{Branches: specs})
		fs.KeepListings(true)
		lookups(fs, 300)
		require.True(t, fs.root.index != nil)
		require.NoError(t, fs.Delete(specs[0].Path))
		var st unix.Stat_t
		_, err := fs.Lookup(fs.Root(), "0-1", &st)
		require.ErrorIs(t, err, unix.ENOENT)
		_, err = fs.Insert(0, specs[0])
		require.NoError(t, err)
		lookups(fs, 300)
	})
	t.Run("of-those-that-may-fold-cases-later", func(t *testing.T) {
		more := append([]BranchSpec{{t.TempDir(), RO}}, specs...) // empty
		fs := mustOpen(t, &Config{Branches: more})
		fs.KeepListings(true)
		lookups(fs, 300)
		require.True(t, fs.root.index != nil)
		if indexTypes[fs.stack[0].fsType] != foldNever {
			assert.True(t, fs.root.index.ask[0])
		}
	})
	t.Run("a-watch-that-fails", func(t *testing.T) {
		fs := mustOpen(t, &Config{Branches: specs, Watch: refusing{}})
		fs.KeepListings(true)
		lookups(fs, 300)
		require.True(t, fs.root.index != nil)
		assert.Zero(t, fs.root.index.size())
		assert.NotContains(t, fs.root.index.ask, false)
	})
}

// refusing watches nothing, as when the user has too many watches.
type refusing struct{}

func (refusing) Add(*Node, int) error { return unix.ENOSPC }
func (refusing) Remove(*Node)         {}

// TestCaseTest checks which directories are taken to find what they list only.
func TestCaseTest(t *testing.T) {
	for _, tt := range []struct {
		name   string
		folds  fold
		listed []string
		there  []string // unlisted, as if the directory found them
		gone   string   // after it was listed
		exact  bool
	}{
		{"never", foldNever, nil, nil, "", true},
		{"empty-and-may-be-flagged", foldFlag, nil, nil, "", false},
		{"no-flag", foldFlag, []string{"1"}, nil, "", true},
		{"empty", foldMount, nil, nil, "", false},
		{"no-letters", foldMount, []string{"1", "é"}, nil, "", false},
		{"a-letter", foldMount, []string{"1", "a"}, nil, "", true},
		{"both-cases", foldMount, []string{"a", "b", "A"}, nil, "", true},
		{"found-in-another-case", foldMount, []string{"1", "a"}, []string{"A"}, "", false},
		{"gone-before-it-was-tried", foldMount, []string{"a"}, nil, "a", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c := caseTest{folds: tt.folds}
			for _, n := range tt.listed {
				c.listed(n)
			}
			for _, n := range append(tt.listed, tt.there...) {
				require.NoError(t, os.WriteFile(dir+"/"+n, nil, 0o600))
			}
			if tt.gone != "" {
				require.NoError(t, os.Remove(dir+"/"+tt.gone))
			}
			fd, err := openDirAt(unix.AT_FDCWD, dir)
			require.NoError(t, err)
			defer unix.Close(fd)
			assert.Equal(t, tt.exact, c.exact(fd))
		})
	}
	t.Run("an-error-is-no-answer", func(t *testing.T) {
		fd, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
		require.NoError(t, err)
		defer unix.Close(fd)
		for _, folds := range []fold{foldFlag, foldMount} {
			c := caseTest{folds: folds}
			c.listed("a")
			assert.False(t, c.exact(fd))
			assert.False(t, c.exact(-1))
		}
	})
}

// TestIndexFolding looks up, in another case, what directories that fold cases
// got after they were indexed.
func TestIndexFolding(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("folding", dir, "tmpfs", 0, "casefold"); err != nil {
		t.Skip("tmpfs without case folding: ", err)
	}
	defer func() { assert.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	var specs []BranchSpec
	for k := range indexMin {
		p := fmt.Sprint(dir, "/l", k)
		require.NoError(t, os.Mkdir(p, 0o755))
		f, err := os.Open(p)
		require.NoError(t, err)
		require.NoError(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, caseFoldFlag))
		f.Close()
		require.NoError(t, os.WriteFile(fmt.Sprint(p, "/", k), nil, 0o644)) // no letter
		specs = append(specs, BranchSpec{p, RO})
	}
	fs := mustOpen(t, &Config{Branches: specs})
	fs.KeepListings(true)
	misses(t, fs, 100)
	require.True(t, fs.root.index != nil)
	require.NoError(t, os.WriteFile(specs[2].Path+"/Name", nil, 0o644))
	fs.Changed(fs.root, "Name")
	var st unix.Stat_t
	n, err := fs.Lookup(fs.root, "nAME", &st)
	require.NoError(t, err)
	fs.Forget(n, 1)
}

func TestSwapCase(t *testing.T) {
	for in, want := range map[string]string{"abc": "Abc", "Abc": "abc", "1Z": "1z", "12": "12", "é": "é", "éa": "éA", "": "", "@[`{": "@[`{"} {
		assert.Equal(t, want, swapCase(in), in)
	}
}
