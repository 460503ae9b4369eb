package overlay

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/feature"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// stack makes a base layer with a few files and a layer on it.
func stack(t testing.TB, d *Driver) {
	t.Helper()
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "base", "", nil))
	tree.Build(t, mustGet(t, d, "base"), "dir d 0755", "file d/f one", "file g two")
	require.NoError(t, d.Put(ctx, "base"))
	require.NoError(t, d.Create(ctx, "top", "base", nil))
}

func TestNewUnsupported(t *testing.T) {
	testenv.RequireRoot(t)
	no := &layerfs.UnsupportedError{Feature: "test", Reason: "forced"}
	for name, tc := range map[string]struct {
		opts  Options
		force feature.Feature
	}{
		"overlay":   {force: feature.Overlay},
		"userxattr": {Options{UserXattr: "on"}, feature.OverlayUserXattr},
		"redirect":  {Options{RedirectDir: "on"}, feature.RedirectDir},
		"metacopy":  {Options{RedirectDir: "on", Metacopy: "on"}, feature.Metacopy},
		"xino":      {Options{XIno: "on"}, feature.XIno},
		"volatile":  {Options{Volatile: true}, feature.Volatile},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			_, err := open(root, &tc.opts, &feature.Prober{Force: map[feature.Feature]error{tc.force: no}}, mount.Auto)
			require.ErrorIs(t, err, errors.ErrUnsupported)
			var e *layerfs.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, "overlay", e.Driver)
			left, err := os.ReadDir(root + "/overlay")
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
	t.Run("overlay-as-root-directory", func(t *testing.T) {
		// An overlay cannot be the upper layer of another.
		dir := t.TempDir()
		tree.Build(t, dir, "dir l 0755", "dir u 0755", "dir w 0755", "dir m 0755")
		require.NoError(t, (&mount.Overlay{Lowers: []string{dir + "/l"}, Upper: dir + "/u", Work: dir + "/w"}).Mount(dir+"/m"))
		defer func() { require.NoError(t, mount.Unmount(dir+"/m")) }()
		_, err := New(dir+"/m", nil)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	})
}

func TestConfigSticks(t *testing.T) {
	root := t.TempDir()
	d := mustNew(t, root, &Options{RedirectDir: "on", Metacopy: "on"})
	stack(t, d)
	top := mustGet(t, d, "top")
	require.NoError(t, os.Rename(top+"/d", top+"/moved"))
	require.NoError(t, os.Chmod(top+"/g", 0o600))
	require.NoError(t, d.Put(t.Context(), "top"))

	// A driver with other options sees what the first one made.
	plain := mustNew(t, root, nil)
	top = mustGet(t, plain, "top")
	b, err := os.ReadFile(top + "/moved/f")
	require.NoError(t, err)
	require.Equal(t, "one", string(b))
	b, err = os.ReadFile(top + "/g")
	require.NoError(t, err)
	require.Equal(t, "two", string(b))
	require.NoError(t, plain.Put(t.Context(), "top"))
	oracle(t, plain, "top", "base")

	_, err = New(root, &Options{UserXattr: "on"})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "written with trusted xattrs")
}

func TestRenameDirectory(t *testing.T) {
	for _, redirect := range []string{"off", "on"} {
		t.Run("redirect_dir="+redirect, func(t *testing.T) {
			d := mustNew(t, t.TempDir(), &Options{RedirectDir: redirect})
			stack(t, d)
			top := mustGet(t, d, "top")
			err := os.Rename(top+"/d", top+"/e")
			require.Equal(t, d.Features().Rename, err == nil, "%v", err)
			if err != nil {
				require.ErrorIs(t, err, unix.EXDEV)
			}
		})
	}
}

func TestUserXattr(t *testing.T) {
	d := mustNew(t, t.TempDir(), &Options{UserXattr: "on"})
	stack(t, d)
	top := mustGet(t, d, "top")
	require.NoError(t, os.RemoveAll(top+"/d"))
	require.NoError(t, os.Mkdir(top+"/d", 0o755))
	buf := make([]byte, 8)
	n, err := unix.Lgetxattr(d.m.upper("top")+"/d", "user.overlay.opaque", buf)
	require.NoError(t, err)
	require.Equal(t, "y", string(buf[:n]))
	require.NoError(t, d.Put(t.Context(), "top"))
	oracle(t, d, "top", "base")
	apply(t, d, "top", "base")
}

