package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) {
	aufs.Main() // this program is the helper of the tests
	os.Exit(testenv.Main(m))
}

// shell runs command lines on one root.
type shell struct {
	t      *testing.T
	root   string
	driver string
	opts   []string // of the driver, as in --opt
	in     io.Reader
}

func newShell(t *testing.T, driver string) *shell {
	t.Helper()
	s := &shell{t: t, root: filepath.Join(scratch(t, driver), "root"), driver: driver, in: strings.NewReader("")}
	t.Cleanup(s.unmountAll)
	return s
}

// scratch returns an empty directory in which a driver works.
func scratch(t *testing.T, driver string) string {
	t.Helper()
	switch driver {
	case "vfs":
		return t.TempDir()
	case "btrfs":
		testenv.RequireRoot(t)
		return testenv.Btrfs(t, 256)
	}
	d, err := auto.Open(t.TempDir(), &auto.Options{Driver: driver, AUFS: &aufs.Options{Helper: []string{"/proc/self/exe"}}})
	testenv.SkipUnsupported(t, err, driver)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	return t.TempDir()
}

// unmountAll keeps a test that failed from leaving mounts behind.
func (s *shell) unmountAll() {
	if _, err := os.Stat(s.root); err != nil {
		return
	}
	_, out, _ := s.run("--json", "ls")
	for line := range strings.Lines(out) {
		var l layerJSON
		if json.Unmarshal([]byte(line), &l) != nil || !l.Mounted {
			continue
		}
		for code := exitOK; code == exitOK; {
			code, _, _ = s.run("umount", l.ID)
		}
	}
}

func (s *shell) run(args ...string) (code int, out, errs string) {
	return s.runContext(context.Background(), args...)
}

func (s *shell) runContext(ctx context.Context, args ...string) (code int, out, errs string) {
	var stdout, stderr bytes.Buffer
	all := append([]string{"layerfs", "--root", s.root, "--driver", s.driver, "--durability", "none"}, s.flags()...)
	all = append(all, args...)
	code = run(ctx, all, s.in, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

func (s *shell) flags() (flags []string) {
	for _, o := range s.opts {
		flags = append(flags, "--opt", o)
	}
	return flags
}

// ok runs a command that must succeed and be silent on standard error.
func (s *shell) ok(args ...string) string {
	s.t.Helper()
	code, out, errs := s.run(args...)
	require.Equal(s.t, exitOK, code, "layerfs %v: %s", args, errs)
	require.Empty(s.t, errs, "layerfs %v", args)
	return out
}

// fails runs a command that must fail with a status and print nothing.
func (s *shell) fails(code int, args ...string) string {
	s.t.Helper()
	got, out, errs := s.run(args...)
	require.Equal(s.t, code, got, "layerfs %v: %s", args, errs)
	require.Empty(s.t, out, "layerfs %v", args)
	require.NotEmpty(s.t, errs)
	return errs
}

// decode reads JSON lines and refuses what the documented type does not have.
func decode[T any](t *testing.T, out string) (list []T) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	for {
		var v T
		err := d.Decode(&v)
		if err == io.EOF {
			return list
		}
		require.NoError(t, err, out)
		list = append(list, v)
	}
}

// layer is a tar stream of pairs of names and contents; a name that ends in a
// slash is a directory.
func layer(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		h := &tar.Header{Name: pairs[i], Mode: 0o644, Size: int64(len(pairs[i+1])), Uid: os.Geteuid(), Gid: os.Getegid()}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		require.NoError(t, w.WriteHeader(h))
		_, err := io.WriteString(w, pairs[i+1])
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func file(t *testing.T, content []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(name, content, 0o644))
	return name
}

// eachDriver runs a test with the drivers that tests can have here.
func eachDriver(t *testing.T, do func(t *testing.T, s *shell)) {
	for _, name := range auto.Drivers() {
		t.Run(name, func(t *testing.T) { do(t, newShell(t, name)) })
	}
}

// story makes base, app on it and a container c, whose tree it returns mounted.
func story(t *testing.T, s *shell) (tree string) {
	t.Helper()
	s.ok("import", "base", file(t, layer(t, "etc/", "", "etc/hostname", "base\n", "bin/", "", "bin/sh", "shell")))
	s.ok("create", "app", "base")
	s.ok("apply", "app", file(t, layer(t, "app/", "", "app/run", "run", "etc/.wh.hostname", "")))
	s.ok("create", "c", "app")
	tree = strings.TrimSpace(s.ok("mount", "c"))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "app/run"), []byte("run 2"), 0o644))
	require.NoError(t, os.Remove(filepath.Join(tree, "bin/sh")))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "new"), nil, 0o644))
	return tree
}

