package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

// The tests make a pool on a sparse file. Where the kernel has no ZFS there is
// zfs-fuse, see TestFuse.

// poolEnv passes the pool to processes that the tests start.
const poolEnv = "LAYERFS_TEST_ZPOOL"

// makePool returns the name of the pool and a function that destroys it. An
// error that matches errors.ErrUnsupported says that there is no ZFS here.
func makePool() (name string, destroy func() error, err error) {
	if name := os.Getenv(poolEnv); name != "" {
		return name, func() error { return nil }, nil
	}
	missing := func(err error) error { return fmt.Errorf("zfs: %w: %w", errors.ErrUnsupported, err) }
	if os.Geteuid() != 0 {
		return "", nil, missing(errors.New("needs root"))
	}
	for _, tool := range []string{"zfs", "zpool"} {
		if _, err := find(tool, ""); err != nil {
			return "", nil, missing(err)
		}
	}
	if !kernelMounts() {
		return "", nil, missing(errors.New("this kernel has no ZFS; zfs-fuse is what TestFuse is for"))
	}
	sweepPools()
	name = "layerfs" + strconv.Itoa(os.Getpid())
	file := filepath.Join(poolDir(), name)
	// Each transaction group is cheaper without these two: most of the time goes
	// there.
	if err := createPool(name, file, 1<<30, "-o", "ashift=12", "-o", "feature@log_spacemap=disabled", "-O", "sync=disabled"); err != nil {
		return "", nil, errors.Join(err, removeDir(file))
	}
	os.Setenv(poolEnv, name)
	return name, func() error {
		os.Unsetenv(poolEnv)
		_, err := command("zpool", "destroy", "-f", name)
		return errors.Join(err, os.Remove(file))
	}, nil
}

// createPool makes a pool on a sparse file of its own. Nothing of it is mounted.
func createPool(name, file string, size int64, extra ...string) error {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, size); err != nil {
		return err
	}
	_, err := command("zpool", slices.Concat(
		[]string{"create", "-f", "-o", "cachefile=none", "-O", "mountpoint=none", "-O", "canmount=off"}, extra, []string{name, file})...)
	return err
}

// poolDir is on tmpfs where there is one: what is measured is the driver.
func poolDir() string {
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) == nil && uint32(st.Type) == unix.TMPFS_MAGIC && st.Bavail*uint64(st.Bsize) > 1<<30 {
		return "/dev/shm"
	}
	return os.TempDir()
}

// sweepPools destroys what test processes left that were killed.
func sweepPools() {
	out, err := command("zpool", "list", "-H", "-o", "name")
	if err != nil {
		return
	}
	for pool := range strings.FieldsSeq(out) {
		pid, ok := strings.CutPrefix(pool, "layerfs")
		if _, err := strconv.Atoi(pid); !ok || err != nil {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, fs.ErrNotExist) {
			_, _ = command("zpool", "destroy", "-f", pool)
			_ = os.Remove(filepath.Join(poolDir(), pool))
		}
	}
}

// command runs a program of the test itself. One that waits for a suspended pool
// cannot be killed and is left behind.
func command(name string, args ...string) (string, error) {
	path, err := find(name, "")
	if err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	text := name + " " + strings.Join(args, " ")
	select {
	case err = <-done:
	case <-time.After(time.Minute):
		if !abandon(cmd, done) {
			return "", fmt.Errorf("%s does not end", text)
		}
		err = context.DeadlineExceeded
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", text, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

func mustCommand(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, err := command(name, args...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// requirePool returns the pool, or skips the test if there is none; it fails
// where LAYERFS_REQUIRE lists zfs.
func requirePool(tb testing.TB) string {
	tb.Helper()
	testenv.RequireRoot(tb)
	pool := os.Getenv(poolEnv)
	if pool == "" {
		_, err := New(tb.TempDir(), nil)
		testenv.SkipUnsupported(tb, err, "zfs")
		tb.Fatalf("there is no pool for the tests: New = %v", err)
	}
	return pool
}

// newRootDir returns a root directory that has a dataset of its own, see
// datasetOf.
func newRootDir(tb testing.TB) string {
	tb.Helper()
	requirePool(tb)
	root := filepath.Join(tb.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		tb.Fatal(err)
	}
	giveDataset(tb, root)
	return root
}

// giveDataset makes a dataset for a root, which is destroyed after the test. It is
// not mounted unless props say so.
func giveDataset(tb testing.TB, root string, props ...string) {
	tb.Helper()
	ds := os.Getenv(poolEnv) + "/" + random()
	if len(props) == 0 {
		props = []string{"-o", "mountpoint=none"}
	}
	mustCommand(tb, "zfs", slices.Concat([]string{"create"}, props, []string{ds})...)
	assign(tb, root, ds)
	tb.Cleanup(func() { mustDestroy(tb, ds) })
}

func assign(tb testing.TB, root, ds string) {
	tb.Helper()
	if err := os.WriteFile(root+".dataset", []byte(ds), 0o600); err != nil {
		tb.Fatal(err)
	}
}

func mustDestroy(tb testing.TB, ds string) {
	tb.Helper()
	var err error
	for range 50 {
		if _, err = command("zfs", "destroy", "-r", ds); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	tb.Error(err)
}

// datasetOf is the dataset of a test's root or of the directory that is in, also
// in another process.
func datasetOf(root string) string {
	for _, dir := range []string{root, filepath.Dir(root)} {
		if b, err := os.ReadFile(dir + ".dataset"); err == nil {
			return string(b)
		}
	}
	return "no dataset was made for " + root
}

// reuse lends datasets to tests that leave them as they got them, which is
// cheaper than making one for each. What is left in one fails the test.
type reuse struct {
	mu   sync.Mutex
	free []string // guarded by mu
}

func (r *reuse) newRootDir(tb testing.TB) string {
	tb.Helper()
	requirePool(tb)
	root := filepath.Join(tb.TempDir(), "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		tb.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	ds := ""
	if n := len(r.free); n > 0 {
		ds, r.free = r.free[n-1], r.free[:n-1]
	} else {
		ds = os.Getenv(poolEnv) + "/" + random()
		mustCommand(tb, "zfs", "create", "-o", "mountpoint=none", ds)
	}
	assign(tb, root, ds)
	tb.Cleanup(func() { r.giveBack(tb, ds) })
	return root
}

func (r *reuse) giveBack(tb testing.TB, ds string) {
	tb.Helper()
	left, err := command("zfs", "list", "-H", "-r", "-t", "filesystem,snapshot,volume", "-o", "name", ds)
	if err == nil && strings.TrimSpace(left) == ds {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.free = append(r.free, ds)
		return
	}
	if !tb.Failed() {
		tb.Errorf("datasets are left: %q, %v", left, err)
	}
	mustDestroy(tb, ds)
}

// prober finds the facts once for all tests of a process: the pool is the same.
func sharedProber() prober {
	var mu sync.Mutex
	var have *facts
	return func(ctx context.Context, m *mechanism) (facts, error) {
		mu.Lock()
		defer mu.Unlock()
		if have == nil {
			f, err := probe(ctx, m)
			if err != nil {
				return f, err
			}
			have = &f
		}
		return *have, nil
	}
}
