package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// eachStreamer runs a test with the drivers that have streams, with two roots.
func eachStreamer(t *testing.T, do func(t *testing.T, src, dst *shell)) {
	for _, driver := range []string{"btrfs", "devmapper"} {
		t.Run(driver, func(t *testing.T) { do(t, newStreamShell(t, driver), newStreamShell(t, driver)) })
	}
}

// newStreamShell is newShell with a small pool in memory.
func newStreamShell(t *testing.T, driver string) *shell {
	t.Helper()
	if driver != "devmapper" {
		return newShell(t, driver)
	}
	testenv.RequireRoot(t)
	d, err := auto.Open(t.TempDir(), &auto.Options{Driver: driver})
	testenv.SkipUnsupported(t, err, driver)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	s := &shell{
		t: t, root: filepath.Join(testenv.Tmpfs(t), "root"), driver: driver, in: strings.NewReader(""),
		opts: []string{"devmapper.basesize=64M", "devmapper.loopdatasize=256M", "devmapper.loopmetadatasize=4M", "devmapper.min_free_space=-1"},
	}
	t.Cleanup(s.unmountAll)
	return s
}

// mounted runs a function on the tree of a layer.
func (s *shell) mounted(id string, do func(path string)) {
	s.t.Helper()
	path := strings.TrimSpace(s.ok("mount", id))
	defer s.ok("umount", id)
	do(path)
}

// same compares the trees of a layer in two roots.
func same(t *testing.T, a, b *shell, id string) {
	t.Helper()
	a.mounted(id, func(one string) {
		b.mounted(id, func(other string) {
			diff, err := tree.Compare(one, other, nil)
			require.NoError(t, err)
			require.Empty(t, diff, id)
		})
	})
}

func TestSend(t *testing.T) {
	eachStreamer(t, func(t *testing.T, src, dst *shell) {
		story(t, src)
		whole := filepath.Join(t.TempDir(), "base.stream")
		got := decode[sentJSON](t, src.ok("--json", "send", "-o", whole, "base"))
		require.Len(t, got, 1)
		fi, err := os.Stat(whole)
		require.NoError(t, err)
		assert.Equal(t, fi.Size(), got[0].Bytes)
		delta := []byte(src.ok("send", "--from", "base", "app"))
		used := []byte(src.ok("send", "--from", "app", "c")) // it is mounted

		received := decode[receivedJSON](t, dst.ok("--json", "receive", "--label", "k=v", "base", whole))
		assert.Equal(t, []receivedJSON{{ID: "base", Driver: src.driver, Bytes: fi.Size()}}, received)
		assert.Equal(t, map[string]string{"k": "v"}, decode[layerJSON](t, dst.ok("--json", "show", "base"))[0].Labels)
		dst.in = bytes.NewReader(delta)
		assert.Contains(t, dst.ok("receive", "--parent", "base", "app"), "app: received, a stream of "+src.driver)
		dst.in = bytes.NewReader(used)
		dst.ok("receive", "--parent", "app", "c", "-")
		same(t, src, dst, "base")
		same(t, src, dst, "app")
		assert.Equal(t, src.ok("changes", "c"), dst.ok("changes", "c"))
		src.ok("umount", "c")
		same(t, src, dst, "c")

		// What is no good is refused, and nothing is made of it.
		list := dst.ok("--json", "ls")
		for _, tc := range []struct {
			name, says string
			stream     []byte
			args       []string
			code       int
		}{
			{"empty", "does not begin", nil, []string{"x"}, exitInput},
			{"tar", "does not begin", layer(t, "a", "1"), []string{"x"}, exitInput},
			{"no-parent", "", delta, []string{"x"}, 0},
			{"parent-unknown", "", delta, []string{"--parent", "none", "x"}, exitNotFound},
			{"exists", "exists", delta, []string{"--parent", "base", "app"}, exitExists},
			{"id", "invalid", delta, []string{"--parent", "base", "../x"}, exitUsage},
			{"cut", "", delta[:len(delta)*2/3], []string{"--parent", "base", "x"}, exitInput},
			{"cut-at-end", "", delta[:len(delta)-1], []string{"--parent", "base", "x"}, exitInput},
			{"bit", "", flip(delta, len(delta)/2), []string{"--parent", "base", "x"}, exitInput},
		} {
			t.Run(tc.name, func(t *testing.T) {
				dst.in = bytes.NewReader(tc.stream)
				code, out, errs := dst.run(append([]string{"receive"}, tc.args...)...)
				require.NotEqual(t, exitOK, code)
				if tc.code != 0 {
					assert.Equal(t, tc.code, code, errs)
				}
				assert.Empty(t, out)
				assert.Contains(t, errs, tc.says)
				assert.Equal(t, list, dst.ok("--json", "ls"))
			})
		}
		assert.Equal(t, "no problems\n", dst.ok("check"))
		assert.Contains(t, src.fails(exitNotFound, "send", "none"), "none")
		assert.Contains(t, src.fails(exitFailure, "send", "--from", "c", "app"), "ancestor")
		assert.Contains(t, src.fails(exitUsage, "--json", "send", "app"), "-o FILE")
		assert.Contains(t, dst.fails(exitUsage, "receive", "x", t.TempDir()), "directory")
		missing := filepath.Join(t.TempDir(), "none", "file")
		src.fails(exitFailure, "send", "-o", missing, "app")
		assert.Equal(t, "no problems\n", src.ok("check"))
	})
}

