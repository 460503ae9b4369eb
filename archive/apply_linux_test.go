package archive_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/whiteout"
)

// requireSame fails the test if two trees differ.
func requireSame(tb testing.TB, want, got string, opts *tree.CompareOptions) {
	tb.Helper()
	diffs, err := tree.Compare(want, got, opts)
	require.NoError(tb, err)
	for i, d := range diffs {
		if i < 20 {
			tb.Error(d)
		}
	}
	if len(diffs) > 0 {
		tb.FailNow()
	}
}

func applyBytes(tb testing.TB, dir string, stream []byte, opts *archive.ApplyOptions) error {
	tb.Helper()
	res, err := archive.Apply(context.Background(), dir, bytes.NewReader(stream), opts)
	if err == nil && archive.Detect(stream) == layerfs.NoCompression {
		sum := sha256.Sum256(stream)
		assert.Equal(tb, "sha256:"+hex.EncodeToString(sum[:]), res.Digest)
		assert.Equal(tb, int64(len(stream)), res.Size)
	}
	return err
}

// TestBreakouts are the cases of containerd's TestBreakouts, by the same
// names: pkg/archive/tar_test.go. Where want is an error we refuse what
// containerd passes over in silence.
func TestBreakouts(t *testing.T) {
	testenv.RequireRoot(t)
	const expected = "unbroken"
	type check func(t *testing.T, root string)
	content := func(name, want string) check {
		return func(t *testing.T, root string) {
			b, err := os.ReadFile(filepath.Join(root, name))
			require.NoError(t, err)
			assert.Equal(t, want, string(b))
		}
	}
	same := func(a, b string) check {
		return func(t *testing.T, root string) {
			ia, err := os.Lstat(filepath.Join(root, a))
			require.NoError(t, err)
			ib, err := os.Lstat(filepath.Join(root, b))
			require.NoError(t, err)
			assert.True(t, os.SameFile(ia, ib))
		}
	}
	notSame := func(a, b string) check {
		return func(t *testing.T, root string) {
			ia, err := os.Lstat(filepath.Join(root, a))
			require.NoError(t, err)
			ib, err := os.Lstat(filepath.Join(root, b))
			require.NoError(t, err)
			assert.False(t, os.SameFile(ia, ib))
		}
	}
	gone := func(name string) check {
		return func(t *testing.T, root string) {
			_, err := os.Lstat(filepath.Join(root, name))
			assert.ErrorIs(t, err, fs.ErrNotExist)
		}
	}
	target := func(name, want string) check {
		return func(t *testing.T, root string) {
			l, err := os.Readlink(filepath.Join(root, name))
			require.NoError(t, err)
			assert.Equal(t, want, l)
		}
	}
	etc, passwd := dirEntry("etc", 0o770), fileEntry("/etc/passwd", "inside")
	base := []string{"dir etc", "file etc/passwd inside"}
	outside := filepath.Join(t.TempDir(), "perm400")
	require.NoError(t, os.WriteFile(outside, []byte("..."), 0o400))

	for _, tt := range []struct {
		name    string
		before  []string
		entries []entry
		want    error
		checks  []check
	}{
		{"SymlinkAbsolute", nil, []entry{etc, symlinkEntry("localetc", "/etc"), fileEntry("/localetc/unbroken", expected)}, nil, []check{content("etc/unbroken", expected)}},
		{"SymlinkUpAndOut", nil, []entry{etc, dirEntry("dummy", 0o755), symlinkEntry("localetc", "/dummy/../etc"), fileEntry("/localetc/unbroken", expected)}, nil, []check{content("etc/unbroken", expected)}},
		{"SymlinkMultipleAbsolute", nil, []entry{etc, dirEntry("dummy", 0o755), symlinkEntry("/dummy/etc", "/etc"), symlinkEntry("localetc", "/dummy/etc"), fileEntry("/dummy/etc/unbroken", expected)}, nil, []check{content("etc/unbroken", expected)}},
		{"SymlinkMultipleRelative", nil, []entry{etc, dirEntry("dummy", 0o755), symlinkEntry("/dummy/etc", "/etc"), symlinkEntry("localetc", "./dummy/etc"), fileEntry("/localetc/unbroken", expected)}, nil, []check{content("etc/unbroken", expected)}},
		{"SymlinkEmptyFile", nil, []entry{etc, fileEntry("etc/emptied", "notempty"), symlinkEntry("localetc", "/etc"), fileEntry("/localetc/emptied", "")}, nil, []check{content("etc/emptied", "")}},
		{"HardlinkRelative", nil, []entry{etc, passwd, dirEntry("breakouts", 0o755), symlinkEntry("breakouts/d1", "../../etc"), linkEntry("breakouts/mypasswd", "/breakouts/d1/passwd")}, nil, []check{same("breakouts/mypasswd", "etc/passwd")}},
		{"HardlinkDownAndOut", nil, []entry{etc, passwd, dirEntry("breakouts", 0o755), dirEntry("downandout", 0o755), symlinkEntry("breakouts/d1", "../downandout/../../etc"), linkEntry("breakouts/mypasswd", "/breakouts/d1/passwd")}, nil, []check{same("breakouts/mypasswd", "etc/passwd")}},
		{"HardlinkAbsolute", nil, []entry{etc, passwd, symlinkEntry("localetc", "/etc"), linkEntry("localpasswd", "/localetc/passwd")}, nil, []check{same("localpasswd", "etc/passwd")}},
		{"HardlinkRelativeLong", nil, []entry{etc, passwd, symlinkEntry("localetc", "../../../../../../../etc"), linkEntry("localpasswd", "/localetc/passwd")}, nil, []check{same("localpasswd", "etc/passwd")}},
		{"HardlinkRelativeUpAndOut", nil, []entry{etc, passwd, dirEntry("upandout", 0o755), symlinkEntry("localetc", "upandout/../../../etc"), linkEntry("localpasswd", "/localetc/passwd")}, nil, []check{same("localpasswd", "etc/passwd")}},
		{"HardlinkDirectRelative", nil, []entry{etc, passwd, linkEntry("localpasswd", "../../../../../etc/passwd")}, nil, []check{same("localpasswd", "etc/passwd")}},
		{"HardlinkDirectAbsolute", nil, []entry{etc, passwd, linkEntry("localpasswd", "/etc/passwd")}, nil, []check{same("localpasswd", "etc/passwd")}},
		{"SymlinkParentDirectory", nil, []entry{etc, passwd, symlinkEntry("..", "/etc/"), linkEntry("localpasswd", "/etc/passwd")}, layerfs.ErrMalformed, nil},
		{"SymlinkEmptyFilename", nil, []entry{etc, passwd, symlinkEntry("", "/etc/"), linkEntry("localpasswd", "/etc/passwd")}, layerfs.ErrMalformed, nil},
		{"SymlinkParentRelative", nil, []entry{etc, passwd, symlinkEntry("localetc/sub/..", "/etc/"), linkEntry("/localetc/localpasswd", "/etc/passwd")}, nil, []check{same("etc/localpasswd", "etc/passwd")}},
		{"SymlinkSlashEnded", nil, []entry{etc, passwd, dirEntry("localetc/", 0o770), linkEntry("/localetc/localpasswd", "/etc/passwd")}, nil, []check{same("localetc/localpasswd", "etc/passwd")}},
		{"SymlinkOverrideDirectory", append(base, "dir localetc"), []entry{symlinkEntry("localetc", "/etc"), linkEntry("/localetc/localpasswd", "/etc/passwd")}, nil, []check{same("etc/localpasswd", "etc/passwd"), target("localetc", "/etc")}},
		{"SymlinkOverrideDirectoryRelative", append(base, "dir localetc"), []entry{symlinkEntry("localetc", "../../etc"), linkEntry("/localetc/localpasswd", "/etc/passwd")}, nil, []check{same("etc/localpasswd", "etc/passwd")}},
		{"DirectoryOverrideSymlink", append(base, "symlink localetc /etc"), []entry{dirEntry("/localetc/", 0o755), linkEntry("/localetc/localpasswd", "/etc/passwd")}, nil, []check{same("localetc/localpasswd", "etc/passwd"), gone("etc/localpasswd")}},
		{"DirectoryOverrideSymlinkAndHardlink", append(base, "symlink localetc etc", "link etc/localpasswd etc/passwd"), []entry{dirEntry("/localetc/", 0o755), fileEntry("/localetc/localpasswd", "different")}, nil, []check{notSame("localetc/localpasswd", "etc/passwd"), content("etc/passwd", "inside")}},
		{"WhiteoutRootParent", base, []entry{fileEntry(".wh...", "")}, layerfs.ErrMalformed, []check{content("etc/passwd", "inside")}},
		{"WhiteoutParent", base, []entry{fileEntry("etc/.wh...", "")}, layerfs.ErrMalformed, []check{content("etc/passwd", "inside")}},
		{"WhiteoutRoot", base, []entry{fileEntry(".wh..", "")}, layerfs.ErrMalformed, []check{content("etc/passwd", "inside")}},
		{"WhiteoutCurrentDirectory", base, []entry{fileEntry("etc/.wh..", "")}, layerfs.ErrMalformed, []check{content("etc/passwd", "inside")}},
		{"WhiteoutBare", base, []entry{fileEntry("etc/.wh.", "")}, layerfs.ErrMalformed, []check{content("etc/passwd", "inside")}},
		{"WhiteoutSymlink", append(base, "symlink localetc /etc"), []entry{fileEntry(".wh.localetc", "")}, nil, []check{content("etc/passwd", "inside"), gone("localetc")}},
		{"WhiteoutSymlinkPath", append(base, "file etc/whitedout x", "symlink localetc /etc"), []entry{fileEntry("localetc/.wh.whitedout", "")}, nil, []check{content("etc/passwd", "inside"), gone("etc/whitedout")}},
		{"WhiteoutDirectoryName", append(base, "file etc/whitedout x", "symlink localetc /etc"), []entry{fileEntry(".wh.etc/somefile", "non-empty")}, nil, []check{content("etc/passwd", "inside"), content(".wh.etc/somefile", "non-empty")}},
		{"WhiteoutDeadSymlinkParent", append(base, "symlink localetc /dne"), []entry{fileEntry("localetc/.wh.etc", "")}, nil, []check{content("etc/passwd", "inside"), gone("dne")}},
		{"WhiteoutRelativePath", append(base, "symlink localetc /dne"), []entry{fileEntry("dne/../.wh.etc", "")}, nil, []check{gone("etc")}},
		{"WhiteoutOpaque", append(base, "file etc/whitedout x"), []entry{fileEntry("etc/.wh..wh..opq", ""), fileEntry("etc/new", "n")}, nil, []check{gone("etc/passwd"), gone("etc/whitedout"), content("etc/new", "n")}},
		{"WhiteoutOpaqueOutOfOrder", append(base, "file etc/whitedout x"), []entry{fileEntry("etc/new", "n"), fileEntry("etc/.wh..wh..opq", "")}, nil, []check{gone("etc/passwd"), gone("etc/whitedout"), content("etc/new", "n")}},
		{"SymlinkOverridePath", append(base, "symlink localetc /etc"), []entry{fileEntry("localetc/passwd", "changed"), dirEntry("localetc", 0o755), fileEntry("localetc/passwd", "other")}, nil, []check{content("etc/passwd", "changed"), content("localetc/passwd", "other")}},
		{"HardlinkSymlinkBeforeCreateTarget", nil, []entry{etc, symlinkEntry("localpasswd", "/etc/passwd"), linkEntry("localpasswd-dup", "localpasswd"), fileEntry("/etc/passwd", "after")}, nil, []check{same("localpasswd-dup", "localpasswd"), target("localpasswd-dup", "/etc/passwd"), content("etc/passwd", "after")}},
		{"HardlinkSymlinkRelative", nil, []entry{etc, passwd, symlinkEntry("passwdlink", "../../../../../etc/passwd"), linkEntry("localpasswd", "/passwdlink")}, nil, []check{same("localpasswd", "passwdlink"), target("localpasswd", "../../../../../etc/passwd")}},
		{"HardlinkSymlinkAbsolute", nil, []entry{etc, passwd, symlinkEntry("passwdlink", "/etc/passwd"), linkEntry("localpasswd", "/passwdlink")}, nil, []check{same("localpasswd", "passwdlink")}},
		{"HardlinkSymlinkChmod", nil, []entry{symlinkEntry("also-exists", outside), linkEntry("sketchylink", "also-exists")}, nil, []check{target("sketchylink", outside), func(t *testing.T, _ string) {
			st, err := os.Stat(outside)
			require.NoError(t, err)
			assert.Equal(t, fs.FileMode(0o400), st.Mode().Perm())
		}}},

		// moby/go-archive, by what they are about.
		{"InvalidFilenames", nil, []entry{fileEntry("../victim/dotdot", "x"), fileEntry("/../victim/slash-dotdot", "x")}, nil, []check{content("victim/dotdot", "x"), content("victim/slash-dotdot", "x")}},
		{"InvalidHardlinkDotdot", nil, []entry{linkEntry("loophole", "../victim/hello")}, layerfs.ErrMalformed, nil},
		{"InvalidHardlinkThroughLink", nil, []entry{symlinkEntry("loophole-victim", "../victim"), linkEntry("file", "loophole-victim/hello")}, layerfs.ErrMalformed, nil},
		{"InvalidSymlinkReadVictim", nil, []entry{symlinkEntry("loophole", "../victim/hello"), fileEntry("loophole", "overwritten")}, nil, []check{content("loophole", "overwritten")}},
		{"SymlinkBreakoutDirectory", nil, []entry{symlinkEntry("loophole", "../victim"), dirEntry("loophole/sub", 0o755), fileEntry("loophole/sub/hello", "w")}, nil, []check{content("victim/sub/hello", "w")}},
		{"SymlinkLoop", nil, []entry{symlinkEntry("a", "b"), symlinkEntry("b", "a"), fileEntry("a/x", "")}, layerfs.ErrMalformed, nil},
		{"RootIsFile", nil, []entry{fileEntry("./.", "x")}, layerfs.ErrMalformed, nil},

		// umoci.
		{"UnpackEntryNonDirParent", []string{"file parent x"}, []entry{fileEntry("parent/child", "y")}, nil, []check{content("parent/child", "y")}},
		{"UnpackEntryParentDir", nil, []entry{fileEntry("a/b/../c", "y")}, nil, []check{content("a/c", "y")}},
		{"UnpackHardlinkToDirectory", nil, []entry{etc, linkEntry("x", "etc")}, layerfs.ErrMalformed, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, mode := range []struct {
				name string
				set  func(*archive.ApplyOptions)
			}{{"linux", func(*archive.ApplyOptions) {}}, {"portable", archive.UsePortable}} {
				t.Run(mode.name, func(t *testing.T) {
					top := t.TempDir()
					tree.Build(t, top, "file victim/hello untouched", "file etc/passwd untouched", "dir root")
					root := filepath.Join(top, "root")
					tree.Build(t, root, tt.before...)
					opts := &archive.ApplyOptions{}
					mode.set(opts)
					err := applyBytes(t, root, makeTar(t, tt.entries...), opts)
					if tt.want != nil {
						require.ErrorIs(t, err, tt.want)
						var ee *archive.EntryError
						require.ErrorAs(t, err, &ee)
					} else {
						require.NoError(t, err)
					}
					for _, c := range tt.checks {
						c(t, root)
					}
					want := t.TempDir()
					tree.Build(t, want, "file victim/hello untouched", "file etc/passwd untouched", "dir root")
					requireSame(t, want, top, &tree.CompareOptions{IgnoreTimes: true, IgnorePath: func(p string) bool { return p == "/root" }})
				})
			}
		})
	}
}

