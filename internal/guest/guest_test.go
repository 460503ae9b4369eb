package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

// cpio is the oracle of the archive.
func TestCpio(t *testing.T) {
	cpio := testenv.RequireTool(t, "cpio")
	dir := t.TempDir()
	host := filepath.Join(dir, "tree")
	require.NoError(t, os.MkdirAll(filepath.Join(host, "sub"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(host, "sub", "odd"), []byte("12345"), 0o640))
	require.NoError(t, os.Symlink("sub/odd", filepath.Join(host, "link")))
	var b bytes.Buffer
	a := NewCpio(&b)
	require.NoError(t, a.Bytes("/etc/deep/er/file", []byte("hello"), 0o600))
	require.NoError(t, a.Bytes("etc/deep/er/file", []byte("the first one wins"), 0o600))
	require.NoError(t, a.Symlink("bin", "usr/bin"))
	require.NoError(t, a.Tree("t", host))
	require.NoError(t, a.Dir("empty"))
	require.Error(t, a.File("x", dir), "a directory is no file")
	require.NoError(t, a.Close())
	require.Zero(t, b.Len()%512)

	out := filepath.Join(dir, "out")
	require.NoError(t, os.Mkdir(out, 0o755))
	cmd := exec.Command(cpio, "-i", "--no-absolute-filenames")
	cmd.Dir, cmd.Stdin = out, bytes.NewReader(b.Bytes())
	msg, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", msg)
	for name, want := range map[string]string{"etc/deep/er/file": "hello", "t/sub/odd": "12345", "t/link": "12345"} {
		got, err := os.ReadFile(filepath.Join(out, name))
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
	st, err := os.Stat(filepath.Join(out, "t/sub/odd"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), st.Mode())
	target, err := os.Readlink(filepath.Join(out, "bin"))
	require.NoError(t, err)
	require.Equal(t, "usr/bin", target)
	require.DirExists(t, filepath.Join(out, "empty"))
}

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	w := NewFrameWriter(&b)
	long := bytes.Repeat([]byte("x"), maxFrame/16+1)
	require.NoError(t, w.Send(Output, long))
	n, err := w.Stream(Output).Write([]byte("y"))
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, w.SendJSON(End, Ended{Index: 3, Code: 2}))
	require.NoError(t, w.Send(Done, nil))
	raw := bytes.Clone(b.Bytes())

	var got []byte
	for {
		k, data, err := ReadFrame(&b)
		require.NoError(t, err)
		if k == End {
			require.JSONEq(t, `{"index":3,"code":2,"error":"","seconds":0}`, string(data))
			continue
		}
		if k == Done {
			break
		}
		require.Equal(t, Output, k)
		got = append(got, data...)
	}
	require.Equal(t, append(long, 'y'), got)
	_, _, err = ReadFrame(&b)
	require.ErrorIs(t, err, io.EOF)

	_, _, err = ReadFrame(bytes.NewReader(raw[:100]))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	_, _, err = ReadFrame(strings.NewReader("?\x00\x00\x00\x00"))
	require.ErrorContains(t, err, "unknown kind")
	_, _, err = ReadFrame(strings.NewReader("o\xff\xff\xff\xff"))
	require.ErrorContains(t, err, "frame of 4294967295 bytes")
}

func TestHostSources(t *testing.T) {
	for _, c := range []struct{ name, file, text, want string }{
		{
			"deb822", "sources.list.d/debian.sources",
			"# a comment\nTypes: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\n" +
				"Types: deb\nURIs: http://other.test\nSuites: stable\nComponents: main\n\n" +
				"Types: deb\nEnabled: no\nURIs: http://off.test\nSuites: bookworm\nComponents: main\n",
			"Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nSigned-By: /k.gpg\nComponents: main contrib\n",
		},
		{
			"inline key", "sources.list.d/x.sources",
			"Types: deb\nURIs: http://m.test\nSuites: bookworm\nComponents:\n main\nSigned-By:\n -----BEGIN\n .\n key\n",
			"Types: deb\nURIs: http://m.test\nSuites: bookworm\nSigned-By:\n -----BEGIN\n .\n key\nComponents: main contrib\n",
		},
		{
			"lines", "sources.list",
			"#deb http://no.test bookworm main\ndeb-src http://src.test bookworm main\n" +
				"deb [arch=amd64,arm64 signed-by=/k.gpg] http://m.test/debian bookworm main # why\ndeb http://m.test/security bookworm-security main\n" +
				"deb http://vendor.test bookworm stable\n",
			"Types: deb\nURIs: http://m.test/debian\nSuites: bookworm\nArchitectures: amd64 arm64\nSigned-By: /k.gpg\nComponents: main contrib\n\n" +
				"Types: deb\nURIs: http://m.test/security\nSuites: bookworm-security\nComponents: main contrib\n",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.Mkdir(filepath.Join(dir, "sources.list.d"), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, c.file), []byte(c.text), 0o644))
			got, err := hostSources(dir, "bookworm")
			require.NoError(t, err)
			require.Equal(t, c.want, got)
			_, err = hostSources(dir, "trixie")
			require.ErrorContains(t, err, "no source for trixie")
		})
	}
}