// apply applies the diff of a layer to a new one on the same base and compares.
func apply(t *testing.T, d *Driver, id, base string) {
	t.Helper()
	ctx := t.Context()
	r, err := d.Diff(ctx, id, base, nil)
	require.NoError(t, err)
	require.NoError(t, d.Create(ctx, id+"-copy", base, nil))
	_, err = d.Apply(ctx, id+"-copy", r, nil)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	diffs, err := tree.Compare(mustGet(t, d, id), mustGet(t, d, id+"-copy"), nil)
	require.NoError(t, err)
	require.Empty(t, diffs)
	require.NoError(t, d.Put(ctx, id))
	require.NoError(t, d.Put(ctx, id+"-copy"))
}

func TestInUserNamespace(t *testing.T) {
	testenv.InUserNamespace(t, func(t *testing.T) {
		root := t.TempDir()
		d, err := New(root, nil)
		testenv.SkipUnsupported(t, err, "overlay")
		require.NoError(t, err)
		require.NoError(t, d.Close())
		d = mustNew(t, root, nil)
		require.Equal(t, "on", d.m.opts.UserXattr)
		require.False(t, d.Features().AllXattrs)
		require.NotEmpty(t, d.Features().Reasons["AllXattrs"])
		stack(t, d)
		top := mustGet(t, d, "top")
		require.NoError(t, os.Remove(top+"/g"))
		require.NoError(t, os.RemoveAll(top+"/d"))
		require.NoError(t, os.Mkdir(top+"/d", 0o700))
		require.NoError(t, d.Put(t.Context(), "top"))
		apply(t, d, "top", "base")
	})
}

func TestIDMap(t *testing.T) {
	d := mustNew(t, t.TempDir(), nil)
	if !d.Features().IDMap {
		testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: "idmap", Reason: d.Features().Reasons["IDMap"]})
	}
	stack(t, d)
	ctx := t.Context()
	m := &layerfs.IDMap{
		UIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 100000, Size: 1000}},
		GIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 200000, Size: 1000}},
	}
	for _, id := range []string{"base", "top"} {
		p, err := d.Get(ctx, id, &layerfs.GetOptions{IDMap: m})
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(p+"/g", &st))
		require.EqualValues(t, 100000, st.Uid)
		require.EqualValues(t, 200000, st.Gid)
		_, err = d.Get(ctx, id, nil)
		require.ErrorIs(t, err, layerfs.ErrInUse)
		other := mustNew(t, filepath.Dir(d.m.home), nil)
		_, err = other.Get(ctx, id, nil)
		require.ErrorIs(t, err, layerfs.ErrInUse)
		if id == "top" { // what is written in it is stored as the container's
			require.NoError(t, os.Chown(p+"/g", 100005, 200006))
			require.NoError(t, unix.Lstat(d.m.upper("top")+"/g", &st))
			require.EqualValues(t, 5, st.Uid)
			require.EqualValues(t, 6, st.Gid)
		}
		require.NoError(t, d.Put(ctx, id))
		p, err = d.Get(ctx, id, nil)
		require.NoError(t, err)
		require.NoError(t, unix.Lstat(p+"/d/f", &st))
		require.EqualValues(t, 0, st.Uid)
		require.NoError(t, d.Put(ctx, id))
	}
}