// scratch returns a directory that can have any xattr, in memory if possible:
// unmounting an overlay syncs its upper file system.
func scratch(t *testing.T) string {
	if sys.KernelAtLeast(6, 6) { // user xattrs on tmpfs
		return testenv.Tmpfs(t)
	}
	return t.TempDir()
}

// layerCase is a base and a layer whose result does not depend on the order of
// the entries.
type layerCase struct {
	name  string
	base  []string
	layer []entry
	want  []string
}

func layerCases() []layerCase {
	wh := func(name string) entry { return fileEntry(name, "") }
	deep := []string{"file d/a 1", "file d/b 2", "file d/s/x 3", "file d/s/y 4", "file keep k"}
	return []layerCase{
		{"add", deep, []entry{fileEntry("d/new", "n"), dirEntry("e", 0o700), fileEntry("e/f", "f")},
			append(deep, "file d/new n", "dir e 0700", "file e/f f")},
		{"whiteout file", deep, []entry{wh("d/.wh.a")}, append(deep, "rm d/a")},
		{"whiteout dir", deep, []entry{wh(".wh.d")}, []string{"file keep k"}},
		{"whiteout and same file", deep, []entry{wh("d/.wh.a"), fileEntry("d/a", "new")}, append(deep, "file d/a new")},
		{"whiteout and same dir", deep, []entry{wh(".wh.d"), dirEntry("d", 0o750), fileEntry("d/z", "z")}, []string{"file keep k", "dir d 0750", "file d/z z"}},
		{"whiteout and implied dir", append(deep, "chmod d 0711"), []entry{wh(".wh.d"), fileEntry("d/z", "z")}, []string{"file keep k", "file d/z z"}},
		{"whiteout and file in subdir", deep, []entry{wh("d/.wh.s"), dirEntry("d/s", 0o755), fileEntry("d/s/x", "new")}, append(deep, "rm d/s", "file d/s/x new")},
		{"opaque", deep, []entry{wh("d/.wh..wh..opq"), dirEntry("d", 0o755), fileEntry("d/z", "z")}, []string{"file keep k", "file d/z z"}},
		{"opaque with same names", deep, []entry{wh("d/.wh..wh..opq"), dirEntry("d", 0o755), fileEntry("d/a", "new"), dirEntry("d/s", 0o701), fileEntry("d/s/q", "q")},
			[]string{"file keep k", "file d/a new", "dir d/s 0701", "file d/s/q q"}},
		{"opaque sub", deep, []entry{wh("d/s/.wh..wh..opq"), dirEntry("d/s", 0o755), fileEntry("d/s/q", "q")}, append(deep, "rm d/s", "file d/s/q q")},
		{"opaque and whiteout", deep, []entry{wh("d/.wh..wh..opq"), wh("d/.wh.a"), dirEntry("d", 0o755)}, []string{"file keep k", "dir d"}},
		{"opaque above whiteout", deep, []entry{wh("d/.wh..wh..opq"), wh("d/s/.wh.x"), dirEntry("d", 0o755), dirEntry("d/s", 0o755)}, []string{"file keep k", "dir d/s"}},
		{"opaque implied", append(deep, "chmod d/s 0711"), []entry{wh("d/.wh..wh..opq"), dirEntry("d", 0o755), fileEntry("d/s/q", "q")}, []string{"file keep k", "file d/s/q q"}},
		{"opaque root", deep, []entry{wh(".wh..wh..opq"), fileEntry("only", "o"), dirEntry("d", 0o755), fileEntry("d/n", "n")}, []string{"file only o", "file d/n n"}},
		{"file over dir", deep, []entry{fileEntry("d", "now a file")}, []string{"file keep k", "file d \"now a file\""}},
		{"dir over file", deep, []entry{dirEntry("keep", 0o755), fileEntry("keep/x", "x")}, append(deep, "rm keep", "file keep/x x")},
		{"dir over link", append(deep, "symlink l d"), []entry{dirEntry("l", 0o755), fileEntry("l/x", "x")}, append(deep, "file l/x x")},
		{"through link", append(deep, "symlink l d"), []entry{fileEntry("l/n", "n"), wh("l/.wh.a")}, append(deep, "symlink l d", "file d/n n", "rm d/a")},
		{"through absolute link", append(deep, "symlink l /d/s"), []entry{fileEntry("l/n", "n"), wh("l/.wh.x")}, append(deep, "symlink l /d/s", "file d/s/n n", "rm d/s/x")},
		{"attributes of dir", append(deep, "xattr d user.old v", "chmod d 0711"), []entry{xattrEntry(dirEntry("d", 0o3775), "user.new", "w")},
			append(deep, "chmod d 03775", "xattr d user.new w")},
		{"implied keeps attributes", append(deep, "chmod d 0711", "chown d 7:8", "xattr d user.k v", "chmod d/s 0700"), []entry{fileEntry("d/s/n", "n")},
			append(deep, "chmod d 0711", "chown d 7:8", "xattr d user.k v", "chmod d/s 0700", "file d/s/n n")},
		{"hard link before target", deep, []entry{linkEntry("l1", "t"), fileEntry("t", "tt"), linkEntry("z", "l1")}, append(deep, "file t tt", "link l1 t", "link z t")},
		{"hard link to lower", deep, []entry{linkEntry("d/l", "d/s/x"), linkEntry("m", "d/s/x")}, append(deep, "link d/l d/s/x", "link m d/s/x")},
		{"hard link through link", append(deep, "symlink l d/s"), []entry{linkEntry("m", "l/x")}, append(deep, "symlink l d/s", "link m d/s/x")},
		{"hard link replaces", deep, []entry{linkEntry("keep", "d/a")}, append(deep, "rm keep", "link keep d/a")},
		{"whiteout of nothing", deep, []entry{wh("d/.wh.nothing"), wh("no/where/.wh.x")}, deep},
		{"whiteout and default acl", append(deep, "xattr d system.posix_acl_default 0x0200000001000700ffffffff02000700010000000400050"+
			"0ffffffff10000700ffffffff20000500ffffffff"), []entry{fileEntry("d/n", "n"), dirEntry("d/nd", 0o755)},
			append(deep, "file d/n n", "dir d/nd", "xattr d system.posix_acl_default 0x0200000001000700ffffffff020007000100000004000500ffffffff10000700ffffffff20000500ffffffff")},
		{"meta names", deep, []entry{fileEntry(".wh..wh.aufs", "x"), dirEntry(".wh..wh.orph", 0o700), fileEntry(".wh..wh.orph/x", "y")}, deep},
		{"plnk", deep, []entry{dirEntry(".wh..wh.plnk", 0o700), fileEntry(".wh..wh.plnk/12.34", "shared"), linkEntry("p1", ".wh..wh.plnk/12.34"), linkEntry("d/p2", ".wh..wh.plnk/12.34")},
			append(deep, "file p1 shared", "link d/p2 p1")},
	}
}

