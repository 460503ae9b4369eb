package quota

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func TestUnsupported(t *testing.T) {
	for _, tt := range []struct {
		name string
		dir  func(t *testing.T) string
		text string
	}{
		{"tmpfs", func(t *testing.T) string { t.Helper(); return testenv.Tmpfs(t) }, ""},
		{"proc", func(*testing.T) string { return "/proc" }, "no project ids"},
		{"ext4-without", func(t *testing.T) string { t.Helper(); return testenv.Ext4(t, 32) }, ""},
		{"btrfs", func(t *testing.T) string { t.Helper(); return testenv.Btrfs(t, 128) }, "has no quotas"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Supported(tt.dir(t))
			require.ErrorIs(t, err, errors.ErrUnsupported)
			var u *layerfs.UnsupportedError
			require.ErrorAs(t, err, &u)
			require.ErrorContains(t, err, tt.text)
			t.Log(err)
		})
	}
	_, err := Open(filepath.Join(t.TempDir(), "none"), nil)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// Project ids need no quotas: this runs wherever ext4 and xfs do.
func TestAssign(t *testing.T) {
	for _, tt := range fileSystems() {
		t.Run(tt.name, func(t *testing.T) {
			dir := tt.plain(t)
			root, err := os.Open(dir)
			require.NoError(t, err)
			p := &Projects{root: root}
			defer p.Close()
			sub := filepath.Join(dir, "sub")
			require.NoError(t, os.Mkdir(sub, 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(sub, "before"), nil, 0o644))
			require.NoError(t, os.Symlink("before", filepath.Join(sub, "link")))
			require.NoError(t, unix.Mkfifo(filepath.Join(sub, "fifo"), 0o644))
			require.NoError(t, p.Assign(4711, sub))
			require.NoError(t, os.MkdirAll(filepath.Join(sub, "a/b"), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(sub, "a/b/f"), nil, 0o644))
			want := map[string]uint32{dir: 0, sub: 4711, sub + "/before": 0, sub + "/a/b": 4711, sub + "/a/b/f": 4711}
			for path, id := range want {
				got, err := p.ID(path)
				require.NoError(t, err)
				assert.Equal(t, id, got, path)
			}
			require.NoError(t, os.Rename(sub+"/a/b/f", dir+"/f"), "out of a project is allowed")
			require.NoError(t, os.WriteFile(dir+"/g", nil, 0o644))
			require.ErrorIs(t, os.Rename(dir+"/g", sub+"/a/g"), unix.EXDEV, "into one is not")
			require.NoError(t, p.AssignTree(4712, sub))
			for _, path := range []string{sub, sub + "/before", sub + "/a/b"} {
				got, err := p.ID(path)
				require.NoError(t, err)
				assert.Equal(t, uint32(4712), got, path)
			}
			require.NoError(t, p.Assign(0, sub))
			require.NoError(t, os.WriteFile(sub+"/later", nil, 0o644))
			got, err := p.ID(sub + "/later")
			require.NoError(t, err)
			assert.Zero(t, got)
		})
	}
}

type fileSystem struct {
	name  string
	plain func(t *testing.T) string // with project ids
	quota func(t *testing.T) string // and limits
	errno error                     // if a limit is hit
}

func fileSystems() []fileSystem {
	return []fileSystem{
		{
			"ext4",
			func(t *testing.T) string { t.Helper(); return testenv.Ext4(t, 64, "-O project -I 256") },
			func(t *testing.T) string {
				t.Helper()
				return testenv.Ext4(t, 64, "-O quota,project -E quotatype=prjquota -I 256", "prjquota")
			},
			unix.EDQUOT,
		},
		{
			"xfs",
			func(t *testing.T) string { t.Helper(); return testenv.XFS(t, 320) },
			func(t *testing.T) string { t.Helper(); return testenv.XFS(t, 320, "prjquota") },
			unix.ENOSPC,
		},
	}
}