// TestLife is what the documentation of the command shows, with each driver.
func TestLife(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		tree := story(t, s)
		assert.NoFileExists(t, filepath.Join(tree, "etc/hostname"))
		want := "C /\nC /app/run\nC /bin\nD /bin/sh\nA /new\n"
		assert.Equal(t, want, s.ok("changes", "c"))
		assert.Equal(t, "A /app\nA /app/run\nA /bin\nA /etc\nA /new\n", s.ok("changes", "--whole", "c"))
		assert.Contains(t, s.ok("changes", "--base", "base", "c"), "D /etc/hostname\n")

		diff := filepath.Join(t.TempDir(), "c.tar")
		assert.Contains(t, s.ok("diff", "-o", diff, "c"), "c.tar: ")
		assert.Contains(t, s.fails(exitInUse, "rm", "c"), "in use")
		assert.Empty(t, s.ok("umount", "c"))
		assert.Contains(t, s.fails(exitInUse, "umount", "c"), "not held")

		s.ok("create", "c2", "app")
		s.ok("apply", "c2", diff)
		assert.Equal(t, want, s.ok("changes", "c2"))
		assert.Contains(t, s.fails(exitInUse, "apply", "app", diff), "read-only")
		assert.Contains(t, s.fails(exitInUse, "rm", "base"), "in use")
		assert.Equal(t, "c\n", s.ok("rm", "c"))
		assert.Equal(t, "c2\napp\nbase\n", s.ok("rm", "-r", "base"))
		assert.Empty(t, s.ok("--quiet", "ls"))
		assert.Equal(t, "no problems\n", s.ok("check"))
	})
}

func TestMount(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		s.ok("import", "base", file(t, layer(t, "a", "1")))
		s.ok("create", "c", "base")
		first := s.ok("mount", "c")
		assert.Equal(t, first, s.ok("mount", "c"), "the path stays the same")
		assert.Contains(t, s.ok("ls"), "writable,mounted")
		s.ok("umount", "c")
		assert.FileExists(t, filepath.Join(strings.TrimSpace(first), "a"), "it was mounted twice")
		s.ok("umount", "c")
		assert.NotContains(t, s.ok("ls"), "mounted")

		got := decode[mountJSON](t, s.ok("--json", "mount", "base"))
		require.Len(t, got, 1)
		assert.Equal(t, "base", got[0].ID)
		assert.FileExists(t, filepath.Join(got[0].Path, "a"))
		assert.Equal(t, []idJSON{{"base"}}, decode[idJSON](t, s.ok("umount", "--json", "base")))
	})
}

func TestMount_readOnly(t *testing.T) {
	testenv.RequireRoot(t)
	eachDriver(t, func(t *testing.T, s *shell) {
		s.ok("create", "base")
		path := strings.TrimSpace(s.ok("mount", "-r", "base"))
		assert.Error(t, os.WriteFile(filepath.Join(path, "x"), nil, 0o644))
		assert.Contains(t, s.fails(exitInUse, "mount", "base"), "in use")
		s.ok("umount", "base")
	})
}

func TestImport(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("hello"), 0o640))
		out := s.ok("import", "dir", dir)
		assert.Regexp(t, `^dir: 2 entries, 5 B of content\nsha256:[0-9a-f]{64}\n$`, out)

		s.in = bytes.NewReader(layer(t, "g", "stdin"))
		got := decode[appliedJSON](t, s.ok("--json", "import", "--read-only", "--label", "from=pipe", "stdin", "-"))
		require.Len(t, got, 1)
		assert.Equal(t, int64(1), got[0].Entries)
		assert.Equal(t, int64(5), got[0].Bytes)
		info := decode[layerJSON](t, s.ok("--json", "show", "stdin"))[0]
		assert.True(t, info.ReadOnly)
		assert.Equal(t, map[string]string{"from": "pipe"}, info.Labels)

		assert.Empty(t, s.ok("-q", "import", "--parent", "dir", "top", file(t, layer(t, ".wh.f", ""))))
		assert.Equal(t, "D /f\n", s.ok("changes", "top"))
	})
}