// TestLayerOrder applies each layer in many orders, as a merged tree, as an
// upper directory of overlayfs and as an AUFS branch. The oracle is a tree
// built by plain steps; the union is made by the kernel for overlayfs and by
// writing and applying again for AUFS.
func TestLayerOrder(t *testing.T) {
	testenv.RequireRoot(t)
	ignore := &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: tree.IgnoreOverlayXattrs}
	for _, tt := range layerCases() {
		t.Run(tt.name, func(t *testing.T) {
			work := scratch(t)
			want, lower := filepath.Join(work, "want"), filepath.Join(work, "lower")
			tree.Build(t, want, tt.want...)
			tree.Build(t, lower, tt.base...)
			r := rand.New(rand.NewPCG(1, 2))
			for i := range 8 {
				entries := append([]entry(nil), tt.layer...)
				if i > 0 && tt.name != "dir over link" { // which means another path before and after
					r.Shuffle(len(entries), func(a, b int) { entries[a], entries[b] = entries[b], entries[a] })
				}
				stream := makeTar(t, entries...)
				sub := filepath.Join(work, fmt.Sprint(i))

				merged := sub + "merged"
				tree.Build(t, merged, tt.base...)
				require.NoError(t, applyBytes(t, merged, stream, nil))
				requireSame(t, want, merged, ignore)

				portable := sub + "portable"
				tree.Build(t, portable, tt.base...)
				other := &archive.ApplyOptions{Lost: func(*archive.EntryError) {}}
				archive.UsePortable(other)
				require.NoError(t, applyBytes(t, portable, stream, other))
				requireSame(t, want, portable, &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: func(string) bool { return true }, IgnoreOwners: true})

				for _, drop := range []bool{false, true} {
					upper := filepath.Join(sub+fmt.Sprint("overlay", drop), "upper")
					require.NoError(t, os.MkdirAll(upper, 0o755))
					opts := &archive.ApplyOptions{Form: whiteout.Overlay, Lowers: []string{lower}, DropWhiteouts: drop}
					if i%2 == 1 {
						archive.NoOpenat2(opts)
					}
					require.NoError(t, applyBytes(t, upper, stream, opts))
					withOverlay(t, upper, lower, func(m string) { requireSame(t, want, m, ignore) })

					// The same as a stream again, in the form of other tools.
					var again bytes.Buffer
					_, err := archive.WriteUpper(t.Context(), &again, upper, whiteout.Overlay, nil)
					require.NoError(t, err)
					back := sub + fmt.Sprint("back", drop)
					tree.Build(t, back, tt.base...)
					require.NoError(t, applyBytes(t, back, again.Bytes(), nil))
					requireSame(t, want, back, ignore)
				}

				branch := sub + "aufs"
				require.NoError(t, os.Mkdir(branch, 0o755))
				require.NoError(t, applyBytes(t, branch, stream, &archive.ApplyOptions{Form: whiteout.AUFS, Lowers: []string{lower}}))
				requireNoAUFSClash(t, branch)
				var again bytes.Buffer
				_, err := archive.WriteUpper(t.Context(), &again, branch, whiteout.AUFS, nil)
				require.NoError(t, err)
				back := sub + "aufsback"
				tree.Build(t, back, tt.base...)
				require.NoError(t, applyBytes(t, back, again.Bytes(), nil))
				requireSame(t, want, back, ignore)
				if t.Failed() {
					for _, e := range entries {
						t.Logf("%c %s %s", e.hdr.Typeflag, e.hdr.Name, e.hdr.Linkname)
					}
					return
				}
			}
		})
	}
}