func flip(b []byte, at int) []byte {
	c := bytes.Clone(b)
	c[at] ^= 0x10
	return c
}

// TestSend_drivers: a stream makes a root for its driver, and no other driver
// takes it.
// TestSendZFS: a pool of its own, in memory.
func TestSendZFS(t *testing.T) {
	src, dst := newPoolShell(t), newPoolShell(t)
	story(t, src)
	whole := filepath.Join(t.TempDir(), "base.stream")
	src.ok("send", "-o", whole, "base")
	delta := []byte(src.ok("send", "--from", "base", "app"))
	received := decode[receivedJSON](t, dst.ok("--json", "receive", "base", whole))
	require.Len(t, received, 1)
	assert.Equal(t, "zfs", received[0].Driver)
	dst.in = bytes.NewReader(delta)
	dst.ok("receive", "--parent", "base", "app")
	same(t, src, dst, "base")
	same(t, src, dst, "app")

	list := dst.ok("--json", "ls")
	dst.in = bytes.NewReader(delta[:len(delta)*2/3])
	dst.fails(exitInput, "receive", "--parent", "base", "x")
	assert.Equal(t, list, dst.ok("--json", "ls"), "nothing is made of what is cut")
	other := newShell(t, "vfs")
	other.ok("create", "a")
	other.in = bytes.NewReader(delta)
	assert.Contains(t, other.fails(exitUnsupported, "receive", "x"), "a stream of zfs")
}

// newPoolShell is newShell on a zfs dataset.
func newPoolShell(t *testing.T) *shell {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := auto.Open(t.TempDir(), &auto.Options{Driver: "zfs"})
	if err == nil {
		require.NoError(t, d.Close())
	}
	if _, lerr := os.Stat("/proc/spl"); lerr != nil && errors.Is(err, errors.ErrUnsupported) {
		testenv.SkipUnsupported(t, err, "zfs")
	}
	dir := testenv.Tmpfs(t)
	disk, pool := filepath.Join(dir, "disk"), fmt.Sprintf("layerfs-send-%d", time.Now().UnixNano())
	require.NoError(t, os.WriteFile(disk, nil, 0o600))
	require.NoError(t, os.Truncate(disk, 256<<20))
	run := func(name string, args ...string) {
		out, err := exec.Command(name, args...).CombinedOutput()
		require.NoError(t, err, "%s %v: %s", name, args, out)
	}
	run("zpool", "create", "-O", "mountpoint=none", pool, disk)
	t.Cleanup(func() { run("zpool", "destroy", "-f", pool) })
	s := &shell{t: t, root: filepath.Join(dir, "root"), driver: "zfs", in: strings.NewReader(""), opts: []string{"zfs.dataset=" + pool}}
	t.Cleanup(s.unmountAll)
	return s
}

