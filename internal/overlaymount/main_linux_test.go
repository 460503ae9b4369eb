package overlaymount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/overlaymount/ask"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/unionfs"
)

// callerEnv makes the test program a caller that is killed: the steps it takes
// before, and the directory.
const callerEnv = "LAYERFS_TEST_CALLER"

func TestMain(m *testing.M) {
	if status, program := Main(os.Args); program {
		os.Exit(status)
	}
	os.Exit(testenv.Main(m))
}

func newPlan(t *testing.T) *ask.Plan {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"low", "up", "mnt"} {
		require.NoError(t, os.Mkdir(dir+"/"+d, 0o755))
	}
	require.NoError(t, os.WriteFile(dir+"/low/f", []byte("low"), 0o644))
	return &ask.Plan{Target: dir + "/mnt", Upper: dir + "/up", Lowers: []string{dir + "/low"}}
}

// ends waits until no process serves a target any more.
func ends(t *testing.T, target string) {
	t.Helper()
	require.Eventually(t, func() bool { return serverOf(t, target) == 0 }, 10*time.Second, 2*time.Millisecond, "a server is left")
}

func unmounted(t *testing.T, target string) {
	t.Helper()
	mounted, err := mount.IsMountPoint(target)
	require.NoError(t, err)
	require.False(t, mounted)
}

// TestMount by this process and by the command.
func TestMount(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	byCommand := func(_ context.Context, program string, p *ask.Plan) error {
		out, err := exec.Command(program, command, "-o", "lowerdir="+p.Lowers[0]+",upperdir="+p.Upper, p.Target).CombinedOutput()
		if err != nil {
			err = errors.Join(err, errors.New(string(out)))
		}
		return err
	}
	for name, do := range map[string]func(context.Context, string, *ask.Plan) error{"call": ask.Mount, "command": byCommand} {
		t.Run(name, func(t *testing.T) {
			p := newPlan(t)
			for round := range 3 {
				require.NoError(t, do(t.Context(), ask.Self, p))
				require.NoError(t, os.WriteFile(p.Target+"/g", []byte{byte(round)}, 0o644))
				b, err := os.ReadFile(p.Target + "/f")
				require.NoError(t, err)
				require.Equal(t, "low", string(b))
				// No child of ours, and the upper directory is taken.
				_, err = unix.Wait4(-1, nil, unix.WNOHANG, nil)
				require.ErrorIs(t, err, unix.ECHILD)
				require.NoError(t, mount.Unmount(p.Target))
			}
			ends(t, p.Target)
			require.FileExists(t, p.Upper+"/g")
		})
	}
}

// TestServerKeeps checks that a server has nothing of its caller's that it does
// not need: it lives as long as the mount.
func TestServerKeeps(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	t.Setenv("LAYERFS_TEST_SECRET", "secret")
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	// The caller does not know of it, and lets its children have it.
	stray, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD, 20)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	p := newPlan(t)
	err = ask.Mount(t.Context(), ask.Self, p)
	unix.Close(stray)
	require.NoError(t, err)
	defer func() {
		require.NoError(t, mount.Unmount(p.Target))
		ends(t, p.Target)
	}()
	require.NoError(t, r.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err = r.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "somebody has the other end of the pipe")
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", serverOf(t, p.Target)))
	require.NoError(t, err)
	require.NotContains(t, string(env), "secret")
	require.Contains(t, string(env), ask.StartedEnv)
}

