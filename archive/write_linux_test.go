package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/fs/fstest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// richTree has everything a tar stream can hold.
func richTree() []string {
	return []string{
		"dir d 02770 5:6", "file d/suid x", "chown d/suid 7:8", "chmod d/suid 06755",
		"file empty", "data small 4000 1", "data medium 70000 2", "data large 900000 3",
		"sparse holes 5000@100000 3000@900000 0@2000000", "sparse allhole 0@1000000", "sparse start 4096@0 0@500000",
		"symlink s d/suid", "symlink dangling /no/where", "symlink slong " + strings.Repeat("t/", 150),
		"link hard d/suid", "link hard2 d/suid", "link hs s",
		"fifo fifo 0640", "char null 1 3 0666", "block blk 7 9", "sock sock",
		"file \"sp ace\\n\\xff\\\"\" odd", "file " + strings.Repeat("long", 50) + " l", "file " + strings.Repeat("deep/", 60) + "f l",
		"file ü ü", "file " + strings.Repeat("p", 99) + "/" + strings.Repeat("q", 99) + " ustar-prefix",
		"xattr d user.a 1", "xattr empty user.b 0x000a3d00", "xattr empty trusted.t tt", "xattr s trusted.link x",
		"xattr large security.capability 0x0100000200200000000000000000000000000000",
		"xattr d/suid system.posix_acl_access 0x0200000001000700ffffffff020007000100000004000500ffffffff10000700ffffffff20000500ffffffff",
		"xattr d system.posix_acl_default 0x0200000001000700ffffffff020007000100000004000500ffffffff10000700ffffffff20000500ffffffff",
		"mtime small 1234567890.123456789", "mtime empty 1969-12-31T23:59:58.5Z", "mtime s 2001-01-01T00:00:00Z",
		"mtime ü 2500-01-01T00:00:00Z", "mtime d 1000000000.000000001",
	}
}

func writeTree(tb testing.TB, dir string, opts *archive.WriteOptions) []byte {
	tb.Helper()
	var b bytes.Buffer
	_, err := archive.Write(context.Background(), &b, dir, opts)
	require.NoError(tb, err)
	return b.Bytes()
}

// TestRoundTrip: Full keeps all but sockets. GNU tar and archive/tar read the
// same from the stream.
func TestRoundTrip(t *testing.T) {
	testenv.RequireRoot(t)
	src := filepath.Join(scratch(t), "src")
	tree.Build(t, src, richTree()...)
	var b bytes.Buffer
	res, err := archive.Write(t.Context(), &b, src, &archive.WriteOptions{Digest: true})
	require.NoError(t, err)
	assert.Equal(t, int64(1), res.Skipped)
	assert.Equal(t, int64(b.Len()), res.Size)
	require.NoError(t, os.Remove(filepath.Join(src, "sock")))
	var times unix.Stat_t // removing changed it
	require.NoError(t, unix.Stat(src, &times))
	opts := &tree.CompareOptions{AccessTimes: true, Holes: true, IgnorePath: func(p string) bool { return p == "/" }}

	t.Run("apply", func(t *testing.T) {
		got := filepath.Join(scratch(t), "got")
		require.NoError(t, os.Mkdir(got, 0o755))
		ares, err := archive.Apply(t.Context(), got, bytes.NewReader(b.Bytes()), nil)
		require.NoError(t, err)
		assert.Equal(t, res.Digest, ares.Digest)
		assert.Equal(t, res.Entries, ares.Entries)
		requireSame(t, src, got, &tree.CompareOptions{Holes: true, IgnoreDirTime: true})
		again := writeTree(t, got, nil)
		requireSameEntries(t, b.Bytes(), again)
	})
	t.Run("gnu tar", func(t *testing.T) {
		testenv.RequireTool(t, "tar")
		got := filepath.Join(scratch(t), "got")
		require.NoError(t, os.Mkdir(got, 0o755))
		c := exec.Command("tar", "xpf", "-", "--xattrs", "--xattrs-include=*", "-C", got)
		c.Stdin = bytes.NewReader(b.Bytes())
		out, err := c.CombinedOutput()
		require.NoError(t, err, "%s", out)
		o := *opts
		o.AccessTimes = false
		o.Holes = false
		o.IgnoreDirTime = true
		// It has a record of its own for ACLs and does not restore them as xattrs.
		o.IgnoreXattr = func(name string) bool { return strings.HasPrefix(name, "system.") }
		requireSame(t, src, got, &o)
	})
	t.Run("archive/tar", func(t *testing.T) {
		r := tar.NewReader(bytes.NewReader(b.Bytes()))
		n := int64(0)
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, r)
			require.NoError(t, err, h.Name)
			n++
		}
		assert.Equal(t, res.Entries, n)
	})
}