// requireNoAUFSClash checks that no name has both an entry and a whiteout,
// which AUFS answers with EIO.
func requireNoAUFSClash(tb testing.TB, dir string) {
	tb.Helper()
	require.NoError(tb, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		d, b := filepath.Split(p)
		if _, err := os.Lstat(d + ".wh." + b); err == nil {
			tb.Errorf("%s has an entry and a whiteout", p)
		}
		return nil
	}))
}

func withOverlay(t *testing.T, upper, lower string, fn func(merged string)) {
	t.Helper()
	top := filepath.Dir(upper)
	for _, d := range []string{"work", "mnt"} {
		require.NoError(t, os.MkdirAll(filepath.Join(top, d), 0o755))
	}
	m := filepath.Join(top, "mnt")
	require.NoError(t, unix.Mount("overlay", m, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, filepath.Join(top, "work"))))
	defer func() { require.NoError(t, unix.Unmount(m, 0)) }()
	fn(m)
}

func TestApplyLimits(t *testing.T) {
	big := strings.Repeat("x", 5000)
	for _, tt := range []struct {
		name    string
		limits  layerfs.Limits
		entries []entry
		ok      bool
	}{
		{"bytes", layerfs.Limits{Bytes: 4999}, []entry{fileEntry("a", big)}, false},
		{"bytes at the limit", layerfs.Limits{Bytes: 5000}, []entry{fileEntry("a", big)}, true},
		{"bytes in all", layerfs.Limits{Bytes: 9999}, []entry{fileEntry("ok", big), fileEntry("a", big)}, false},
		{"entries", layerfs.Limits{Entries: 1}, []entry{fileEntry("ok", ""), fileEntry("a", "")}, false},
		{"entries at the limit", layerfs.Limits{Entries: 2}, []entry{fileEntry("ok", ""), fileEntry("a", "")}, true},
		{"path", layerfs.Limits{PathLength: 3}, []entry{fileEntry("long", "")}, false},
		{"default path", layerfs.Limits{}, []entry{fileEntry(strings.Repeat("a/", 2049)+"x", "")}, false},
		{"link", layerfs.Limits{PathLength: 100}, []entry{symlinkEntry("l", big)}, false},
		{"xattr", layerfs.Limits{XattrBytes: 100}, []entry{xattrEntry(fileEntry("a", ""), "user.a", big[:200])}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			err := applyBytes(t, dir, makeTar(t, tt.entries...), &archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{Limits: tt.limits}})
			if tt.ok {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, layerfs.ErrLimit)
			var ee *archive.EntryError
			require.ErrorAs(t, err, &ee)
			last := tt.entries[len(tt.entries)-1].hdr.Name
			require.Equal(t, last, ee.Entry)
			_, serr := os.Lstat(filepath.Join(dir, last))
			require.Error(t, serr, "what is over the limit was made")
		})
	}
}

