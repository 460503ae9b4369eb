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
			if form == whiteout.OverlayXattr && testenv.KernelHas("6.8") {
				// The kernel honours such whiteouts in lower layers but the lowest.
				tree.Build(t, filepath.Join(dir, "top"))
				stackMount(t, dir, "", []string{upper, lower}, func(m string) {
					requireSame(t, want, m, &tree.CompareOptions{IgnoreTimes: true, IgnoreXattr: tree.IgnoreOverlayXattrs})
				})
			}
		})
	}
}