// requireSameEntries compares two streams by entries, for a message that helps.
func requireSameEntries(t *testing.T, a, b []byte) {
	t.Helper()
	ra, rb := tar.NewReader(bytes.NewReader(a)), tar.NewReader(bytes.NewReader(b))
	for {
		ha, erra := ra.Next()
		hb, errb := rb.Next()
		require.Equal(t, erra, errb)
		if erra != nil {
			break
		}
		ha.AccessTime, hb.AccessTime = time.Time{}, time.Time{}
		delete(ha.PAXRecords, "atime")
		delete(hb.PAXRecords, "atime")
		if ha.Name == "./" {
			continue
		}
		require.Equal(t, ha, hb)
		da, err := io.ReadAll(ra)
		require.NoError(t, err)
		db, err := io.ReadAll(rb)
		require.NoError(t, err)
		require.True(t, bytes.Equal(da, db), ha.Name)
	}
}

func TestProfiles(t *testing.T) {
	testenv.RequireRoot(t)
	a, b := scratch(t), scratch(t)
	lines := append(richTree(), "rm sock")
	tree.Build(t, a, lines...)
	tree.Build(t, b, lines...)
	for _, d := range []string{a, b} {
		require.NoError(t, os.Chtimes(d, time.Unix(5, 0), time.Unix(5, 0)))
	}
	when := time.Unix(1500000000, 0)
	repro := &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: layerfs.ProfileReproducible, SourceDate: when}}
	first := writeTree(t, a, repro)
	assert.True(t, bytes.Equal(first, writeTree(t, b, repro)), "equal trees give different streams")
	for _, p := range []layerfs.Profile{layerfs.ProfileOCI, layerfs.ProfileReproducible} {
		stream := writeTree(t, a, &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: p, SourceDate: when}})
		r := tar.NewReader(bytes.NewReader(stream))
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			require.NoError(t, err)
			assert.Zero(t, h.ModTime.Nanosecond(), h.Name)
			assert.True(t, h.AccessTime.IsZero(), h.Name)
			if p == layerfs.ProfileReproducible {
				assert.False(t, h.ModTime.After(when), h.Name)
			}
			for k := range h.PAXRecords {
				assert.False(t, strings.Contains(k, "trusted.") || strings.Contains(k, "system.") || strings.Contains(k, "sparse"), "%s %s", h.Name, k)
			}
			if h.Name == "large" {
				assert.Contains(t, h.PAXRecords, "SCHILY.xattr.security.capability")
			}
		}
	}
}

func TestWriteCompressed(t *testing.T) {
	src, plain := t.TempDir(), []byte(nil)
	tree.Build(t, src, "data a 300000 1", "file b b")
	for _, c := range []layerfs.Compression{layerfs.NoCompression, layerfs.Gzip, layerfs.Zstd} {
		for _, level := range []int{0, 1, 9} {
			b := writeTree(t, src, &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Compression: c, Level: level, Profile: layerfs.ProfileOCI}})
			assert.Equal(t, c, archive.Detect(b))
			r, _, err := archive.Decompress(bytes.NewReader(b))
			require.NoError(t, err)
			un, err := io.ReadAll(r)
			require.NoError(t, err)
			require.NoError(t, r.Close())
			if plain == nil {
				plain = un
			}
			assert.True(t, bytes.Equal(plain, un))
		}
	}
	for _, o := range []layerfs.DiffOptions{{Compression: layerfs.XZ}, {Compression: layerfs.Gzip, Level: 10}, {Profile: 9}} {
		_, err := archive.Write(t.Context(), io.Discard, src, &archive.WriteOptions{DiffOptions: o})
		require.Error(t, err)
	}
}