// What cannot be imported leaves no layer.
func TestImport_failures(t *testing.T) {
	whole := layer(t, "a", strings.Repeat("x", 10000))
	for _, tc := range []struct {
		name, source string
		flags        []string
		code         int
		says         string
	}{
		{"missing", filepath.Join(t.TempDir(), "none"), nil, exitFailure, "no such file"},
		{"truncated", file(t, whole[:5000]), nil, exitInput, "malformed layer"},
		{"not-a-tar", file(t, []byte(strings.Repeat("this is no tar\n", 100))), nil, exitInput, "malformed layer"},
		{"whiteout-of-nothing", file(t, layer(t, ".wh.", "")), nil, exitInput, "hides nothing"},
		{"over-entries", file(t, layer(t, "a", "", "b", "")), []string{"--max-entries", "1"}, exitInput, "limit exceeded"},
		{"over-bytes", file(t, whole), []string{"--max-bytes", "9K"}, exitInput, "limit exceeded"},
		{"unknown-parent", file(t, whole), []string{"--parent", "nobody"}, exitNotFound, "nobody"},
		{"bad-devices", file(t, whole), []string{"--devices", "eat"}, exitUsage, "make, skip, record, refuse"},
		{"bad-map", file(t, whole), []string{"--uid-map", "0:1"}, exitUsage, "CONTAINER:HOST:SIZE"},
		{"half-map", file(t, whole), []string{"--uid-map", "0:1:1"}, exitUsage, "go together"},
		{"bad-label", file(t, whole), []string{"--label", "=x"}, exitUsage, "KEY=VALUE"},
		{"bad-size", file(t, whole), []string{"--size", "huge"}, exitUsage, "is no size"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newShell(t, "vfs")
			errs := s.fails(tc.code, append([]string{"import", "l", tc.source}, tc.flags...)...)
			assert.Contains(t, errs, tc.says)
			s.ok("create", "other") // the root exists now, if it did not
			assert.Equal(t, "other\n", s.ok("-q", "ls"))
		})
	}
}

// Names that point outside of the layer stay in it.
func TestImport_escape(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("import", "l", file(t, layer(t, "../../../outside", "x")))
	assert.Equal(t, "A /outside\n", s.ok("changes", "l"))
}

func TestIgnoreOwners(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		s := newShell(t, "vfs")
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		require.NoError(t, w.WriteHeader(&tar.Header{Name: "f", Mode: 0o644}))
		require.NoError(t, w.Close())
		roots := file(t, b.Bytes())
		errs := s.fails(exitFailure, "import", "a", roots)
		assert.Contains(t, errs, "operation not permitted")
		assert.Contains(t, errs, "--ignore-owners")
		s.ok("import", "--ignore-owners", "a", roots)
		s.ok("--opt", "vfs.ignore_owners=on", "import", "b", roots)
	})
}

func TestDiff(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		story(t, s)
		plain := s.ok("diff", "c")
		assert.ElementsMatch(t, []string{"./", "app/", "app/run", "bin/", "bin/.wh.sh", "new"}, names(t, plain))
		for compression, magic := range map[string]string{"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd"} {
			out := s.ok("diff", "--compression", compression, "c")
			assert.True(t, strings.HasPrefix(out, magic), compression)
		}
		whole := s.ok("diff", "--whole", "--profile", "oci", "app")
		assert.Contains(t, names(t, whole), "bin/sh")
		assert.NotContains(t, names(t, whole), "etc/hostname")
		assert.NotContains(t, whole, ".wh.")

		one := s.ok("diff", "--profile", "reproducible", "--source-date", "86400", "c")
		two := s.ok("diff", "--profile", "reproducible", "--source-date", "1970-01-02T00:00:00Z", "c")
		assert.Equal(t, one, two)
		assert.NotEqual(t, one, s.ok("diff", "--profile", "reproducible", "c"))

		name := filepath.Join(t.TempDir(), "out.tar")
		got := decode[diffJSON](t, s.ok("--json", "diff", "-o", name, "c"))
		require.Len(t, got, 1)
		content, err := os.ReadFile(name)
		require.NoError(t, err)
		assert.Equal(t, plain, string(content))
		assert.Equal(t, diffJSON{ID: "c", Base: "app", File: name, Bytes: int64(len(plain)), Digest: got[0].Digest, Compression: "none"}, got[0])
		assert.Empty(t, s.ok("umount", "c"))
		s.ok("create", "again", "app")
		applied := decode[appliedJSON](t, s.ok("--json", "apply", "again", name))
		assert.Equal(t, got[0].Digest, applied[0].Digest, "the DiffID is that of the file")
		s.ok("diff", "-o", os.DevNull, "c")
	})
}

