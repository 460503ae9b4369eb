package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
)

func timeOf(ns int64) time.Duration { return time.Duration(ns) }

// sources makes a tree that has something for every step of a demo.
func sources(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for i := range 40 {
		name := filepath.Join(dir, fmt.Sprintf("pkg%d", i/5), fmt.Sprintf("file%d.go", i))
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		require.NoError(t, os.WriteFile(name, []byte(strings.Repeat("package p\n", 100*(i+1))), 0o644))
	}
	return dir
}

// demoDir is where a demo works.
func demoDir(t *testing.T, driver string) string {
	t.Helper()
	dir := filepath.Join(scratch(t, driver), "demo")
	require.NoError(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		left, err := os.ReadDir(dir)
		assert.NoError(t, err)
		assert.Empty(t, left, "a demo leaves nothing")
	})
	return dir
}

func TestDemo(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		out := s.ok("demo", "--from", sources(t), "--dir", demoDir(t, s.driver), "--containers", "4")
		for _, want := range []string{
			"\nHost\n", s.driver + " ", "is used",
			"as a base layer\n", "49 entries with 820 kB of content",
			"\nStart 4 containers on it\n",
			"rename a directory", "delete a file", "append a byte to the largest file (40.0 kB)",
			"A /layerfs-demo/notes", "finds the same",
			"the two trees are the same",
			"\nMemory\n", "\nStop\n",
		} {
			assert.Contains(t, out, want)
		}
		assert.NoDirExists(t, s.root, "a demo does not touch the root")
	})
}

func TestDemo_json(t *testing.T) {
	for _, n := range []int{2, 3} { // the page cache is looked at from other containers
		t.Run(fmt.Sprint("containers=", n), func(t *testing.T) { testDemoJSON(t, n) })
	}
}

func testDemoJSON(t *testing.T, containers int) {
	eachDriver(t, func(t *testing.T, s *shell) {
		got := decode[demoJSON](t, s.ok("--json", "demo", "--from", sources(t), "--dir", demoDir(t, s.driver), "--containers", fmt.Sprint(containers)))
		require.Len(t, got, 1)
		r := got[0]
		assert.Equal(t, s.driver, r.Host.Driver)
		assert.Equal(t, int64(820_000), r.Import.Bytes)
		assert.Equal(t, containers, r.Containers.Count)
		assert.True(t, 0 < r.Containers.Min && r.Containers.Min <= r.Containers.Median && r.Containers.Median <= r.Containers.Max)
		assert.Positive(t, r.FullCopy.Time)
		assert.GreaterOrEqual(t, r.FullCopy.Bytes, int64(820_000))
		assert.Len(t, r.Changes.Steps, 7)
		assert.True(t, r.Changes.Oracle)
		assert.Zero(t, r.Diff.Differences)
		assert.Positive(t, r.Diff.Bytes)
		if s.driver == "overlay" {
			assert.Less(t, r.Containers.Bytes, r.FullCopy.Bytes, "they take less than one copy")
		}
		if m := r.Memory; m != nil {
			assert.Less(t, m.CopyAfter, m.Bytes/2, "copies share no memory")
			if s.driver == "overlay" {
				assert.Greater(t, m.After, m.Bytes*8/10)
				assert.Less(t, m.Before, m.Bytes/10)
			}
		}
	})
}

func TestDemo_unprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		s := newShell(t, "vfs")
		dir := demoDir(t, "vfs")
		s.driver = ""
		from := sources(t)
		// As in the module cache, where Go keeps toolchains that it fetches.
		require.NoError(t, filepath.WalkDir(from, func(path string, _ os.DirEntry, err error) error {
			if err == nil {
				err = os.Chmod(path, 0o555)
			}
			return err
		}))
		t.Cleanup(func() {
			_ = filepath.WalkDir(from, func(path string, _ os.DirEntry, _ error) error { return os.Chmod(path, 0o755) })
		})
		out := s.ok("demo", "--from", from, "--dir", dir)
		assert.Contains(t, out, "Start 3 containers")
		assert.Contains(t, out, "vfs           is used")
	})
}

// A tree with nothing in it has nothing to delete or rename, which is no error.
func TestDemo_emptyTree(t *testing.T) {
	s := newShell(t, "vfs")
	out := s.ok("demo", "--from", t.TempDir(), "--dir", demoDir(t, s.driver), "--containers", "1")
	assert.Contains(t, out, "write a new file")
	assert.Contains(t, out, "not measured: it takes two containers")
	assert.NotContains(t, out, "delete a ")
	assert.NotContains(t, out, "rename a ")
}

func TestDemo_tar(t *testing.T) {
	s := newShell(t, "vfs")
	from := file(t, layer(t, "a/", "", "a/b", "1", "c/", "", "c/d", "22"))
	out := s.ok("demo", "--from", from, "--dir", demoDir(t, s.driver), "--containers", "1")
	assert.Contains(t, out, "4 entries with 3 B of content")
}

func TestDemo_keep(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		dir := filepath.Dir(s.root)
		out := s.ok("demo", "--from", sources(t), "--dir", dir, "--containers", "1", "--keep")
		_, kept, ok := strings.Cut(out, "layerfs --root ")
		require.True(t, ok, out)
		s.root = strings.TrimSuffix(strings.TrimSpace(kept), " ls")
		assert.True(t, strings.HasPrefix(s.root, dir))
		assert.Equal(t, "base\nlayer\n", s.ok("-q", "ls"))
		s.ok("rm", "layer", "base")
		// The copies to compare with are beside them.
		s.root, s.driver = filepath.Join(filepath.Dir(s.root), "elsewhere"), "vfs"
		s.ok("rm", "copy", "layer")
	})
}

func TestDemo_failures(t *testing.T) {
	s := newShell(t, "vfs")
	dir := demoDir(t, s.driver)
	assert.Contains(t, s.fails2(exitFailure, "demo", "--dir", dir, "--from", filepath.Join(dir, "none")), "no such file")
	assert.Contains(t, s.fails2(exitInput, "demo", "--dir", dir, "--from", file(t, []byte(strings.Repeat("no tar ", 200)))), "malformed")
	t.Setenv("PATH", "")
	assert.Contains(t, s.fails2(exitFailure, "demo", "--dir", dir), "--from")
}

// fails2 is fails of a command that may have printed something before.
func (s *shell) fails2(code int, args ...string) string {
	s.t.Helper()
	got, _, errs := s.run(args...)
	require.Equal(s.t, code, got, errs)
	return errs
}

// A demo that is interrupted at any point leaves nothing: no mount (which the
// leak check of the tests finds) and no file.
func TestDemo_interrupted(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *shell) {
		from := sources(t)
		interrupted := false
		for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond} {
			ctx, cancel := context.WithTimeoutCause(t.Context(), after, context.Canceled)
			code, _, errs := s.runContext(ctx, "demo", "--from", from, "--dir", demoDir(t, s.driver), "--containers", "5")
			cancel()
			if code != exitOK {
				interrupted = true
				assert.Contains(t, errs, "layerfs: ")
			}
		}
		assert.True(t, interrupted)
	})
}