func TestWriteRefuses(t *testing.T) {
	src := t.TempDir()
	tree.Build(t, src, "file d/.wh.x hidden")
	_, err := archive.Write(t.Context(), io.Discard, src, nil)
	require.ErrorIs(t, err, layerfs.ErrMalformed)
	var ee *archive.EntryError
	require.ErrorAs(t, err, &ee)
	require.Equal(t, "d/.wh.x", ee.Entry)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = archive.Write(ctx, io.Discard, t.TempDir(), nil)
	require.ErrorIs(t, err, context.Canceled)

	full := errors.New("full")
	tree.Build(t, src, "rm d", "data big 5000000 1")
	_, err = archive.Write(t.Context(), &limitedWriter{1000000, full}, src, nil)
	require.ErrorIs(t, err, full)

	for _, list := range [][]layerfs.Change{
		{{Path: "b", Kind: layerfs.Added}},
		{{Path: "/../x", Kind: layerfs.Added}},
		{{Path: "/big", Kind: layerfs.Added}, {Path: "/a", Kind: layerfs.Deleted}},
		{{Path: "/missing", Kind: layerfs.Added}},
	} {
		_, err = archive.WriteChanges(t.Context(), io.Discard, src, seqOf(list), nil)
		require.Error(t, err, "%v", list)
	}
}

type limitedWriter struct {
	n   int
	err error
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if l.n -= len(p); l.n < 0 {
		return 0, l.err
	}
	return len(p), nil
}

func seqOf(list []layerfs.Change) func(func(layerfs.Change, error) bool) {
	return func(yield func(layerfs.Change, error) bool) {
		for _, c := range list {
			if !yield(c, nil) {
				return
			}
		}
	}
}

func collect(tb testing.TB, a, b string, opts *archive.CompareOptions) []layerfs.Change {
	tb.Helper()
	var out []layerfs.Change
	for c, err := range archive.Compare(context.Background(), a, b, opts) {
		require.NoError(tb, err)
		out = append(out, c)
	}
	return out
}

// mutate changes a tree at random, in all ways a change list can tell.
func mutate(r *rand.Rand, root string, dirs, files []string) []string {
	var lines []string
	for range 1 + r.IntN(12) {
		f, d := files[r.IntN(len(files))], dirs[r.IntN(len(dirs))]
		p := filepath.Join(root, f)
		if _, err := os.Lstat(p); err != nil {
			lines = append(lines, "file "+f+" back")
			continue
		}
		lines = append(lines, []string{
			"rm " + f, "append " + f + " more", "chmod " + f + " 0600", "chown " + f + " 3:4", "xattr " + f + " user.n v",
			"file " + d + "/new" + fmt.Sprint(r.IntN(3)) + " n", "rm " + d, "chmod " + d + " 0700", "touch " + f,
			"rename " + f + " " + f + "-r", "rename " + d + " " + d + "-r", "symlink " + d + "/l" + fmt.Sprint(r.IntN(1000)) + " x",
			"xattr " + d + " user.d v",
		}[r.IntN(13)])
	}
	return lines
}

// TestCompareOracle compares with a plain double walk, and checks that the
// changes written and applied elsewhere give the new tree.
func TestCompareOracle(t *testing.T) {
	testenv.RequireRoot(t)
	work := scratch(t)
	base := filepath.Join(work, "base")
	var dirs, files, lines []string
	for i := range 6 {
		d := fmt.Sprintf("d%d", i)
		for _, sub := range []string{d, d + "/s", d + "/s/t", d + "-x"} {
			dirs = append(dirs, sub)
			for j := range 4 {
				files = append(files, fmt.Sprintf("%s/f%d", sub, j))
				lines = append(lines, fmt.Sprintf("data %s/f%d %d %d", sub, j, 10+j*3000, i))
			}
		}
	}
	tree.Build(t, base, lines...)
	for seed := range 30 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 7))
			now := filepath.Join(work, fmt.Sprint("new", seed))
			require.NoError(t, exec.Command("cp", "-a", base, now).Run())
			time.Sleep(30 * time.Millisecond)
			since := time.Now()
			time.Sleep(5 * time.Millisecond)
			for _, l := range mutate(r, now, dirs, files) {
				_ = tree.Make(now, l) // what an earlier line removed cannot be changed
			}
			// The change nobody sees: same size, same time.
			for _, f := range files {
				p := filepath.Join(now, f)
				if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() && r.IntN(8) == 0 {
					b, err := os.ReadFile(p)
					require.NoError(t, err)
					b[len(b)-1] ^= 1
					require.NoError(t, os.WriteFile(p, b, 0))
					require.NoError(t, os.Chtimes(p, st.ModTime(), st.ModTime()))
				}
			}
			want, err := tree.Changes(base, now)
			require.NoError(t, err)
			since0 := &archive.CompareOptions{}
			noAt := &archive.CompareOptions{Workers: 1}
			archive.NoListxattrat(noAt)
			for name, opts := range map[string]*archive.CompareOptions{"exact": since0, "since": {Since: since}, "workers": {Workers: 7}, "noat": noAt} {
				assert.Equal(t, tree.FormatChanges(want), tree.FormatChanges(collect(t, base, now, opts)), name)
			}
			port := &archive.CompareOptions{}
			archive.ComparePortable(port)
			noXattrs, err := tree.Compare(base, now, nil)
			require.NoError(t, err)
			if !strings.Contains(fmt.Sprint(noXattrs), "xattr") {
				assert.Equal(t, tree.FormatChanges(want), tree.FormatChanges(collect(t, base, now, port)), "portable")
			}

			var layer bytes.Buffer
			_, err = archive.WriteChanges(t.Context(), &layer, now, archive.Compare(t.Context(), base, now, nil), nil)
			require.NoError(t, err)
			elsewhere := filepath.Join(work, fmt.Sprint("else", seed))
			require.NoError(t, exec.Command("cp", "-a", base, elsewhere).Run())
			require.NoError(t, applyBytes(t, elsewhere, layer.Bytes(), nil))
			requireSame(t, now, elsewhere, nil)
		})
	}
}

