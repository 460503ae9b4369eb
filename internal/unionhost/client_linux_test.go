package unionhost

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/keeper"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) {
	if status, helper := keeper.Main(os.Args, Program()); helper {
		os.Exit(status)
	}
	os.Exit(testenv.Main(m))
}

// served is a union that a helper serves.
type served struct {
	*Client
	dir    string
	target string
	cfg    Config
}

func newClient(t *testing.T) *Client {
	t.Helper()
	c := &Client{Dir: t.TempDir() + "/serve", Command: keeper.Self()}
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func newServed(t *testing.T) *served {
	t.Helper()
	testenv.RequireFUSE(t, "aufs")
	s := &served{Client: newClient(t), dir: t.TempDir()}
	for _, d := range []string{"up", "low", "more", "mnt"} {
		require.NoError(t, os.Mkdir(s.dir+"/"+d, 0o755))
	}
	s.target = s.dir + "/mnt"
	s.cfg = Config{Target: s.target, UDBA: "none", Branches: []Branch{{s.dir + "/up", "rw"}, {s.dir + "/low", "ro"}}}
	_, err := s.Mount(t.Context(), s.cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, mount.IgnoreNotMounted(mount.Unmount(s.target)))
		require.NoError(t, s.Wait(context.Background(), s.target))
	})
	return s
}

// TestNoHelper: calls of a helper that is not there, or cannot be.
func TestNoHelper(t *testing.T) {
	testenv.RequireFUSE(t, "aufs")
	branch, target := t.TempDir(), t.TempDir()
	cfg := Config{Target: target, UDBA: "none", Branches: []Branch{{branch, "rw"}}}
	mounts := func(t *testing.T, c *Client, want string) {
		_, err := c.Mount(t.Context(), cfg)
		require.ErrorContains(t, err, want)
		mounted, err := mount.IsMountPoint(target)
		require.NoError(t, err)
		require.False(t, mounted)
	}
	t.Run("none", func(t *testing.T) {
		c := newClient(t)
		for name, call := range map[string]func() error{
			"insert":   func() error { return c.Insert(t.Context(), target, 0, Branch{branch, "ro"}) },
			"modify":   func() error { return c.Modify(t.Context(), target, Branch{branch, "ro"}) },
			"delete":   func() error { return c.Delete(t.Context(), target, branch) },
			"branches": func() error { _, err := c.Branches(t.Context(), target); return err },
			"flush":    func() error { return c.Flush(t.Context(), target) },
			"sync":     func() error { return c.Sync(t.Context(), target) },
			"info":     func() error { _, err := c.Info(t.Context()); return err },
			"replace":  func() error { return c.Replace(t.Context()) },
		} {
			require.ErrorIs(t, call(), ErrNotServed, name)
		}
		require.NoError(t, c.Wait(t.Context(), target), "who serves nothing uses nothing")
		require.NoDirExists(t, c.Dir)
	})
	t.Run("no-program", func(t *testing.T) {
		c := newClient(t)
		c.Command = []string{"/nowhere/helper"}
		mounts(t, c, "no such file")
	})
	t.Run("not-a-helper", func(t *testing.T) {
		c := newClient(t)
		c.Command = []string{"/bin/true"}
		mounts(t, c, "does not stay")
	})
	t.Run("not-executable", func(t *testing.T) {
		c := newClient(t)
		c.Command = []string{"/etc/passwd"}
		mounts(t, c, "permission denied")
	})
	t.Run("directory-is-a-file", func(t *testing.T) {
		c := newClient(t)
		require.NoError(t, os.WriteFile(c.Dir, nil, 0o600))
		mounts(t, c, "not a directory")
		require.NoError(t, os.Remove(c.Dir))
	})
	t.Run("no-place-for-the-directory", func(t *testing.T) {
		c := newClient(t)
		c.Dir = "/proc/nothing/serve"
		mounts(t, c, "no such file")
		c.used.Store(false)
	})
	t.Run("read-only-directory", func(t *testing.T) {
		c := newClient(t)
		require.NoError(t, os.Mkdir(c.Dir, 0o700))
		require.NoError(t, mount.Mount("tmpfs", "tmpfs", c.Dir, mount.ReadOnly, nil))
		defer func() { require.NoError(t, mount.Unmount(c.Dir)) }()
		mounts(t, c, "read-only file system")
	})
	t.Run("cancelled", func(t *testing.T) {
		enough := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(enough)
		_, err := newClient(t).Mount(ctx, cfg)
		require.ErrorIs(t, err, enough)
	})
}