// zeroReader gives n zeros.
type zeroReader struct{ n int64 }

func (z *zeroReader) Read(p []byte) (int, error) {
	if z.n <= 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), z.n)]
	clear(p)
	z.n -= int64(len(p))
	return len(p), nil
}

func TestApplyBomb(t *testing.T) {
	var b bytes.Buffer
	z := newGzip(&b)
	_, err := io.Copy(z, io.MultiReader(bytes.NewReader(makeTar(t, fileEntry("a", ""))), &zeroReader{200 << 20}))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	// DEFLATE cannot expand more than 1032 times, so a lower limit is needed to see it.
	opts := &archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{Limits: layerfs.Limits{Ratio: 100}}}
	require.ErrorIs(t, applyBytes(t, t.TempDir(), b.Bytes(), opts), layerfs.ErrLimit)
	require.NoError(t, applyBytes(t, t.TempDir(), b.Bytes(), nil))
}

// TestApplyTruncated cuts a stream at every block and some bytes beside.
func TestApplyTruncated(t *testing.T) {
	whole := makeTar(t, dirEntry("d", 0o755), fileEntry("d/a", strings.Repeat("a", 1300)),
		xattrEntry(fileEntry("d/"+strings.Repeat("long", 40), "b"), "user.x", "y"), linkEntry("l", "d/a"))
	for cut := 1; cut < len(whole)-512; cut += 256 {
		err := applyBytes(t, t.TempDir(), whole[:cut], nil)
		end := len(whole) - 1024
		if cut >= end+512 {
			require.NoError(t, err, "cut at %d", cut)
			continue
		}
		require.ErrorIs(t, err, layerfs.ErrMalformed, "cut at %d", cut)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "cut at %d", cut)
	}
	for name, z := range compressions(t, whole) {
		for _, cut := range []int{len(z) / 2, len(z) - 1} {
			err := applyBytes(t, t.TempDir(), z[:cut], nil)
			require.ErrorIs(t, err, layerfs.ErrMalformed, "%s cut at %d of %d", name, cut, len(z))
		}
		require.NoError(t, applyBytes(t, t.TempDir(), z, nil), name)
		broken := bytes.Clone(z)
		broken[len(broken)/2] ^= 0x55
		require.ErrorIs(t, applyBytes(t, t.TempDir(), broken, nil), layerfs.ErrMalformed, name)
	}
}

