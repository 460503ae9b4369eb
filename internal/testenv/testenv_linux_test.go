package testenv

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// runLeaky runs f as if it were all tests of a package.
func runLeaky(t *testing.T, code int, f func(dir string)) (int, string) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	defer out.Close()
	var dir string
	got := run(func() int {
		dir = os.TempDir()
		f(dir)
		return code
	}, out)
	require.NoDirExists(t, dir)
	text, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	return got, string(text)
}

func TestLeakCheck(t *testing.T) {
	t.Run("nothing", func(t *testing.T) {
		code, out := runLeaky(t, 0, func(dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
		})
		assert.Equal(t, 0, code)
		assert.Empty(t, out)
	})
	t.Run("failed-anyway", func(t *testing.T) {
		code, _ := runLeaky(t, 3, func(string) {})
		assert.Equal(t, 3, code)
	})
	t.Run("descriptor", func(t *testing.T) {
		var f *os.File
		code, out := runLeaky(t, 0, func(string) {
			var err error
			f, err = os.Open("/etc/passwd")
			require.NoError(t, err)
		})
		require.NoError(t, f.Close())
		assert.Equal(t, 1, code)
		assert.Contains(t, out, "of /etc/passwd")
	})
	t.Run("child", func(t *testing.T) {
		cmd := exec.Command("sleep", "30")
		code, out := runLeaky(t, 0, func(string) { require.NoError(t, cmd.Start()) })
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		assert.Equal(t, 1, code)
		assert.Contains(t, out, "sleep 30")
	})
	t.Run("mount", func(t *testing.T) {
		RequireRoot(t)
		code, out := runLeaky(t, 0, func(dir string) {
			sub := filepath.Join(dir, "a b")
			require.NoError(t, os.Mkdir(sub, 0o755))
			require.NoError(t, mount.Mount("tmpfs", "", sub, 0, nil))
		})
		assert.Equal(t, 1, code)
		assert.Contains(t, out, "mount of tmpfs")
		assert.Contains(t, out, "/a b")
	})
	t.Run("loop", func(t *testing.T) {
		RequireRoot(t)
		losetup := RequireTool(t, "losetup")
		var device string
		code, out := runLeaky(t, 0, func(dir string) {
			image := filepath.Join(dir, "image")
			require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o644))
			device = attach(t, losetup, "loop", image)
		})
		require.NoError(t, exec.Command(losetup, "--detach", device).Run())
		assert.Equal(t, 1, code)
		assert.Contains(t, out, device)
	})
	t.Run("of-others", func(t *testing.T) {
		RequireRoot(t)
		other := t.TempDir()
		code, out := runLeaky(t, 0, func(string) { require.NoError(t, mount.Mount("tmpfs", "", other, 0, nil)) })
		require.NoError(t, mount.Unmount(other))
		assert.Equal(t, 0, code, out)
	})
}

func TestFileSystems(t *testing.T) {
	for _, tt := range []struct {
		name  string
		make  func(tb testing.TB) string
		magic uint32
	}{
		{"ext4", func(tb testing.TB) string { tb.Helper(); return Ext4(tb, 32, "-m 0", "noatime") }, unix.EXT4_SUPER_MAGIC},
		{"xfs", func(tb testing.TB) string { tb.Helper(); return XFS(tb, 320) }, unix.XFS_SUPER_MAGIC},
		{"btrfs", func(tb testing.TB) string { tb.Helper(); return Btrfs(tb, 128) }, unix.BTRFS_SUPER_MAGIC},
		{"tmpfs", func(tb testing.TB) string { tb.Helper(); return Tmpfs(tb, "size=1m") }, unix.TMPFS_MAGIC},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var dir string
			t.Run("made", func(t *testing.T) {
				dir = tt.make(t)
				st, err := mount.Query(dir)
				require.NoError(t, err)
				assert.True(t, st.MountPoint)
				assert.Equal(t, tt.magic, st.Magic)
				require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644))
				if tt.name == "ext4" {
					list, err := mount.Under(dir)
					require.NoError(t, err)
					assert.Contains(t, list[0].Options, "noatime")
				}
				// A file that is closed a moment later must not make the
				// clean-up fail.
				f, err := os.Open(filepath.Join(dir, "f"))
				require.NoError(t, err)
				time.AfterFunc(200*time.Millisecond, func() { f.Close() })
			})
			if dir != "" {
				require.NoDirExists(t, dir)
			}
		})
	}
	t.Run("bad-option", func(t *testing.T) {
		t.Setenv(requireEnv, "")
		RequireRoot(t)
		RequireTool(t, "mkfs.ext4")
		r := record(t, func(tb testing.TB) { Ext4(tb, 16, "no_such_option=1") })
		assert.Equal(t, "skip", r.end)
		assert.Contains(t, r.msg, "no_such_option")
	})
}

func TestUnprivileged(t *testing.T) {
	Unprivileged(t, func(t *testing.T) {
		assert.NotEqual(t, 0, os.Geteuid())
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
		require.ErrorIs(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""), unix.EPERM)
	})
}

func TestInUserNamespace(t *testing.T) {
	InUserNamespace(t, func(t *testing.T) {
		assert.Equal(t, 0, os.Geteuid())
		b, err := os.ReadFile("/proc/self/uid_map")
		require.NoError(t, err)
		fields := strings.Fields(string(b))
		require.Len(t, fields, 3)
		assert.Equal(t, "1", fields[2], "only one user is mapped")
		assert.NotEqual(t, "0", fields[1], "root is not root outside")
		dir := filepath.Join(t.TempDir(), "m")
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, mount.Mount("tmpfs", "", dir, 0, nil))
		require.NoError(t, mount.Unmount(dir))
	})
}

// The result of the second process is the result of the test.
func TestRerunFailureIsSeen(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		t.Fatal("expected")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestRerunFailureIsSeen$")
	cmd.Env = append(os.Environ(), childEnv+"=user")
	cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
	require.Error(t, cmd.Run())
}
