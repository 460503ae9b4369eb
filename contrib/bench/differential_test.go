package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fixture"
)

// TestAppliersAgree applies the same layers with this project and with its
// peers, on top of each other, and compares all trees after every layer with
// the one that GNU tar makes of the tree which the kernel's overlay showed.
func TestAppliersAgree(t *testing.T) {
	layers := fixture.Debian(t)
	// What a peer is known to do otherwise, by path. An entry that no longer
	// differs is an error, so that this list stays true.
	deviates := map[string]map[string]string{
		ours:       {},
		containerd: {".": "leaves the root directory's attributes alone"},
		podman:     {},
	}
	for who, known := range deviates {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			for _, l := range layers {
				apply := contestants()["apply"][who]
				_, err := apply(t.Context(), &job{Who: who, Kind: "apply", Tar: l.Tar, Dir: dir})
				require.NoError(t, err, l.Name)

				want := newDir(t)
				require.NoError(t, command(t.Context(), "tar", tarExtract(l.Tree, want)...))
				diffs := differences(describe(t, want), describe(t, dir))
				for path := range known {
					if l.Name == layers[len(layers)-1].Name {
						assert.Contains(t, diffs, path, "is listed as a deviation, but there is none")
					}
					delete(diffs, path)
				}
				n := 0
				for path, diff := range diffs {
					if n++; n > 20 {
						t.Errorf("%s: and %d more", l.Name, len(diffs)-20)
						break
					}
					t.Errorf("%s: %q: %s", l.Name, path, diff)
				}
				require.NoError(t, os.RemoveAll(want))
			}
		})
	}
}

// TestCompressedAgree checks that every form of a layer gives one tree.
func TestCompressedAgree(t *testing.T) {
	layers := fixture.BenchLayers(t)
	small := layers[2]
	want := newDir(t)
	require.NoError(t, command(t.Context(), "tar", tarExtract(small.Tar, want)...))
	oracle := describe(t, want)
	for kind, path := range map[string]string{"apply": small.Tar, "apply.gz": small.Gzip, "apply.zst": small.Zstd} {
		for who, apply := range contestants()[kind] {
			if who == unpack || who == gnu || who == moby {
				continue // nothing is made, is the oracle, is slow
			}
			t.Run(kind+"/"+who, func(t *testing.T) {
				dir := newDir(t)
				_, err := apply(t.Context(), &job{Who: who, Kind: kind, Tar: path, Dir: dir})
				require.NoError(t, err)
				got := describe(t, dir)
				// The layer has no entry for its root.
				delete(got, ".")
				for path, diff := range differences(oracle, got) {
					if path != "." {
						t.Fatalf("%q: %s", path, diff)
					}
				}
				require.NoError(t, os.RemoveAll(dir))
			})
		}
	}
}

// TestWritersAgree writes a tree with this project and unpacks it with GNU tar.
func TestWritersAgree(t *testing.T) {
	layers := fixture.Debian(t)
	tree := newDir(t)
	require.NoError(t, command(t.Context(), "tar", tarExtract(layers[len(layers)-1].Tree, tree)...))
	oracle := describe(t, tree)
	stream := filepath.Join(t.TempDir(), "tree.tar")
	f, err := os.Create(stream)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, writeTo(t.Context(), f, tree))
	require.NoError(t, f.Close())
	back := newDir(t)
	require.NoError(t, command(t.Context(), "tar", tarExtract(stream, back)...))
	for path, diff := range differences(oracle, describe(t, back)) {
		t.Errorf("%q: %s", path, diff)
	}
}

// newDir is t.TempDir on a tmpfs where there is one: these trees are large.
func newDir(t *testing.T) string {
	t.Helper()
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = t.TempDir()
	}
	dir, err := os.MkdirTemp(parent, "layerfs-test-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { assert.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// describe returns all that a tree is, as text by path. Files that are one
// inode name the first of its paths.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
		var b strings.Builder
		fmt.Fprintf(&b, "mode=%#o owner=%d:%d", st.Mode, st.Uid, st.Gid)
		if !d.IsDir() {
			fmt.Fprintf(&b, " links=%d size=%d", st.Nlink, st.Size)
		}
		fmt.Fprintf(&b, " mtime=%d.%09d dev=%d", st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		if st.Nlink > 1 && !d.IsDir() {
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			fmt.Fprintf(&b, " is=%q", first[st.Ino])
		}
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " target=%q", target)
		}
		names := make([]byte, 64<<10)
		n, err := unix.Llistxattr(name, names)
		if err != nil {
			return fmt.Errorf("%s: listxattr: %w", rel, err)
		}
		keys := strings.FieldsFunc(string(names[:n]), func(r rune) bool { return r == 0 })
		slices.Sort(keys)
		for _, key := range keys {
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(name, key, value)
			if err != nil {
				return fmt.Errorf("%s: getxattr %s: %w", rel, key, err)
			}
			fmt.Fprintf(&b, " %s=%q", key, value[:n])
		}
		if d.Type().IsRegular() {
			content, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " sha256=%x", sha256.Sum256(content))
		}
		tree[rel] = b.String()
		return nil
	})
	require.NoError(t, err)
	return tree
}

// differences says by path where two trees differ.
func differences(want, got map[string]string) map[string]string {
	diffs := map[string]string{}
	for path, w := range want {
		if g, ok := got[path]; !ok {
			diffs[path] = "is missing"
		} else if g != w {
			diffs[path] = fmt.Sprintf("\n  want %s\n   got %s", w, g)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			diffs[path] = "is too many"
		}
	}
	return diffs
}

// TestBareAgrees keeps the bare row honest: it must do the whole job.
func TestBareAgrees(t *testing.T) {
	base := fixture.Debian(t)[0]
	want, got := newDir(t), newDir(t)
	require.NoError(t, command(t.Context(), "tar", tarExtract(base.Tar, want)...))
	_, err := applyBare(t.Context(), &job{Tar: base.Tar, Dir: got})
	require.NoError(t, err)
	assert.Empty(t, differences(describe(t, want), describe(t, got)))
}

// TestGenerateTar checks the stream the memory figures are measured with.
func TestGenerateTar(t *testing.T) {
	name := filepath.Join(t.TempDir(), "t.tar")
	require.NoError(t, generateTar(name, 250))
	list, err := entries(name)
	require.NoError(t, err)
	var files, dirs int
	for _, e := range list {
		switch e.Typeflag {
		case tar.TypeReg:
			files++
			assert.EqualValues(t, 16, e.Size)
		case tar.TypeDir:
			dirs++
		}
	}
	assert.Equal(t, 250, files)
	assert.Equal(t, 3, dirs)
}

// TestLifecycles runs every driver's containers once.
func TestLifecycles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for who, f := range contestants()["lifecycle"] {
		t.Run(who, func(t *testing.T) {
			spent, err := f(context.Background(), &job{Who: who, Dir: newDir(t), N: 3})
			require.NoError(t, err)
			assert.Positive(t, spent.Wall)
		})
	}
}