// TestStaleSocket: what helpers that were killed left, or others put there, does
// not keep the next one from starting.
func TestStaleSocket(t *testing.T) {
	for name, left := range map[string]func(*testing.T, string){
		"socket": func(t *testing.T, path string) {
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
			require.NoError(t, err)
			l.SetUnlinkOnClose(false)
			require.NoError(t, l.Close())
		},
		"stream": func(t *testing.T, path string) { // EPROTOTYPE
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			require.NoError(t, err)
			l.SetUnlinkOnClose(false)
			require.NoError(t, l.Close())
		},
		"file": func(t *testing.T, path string) { require.NoError(t, os.WriteFile(path, nil, 0o600)) },
		"link": func(t *testing.T, path string) { require.NoError(t, os.Symlink("nowhere", path)) },
	} {
		t.Run(name, func(t *testing.T) {
			testenv.RequireFUSE(t, "aufs")
			c := newClient(t)
			require.NoError(t, os.Mkdir(c.Dir, 0o700))
			left(t, c.Dir+"/socket")
			target := t.TempDir()
			_, err := c.Mount(t.Context(), Config{Target: target, UDBA: "none", Branches: []Branch{{t.TempDir(), "rw"}}})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(target+"/f", nil, 0o644))
			require.NoError(t, mount.Unmount(target))
			require.NoError(t, c.Wait(t.Context(), target))
		})
	}
}

// TestPaths: paths are bytes, on their way to the helper and in the state.
func TestPaths(t *testing.T) {
	testenv.RequireFUSE(t, "aufs")
	testenv.RequireKernel(t, "6.9", "requests that come again (FUSE_NOTIFY_RESEND)")
	c := newClient(t)
	dir := t.TempDir() + "/\xff\"\n\u2028\xf0\x9f"
	up, low, target := dir+"/up\xfe", dir+"/low\x80", dir+"/mnt\xc0"
	for _, d := range []string{dir, up, low, target} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	ctx := t.Context()
	_, err := c.Mount(ctx, Config{Target: target, UDBA: "none", Branches: []Branch{{up, "rw"}}})
	require.NoError(t, err)
	require.NoError(t, c.Insert(ctx, target, -1, Branch{low, "ro"}))
	before, err := c.Info(ctx)
	require.NoError(t, err)
	require.Equal(t, sys.ByteStrings{target}, before.Mounts)
	require.NoError(t, unix.Kill(before.PID, unix.SIGKILL))
	list, err := c.Branches(ctx, target)
	require.NoError(t, err)
	require.Equal(t, []Branch{{up, "rw"}, {low, "ro"}}, list)
	require.NoError(t, os.WriteFile(target+"/f", nil, 0o644))
	require.FileExists(t, up+"/f")
	require.NoError(t, mount.Unmount(target))
	require.NoError(t, c.Wait(ctx, target))
	r := answer{Repaired: []Repaired{{"/a\xff", "b\xfe", "done"}}}
	b, err := keeper.Marshal(r)
	require.NoError(t, err)
	var got answer
	require.NoError(t, keeper.Unmarshal(b, &got))
	require.Equal(t, r, got)
}

// TestHelperKilled: killed for good, with its socket left, a helper is followed
// by another.
func TestHelperKilled(t *testing.T) {
	s := newServed(t)
	info, err := s.Info(t.Context())
	require.NoError(t, err)
	require.NoError(t, unix.Kill(info.PID, unix.SIGSTOP)) // it would start another keeper
	require.NoError(t, unix.Kill(info.Keeper, unix.SIGKILL))
	require.NoError(t, unix.Kill(info.PID, unix.SIGKILL))
	_, err = os.Stat(s.target + "/f")
	require.Error(t, err)
	require.NoError(t, mount.Unmount(s.target))
	require.Eventually(t, func() bool { // the dead may still hold the lock of the branch
		_, err = s.Mount(t.Context(), s.cfg)
		return !errors.Is(err, unix.EBUSY)
	}, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.target+"/f", nil, 0o644))
}

