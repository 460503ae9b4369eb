package feature

import (
	"errors"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// What each file system can do is documented; the probes must find the same.
func TestProbe(t *testing.T) {
	testenv.RequireRoot(t)
	overlay := map[Feature]string{
		Overlay: "4.0", Metacopy: "4.19", RedirectDir: "4.10", XIno: "4.17", Volatile: "5.10",
		XattrWhiteout: "6.7", DType: "4.0",
	}
	for _, tt := range []struct {
		name  string
		fs    string
		dir   func(t *testing.T) string
		yes   map[Feature]string // since
		never []Feature
	}{
		{"tmpfs", "tmpfs", func(t *testing.T) string { t.Helper(); return testenv.Tmpfs(t) }, map[Feature]string{OverlayUserXattr: "6.6", IDMap: "6.3", OverlayIDMap: "6.15"}, []Feature{Reflink, ProjectQuota}},
		{"ext4", "extfs", func(t *testing.T) string { t.Helper(); return testenv.Ext4(t, 32) }, map[Feature]string{OverlayUserXattr: "5.11", Index: "4.13", IDMap: "5.12", OverlayIDMap: "6.15"}, []Feature{Reflink, ProjectQuota}},
		{"xfs", "xfs", func(t *testing.T) string { t.Helper(); return testenv.XFS(t, 320) }, map[Feature]string{OverlayUserXattr: "5.11", Index: "4.13", IDMap: "5.12", Reflink: "4.16"}, []Feature{ProjectQuota}},
		{"btrfs", "btrfs", func(t *testing.T) string { t.Helper(); return testenv.Btrfs(t, 128) }, map[Feature]string{OverlayUserXattr: "5.11", Index: "4.13", IDMap: "5.15", Reflink: "4.5"}, []Feature{ProjectQuota}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tt.dir(t)
			name, err := FSName(dir)
			require.NoError(t, err)
			assert.Equal(t, tt.fs, name)
			var p Prober
			for _, list := range []map[Feature]string{overlay, tt.yes} {
				for f, since := range list {
					t.Run(string(f), func(t *testing.T) {
						testenv.RequireKernel(t, since, string(f))
						require.NoError(t, p.Probe(f, dir))
					})
				}
			}
			for _, f := range tt.never {
				err := p.Probe(f, dir)
				var u *layerfs.UnsupportedError
				require.ErrorAs(t, err, &u, f)
				assert.NotEmpty(t, u.Reason)
				again := p.Probe(f, dir)
				assert.Same(t, err, again, "a no is kept")
			}
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			for _, e := range entries {
				assert.Equal(t, "lost+found", e.Name(), "probes leave nothing behind")
			}
		})
	}
}

// An overlay is no upper layer of another one unless it has user xattrs
// escaped; a read-only directory and a missing one give no answer.
func TestProbeNoAnswer(t *testing.T) {
	testenv.RequireRoot(t)
	var p Prober
	ro := testenv.Tmpfs(t, "ro")
	for _, f := range features() {
		switch f {
		case NewMountAPI, LowerAppend, MountSetattr, OpenAt2, SysAdmin, Mknod, IDMap, ProjectQuota:
			continue
		}
		err := p.Probe(f, ro)
		require.Error(t, err, f)
		require.NotErrorIs(t, err, errors.ErrUnsupported, f)
		err = p.Probe(f, ro+"/none")
		require.ErrorIs(t, err, os.ErrNotExist, f)
	}
	assert.Empty(t, p.no, "could not tell is not kept")
}

func TestProbeSystem(t *testing.T) {
	testenv.RequireRoot(t)
	var p Prober
	for f, since := range map[Feature]string{NewMountAPI: "5.2", MountSetattr: "5.12", OpenAt2: "5.6", LowerAppend: "6.8", SysAdmin: "3.0", Mknod: "3.0"} {
		t.Run(string(f), func(t *testing.T) {
			testenv.RequireKernel(t, since, string(f))
			err := p.Probe(f, "")
			testenv.SkipUnsupported(t, err)
			require.NoError(t, err)
		})
	}
}

func TestProbeUnprivileged(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		var p Prober
		dir := t.TempDir()
		for _, f := range []Feature{SysAdmin, Mknod, Overlay, LowerAppend} {
			require.ErrorIs(t, p.Probe(f, dir), errors.ErrUnsupported, f)
		}
		require.NoError(t, p.Probe(OpenAt2, dir))
		require.NoError(t, p.Probe(DType, dir))
	})
}

func TestProbeInUserNamespace(t *testing.T) {
	testenv.InUserNamespace(t, func(t *testing.T) {
		testenv.RequireKernel(t, "6.6", "user xattrs of tmpfs")
		in, err := InUserNamespace()
		require.NoError(t, err)
		assert.True(t, in)
		var p Prober
		dir := testenv.Tmpfs(t)
		require.NoError(t, p.Probe(OverlayUserXattr, dir))
		require.ErrorIs(t, p.Probe(Mknod, dir), errors.ErrUnsupported)
		require.ErrorIs(t, p.Probe(Overlay, dir), errors.ErrUnsupported)
	})
}

func TestSince(t *testing.T) {
	var u *layerfs.UnsupportedError
	require.ErrorAs(t, no("x", "Linux 999.9", "r"), &u)
	assert.Equal(t, "Linux 999.9", u.Since)
	require.ErrorAs(t, no("x", "Linux 3.1", "r"), &u)
	assert.Empty(t, u.Since, "this kernel is newer, so its version is not the reason")
}

func TestMagicName(t *testing.T) {
	for magic, want := range map[uint32]string{0xef53: "extfs", 0x58465342: "xfs", 0x794c7630: "overlayfs", 0x2fc12fc1: "zfs", 0x61756673: "aufs", 0x1234: "0x1234"} {
		assert.Equal(t, want, magicName(magic))
	}
}

func BenchmarkProbe(b *testing.B) {
	testenv.RequireRoot(b)
	dir := testenv.Tmpfs(b)
	for _, f := range []Feature{NewMountAPI, Overlay, Reflink} {
		b.Run("feature="+string(f), func(b *testing.B) {
			for b.Loop() {
				_ = probe(f, dir)
			}
		})
	}
}