func TestCompareStops(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	var lines []string
	for i := range 3000 {
		lines = append(lines, fmt.Sprintf("file d%04d/f x", i))
	}
	tree.Build(t, b, lines...)
	n := 0
	for range archive.Compare(t.Context(), a, b, nil) {
		if n++; n == 5 {
			break
		}
	}
	assert.Equal(t, 5, n)
	assert.Len(t, collect(t, a, b, nil), 6001) // and "/"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, err := range archive.Compare(ctx, a, b, nil) {
		cancel()
		last = err
	}
	assert.ErrorIs(t, last, context.Canceled)
	for _, err := range archive.Compare(t.Context(), a, filepath.Join(b, "none"), nil) {
		assert.ErrorIs(t, err, os.ErrNotExist)
	}
}

// TestCompareTrust: the mode that is wrong on purpose.
func TestCompareTrust(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	tree.Build(t, a, "file f one", "mtime f 1000000000")
	tree.Build(t, b, "file f two", "mtime f 1000000000")
	now := time.Unix(1, 0)
	for _, d := range []string{a, b} {
		require.NoError(t, os.Chtimes(d, now, now))
	}
	assert.Equal(t, "C /f\n", tree.FormatChanges(collect(t, a, b, nil)))
	assert.Empty(t, collect(t, a, b, &archive.CompareOptions{Content: archive.ContentTrustTimes}))
}

// continuityApplier runs continuity's suite: changes are made in a copy,
// compared with the original, written, and applied to another copy.
type continuityApplier struct{ t *testing.T }

func (continuityApplier) TestContext(ctx context.Context) (context.Context, func(), error) {
	dir, err := os.MkdirTemp("", "fssuite")
	return context.WithValue(ctx, continuityApplier{}, dir), func() { _ = os.RemoveAll(dir) }, err
}

func (continuityApplier) Apply(ctx context.Context, a fstest.Applier) (string, func(), error) {
	dir := ctx.Value(continuityApplier{}).(string)
	applied, changed := filepath.Join(dir, "applied"), filepath.Join(dir, "changed")
	if err := os.MkdirAll(applied, 0o755); err != nil {
		return "", nil, err
	}
	if err := os.RemoveAll(changed); err != nil {
		return "", nil, err
	}
	if out, err := exec.Command("cp", "-a", applied, changed).CombinedOutput(); err != nil {
		return "", nil, fmt.Errorf("%w: %s", err, out)
	}
	if err := a.Apply(changed); err != nil {
		return "", nil, err
	}
	var b bytes.Buffer
	if _, err := archive.WriteChanges(ctx, &b, changed, archive.Compare(ctx, applied, changed, nil), nil); err != nil {
		return "", nil, err
	}
	if _, err := archive.Apply(ctx, applied, &b, nil); err != nil {
		return "", nil, err
	}
	return applied, nil, nil
}

func TestContinuitySuite(t *testing.T) {
	testenv.RequireRoot(t)
	fstest.FSSuite(t, continuityApplier{t})
}