func TestApplyEmpty(t *testing.T) {
	require.NoError(t, applyBytes(t, t.TempDir(), nil, nil))
	require.NoError(t, applyBytes(t, t.TempDir(), make([]byte, 1024), nil))
	require.NoError(t, applyBytes(t, t.TempDir(), make([]byte, 10240), nil))
	require.ErrorIs(t, applyBytes(t, t.TempDir(), []byte("no tar at all"), nil), layerfs.ErrMalformed)
	require.ErrorIs(t, applyBytes(t, t.TempDir(), bytes.Repeat([]byte("no tar at all"), 100), nil), layerfs.ErrMalformed)
}

type failingReader struct {
	r   io.Reader
	err error
}

func (f *failingReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err == io.EOF {
		err = f.err
	}
	return n, err
}

// TestApplyReaderError: an error of the caller's reader is not taken for a bad
// stream, nor for its end.
func TestApplyReaderError(t *testing.T) {
	whole := makeTar(t, fileEntry("a", strings.Repeat("a", 100000)))
	for _, own := range []error{errors.New("connection lost"), io.ErrUnexpectedEOF} {
		_, err := archive.Apply(t.Context(), t.TempDir(), &failingReader{bytes.NewReader(whole[:50000]), own}, nil)
		require.ErrorIs(t, err, own)
		require.NotErrorIs(t, err, layerfs.ErrMalformed)
	}
}