func TestSend_drivers(t *testing.T) {
	vfs := newShell(t, "vfs")
	vfs.ok("create", "a")
	assert.Contains(t, vfs.fails(exitUnsupported, "send", "a"), "stream of the driver vfs")
	assert.Contains(t, vfs.fails(exitUnsupported, "migrate", "--to", t.TempDir(), "a"), "only devmapper")
	for _, f := range streamFormats() {
		vfs.in = strings.NewReader(strings.Repeat("\x00", f.at) + f.magic + strings.Repeat("x", 100))
		assert.Contains(t, vfs.fails(exitUnsupported, "receive", "x"), "a stream of "+f.driver)
	}
	assert.Equal(t, "a", decode[layerJSON](t, vfs.ok("--json", "ls"))[0].ID)

	src, dst := newShell(t, "btrfs"), newShell(t, "btrfs")
	src.ok("create", "a")
	stream := src.ok("send", "a")
	dst.driver, dst.in = "", strings.NewReader(stream)
	dst.ok("receive", "a")
	assert.Contains(t, dst.ok("status"), "btrfs")
}

// scribbler changes files of a tree all the time, until a file "stop" appears
// in a directory, where it then makes "stopped".
type scribbler struct {
	count atomic.Int64
	done  chan struct{}
	err   error
}

func scribble(t *testing.T, dir, control string) *scribbler {
	s := &scribbler{done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for s.err == nil {
			if _, err := os.Stat(control + "/stop"); err == nil {
				s.err = os.WriteFile(control+"/stopped", nil, 0o644)
				return
			}
			n := s.count.Add(1)
			s.err = os.WriteFile(fmt.Sprintf("%s/w%d", dir, n%30), bytes.Repeat([]byte{byte(n)}, 16<<10), 0o644)
			time.Sleep(5 * time.Millisecond) // more would be a test of the disk
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, os.WriteFile(control+"/stop", nil, 0o644))
		<-s.done
		require.NoError(t, s.err)
	})
	return s
}

// goesOn waits until more is written.
func (s *scribbler) goesOn(t *testing.T) {
	t.Helper()
	n := s.count.Load()
	require.Eventually(t, func() bool { return s.count.Load() > n+2 }, 30*time.Second, time.Millisecond)
}

