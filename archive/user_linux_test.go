package archive_test

import (
	"bytes"
	"os"
	"path/filepath"
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

// TestUnprivileged: a user without any privilege unpacks a layer with closed
// directories, owners and capabilities.
func TestUnprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		dir := t.TempDir()
		owned := fileEntry("closed/sub/f", "x")
		owned.hdr.Uid, owned.hdr.Gid, owned.hdr.Mode = 5, 6, 0o400
		stream := makeTar(t, dirEntry("closed", 0o555), dirEntry("closed/sub", 0o500), owned, linkEntry("closed/l", "closed/sub/f"),
			xattrEntry(fileEntry("cap", ""), "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
		require.ErrorIs(t, applyBytes(t, t.TempDir(), stream, nil), unix.EPERM, "owners cannot be set")

		ignore := layerfs.ApplyOptions{IgnoreOwners: true}
		require.ErrorIs(t, applyBytes(t, t.TempDir(), stream, &archive.ApplyOptions{ApplyOptions: ignore}), unix.EPERM, "capabilities cannot be set")
		var lost []string
		require.NoError(t, applyBytes(t, dir, stream, &archive.ApplyOptions{ApplyOptions: ignore, Lost: func(e *archive.EntryError) { lost = append(lost, e.Entry) }}))
		assert.Equal(t, []string{"cap"}, lost)
		t.Cleanup(func() { // closed directories cannot be removed
			_ = os.Chmod(filepath.Join(dir, "closed"), 0o700)
			_ = os.Chmod(filepath.Join(dir, "closed/sub"), 0o700)
		})
		st, err := os.Stat(filepath.Join(dir, "closed"))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o555), st.Mode().Perm())
		b, err := os.ReadFile(filepath.Join(dir, "closed/l"))
		require.NoError(t, err)
		assert.Equal(t, "x", string(b))

		// What was unpacked can be read and compared without privilege, too.
		var out bytes.Buffer
		_, err = archive.Write(t.Context(), &out, dir, nil)
		require.NoError(t, err)
		assert.Empty(t, collect(t, dir, dir, nil))
	})
}

// TestUnprivilegedClosed: a user adds to, deletes from and removes directories
// of their own that are closed to them, as a lower layer may have left them.
func TestUnprivilegedClosed(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		opts := &archive.ApplyOptions{ApplyOptions: layerfs.ApplyOptions{IgnoreOwners: true}}
		dir := filepath.Join(t.TempDir(), "tree")
		require.NoError(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() {
			_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
				if d != nil && d.IsDir() {
					return os.Chmod(p, 0o700)
				}
				return err
			})
		})
		mode := func(name string) os.FileMode {
			fi, err := os.Lstat(filepath.Join(dir, name))
			require.NoError(t, err)
			return fi.Mode().Perm()
		}
		base := makeTar(t, dirEntry("closed", 0o555), fileEntry("closed/old", "x"), dirEntry("closed/sub", 0), fileEntry("closed/sub/f", "x"),
			dirEntry("gone", 0), dirEntry("gone/deep", 0o555), fileEntry("gone/deep/f", "x"), dirEntry("redone", 0o500), fileEntry("redone/f", "x"))
		require.NoError(t, applyBytes(t, dir, base, opts))
		broken := makeTar(t, fileEntry("closed/new", "y"), fileEntry("closed/sub/g", "y"))
		require.Error(t, applyBytes(t, dir, broken[:len(broken)-1700], opts), "truncated")
		assert.Equal(t, os.FileMode(0o555), mode("closed"), "after a failure")

		before, err := os.Stat(filepath.Join(dir, "closed"))
		require.NoError(t, err)
		next := makeTar(t, fileEntry("closed/new", "y"), fileEntry("closed/.wh.old", ""), fileEntry("closed/sub/g", "y"),
			fileEntry(".wh.gone", ""), dirEntry("redone", 0o511), fileEntry("redone/.wh..wh..opq", ""), fileEntry("redone/g", "z"))
		require.NoError(t, applyBytes(t, dir, next, opts))
		after, err := os.Stat(filepath.Join(dir, "closed"))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o555), mode("closed"))
		assert.Equal(t, os.FileMode(0o511), mode("redone"))
		assert.Equal(t, before.ModTime(), after.ModTime(), "the time of a directory that the stream does not have")
		assert.NoFileExists(t, filepath.Join(dir, "closed/old"))
		assert.FileExists(t, filepath.Join(dir, "closed/new"))
		assert.NoDirExists(t, filepath.Join(dir, "gone"))
		assert.NoFileExists(t, filepath.Join(dir, "redone/f"))
		assert.FileExists(t, filepath.Join(dir, "redone/g"))
		assert.Zero(t, mode("closed/sub"))
		require.NoError(t, os.Chmod(filepath.Join(dir, "closed/sub"), 0o700))
		assert.FileExists(t, filepath.Join(dir, "closed/sub/f"))
		assert.FileExists(t, filepath.Join(dir, "closed/sub/g"))
	})
}