// TestVersions: clients, workers and states of different versions.
func TestVersions(t *testing.T) {
	s := newServed(t)
	ctx := t.Context()
	earlier := &Client{Dir: s.Dir, Command: []string{"/bin/sh", "-c", fmt.Sprintf("echo %d", Version-1)}}
	require.ErrorContains(t, earlier.Replace(ctx), "is an earlier program")
	stranger := &Client{Dir: s.Dir, Command: []string{"/bin/false"}}
	require.ErrorContains(t, stranger.Replace(ctx), "for its version")
	before, err := s.Info(ctx)
	require.NoError(t, err)
	require.FileExists(t, s.Dir+"/log")

	// A later client than its worker replaces that, and says so if its own
	// program does not know more.
	later := &Client{Dir: s.Dir, Command: keeper.Self(), ahead: 1}
	more := Branch{s.dir + "/more", "ro"}
	err = later.Insert(ctx, s.target, -1, more)
	require.ErrorIs(t, err, errnoLater)
	require.NotContains(t, err.Error(), "\n", "the worker was not replaced")
	after, err := s.Info(ctx)
	require.NoError(t, err)
	require.NotEqual(t, before.PID, after.PID)
	other := s.cfg
	other.Target = t.TempDir()
	_, err = later.Mount(ctx, other)
	require.ErrorIs(t, err, errnoLater)
	mounted, err := mount.IsMountPoint(other.Target)
	require.NoError(t, err)
	require.False(t, mounted)
	require.NoError(t, os.WriteFile(s.target+"/f", nil, 0o644))
}