func names(t *testing.T, stream string) (names []string) {
	t.Helper()
	r := tar.NewReader(strings.NewReader(stream))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		require.NoError(t, err)
		names = append(names, h.Name)
	}
}

// A file that diff cannot finish does not appear, and one that was there stays.
func TestDiff_failureLeavesNoFile(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("import", "base", file(t, layer(t, "a", "1")))
	dir := t.TempDir()
	name := filepath.Join(dir, "old")
	require.NoError(t, os.WriteFile(name, []byte("old"), 0o644))
	bad := errors.New("disk full")
	err := writeWhole(name, func(w io.Writer) error {
		_, err := io.WriteString(w, "half")
		return errors.Join(err, bad)
	})
	assert.ErrorIs(t, err, bad)
	content, err := os.ReadFile(name)
	require.NoError(t, err)
	assert.Equal(t, "old", string(content))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, left, 1)
	assert.Contains(t, s.fails(exitFailure, "diff", "-o", filepath.Join(dir, "none", "x"), "base"), "no such file")
	assert.Contains(t, s.fails(exitNotFound, "diff", "--base", "nobody", "base"), "nobody")
}

func TestCopy(t *testing.T) {
	for _, from := range auto.Drivers() {
		for _, to := range auto.Drivers() {
			t.Run(from+"-to-"+to, func(t *testing.T) {
				s, dst := newShell(t, from), newShell(t, to)
				story(t, s)
				s.ok("umount", "c")
				out := s.ok("copy", "--to", dst.root, "--to-driver", to, "--verify", "c")
				assert.Regexp(t, `^base: copied, .*\napp: copied, .*\nc: copied, \d+ entries, \d+ B of content, sha256:[0-9a-f]{64}, trees compared\n$`, out)
				assert.Equal(t, s.ok("changes", "c"), dst.ok("changes", "c"))
				again := decode[copiedJSON](t, s.ok("--json", "copy", "--to", dst.root, "--to-driver", to, "--as", "d", "c"))
				require.Len(t, again, 3)
				assert.Equal(t, copiedJSON{ID: "base", From: "base", Existed: true}, again[0])
				assert.Equal(t, "d", again[2].ID)
				assert.Equal(t, "app", again[2].Parent)
				assert.NotEmpty(t, again[2].Digest)
				assert.Equal(t, s.ok("changes", "c"), dst.ok("changes", "d"))
				assert.Contains(t, s.fails(exitExists, "--quiet", "copy", "--to", dst.root, "--to-driver", to, "c"), "exists")
			})
		}
	}
}