// TestMountFails leaves neither a mount nor a server.
func TestMountFails(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	for name, tc := range map[string]struct {
		program string
		spoil   func(*ask.Plan)
		want    string
	}{
		"no program":    {program: "/nowhere", want: "no such file"},
		"other program": {program: "/bin/false", want: "false: exit status 1"},
		"no server":     {program: "/bin/true", want: "the server"},
		"no branch":     {program: ask.Self, spoil: func(p *ask.Plan) { p.Lowers = []string{"/nowhere"} }, want: "/nowhere: no such file"},
		"no target":     {program: ask.Self, spoil: func(p *ask.Plan) { p.Target += "/nowhere" }, want: "nowhere: no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlan(t)
			target := p.Target
			if tc.spoil != nil {
				tc.spoil(p)
			}
			require.ErrorContains(t, ask.Mount(t.Context(), tc.program, p), tc.want)
			unmounted(t, target)
			ends(t, target)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		p := newPlan(t)
		// Another union has the upper directory.
		lock, err := os.Open(p.Upper)
		require.NoError(t, err)
		defer lock.Close()
		require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, enough)
		defer cancel()
		began := time.Now()
		require.ErrorIs(t, ask.Mount(ctx, ask.Self, p), enough)
		ends(t, p.Target)
		require.Less(t, time.Since(began), busyFor/2, "a server waits for a layer, but nobody for it")
		require.NoError(t, lock.Close())
		unmounted(t, p.Target)
	})
	t.Run("usage", func(t *testing.T) {
		for _, args := range [][]string{{command, "-o", "squash_to_root", "/t"}, {ask.Start}, {ask.Serve}} {
			out, err := exec.Command(ask.Self, args...).CombinedOutput()
			require.Error(t, err)
			require.Contains(t, string(out), "layerfs: "+args[0]+": ")
		}
	})
	t.Run("main not called", func(t *testing.T) {
		t.Setenv("LAYERFS_MOUNT_PROGRAM", "1")
		require.ErrorContains(t, ask.Mount(t.Context(), ask.Self, newPlan(t)), "does not call Main")
	})
}

// TestLog: what goes wrong when there is no caller any more is told in a file.
func TestLog(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	logged := func(t *testing.T, p *ask.Plan) string {
		t.Helper()
		ends(t, p.Target)
		b, err := os.ReadFile(p.Log)
		require.NoError(t, err)
		return string(b)
	}
	t.Run("no caller", func(t *testing.T) {
		p := newPlan(t)
		p.Log = filepath.Dir(p.Target) + "/log"
		lock, err := os.Open(p.Upper)
		require.NoError(t, err)
		defer lock.Close()
		require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		path := p.Log
		go func() { // the caller ends when the server has begun
			defer cancel()
			for ctx.Err() == nil {
				if _, err := os.Stat(path); err == nil {
					return
				}
				time.Sleep(time.Millisecond)
			}
		}()
		require.ErrorIs(t, ask.Mount(ctx, ask.Self, p), context.Canceled)
		require.Contains(t, logged(t, p), p.Target+": the caller has ended")
	})
	t.Run("crash", func(t *testing.T) {
		p := newPlan(t)
		p.Log = filepath.Dir(p.Target) + "/log"
		require.NoError(t, os.WriteFile(p.Log, make([]byte, maxLog+1), 0o600))
		require.NoError(t, ask.Mount(t.Context(), ask.Self, p))
		defer func() { require.NoError(t, mount.Unmount(p.Target)) }()
		require.NoError(t, unix.Kill(serverOf(t, p.Target), unix.SIGQUIT)) // whose default is a crash in Go
		text := logged(t, p)
		require.Contains(t, text, "goroutine ")
		require.NotContains(t, text, "\x00")
		fi, err := os.Stat(p.Log + ".old")
		require.NoError(t, err)
		require.EqualValues(t, maxLog+1, fi.Size())
	})
	t.Run("none", func(t *testing.T) {
		p := newPlan(t)
		p.Log = filepath.Dir(p.Target) + "/nowhere/log"
		require.NoError(t, ask.Mount(t.Context(), ask.Self, p))
		require.NoError(t, mount.Unmount(p.Target))
		ends(t, p.Target)
	})
}

// serverOf returns the process that serves a target, 0 for none.
func serverOf(t *testing.T, target string) int {
	t.Helper()
	pids := testenv.Processes(t, "\x00"+ask.Serve+"\x00"+target+"\x00")
	if len(pids) == 0 {
		return 0
	}
	return pids[0]
}