// TestUserNamespace: root of a user namespace makes the whiteouts of overlay
// mounts with userxattr.
func TestUserNamespace(t *testing.T) {
	testenv.InUserNamespace(t, func(t *testing.T) {
		dir := t.TempDir()
		lower, upper := filepath.Join(dir, "lower"), filepath.Join(dir, "upper")
		tree.Build(t, lower, "file d/a 1", "file d/b 2", "file e/c 3")
		tree.Build(t, upper)
		stream := makeTar(t, fileEntry("d/.wh.a", ""), fileEntry("e/.wh..wh..opq", ""), dirEntry("e", 0o755), fileEntry("e/n", "n"))
		opts := &archive.ApplyOptions{Form: whiteout.OverlayUser, Lowers: []string{lower}}
		opts.IgnoreOwners = true
		require.NoError(t, applyBytes(t, upper, stream, opts))
		var out bytes.Buffer
		_, err := archive.WriteUpper(t.Context(), &out, upper, whiteout.OverlayUser, nil)
		require.NoError(t, err)
		want, got := filepath.Join(dir, "want"), filepath.Join(dir, "got")
		tree.Build(t, want, "file d/b 2", "file e/n n")
		tree.Build(t, got, "file d/a 1", "file d/b 2", "file e/c 3")
		require.NoError(t, applyBytes(t, got, out.Bytes(), nil))
		requireSame(t, want, got, &tree.CompareOptions{IgnoreTimes: true})
	})
}

// TestXattrWhiteouts: the form without devices, round.
func TestXattrWhiteouts(t *testing.T) {
	testenv.RequireRoot(t)
	for _, form := range []whiteout.Form{whiteout.OverlayXattr, whiteout.OverlayUserXattr} {
		t.Run(form.String(), func(t *testing.T) {
			dir := scratch(t)
			lower, upper := filepath.Join(dir, "lower"), filepath.Join(dir, "upper")
			base := []string{"file d/a 1", "file d/b 2", "file e/c 3", "file x/y z"}
			tree.Build(t, lower, base...)
			tree.Build(t, upper)
			stream := makeTar(t, fileEntry("d/.wh.a", ""), fileEntry("d/empty", ""), fileEntry("e/.wh..wh..opq", ""), dirEntry("e", 0o755), fileEntry(".wh.x", ""))
			require.NoError(t, applyBytes(t, upper, stream, &archive.ApplyOptions{Form: form, Lowers: []string{lower}}))
			var out bytes.Buffer
			_, err := archive.WriteUpper(t.Context(), &out, upper, form, nil)
			require.NoError(t, err)
			want, got := filepath.Join(dir, "want"), filepath.Join(dir, "got")
			tree.Build(t, want, "file d/b 2", "file d/empty", "dir e")
			tree.Build(t, got, base...)
			require.NoError(t, applyBytes(t, got, out.Bytes(), nil))
			requireSame(t, want, got, &tree.CompareOptions{IgnoreTimes: true})
			if form == whiteout.OverlayXattr && sys.KernelAtLeast(6, 8) {
				// The kernel honours such whiteouts in lower layers but the lowest.
				tree.Build(t, filepath.Join(dir, "top"))
				stackMount(t, dir, "", []string{upper, lower}, func(m string) {
					requireSame(t, want, m, &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: tree.IgnoreOverlayXattrs})
				})
			}
		})
	}
}