func TestLimits(t *testing.T) {
	for _, tt := range fileSystems() {
		t.Run(tt.name, func(t *testing.T) {
			for _, byDevice := range []bool{false, true} {
				t.Run("device="+strconv.FormatBool(byDevice), func(t *testing.T) {
					dir := tt.quota(t)
					p, err := Open(dir, &Options{First: 5000, BlockDevice: byDevice})
					testenv.SkipUnsupported(t, err, "quota")
					require.NoError(t, err)
					defer p.Close()
					assert.Equal(t, byDevice, p.device != "")
					testLimits(t, p, dir, tt.errno)
				})
			}
		})
	}
}

func testLimits(t *testing.T, p *Projects, dir string, errno error) {
	t.Helper()
	id, err := p.Allocate(dir)
	require.NoError(t, err)
	assert.Equal(t, uint32(5000), id)
	layer := filepath.Join(dir, "layer")
	require.NoError(t, os.Mkdir(layer, 0o755))
	require.NoError(t, p.Assign(id, layer))
	require.NoError(t, p.SetLimits(id, layerfs.Quota{Bytes: 1 << 20, Inodes: 10}))
	r, err := p.Report(id)
	require.NoError(t, err)
	assert.Equal(t, layerfs.Quota{Bytes: 1 << 20, Inodes: 10}, r.Limit)
	assert.Equal(t, int64(1), r.Inodes)

	next, err := p.Allocate(dir)
	require.NoError(t, err)
	assert.Equal(t, uint32(5001), next)
	require.NoError(t, p.SetLimits(5001, layerfs.Quota{Inodes: 1}))
	next, err = p.Allocate(dir)
	require.NoError(t, err)
	assert.Equal(t, uint32(5002), next, "one that has limits is somebody's")

	// Bytes: some below the limit can be written, and not one block more.
	f, err := os.Create(layer + "/data")
	require.NoError(t, err)
	defer f.Close()
	write := func(n int) error {
		return limited(t, func() error {
			_, err := f.Write(make([]byte, n))
			return errors.Join(err, f.Sync())
		})
	}
	require.NoError(t, write(512<<10))
	require.ErrorIs(t, write(1<<20), errno)
	r, err = p.Report(id)
	require.NoError(t, err)
	assert.LessOrEqual(t, r.Bytes, int64(1<<20))
	assert.GreaterOrEqual(t, r.Bytes, int64(512<<10))
	require.NoError(t, f.Close())
	require.NoError(t, os.Remove(layer+"/data"))
	require.Eventually(t, func() bool {
		r, err := p.Report(id)
		return err == nil && r.Inodes == 1
	}, 10*time.Second, 50*time.Millisecond, "xfs frees inodes in the background since Linux 5.14")

	// Inodes: the directory is one of the ten.
	for i := range 9 {
		require.NoError(t, os.WriteFile(layer+"/"+strconv.Itoa(i), nil, 0o644))
	}
	require.ErrorIs(t, limited(t, func() error { return os.WriteFile(layer+"/more", nil, 0o644) }), errno)
	require.NoError(t, os.WriteFile(dir+"/outside", make([]byte, 2<<20), 0o644))
	require.NoError(t, p.Clear(id))
	require.NoError(t, os.WriteFile(layer+"/more", make([]byte, 2<<20), 0o644))
	r, err = p.Report(id)
	require.NoError(t, err)
	assert.Equal(t, layerfs.Quota{}, r.Limit)
	assert.Equal(t, int64(11), r.Inodes)
	require.Error(t, p.SetLimits(0, layerfs.Quota{Bytes: 1}))
	require.Error(t, p.SetLimits(id, layerfs.Quota{Bytes: -1}))
}

// limited runs f on a thread without CAP_SYS_RESOURCE, with which ext4 lets
// root write past every limit (ignore_hardlimit, fs/quota/dquot.c).
func limited(t *testing.T, f func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&header, &data[0])
		data[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
		if err == nil {
			err = unix.Capset(&header, &data[0])
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