func TestApplyCancel(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := archive.Apply(ctx, t.TempDir(), bytes.NewReader(makeTar(t, fileEntry("a", ""))), nil)
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("reader stuck", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		r, w := io.Pipe()
		defer w.Close()
		why := errors.New("why")
		go func() {
			_, _ = w.Write(makeTar(t, fileEntry("a", strings.Repeat("x", 10000)))[:6000])
			cancel(why)
		}()
		_, err := archive.Apply(ctx, t.TempDir(), r, nil)
		require.ErrorIs(t, err, why)
	})
}

func TestApplyDevices(t *testing.T) {
	testenv.RequireRoot(t)
	dev := entry{hdr: tarHeader('3', "null")}
	dev.hdr.Devmajor, dev.hdr.Devminor = 1, 3
	stream := makeTar(t, dev, fileEntry("after", "x"))
	apply := func(p layerfs.DevicePolicy) (string, layerfs.ApplyResult, error) {
		dir := t.TempDir()
		res, err := archive.Apply(t.Context(), dir, bytes.NewReader(stream), &archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{Devices: p}})
		return filepath.Join(dir, "null"), res, err
	}
	path, _, err := apply(layerfs.DevicesMake)
	require.NoError(t, err)
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st))
	require.Equal(t, unix.Mkdev(1, 3), st.Rdev)

	path, res, err := apply(layerfs.DevicesSkip)
	require.NoError(t, err)
	require.Equal(t, int64(1), res.Skipped)
	require.NoFileExists(t, path)

	path, _, err = apply(layerfs.DevicesRecord)
	require.NoError(t, err)
	buf := make([]byte, 100)
	n, err := unix.Lgetxattr(path, "user.containers.override_stat", buf)
	require.NoError(t, err)
	require.Equal(t, "0:0:0644:char-1-3", string(buf[:n]))

	_, _, err = apply(layerfs.DevicesRefuse)
	require.ErrorIs(t, err, fs.ErrPermission)

	// In an upper directory of overlayfs a device 0:0 would hide what is below.
	dev.hdr.Devmajor, dev.hdr.Devminor = 0, 0
	err = applyBytes(t, t.TempDir(), makeTar(t, dev), &archive.ApplyOptions{Form: whiteout.Overlay})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	lost := 0
	err = applyBytes(t, t.TempDir(), makeTar(t, dev), &archive.ApplyOptions{Form: whiteout.Overlay, Lost: func(*archive.EntryError) { lost++ }})
	require.NoError(t, err)
	require.Equal(t, 1, lost)

	dev.hdr.Devmajor = 5000
	require.ErrorIs(t, applyBytes(t, t.TempDir(), makeTar(t, dev), nil), layerfs.ErrMalformed)
}

func TestApplyOverlayXattrs(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	stream := makeTar(t, xattrEntry(dirEntry("d", 0o755), "trusted.overlay.opaque", "y"))
	require.NoError(t, applyBytes(t, dir, stream, &archive.ApplyOptions{Form: whiteout.Overlay}))
	buf := make([]byte, 10)
	_, err := unix.Lgetxattr(dir+"/d", "trusted.overlay.opaque", buf)
	require.ErrorIs(t, err, unix.ENODATA)
	n, err := unix.Lgetxattr(dir+"/d", "trusted.overlay.overlay.opaque", buf)
	require.NoError(t, err)
	require.Equal(t, "y", string(buf[:n]))
	var out bytes.Buffer
	_, err = archive.WriteUpper(t.Context(), &out, dir, whiteout.Overlay, nil)
	require.NoError(t, err)
	require.Contains(t, out.String(), "SCHILY.xattr.trusted.overlay.opaque=y")
}

func TestApplyOwners(t *testing.T) {
	testenv.RequireRoot(t)
	f := fileEntry("d/f", "x")
	f.hdr.Uid, f.hdr.Gid, f.hdr.Mode = 5, 6, 0o6755
	stream := makeTar(t, f)
	stat := func(opts *archive.ApplyOptions, name string) unix.Stat_t {
		dir := t.TempDir()
		require.NoError(t, applyBytes(t, dir, stream, opts))
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
		return st
	}
	st := stat(nil, "d/f")
	assert.Equal(t, [3]uint32{5, 6, 0o106755}, [3]uint32{st.Uid, st.Gid, st.Mode})
	idmap := &layerfs.IDMap{UIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 1000, Size: 10}}, GIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 2000, Size: 10}}}
	mapped := &archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{IDMap: idmap}}
	st = stat(mapped, "d/f")
	assert.Equal(t, [3]uint32{1005, 2006, 0o106755}, [3]uint32{st.Uid, st.Gid, st.Mode})
	st = stat(mapped, "d")
	assert.Equal(t, [2]uint32{1000, 2000}, [2]uint32{st.Uid, st.Gid}, "implied directories belong to the container's root")
	st = stat(&archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{IgnoreOwners: true}}, "d/f")
	assert.Equal(t, [3]uint32{0, 0, 0o106755}, [3]uint32{st.Uid, st.Gid, st.Mode})

	f.hdr.Uid = 50
	err := applyBytes(t, t.TempDir(), makeTar(t, f), mapped)
	var ee *archive.EntryError
	require.ErrorAs(t, err, &ee)
}