func TestVolatile(t *testing.T) {
	root := t.TempDir()
	d := mustNew(t, root, &Options{Volatile: true})
	stack(t, d)
	ctx := t.Context()
	for range 2 { // the kernel refuses a second mount unless its mark is removed
		top := mustGet(t, d, "top")
		require.NoError(t, os.WriteFile(top+"/v", nil, 0o644))
		require.NoError(t, d.Put(ctx, "top"))
	}
	// As if the machine had been restarted.
	require.NoError(t, os.WriteFile(d.m.volatilePath("top"), []byte("another boot"), 0o600))
	again := mustNew(t, root, nil)
	_, err := again.Get(ctx, "top", nil)
	require.ErrorIs(t, err, layerfs.ErrIncomplete)
	require.ErrorContains(t, err, "volatile")
	require.NoError(t, again.Rollback(ctx, "top"))
	top := mustGet(t, again, "top")
	require.NoFileExists(t, top+"/v")
	require.FileExists(t, top+"/g")
	_, err = os.Lstat(d.m.volatilePath("top"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestMounts(t *testing.T) {
	d := mustNew(t, filepath.Join(t.TempDir(), "a:b,c"), nil)
	stack(t, d)
	ctx := t.Context()
	for _, id := range []string{"base", "top"} {
		mounts, err := layerfs.Mounts(ctx, d, id, nil)
		require.NoError(t, err)
		target := t.TempDir()
		for _, m := range mounts {
			flags := uintptr(0)
			var data []string
			for _, o := range m.Options {
				switch o {
				case "rbind":
					flags |= unix.MS_BIND | unix.MS_REC
				case "ro":
					flags |= unix.MS_RDONLY
				case "rw":
				default:
					data = append(data, o)
				}
			}
			require.NoError(t, unix.Mount(m.Source, target, m.Type, flags, strings.Join(data, ",")))
		}
		b, err := os.ReadFile(target + "/d/f")
		require.NoError(t, err)
		require.Equal(t, "one", string(b))
		require.NoError(t, unix.Unmount(target, 0))
		require.ErrorIs(t, d.Remove(ctx, id), layerfs.ErrInUse)
		require.NoError(t, d.Put(ctx, id))
	}
}

func TestMountOptions(t *testing.T) {
	d := mustNew(t, t.TempDir(), &Options{MountOptions: []string{"no-such-option"}})
	stack(t, d)
	_, err := d.Get(t.Context(), "top", nil)
	require.ErrorIs(t, err, unix.EINVAL)
	if new(feature.Prober).Has(feature.LowerAppend, "") { // mount(2) does not say which
		require.ErrorContains(t, err, "no-such-option")
	}
	require.NoError(t, d.Remove(t.Context(), "top"), "a failed Get must hold nothing")
}

func TestClone(t *testing.T) {
	d := mustNew(t, t.TempDir(), nil)
	stack(t, d)
	ctx := t.Context()
	top := mustGet(t, d, "top")
	require.NoError(t, os.RemoveAll(top+"/d"))
	require.NoError(t, os.Mkdir(top+"/d", 0o711))
	require.ErrorIs(t, d.Clone(ctx, "twin", "top", nil), layerfs.ErrInUse)
	require.NoError(t, d.Put(ctx, "top"))
	require.NoError(t, d.Clone(ctx, "twin", "top", nil))
	require.ErrorIs(t, d.Clone(ctx, "twin", "top", nil), layerfs.ErrExist)
	diffs, err := tree.Compare(mustGet(t, d, "top"), mustGet(t, d, "twin"), nil)
	require.NoError(t, err)
	require.Empty(t, diffs)
	info, err := d.Stat(ctx, "twin", nil)
	require.NoError(t, err)
	require.Equal(t, "base", info.Parent)
	require.Equal(t, tree.FormatChanges(changes(t, d, "top", "base")), tree.FormatChanges(changes(t, d, "twin", "base")))
}

func TestMountProgram(t *testing.T) {
	program := testenv.RequireTool(t, "fuse-overlayfs", "overlay")
	d := mustNew(t, t.TempDir(), &Options{MountProgram: program})
	ctx := t.Context()
	stack(t, d)
	top := mustGet(t, d, "top")
	st, err := mount.Query(top)
	require.NoError(t, err)
	require.EqualValues(t, unix.FUSE_SUPER_MAGIC, st.Magic)
	require.NoError(t, os.Remove(top+"/g"))
	require.NoError(t, os.RemoveAll(top+"/d"))
	require.NoError(t, os.Mkdir(top+"/d", 0o755))
	require.NoError(t, os.WriteFile(top+"/d/new", []byte("n"), 0o644))
	require.NoError(t, d.Put(ctx, "top"))
	oracle(t, d, "top", "base")
	apply(t, d, "top", "base")

	_, err = New(t.TempDir(), &Options{MountProgram: "/no/such/program"})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	broken := mustNew(t, t.TempDir(), &Options{MountProgram: mustFalse(t)})
	require.NoError(t, broken.Create(ctx, "base", "", nil))
	require.NoError(t, broken.Create(ctx, "top", "base", nil))
	_, err = broken.Get(ctx, "top", nil)
	require.ErrorContains(t, err, "exit status 1")
	require.NoError(t, broken.Remove(ctx, "top"))
}

func mustFalse(t *testing.T) string {
	p, err := exec.LookPath("false")
	require.NoError(t, err)
	return p
}

// TestMountProgramAUFS reads what fuse-overlayfs makes where it may not make
// devices.
func TestMountProgramAUFS(t *testing.T) {
	d := mustNew(t, t.TempDir(), nil)
	stack(t, d)
	d.m.conf.AUFS = true
	upper := d.m.upper("top")
	tree.Build(t, upper, "file .wh.g ", "dir d 0755", "file d/.wh..wh..opq ", "file d/new n")
	got := tree.FormatChanges(changes(t, d, "top", "base"))
	require.Contains(t, got, "D /d/f\nA /d/new\nD /g\n")
	require.NotContains(t, got, ".wh.")
}

func TestQuotaUnsupported(t *testing.T) {
	d := mustNew(t, testenv.Tmpfs(t), nil)
	ctx := t.Context()
	q := layerfs.Quota{Bytes: 1 << 20}
	err := d.Create(ctx, "a", "", &layerfs.CreateOptions{Quota: q})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.NotEmpty(t, d.Features().Reasons["Quota"])
	require.ErrorContains(t, err, d.Features().Reasons["Quota"])
	_, err = d.Stat(ctx, "a", nil)
	require.ErrorIs(t, err, layerfs.ErrNotExist)
	require.NoError(t, d.Create(ctx, "a", "", nil))
	require.ErrorIs(t, layerfs.SetQuota(ctx, d, "a", q), errors.ErrUnsupported)
}

// TestQuota runs where the kernel counts projects: in the guest.
func TestQuota(t *testing.T) {
	for name, mkfs := range map[string]func(testing.TB, int, ...string) string{
		"ext4": func(t testing.TB, mib int, _ ...string) string {
			return testenv.Ext4(t, mib, "-O quota,project", "prjquota")
		},
		"xfs": func(t testing.TB, mib int, _ ...string) string { return testenv.XFS(t, mib, "prjquota") },
	} {
		t.Run("fs="+name, func(t *testing.T) {
			d := mustNew(t, mkfs(t, 400), nil)
			if !d.Features().Quota {
				testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: "project quota", Reason: d.Features().Reasons["Quota"]}, "quota")
			}
			ctx := t.Context()
			stack(t, d)
			require.NoError(t, d.Create(ctx, "small", "base", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 4 << 20, Inodes: 50}}))
			small := mustGet(t, d, "small")
			full := os.WriteFile(small+"/big", make([]byte, 8<<20), 0o644)
			require.True(t, errors.Is(full, unix.EDQUOT) || errors.Is(full, unix.ENOSPC), "%v", full)
			require.NoError(t, os.Remove(small+"/big"))
			require.NoError(t, d.SetQuota(ctx, "small", layerfs.Quota{Bytes: 32 << 20}))
			require.NoError(t, os.WriteFile(small+"/big", make([]byte, 8<<20), 0o644))
			require.NoError(t, d.Put(ctx, "small"))
			apply(t, d, "small", "base")
			require.NoError(t, d.Rollback(ctx, "small"))
			require.NoError(t, d.Remove(ctx, "small"))
		})
	}
}

func TestFind(t *testing.T) {
	d := mustNew(t, t.TempDir(), nil)
	stack(t, d)
	require.NoError(t, os.Remove(d.m.work("top")))
	require.NoError(t, os.WriteFile(d.m.layer("top")+"/lower-id", []byte("other"), 0o600))
	require.NoError(t, os.Mkdir(d.m.layer("orphan"), 0o755))
	problems, err := d.Check(t.Context())
	require.NoError(t, err)
	var text []string
	for _, p := range problems {
		text = append(text, p.ID+": "+p.Reason)
	}
	require.Contains(t, strings.Join(text, "\n"), "orphan: storage of a layer that does not exist")
	require.Contains(t, strings.Join(text, "\n"), "top: lstat")
	mended, err := d.Repair(t.Context())
	require.NoError(t, err)
	require.Len(t, mended, 1)
	require.NoDirExists(t, d.m.layer("orphan"))
}

var (
	_ lifecycle.Mechanism = (*mechanism)(nil)
	_ lifecycle.IDDeleter = (*mechanism)(nil)
)