// TestOtherNamespace: a helper that sees another directory where its client has
// a branch does not serve it.
func TestOtherNamespace(t *testing.T) {
	s := newServed(t)
	ctx := t.Context()
	own, err := os.Readlink("/proc/self/exe")
	require.NoError(t, err)
	// Another client, in a mount namespace in which /more is another directory.
	script := `mount --make-rprivate / && mount -t tmpfs tmpfs "$1/more" && exec "$2" -test.run='^TestInNamespace$' -test.v`
	cmd := exec.CommandContext(ctx, "unshare", "-m", "/bin/sh", "-c", script, "sh", s.dir, own)
	cmd.Env = append(os.Environ(), "LAYERFS_TEST_SERVED="+s.Dir+":"+s.dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: TestInNamespace")
	list, err := s.Branches(ctx, s.target)
	require.NoError(t, err)
	require.Equal(t, s.cfg.Branches, list)
	require.NoError(t, s.Insert(ctx, s.target, -1, Branch{s.dir + "/more", "ro"}))
}

// TestInNamespace is what TestOtherNamespace runs. Alone it is about a branch
// that the helper does not see at all.
func TestInNamespace(t *testing.T) {
	serve, dir, ok := strings.Cut(os.Getenv("LAYERFS_TEST_SERVED"), ":")
	if !ok {
		h := &host{unions: map[string]*union{}}
		require.ErrorContains(t, h.permitted("/nowhere", place{1, 1}), "does not see the branch")
		return
	}
	c := &Client{Dir: serve}
	more := Branch{dir + "/more", "ro"}
	require.ErrorIs(t, c.Insert(t.Context(), dir+"/mnt", -1, more), unix.ESTALE)
	_, err := c.Mount(t.Context(), Config{Target: t.TempDir(), UDBA: "none", Branches: []Branch{more}})
	require.ErrorIs(t, err, unix.ESTALE)
}

// TestRetry: a change that was made by a worker that could not say so is not
// made again, and is no error; only then.
func TestRetry(t *testing.T) {
	s := newServed(t)
	ctx := t.Context()
	more := Branch{s.dir + "/more", "ro"}
	is, err := placeOf(more.Path)
	require.NoError(t, err)
	for _, tc := range []struct {
		req   request
		wrong request // not what was done; none of what would be a first one
	}{
		{request{Op: opInsert, At: 1, Branch: more}, request{Op: opInsert, At: 2, Branch: more}},
		{req: request{Op: opDelete, Branch: more}},
		{request{Op: opAppend, Branch: more}, request{Op: opAppend, Branch: Branch{more.Path, "rr"}}},
		{request{Op: opModify, Branch: Branch{more.Path, "rr"}}, request{Op: opModify, Branch: Branch{"/nowhere", "ro"}}},
	} {
		call := func(req request, retry bool) error {
			req.Target, req.Is, req.Retry = []byte(s.target), is, retry
			_, err := s.call(ctx, &req)
			return err
		}
		require.NoError(t, call(tc.req, false), tc.req.Op)
		list, err := s.Branches(ctx, s.target)
		require.NoError(t, err)
		if tc.req.Op != opModify { // the same each time
			require.Error(t, call(tc.req, false), tc.req.Op)
		}
		require.NoError(t, call(tc.req, true), tc.req.Op)
		if tc.wrong.Op != "" {
			require.Error(t, call(tc.wrong, true), tc.req.Op)
		}
		again, err := s.Branches(ctx, s.target)
		require.NoError(t, err)
		require.Equal(t, list, again)
	}
}

// TestKilledMeanwhile kills workers at random moments while clients mount, change
// branches and unmount: each call does what it should, once.
func TestKilledMeanwhile(t *testing.T) {
	testenv.RequireKernel(t, "6.9", "requests that come again (FUSE_NOTIFY_RESEND)")
	s := newServed(t)
	ctx := t.Context()
	stop, killer := make(chan struct{}), sync.WaitGroup{}
	kills := 0
	killer.Go(func() {
		for wait := 0; ; wait++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(5+7*(wait%17)) * time.Millisecond):
			}
			if info, err := s.Info(ctx); err == nil {
				assert.NoError(t, unix.Kill(info.PID, unix.SIGKILL))
				kills++
			}
		}
	})
	var clients sync.WaitGroup
	for n := range 2 {
		clients.Go(func() {
			dir := filepath.Join(s.dir, fmt.Sprint("client", n))
			up, low, target := dir+"/up", dir+"/low", dir+"/mnt"
			for _, d := range []string{dir, up, low, target} {
				assert.NoError(t, os.Mkdir(d, 0o755))
			}
			c := &Client{Dir: s.Dir, Command: keeper.Self()}
			for round := range 15 {
				if t.Failed() {
					return
				}
				// One whose first try was not finished may have the branch still.
				assert.Eventually(t, func() bool {
					_, err := c.Mount(ctx, Config{Target: target, UDBA: "none", Branches: []Branch{{up, "rw"}}})
					if !errors.Is(err, unix.EBUSY) {
						assert.NoError(t, err)
						return true
					}
					return false
				}, 10*time.Second, time.Millisecond)
				assert.NoError(t, c.Insert(ctx, target, -1, Branch{low, "ro"}))
				list, err := c.Branches(ctx, target)
				assert.NoError(t, err)
				assert.Equal(t, []Branch{{up, "rw"}, {low, "ro"}}, list)
				name := fmt.Sprint(target, "/", round)
				assert.NoError(t, os.WriteFile(name, []byte("x"), 0o644))
				assert.NoError(t, c.Delete(ctx, target, low))
				assert.FileExists(t, name)
				assert.NoError(t, mount.Unmount(target))
				assert.NoError(t, c.Wait(ctx, target))
				infos, err := mount.Under(target)
				assert.NoError(t, err)
				assert.Empty(t, infos)
			}
		})
	}
	clients.Wait()
	close(stop)
	killer.Wait()
	t.Logf("%d kills", kills)
	require.Positive(t, kills)
	// A mount whose first try was not finished may be ending still.
	require.Eventually(t, func() bool {
		info, err := s.Info(ctx)
		require.NoError(t, err)
		return len(info.Mounts) == 1 && info.Mounts[0] == s.target
	}, 10*time.Second, 5*time.Millisecond)
}