// module writes an ELF file that has nothing but a section .modinfo.
func module(t *testing.T, dir, name string, fields ...string) {
	t.Helper()
	info := strings.Join(fields, "\x00") + "\x00"
	names := "\x00.shstrtab\x00.modinfo\x00"
	const head, sect = 64, 64
	var b bytes.Buffer
	le := func(v any) { require.NoError(t, binary.Write(&b, binary.LittleEndian, v)) }
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	le([]uint16{1, 62})
	le(uint32(1))
	le([]uint64{0, 0, head})
	le(uint32(0))
	le([]uint16{head, 0, 0, sect, 3, 1})
	section := func(name, typ uint32, off, size int) {
		le([]uint32{name, typ})
		le([]uint64{0, 0, uint64(off), uint64(size)})
		le([]uint32{0, 0})
		le([]uint64{1, 0})
	}
	data := head + 3*sect
	section(0, 0, 0, 0)
	section(1, 3, data, len(names))
	section(11, 1, data+len(names), len(info))
	b.WriteString(names + info)
	require.NoError(t, os.WriteFile(filepath.Join(dir, name), b.Bytes(), 0o644))
}

func TestModuleOrder(t *testing.T) {
	dir := t.TempDir()
	module(t, dir, "dm-thin-pool.ko", "license=GPL", "depends=dm-persistent-data,dm-mod")
	module(t, dir, "dm-persistent-data.ko", "depends=dm-mod,libcrc32c")
	module(t, dir, "dm-mod.ko", "depends=")
	module(t, dir, "libcrc32c.ko", "depends=", "softdep=pre: crypto-crc32c crypto-nothing post: dm-mod")
	module(t, dir, "crc32c_generic.ko", "depends=builtin_one")
	module(t, dir, "a.ko", "depends=b")
	module(t, dir, "b.ko", "depends=a")
	module(t, dir, "c.ko", "depends=missing")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "broken.ko"), []byte("no ELF"), 0o644))
	tree, err := OpenModules([]byte("kernel/x/builtin-one.ko\n"), dir)
	require.NoError(t, err)
	files, err := tree.Order("dm_thin_pool", "dm-mod", "builtin_one")
	require.NoError(t, err)
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(f))
	}
	require.Equal(t, []string{"dm-mod.ko", "crc32c_generic.ko", "libcrc32c.ko", "dm-persistent-data.ko", "dm-thin-pool.ko"},
		moved(names, "dm-mod.ko"))
	for name, say := range map[string]string{"a": "needs itself", "c": "missing, needed by c: not in this kernel", "none": "not in this kernel", "broken": "module broken"} {
		_, err := tree.Order(name)
		require.ErrorContains(t, err, say)
	}
}

// moved puts a name first, having checked that all that need it come later.
func moved(names []string, name string) []string {
	i := slices.Index(names, name)
	return append([]string{name}, slices.Delete(slices.Clone(names), i, i+1)...)
}

func TestReport(t *testing.T) {
	m := "\x16"
	passing := m + "=== RUN   TestA\nnoise\n" + m + "--- PASS: TestA (0.00s)\n" +
		m + "=== RUN   TestB\n    b_test.go:1: because\n" + m + "--- SKIP: TestB (0.00s)\n"
	for _, c := range []struct {
		name, in      string
		ok            bool
		tally         Tally
		failed, skips []string
		show, hide    []string
	}{
		{"pass", passing + m + "PASS\n", true, Tally{Pass: 1, Skip: 1}, nil, []string{"TestB"}, nil, []string{"noise", "PASS", "TestA"}},
		{
			"fail", passing + m + "=== RUN   TestC\n    c_test.go:1: wrong\n" + m + "--- FAIL: TestC (0.00s)\n" + m + "FAIL\n",
			false, Tally{1, 1, 1}, []string{"TestC"}, []string{"TestB"}, []string{"c_test.go:1: wrong", "--- FAIL: TestC"}, []string{"noise"},
		},
		{
			"crash", passing + m + "=== RUN   TestC\nlast words\n", false, Tally{Pass: 1, Skip: 1},
			[]string{"TestC (did not end)"}, []string{"TestB"}, []string{"last words"}, []string{"noise"},
		},
		{"benchmark", m + "=== RUN   BenchmarkX\nBenchmarkX\nBenchmarkX-2 \t 5\t 10 ns/op\n" + m + "PASS\n", true, Tally{Pass: 1}, nil, nil, nil, nil},
		{"benchmark that ended badly", m + "=== RUN   BenchmarkX\nBenchmarkX\n", false, Tally{}, []string{"BenchmarkX (did not end)"}, nil, nil, nil},
		{"a test that prints a pass of another", m + "=== RUN   TestA\n--- PASS: TestA (0.00s)\n", false, Tally{}, []string{"TestA (did not end)"}, nil, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			r, err := NewReport(t.Context(), "pkg", &out, false, false)
			require.NoError(t, err)
			_, err = io.WriteString(r, c.in)
			require.NoError(t, err)
			tally, failed, skips, err := r.Close(c.ok)
			require.NoError(t, err)
			require.Equal(t, c.tally, tally)
			require.Equal(t, c.failed, failed)
			require.Equal(t, c.skips, skips)
			for _, s := range c.show {
				require.Contains(t, out.String(), s)
			}
			for _, s := range c.hide {
				require.NotContains(t, out.String(), s)
			}
		})
	}
}