// TestApplyFullDisk: the error says what it is and names the entry.
func TestApplyFullDisk(t *testing.T) {
	testenv.RequireRoot(t)
	dir := testenv.Tmpfs(t, "size=256k")
	err := applyBytes(t, dir, makeTar(t, fileEntry("small", "s"), fileEntry("huge", strings.Repeat("x", 1<<20))), nil)
	require.ErrorIs(t, err, unix.ENOSPC)
	var ee *archive.EntryError
	require.ErrorAs(t, err, &ee)
	// Both are written at once, so either may find the disk full.
	require.Contains(t, []string{"huge", "small"}, ee.Entry)
}

func TestApplyHoles(t *testing.T) {
	body := strings.Repeat("\x00", 100_000) + "x" + strings.Repeat("\x00", 700_000) + "y" + strings.Repeat("\x00", 12345)
	for _, holes := range []bool{false, true} {
		dir := t.TempDir()
		require.NoError(t, applyBytes(t, dir, makeTar(t, fileEntry("f", body)), &archive.ApplyOptions{Holes: holes}))
		b, err := os.ReadFile(dir + "/f")
		require.NoError(t, err)
		require.Equal(t, body, string(b))
		var st unix.Stat_t
		require.NoError(t, unix.Stat(dir+"/f", &st))
		require.Equal(t, holes, st.Blocks*512 < 100_000, "%d blocks", st.Blocks)
	}
}

func TestApplyFewDescriptors(t *testing.T) {
	var entries []entry
	for i := range 40 {
		entries = append(entries, dirEntry(fmt.Sprintf("a%d/b/c", i), 0o755), fileEntry(fmt.Sprintf("a%d/b/c/f", i), "x"))
	}
	for i := range 40 {
		entries = append(entries, fileEntry(fmt.Sprintf("a%d/b/g", i), "y"), linkEntry(fmt.Sprintf("a%d/l", i), fmt.Sprintf("a%d/b/c/f", 39-i)))
	}
	stream := makeTar(t, entries...)
	want, got := t.TempDir(), t.TempDir()
	require.NoError(t, applyBytes(t, want, stream, nil))
	opts := &archive.ApplyOptions{}
	archive.FewDescriptors(opts)
	require.NoError(t, applyBytes(t, got, stream, opts))
	requireSame(t, want, got, &tree.CompareOptions{IgnoreDirTime: true})
}

// TestLongWhiteouts: the whiteout of a name of more than 251 bytes is longer
// than a name can be. A stream holds it, and only AUFS needs a file of it.
func TestLongWhiteouts(t *testing.T) {
	testenv.RequireRoot(t)
	work := scratch(t)
	lower := filepath.Join(work, "lower")
	steps := []string{"file d/kept 1"}
	var entries []entry
	for n := 250; n <= 255; n++ {
		name := "d/" + strings.Repeat("n", n)
		steps = append(steps, "file "+name+" 1")
		entries = append(entries, fileEntry("d/.wh."+filepath.Base(name), ""))
	}
	tree.Build(t, lower, steps...)
	want := filepath.Join(work, "want")
	tree.Build(t, want, "file d/kept 1")
	stream := makeTar(t, entries...)
	ignore := &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: tree.IgnoreOverlayXattrs}

	// What Compare and WriteChanges make of it comes back, too.
	var written bytes.Buffer
	_, err := archive.WriteChanges(t.Context(), &written, want, archive.Compare(t.Context(), lower, want, nil), nil)
	require.NoError(t, err)
	for name, s := range map[string][]byte{"made": stream, "written": written.Bytes()} {
		for _, portable := range []bool{false, true} {
			t.Run(fmt.Sprintf("merged/%s/portable=%v", name, portable), func(t *testing.T) {
				dir := filepath.Join(scratch(t), "d")
				tree.Build(t, dir, steps...)
				opts := &archive.ApplyOptions{}
				if portable {
					archive.UsePortable(opts)
				}
				require.NoError(t, applyBytes(t, dir, s, opts))
				requireSame(t, want, dir, ignore)
			})
		}
	}
	t.Run("overlay", func(t *testing.T) {
		upper := filepath.Join(work, "o", "upper")
		require.NoError(t, os.MkdirAll(upper, 0o755))
		opts := &archive.ApplyOptions{Form: whiteout.Overlay, Lowers: []string{lower}}
		require.NoError(t, applyBytes(t, upper, stream, opts))
		withOverlay(t, upper, lower, func(m string) { requireSame(t, want, m, ignore) })
		var again bytes.Buffer
		_, err := archive.WriteUpper(t.Context(), &again, upper, whiteout.Overlay, nil)
		require.NoError(t, err)
		dir := filepath.Join(work, "again")
		tree.Build(t, dir, steps...)
		require.NoError(t, applyBytes(t, dir, again.Bytes(), nil))
		requireSame(t, want, dir, ignore)
	})
	t.Run("aufs", func(t *testing.T) {
		err := applyBytes(t, scratch(t), stream, &archive.ApplyOptions{Form: whiteout.AUFS, Lowers: []string{lower}})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		assert.ErrorContains(t, err, "252 bytes")
	})
	t.Run("too-long", func(t *testing.T) {
		for _, form := range []whiteout.Form{archive.Merged, whiteout.AUFS, whiteout.Overlay} {
			s := makeTar(t, fileEntry(".wh."+strings.Repeat("n", 256), ""))
			require.ErrorIs(t, applyBytes(t, scratch(t), s, &archive.ApplyOptions{Form: form}), layerfs.ErrMalformed, form)
		}
	})
}