// TestCallerKilled kills callers at all moments: what is mounted when the caller
// has ended is all that will ever be mounted.
func TestCallerKilled(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	own, err := os.Readlink(ask.Self)
	require.NoError(t, err)
	mounts, rounds := 0, 60
	if testing.Short() {
		rounds = 15
	}
	takes := time.Duration(0) // a mount; known after the first round
	for round := range rounds {
		p := newPlan(t)
		cmd := exec.Command(own, "-test.run=^TestCaller$")
		cmd.Env = append(os.Environ(), callerEnv+"="+filepath.Dir(p.Target))
		ready, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = ready.Read(make([]byte, 1))
		require.NoError(t, err)
		if round == 0 {
			began := time.Now()
			require.Eventually(t, func() bool {
				mounted, err := mount.IsMountPoint(p.Target)
				return err == nil && mounted
			}, 20*time.Second, 100*time.Microsecond)
			takes = time.Since(began)
		} else {
			time.Sleep(takes * 3 / 2 * time.Duration(round-1) / time.Duration(rounds))
		}
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		infos, err := mount.Under(p.Target)
		require.NoError(t, err)
		mounts += len(infos)
		for range infos {
			require.NoError(t, mount.Unmount(p.Target))
		}
		ends(t, p.Target)
		unmounted(t, p.Target)
		// The layer is free.
		require.NoError(t, ask.Mount(t.Context(), ask.Self, p))
		require.NoError(t, mount.Unmount(p.Target))
		ends(t, p.Target)
	}
	t.Logf("%d of %d had mounted", mounts, rounds)
	require.NotZero(t, mounts)
	require.Less(t, mounts, rounds)
}

// TestCaller is the process that TestCallerKilled kills. Alone it makes sure
// that a mount is there when Mount returns.
func TestCaller(t *testing.T) {
	dir := os.Getenv(callerEnv)
	if dir != "" {
		p := &ask.Plan{Target: dir + "/mnt", Upper: dir + "/up", Lowers: []string{dir + "/low"}}
		_, _ = os.Stdout.WriteString("+")
		_ = ask.Mount(context.Background(), ask.Self, p)
		time.Sleep(time.Minute)
		return
	}
	testenv.RequireFUSE(t, "overlay-union")
	p := newPlan(t)
	p.ReadOnly, p.NoDev = true, true
	require.NoError(t, ask.Mount(t.Context(), ask.Self, p))
	infos, err := mount.Under(p.Target)
	require.NoError(t, err)
	require.Len(t, infos, 1)
	require.Equal(t, "overlay", infos[0].Source)
	require.Equal(t, "fuse.layerfs", infos[0].FSType)
	require.ErrorIs(t, os.WriteFile(p.Target+"/x", nil, 0o644), unix.EROFS)
	require.NoError(t, mount.Unmount(p.Target))
	ends(t, p.Target)
}

func TestConfig(t *testing.T) {
	p := ask.Plan{Lowers: []string{"/b", "/a"}, Upper: "/u", UserXattr: true, NoDev: true}
	rw := engineConfig(&p)
	assert.Equal(t, unionfs.Overlay{User: true}, rw.Format)
	assert.Equal(t, []unionfs.BranchSpec{
		{Path: "/u", Perm: unionfs.RW}, {Path: "/b", Perm: unionfs.ROWH}, {Path: "/a", Perm: unionfs.ROWH},
	}, rw.Branches)
	srv := serverConfig(&p, nil)
	assert.True(t, !srv.NoSuid && srv.NoDev && !srv.NoExec && !srv.ReadOnly)
	p.ReadOnly = true
	assert.True(t, serverConfig(&p, nil).ReadOnly)
	assert.Equal(t, unionfs.ROWH, engineConfig(&p).Branches[0].Perm, "ro does not touch upperdir")
	p = ask.Plan{Lowers: []string{"/a"}}
	assert.True(t, serverConfig(&p, nil).ReadOnly)
	assert.Equal(t, unionfs.Overlay{}, engineConfig(&p).Format)
}