func TestUnpackResults(t *testing.T) {
	archive := func(hs ...tar.Header) io.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range hs {
			h.Mode, h.Size = 0o644, 2
			if h.Typeflag != tar.TypeReg {
				h.Size = 0
			}
			require.NoError(t, w.WriteHeader(&h))
			if h.Size > 0 {
				_, err := w.Write([]byte("ok"))
				require.NoError(t, err)
			}
		}
		require.NoError(t, w.Close())
		return &b
	}
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	require.NoError(t, unpackResults(archive(
		tar.Header{Name: "a/", Typeflag: tar.TypeDir}, tar.Header{Name: "a/b/c", Typeflag: tar.TypeReg},
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: ".."},
	), out))
	got, err := os.ReadFile(filepath.Join(out, "a/b/c"))
	require.NoError(t, err)
	require.Equal(t, "ok", string(got))
	require.NoFileExists(t, filepath.Join(out, "link"))
	require.Error(t, unpackResults(archive(tar.Header{Name: "../evil", Typeflag: tar.TypeReg}), out))
	require.NoFileExists(t, filepath.Join(dir, "evil"))
}

func TestOnce(t *testing.T) {
	dir := t.TempDir()
	c, err := OpenCache(dir, false, t.Logf)
	require.NoError(t, err)
	unlock, err := c.Lock()
	require.NoError(t, err)
	defer func() { require.NoError(t, unlock()) }()
	_, err = c.Once("a/b", func(dir string) error {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "half"), nil, 0o644))
		return io.ErrUnexpectedEOF
	})
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	n := 0
	for range 2 {
		dir, err := c.Once("a/b", func(dir string) error {
			n++
			return os.WriteFile(filepath.Join(dir, "whole"), nil, 0o644)
		})
		require.NoError(t, err)
		require.FileExists(t, filepath.Join(dir, "whole"))
		require.NoFileExists(t, filepath.Join(dir, "half"))
	}
	require.Equal(t, 1, n)
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	old := time.Now().Add(-25 * time.Hour)
	for _, name := range []string{"run-old", "tmp-old", "run-new", "trees"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		if name != "run-new" {
			require.NoError(t, os.Chtimes(filepath.Join(dir, name), old, old))
		}
	}
	_, err := OpenCache(dir, false, t.Logf)
	require.NoError(t, err)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	require.Equal(t, []string{"debs", "run-new", "trees"}, names)
}

// TestGuest boots, so it runs only where LAYERFS_REQUIRE names it: it needs
// packages and some seconds for each case.
func TestGuest(t *testing.T) {
	if !testenv.Required("guest") {
		t.Skip("LAYERFS_REQUIRE does not list guest")
	}
	for _, c := range []struct {
		run, fail, log string
		race           bool
	}{
		{run: "TestPass"},
		{run: "TestPass", race: true},
		{run: "TestPass|TestSkip|TestFail", fail: "FAIL", log: "failed: faulty: TestFail/sub"},
		{run: "TestExit", fail: "FAIL", log: "TestExit (did not end)"},
		{run: "TestCrash", fail: "FAIL", log: "TestCrash (did not end)"},
		{run: "TestHang", fail: "FAIL", log: "TestHang (did not end)"},
		{run: "TestPoweroff", fail: "the guest ended early", log: "did not run to its end"},
		{run: "TestPanic", fail: `the kernel reported "Kernel panic"`, log: "sysrq triggered crash"},
		{run: "TestRace", race: true, fail: "FAIL", log: "failed: faulty: TestRace"},
		{run: "NoSuchTest", fail: "FAIL", log: "no test passed"},
	} {
		name := c.run
		if c.race {
			name += "/race"
		}
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			var stdout, stderr bytes.Buffer
			out := t.TempDir()
			err := Run(ctx, Options{
				Build: Build{Dir: "testdata/faulty", Race: c.race}, Packages: []string{"."},
				TestArgs: []string{"-test.run=^(" + c.run + ")$"}, Timeout: 20 * time.Second, Out: out,
				Stdout: &stdout, Stderr: &stderr,
			})
			if c.fail == "" {
				require.NoError(t, err, "%s%s", &stdout, &stderr)
				require.Contains(t, stdout.String(), "ok  \tfaulty")
				got, err := os.ReadFile(filepath.Join(out, "deep", "result.txt"))
				require.NoError(t, err)
				require.Equal(t, "result\n", string(got))
				return
			}
			require.ErrorContains(t, err, c.fail)
			require.Contains(t, stderr.String(), c.log)
			require.Contains(t, stderr.String(), "Linux version", "the kernel log")
		})
	}
}