func TestLs(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("create", "--label", "b=2", "--label", "a=1", "base")
	s.ok("create", "x", "base")
	s.ok("create", "--read-only", "y", "base")
	s.ok("create", "x1", "x")
	s.ok("create", "other")
	// The only things that differ from run to run are times.
	times := regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`)
	assert.Equal(t, `LAYER     STATE     CREATED              LABELS
base      frozen    2026-01-02 03:04:05  a=1 b=2
├─ x      frozen    2026-01-02 03:04:05
│  └─ x1  writable  2026-01-02 03:04:05
└─ y      frozen    2026-01-02 03:04:05
other     writable  2026-01-02 03:04:05
`, times.ReplaceAllString(s.ok("ls"), "2026-01-02 03:04:05"))
	assert.Equal(t, "x\nx1\n", s.ok("--quiet", "ls", "x"))
	assert.Contains(t, s.ok("ls", "--flat"), "\nx1 ")
	assert.Contains(t, s.ok("ls", "--usage"), "SIZE")
	list := decode[layerJSON](t, s.ok("ls", "--json", "--usage"))
	require.Len(t, list, 5)
	assert.Equal(t, "base", list[0].ID)
	assert.Equal(t, 2, list[0].Children)
	assert.True(t, list[0].Frozen)
	assert.NotNil(t, list[0].Usage)
	assert.Contains(t, s.fails(exitNotFound, "ls", "nobody"), "nobody")
}

func TestShow(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		story(t, s)
		l := decode[layerJSON](t, s.ok("--json", "show", "c"))[0]
		assert.Equal(t, []string{"app", "base"}, l.Chain)
		assert.Equal(t, "app", l.Parent)
		assert.True(t, l.Mounted)
		assert.False(t, l.Frozen)
		assert.Positive(t, l.Usage.Inodes)
		out := s.ok("show", "c")
		for _, line := range []string{`Layer: +c`, `On: +app on base`, `State: +writable, mounted`, `Driver: +` + s.driver} {
			assert.Regexp(t, line, out)
		}
		assert.Regexp(t, `On: +nothing \(a base layer\)`, s.ok("show", "base"))
		s.ok("umount", "c")
	})
}

func TestStatus(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		s.ok("create", "base")
		got := decode[statusJSON](t, s.ok("--json", "status"))[0]
		assert.Equal(t, s.driver, got.Driver)
		assert.Equal(t, s.root, got.Root)
		assert.Equal(t, 1, got.Layers)
		assert.NotEmpty(t, got.Status)
		for name, a := range got.Abilities {
			assert.Equal(t, a.Have, a.Reason == "", name)
		}
		assert.Equal(t, s.driver == "vfs", !got.Abilities["ConstantCreate"].Have)
		out := s.ok("status")
		assert.Regexp(t, `Backing Filesystem: +\S`, out)
		assert.Regexp(t, `NativeDiff: +(yes|no: \S)`, out)
	})
}

func TestProbe(t *testing.T) {
	s := newShell(t, "vfs")
	lines := decode[probeJSON](t, s.ok("--json", "probe"))
	var drivers []string
	for _, l := range lines {
		drivers = append(drivers, l.Driver)
		assert.Equal(t, l.Works, l.Reason == "", l.Driver)
		assert.False(t, l.Prior)
	}
	assert.Equal(t, auto.Drivers(), drivers)
	assert.NoDirExists(t, s.root, "a probe makes nothing")
	s.ok("create", "base")
	out := s.ok("probe")
	assert.Regexp(t, `(?m)^DRIVER .*\bvfs\b`, out)
	assert.Regexp(t, `(?m)^works .*yes`, out)
	assert.Regexp(t, `(?m)^has layers here .*yes`, out)
	assert.Contains(t, out, "vfs ConstantCreate: a new layer is a full copy of its parent")
}

func TestCheck(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		s.ok("import", "base", file(t, layer(t, "a", "1")))
		s.ok("create", "c", "base")
		assert.Equal(t, "no problems\n", s.ok("check"))
		assert.Empty(t, s.ok("--json", "check"))
		// A record that cannot be read is a problem that no repair mends.
		record := filepath.Join(s.root, s.driver, ".layerfs", "records", "c")
		require.NoError(t, os.WriteFile(record, []byte("{"), 0o600))
		code, out, errs := s.run("check", "--repair")
		assert.Equal(t, exitDamaged, code)
		assert.Contains(t, out, "c")
		assert.Contains(t, errs, "problem")
		code, out, errs = s.run("--json", "check")
		assert.Equal(t, exitDamaged, code)
		problems := decode[problemJSON](t, out)
		require.NotEmpty(t, problems)
		assert.Equal(t, "c", problems[0].ID)
		assert.False(t, problems[0].Repaired)
		assert.Equal(t, "damaged", decode[errorJSON](t, errs)[0].Error.Kind)
		assert.Contains(t, s.ok("ls"), "incomplete")
	})
}

// A layer whose making was interrupted by a crash is mended by the next
// command, and check says so.
func TestCheck_recovers(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("create", "base")
	orphan := filepath.Join(s.root, "vfs", "dir", "orphan")
	require.NoError(t, os.Mkdir(orphan, 0o755))
	out := s.ok("check")
	assert.Contains(t, out, "orphan")
	assert.Contains(t, out, "mended")
	assert.NoDirExists(t, orphan)
	assert.Equal(t, "no problems\n", s.ok("check"))
}

func TestErrors(t *testing.T) {
	s := newShell(t, "vfs")
	missing := newShell(t, "vfs")
	s.ok("create", "base")
	for _, tc := range []struct {
		name string
		args []string
		code int
		kind string
		says string
	}{
		{"no-command", []string{"fly"}, exitUsage, "usage", `"fly" is no command`},
		{"unknown-flag", []string{"ls", "--colour"}, exitUsage, "usage", "colour"},
		{"too-few", []string{"create"}, exitUsage, "usage", "create needs ID [PARENT]"},
		{"too-many", []string{"show", "a", "b"}, exitUsage, "usage", `not "b"`},
		{"rm-none", []string{"rm"}, exitUsage, "usage", "rm needs"},
		{"bad-id", []string{"create", "../up"}, exitUsage, "invalid_id", "invalid layer id"},
		{"bad-driver", []string{"--driver", "zip", "ls"}, exitUsage, "usage", `"zip" is not one of`},
		{"bad-durability", []string{"--durability", "some", "ls"}, exitUsage, "usage", "none, metadata, full"},
		{"bad-root", []string{"--root", "", "ls"}, exitUsage, "usage", "no root"},
		{"unknown-layer", []string{"mount", "nobody"}, exitNotFound, "not_found", "layer does not exist"},
		{"unknown-parent", []string{"create", "x", "nobody"}, exitNotFound, "not_found", "parent nobody"},
		{"exists", []string{"create", "base"}, exitExists, "exists", "layer exists"},
		{"not-mounted", []string{"umount", "base"}, exitInUse, "not_mounted", "not held"},
		{"base-and-whole", []string{"changes", "--base", "a", "--whole", "base"}, exitUsage, "usage", "exclude"},
		{"json-to-stdout", []string{"--json", "diff", "base"}, exitUsage, "usage", "-o FILE"},
		{"bad-profile", []string{"diff", "--profile", "thin", "base"}, exitUsage, "usage", "full, oci, reproducible"},
		{"bad-compression", []string{"diff", "--compression", "xz", "base"}, exitUsage, "usage", "none, gzip, zstd"},
		{"bad-date", []string{"diff", "--profile", "reproducible", "--source-date", "now", "base"}, exitUsage, "usage", `"now"`},
		{"copy-nowhere", []string{"copy", "base"}, exitUsage, "usage", "--to DIR"},
		{"copy-to-itself", []string{"copy", "--to", s.root, "base"}, exitUsage, "usage", "where the layer is"},
		{"copy-bad-as", []string{"copy", "--to", missing.root, "--as", "/", "base"}, exitUsage, "invalid_id", "invalid layer id"},
		{"copy-unknown", []string{"copy", "--to", missing.root, "nobody"}, exitNotFound, "not_found", "nobody"},
		{"quota-unsupported", []string{"--root", "/dev/shm/layerfs-test-none/..", "--opt", "vfs.size=1G", "ls"}, exitNotFound, "not_found", "no layers"},
		{"demo-none", []string{"demo", "--containers", "0"}, exitUsage, "usage", "too few"},
		{"demo-no-dir", []string{"demo", "--dir", filepath.Join(s.root, "none"), "--from", s.root}, exitFailure, "failure", "no such file"},
		{"opt-shape", []string{"--opt", "overlay", "ls"}, exitUsage, "usage", "DRIVER.KEY=VALUE"},
		{"opt-driver", []string{"--opt", "zip.level=9", "ls"}, exitUsage, "usage", `"zip.level=9" does not fit`},
		{"opt-key", []string{"--opt", "vfs.speed=9", "ls"}, exitUsage, "usage", `no option "speed"; it has ignore_owners`},
		{"opt-value", []string{"--opt", "vfs.reflink=maybe", "ls"}, exitUsage, "usage", `option vfs.reflink: "maybe" is not one of on, off`},
		{"opt-size", []string{"--opt", "vfs.size=big", "ls"}, exitUsage, "usage", "is no size"},
		{"opt-other-driver", []string{"--opt", "overlay.xino=on", "ls"}, exitUsage, "usage", "the driver is vfs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			errs := s.fails(tc.code, tc.args...)
			if tc.args[0] != "--json" {
				assert.True(t, strings.HasPrefix(errs, "layerfs: "), errs)
			}
			assert.Contains(t, errs, tc.says)
			detail := decode[errorJSON](t, s.fails(tc.code, append([]string{"--json"}, tc.args...)...))
			require.Len(t, detail, 1)
			assert.Equal(t, tc.code, detail[0].Error.Code)
			assert.Equal(t, tc.kind, detail[0].Error.Kind)
			assert.Contains(t, detail[0].Error.Message, tc.says)
		})
	}
	assert.NoDirExists(t, missing.root, "no mistake makes a root")
	assert.Contains(t, missing.fails(exitNotFound, "ls"), "does not exist")
	assert.NoDirExists(t, missing.root)
	detail := decode[errorJSON](t, s.fails(exitNotFound, "--json", "mount", "nobody"))[0].Error
	assert.Equal(t, errorDetail{Code: 3, Kind: "not_found", Message: detail.Message, Op: "get", Driver: "vfs", ID: "nobody"}, detail)
}

func TestUnsupported(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		s := newShell(t, "vfs")
		s.driver = "overlay"
		errs := s.fails(exitUnsupported, "create", "base")
		assert.Contains(t, errs, "not supported")
		assert.Contains(t, errs, "layerfs probe")
	})
}

// Without --driver the one that has layers in the root is taken, and options
// for another are refused.
func TestDriverChoice(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("create", "base")
	s.driver = ""
	assert.Equal(t, "vfs", decode[statusJSON](t, s.ok("--json", "status"))[0].Driver)
	assert.Contains(t, s.fails(exitUsage, "--opt", "overlay.xino=on", "ls"), "the driver is vfs")
}

func TestOptions(t *testing.T) {
	// Every option can be set, and shows up in the help.
	values := map[string]string{"mount_option": "x=1,2", "mount_program": "/bin/true", "size": "1.5G", "min_space": "1M", "quotas": "simple", "inodes": "7", "workers": "2",
		"property": "compression=lz4", "engine": "fuse", "udba": "reval", "refquota": "1G", "basesize": "1G", "loopdatasize": "1G", "loopmetadatasize": "1G",
		"blocksize": "64K", "fs": "xfs", "min_free_space": "5", "extend_threshold": "80", "extend_percent": "10",
		"xfs_nospace_max_retries": "-1",
		"discard":                 "off", "discard_passdown": "off", "use_deferred_removal": "off", "use_deferred_deletion": "off",
	}
	s := newShell(t, "vfs")
	help := s.ok("--help")
	for _, o := range driverOptions() {
		value := values[o.key]
		if value == "" {
			value = "on"
		}
		var opts auto.Options
		item := fmt.Sprintf("%s.%s=%s", o.driver, o.key, value)
		require.NoError(t, setDriverOptions(&opts, []string{item}))
		assert.NotEqual(t, auto.Options{}, opts, item)
		assert.Contains(t, help, o.driver+"."+o.key)
	}
	var opts auto.Options
	require.NoError(t, setDriverOptions(&opts, []string{
		"overlay.redirect_dir=on", "overlay.metacopy=on", "overlay.mount_option=a,b", "overlay.mount_option=c=d=e",
		"overlay.size=1.5G", "vfs.reflink=off", "vfs.workers=3",
	}))
	assert.Equal(t, "on", opts.Overlay.RedirectDir)
	assert.Equal(t, []string{"a,b", "c=d=e"}, opts.Overlay.MountOptions)
	assert.Equal(t, int64(3<<29), opts.Overlay.Quota.Bytes)
	assert.True(t, opts.VFS.NoReflink)
	assert.Equal(t, 3, opts.VFS.Workers)
	err := setDriverOptions(&opts, []string{"overlay.xino=x", "vfs.workers=-1"})
	assert.ErrorContains(t, err, "xino")
	assert.ErrorContains(t, err, "workers", "all mistakes at once")
}

func TestOptions_reachDriver(t *testing.T) {
	s := newShell(t, "overlay")
	s.ok("--opt", "overlay.redirect_dir=on", "create", "base")
	got := decode[statusJSON](t, s.ok("--json", "--opt", "overlay.redirect_dir=on", "status"))[0]
	assert.True(t, got.Abilities["Rename"].Have)
	errs := s.fails(exitFailure, "--opt", "overlay.metacopy=on", "ls")
	assert.Contains(t, errs, "Metacopy needs RedirectDir on")
}

// cancelled reads a little, cancels the context and then stays silent for
// ever, as a terminal would.
type cancelled struct {
	data   *bytes.Reader
	cancel func()
	block  chan struct{}
}

func (c *cancelled) Read(p []byte) (int, error) {
	if n, err := c.data.Read(p); err == nil {
		return n, nil
	}
	c.cancel()
	<-c.block
	return 0, io.EOF
}

func TestInterrupt(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		ctx, cancel := context.WithCancel(t.Context())
		whole := layer(t, "a", strings.Repeat("x", 100_000))
		in := &cancelled{bytes.NewReader(whole[:50_000]), cancel, make(chan struct{})}
		defer close(in.block)
		s.in = in
		code, out, errs := s.runContext(ctx, "import", "l", "-")
		assert.Equal(t, exitInterrupted, code)
		assert.Empty(t, out)
		assert.Equal(t, "layerfs: interrupted\n", errs)
		assert.Empty(t, s.ok("--quiet", "ls"))
		assert.Equal(t, "no problems\n", s.ok("check"))
		code, _, errs = s.runContext(ctx, "--json", "ls")
		assert.Equal(t, exitInterrupted, code)
		assert.Equal(t, "interrupted", decode[errorJSON](t, errs)[0].Error.Kind)
	})
}

func TestHelp(t *testing.T) {
	s := newShell(t, "vfs")
	help := s.ok("--help")
	a := &app{}
	for _, c := range a.command().Commands {
		assert.Contains(t, help, c.Name)
		assert.Contains(t, s.ok(c.Name, "--help"), c.Usage)
	}
	assert.Equal(t, help, s.ok())
	// "help" is a layer like any other below a command.
	s.ok("create", "help")
	assert.Equal(t, "help\n", s.ok("rm", "help"))
	assert.Contains(t, s.ok("--version"), "layerfs version")
}

func TestNames(t *testing.T) {
	assert.Equal(t, "/a b/ö", printablePath("/a b/ö"))
	assert.Equal(t, `"/a\nb"`, printablePath("/a\nb"))
	assert.Equal(t, `"/\x1b[2J\xff"`, printablePath("/\x1b[2J\xff"))
	assert.Equal(t, "a\n\\x1b[2J", printable("a\n\x1b[2J"))
	s := newShell(t, "vfs")
	s.ok("import", "base", file(t, layer(t, "a\nb", "", "\xff", "")))
	if got := s.ok("changes", "base"); strings.Count(got, "\n") != 2 {
		t.Errorf("changes = %q, want two lines", got)
	}
	list := decode[changeJSON](t, s.ok("--json", "changes", "base"))
	require.Len(t, list, 2)
	assert.Equal(t, changeJSON{Kind: "A", Path: "/a\nb"}, list[0])
	assert.Equal(t, []byte("/\xff"), list[1].PathBytes)
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "4096": 4096, "10K": 10 << 10, "1.5G": 3 << 29, "2GiB": 2 << 30, "3mb": 3 << 20, "1T": 1 << 40} {
		got, err := parseSize(in)
		assert.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for _, in := range []string{"", "G", "-1", "1X", "1KK", "NaN", "1e30", "infinity"} {
		_, err := parseSize(in)
		assert.Error(t, err, in)
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.00 kB", 4096: "4.10 kB", 128_400_000: "128 MB", 999_600: "1.00 MB", 1 << 50: "1.13 PB"} {
		assert.Equal(t, want, humanBytes(n))
	}
	for n, want := range map[int64]string{0: "0.00 µs", 1500: "1.50 µs", 85_000: "85.0 µs", 1_230_000: "1.23 ms", 4_500_000_000: "4.50 s", 120_000_000_000: "120 s"} {
		assert.Equal(t, want, humanTime(timeOf(n)))
	}
}

// TestJudgeProgram: what a program that a driver ran did is no mistake of usage.
func TestJudgeProgram(t *testing.T) {
	err := exec.Command(os.Args[0], "-test.no-such-flag").Run()
	require.Error(t, err)
	assert.Equal(t, exitFailure, judge(&layerfs.Error{Op: "create", Driver: "zfs", Err: err}).code)
	assert.Equal(t, exitInput, judge(errors.Join(layerfs.ErrMalformed, err)).code)
}