// TestGNUTar reads what GNU tar writes in each of its formats.
func TestGNUTar(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.RequireTool(t, "tar")
	work := scratch(t)
	src := filepath.Join(work, "src")
	common := []string{
		"file a/b hello", "dir a 0711 5:6", "symlink a/l b", "link a/h a/b", "fifo p 0640", "char c 1 3",
		"sparse holes 5000@100000 3000@900000 0@2000000", "sparse many 1@0 1@10000 1@20000 1@30000 1@40000 1@50000 1@60000 0@70000",
		"mtime a/b 1234567890",
	}
	for _, tt := range []struct {
		format string
		args   []string
		extra  []string
	}{
		{"v7", nil, []string{"rm p", "rm c"}},
		{"ustar", nil, nil},
		{"oldgnu", []string{"--sparse"}, []string{"file " + strings.Repeat("n", 150) + " x", "symlink sl " + strings.Repeat("t", 150)}},
		{"gnu", []string{"--sparse"}, []string{"file " + strings.Repeat("n", 150) + " x", "symlink sl " + strings.Repeat("t", 150)}},
		{"posix", []string{"--sparse", "--sparse-version=0.0"}, nil},
		{"posix", []string{"--sparse", "--sparse-version=0.1"}, nil},
		{"posix", []string{"--sparse", "--sparse-version=1.0"}, nil},
		{"posix", []string{"--xattrs", "--xattrs-include=*", "--acls"}, []string{"xattr a/b user.x y", "mtime a/b 1234567890.5", "file " + strings.Repeat("n", 150) + " x"}},
	} {
		t.Run(tt.format+strings.Join(tt.args, ""), func(t *testing.T) {
			require.NoError(t, os.RemoveAll(src))
			tree.Build(t, src, append(append([]string{}, common...), tt.extra...)...)
			args := append([]string{"--format=" + tt.format, "-C", src, "-cf", "-"}, tt.args...)
			stream, err := exec.Command("tar", append(args, ".")...).Output()
			require.NoError(t, err)
			for _, portable := range []bool{false, true} {
				if portable && tt.format != "v7" {
					continue // fifos and devices
				}
				got := filepath.Join(work, fmt.Sprint("got", portable))
				require.NoError(t, os.RemoveAll(got))
				require.NoError(t, os.Mkdir(got, 0o755))
				opts := &archive.ApplyOptions{}
				if portable {
					archive.UsePortable(opts)
				}
				require.NoError(t, applyBytes(t, got, stream, opts))
				if portable { // which cannot set the time of a symbolic link
					var st unix.Stat_t
					require.NoError(t, unix.Lstat(src+"/a/l", &st))
					require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, got+"/a/l", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
				}
				sparse := len(tt.args) > 0 && tt.args[0] == "--sparse"
				requireSame(t, src, got, &tree.CompareOptions{WholeSeconds: tt.format != "posix", Holes: sparse})
			}
		})
	}
}

// TestLibarchive reads the xattrs and formats of bsdtar.
func TestLibarchive(t *testing.T) {
	testenv.RequireTool(t, "bsdtar")
	src, got := t.TempDir(), t.TempDir()
	tree.Build(t, src, "file a/b hello", "xattr a/b user.x y", "symlink l a")
	stream, err := exec.Command("bsdtar", "--format", "pax", "--xattrs", "-C", src, "-cf", "-", ".").Output()
	require.NoError(t, err)
	require.NoError(t, applyBytes(t, got, stream, nil))
	requireSame(t, src, got, nil)
}

func TestWritePortable(t *testing.T) {
	src := t.TempDir()
	tree.Build(t, src, "file a/b hello", "data big 700000 1", "symlink l a", "link h big", "dir e 01777", "file "+strings.Repeat("n", 150)+" x")
	opts := &archive.WriteOptions{DiffOptions: layerfs.DiffOptions{Profile: layerfs.ProfileOCI}}
	want := writeTree(t, src, opts)
	archive.WritePortable(opts)
	assert.True(t, bytes.Equal(want, writeTree(t, src, opts)))
	changes := []layerfs.Change{{Path: "/a/b", Kind: layerfs.Modified}, {Path: "/gone", Kind: layerfs.Deleted}, {Path: "/h", Kind: layerfs.Added}}
	var a, b bytes.Buffer
	_, err := archive.WriteChanges(t.Context(), &a, src, seqOf(changes), opts)
	require.NoError(t, err)
	_, err = archive.WriteChanges(t.Context(), &b, src, seqOf(append(changes[:3:3], layerfs.Change{Path: "/big", Kind: layerfs.Deleted})), opts)
	require.Error(t, err)
}