func TestSendMigrate(t *testing.T) {
	src, dst := newStreamShell(t, "devmapper"), newStreamShell(t, "devmapper")
	control := t.TempDir()
	path := story(t, src)
	s := scribble(t, path, control)
	migrate := func(flags ...string) []string {
		all := append([]string{"migrate"}, flags...)
		for _, o := range dst.opts {
			all = append(all, "--to-opt", o)
		}
		return append(all, "--to", dst.root, "c")
	}
	empty := func(t *testing.T) {
		t.Helper()
		assert.Empty(t, dst.ok("--quiet", "ls"))
		assert.Equal(t, "no problems\n", dst.ok("check"))
		assert.Equal(t, "no problems\n", src.ok("check"))
		s.goesOn(t)
	}
	t.Run("usage", func(t *testing.T) {
		src.fails(exitUsage, "migrate", "c")
		src.fails(exitUsage, "migrate", "--to", src.root, "c")
		src.fails(exitUsage, migrate("--rounds", "0")...)
		src.fails(exitUsage, migrate("--until", "much")...)
		src.fails(exitUsage, migrate("--as", "../x")...)
		none := migrate()
		none[len(none)-1] = "none"
		src.fails(exitNotFound, none...)
		_, err := os.Stat(dst.root)
		require.ErrorIs(t, err, os.ErrNotExist, "a mistake makes no root")
	})
	t.Run("stop-fails", func(t *testing.T) {
		assert.Contains(t, src.fails(exitFailure, migrate("--stop", "exit 3")...), "exit status 3")
		empty(t)
	})
	t.Run("then-fails", func(t *testing.T) {
		code, out, errs := src.run(migrate("--then", `echo "$LAYERFS_FROM_ID to $LAYERFS_TO_ID in $LAYERFS_TO_ROOT"; false`)...)
		require.Equal(t, exitFailure, code)
		assert.Empty(t, out)
		assert.Contains(t, errs, "c to c in "+dst.root)
		empty(t)
	})
	t.Run("interrupted", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		here := t.TempDir() + "/here"
		go func() {
			defer cancel()
			for range 3000 {
				if _, err := os.Stat(here); err == nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}()
		code, _, errs := src.runContext(ctx, migrate("--then", "echo > "+here+"; exec sleep 100")...)
		require.Equal(t, exitInterrupted, code, errs)
		empty(t)
	})
	// The process is killed with the copy half-made, and with the layer frozen.
	for _, hook := range []string{"--stop", "--then"} {
		t.Run("killed"+hook, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestSendMigrateChild$")
			cmd.Env = append(os.Environ(), "LAYERFS_MIGRATE_ARGS="+strings.Join(append(append([]string{"--root", src.root, "--driver", "devmapper"}, src.flags()...), migrate(hook, "kill -9 $PPID")...), "\n"))
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit, "%s", out)
			require.Equal(t, unix.SIGKILL, exit.Sys().(interface{ Signal() unix.Signal }).Signal(), "%s", out)
			if hook == "--stop" {
				assert.Contains(t, dst.ok("ls"), "incomplete")
				dst.fails(exitDamaged, "mount", "c")
			}
			assert.Equal(t, "no problems\n", src.ok("check"))
			s.goesOn(t)
			if hook == "--then" { // the copy was complete
				dst.ok("rm", "c")
			}
		})
	}
	t.Run("complete", func(t *testing.T) {
		out := src.ok(migrate("--verify", "--until", "1K", "--rounds", "3",
			"--stop", fmt.Sprintf("touch %[1]s/stop; while ! [ -e %[1]s/stopped ]; do sleep 0.1; done", control))...)
		assert.Regexp(t, `(?s)^base: is there\napp: is there\nc: round 1: .*c: round \d, the last one: .*c: frozen for .*c: .* of blocks compared, the copy is the same\nsha256:[0-9a-f]{64}\n$`, out)
		diff, err := tree.Compare(path, strings.TrimSpace(dst.ok("mount", "c")), nil)
		require.NoError(t, err)
		assert.Empty(t, diff)
		dst.ok("umount", "c")
		assert.Equal(t, src.ok("changes", "c"), dst.ok("changes", "c"))
		assert.Contains(t, src.fails(exitExists, migrate()...), "exists")

		got := decode[migratedJSON](t, src.ok(append([]string{"--json"}, migrate("--as", "d", "--verify")...)...))
		require.Len(t, got, 1)
		assert.Equal(t, "d", got[0].ID)
		assert.Equal(t, "c", got[0].From)
		assert.Equal(t, []string{"base", "app"}, got[0].There)
		assert.True(t, got[0].Verified)
		assert.Positive(t, got[0].Compared)
		assert.GreaterOrEqual(t, len(got[0].Rounds), 2)
	})
}

// TestSendMigrateChild is the process that is killed.
func TestSendMigrateChild(t *testing.T) {
	args, ok := os.LookupEnv("LAYERFS_MIGRATE_ARGS")
	if !ok {
		t.Skip("for TestSendMigrate")
	}
	code := run(t.Context(), append([]string{"layerfs"}, strings.Split(args, "\n")...), os.Stdin, os.Stdout, os.Stderr)
	t.Fatalf("it came to its end: %d", code)
}
