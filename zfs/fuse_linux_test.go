package zfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/drivertest"
	"github.com/layerfs/layerfs/internal/testenv"
)

// Each test with zfs-fuse runs in a process of its own, with a daemon and a pool
// of its own, in namespaces of processes and mounts that end with it. So
// whatever becomes of the daemon ends in time and leaves nothing, a daemon of
// the host is not touched, and one test cannot spoil another.
//
// TestFuse starts this program as the first process of the namespaces
// (stageInit); that starts the daemon and, with the pool in poolEnv, this
// program again, for one test.
const (
	fuseEnv      = "LAYERFS_TEST_ZFS_FUSE"       // allows TestFuse
	fuseStageEnv = "LAYERFS_TEST_ZFS_FUSE_STAGE" // what a process is for
	fuseDirEnv   = "LAYERFS_TEST_ZFS_FUSE_DIR"   // where stageInit may mount
	requireEnv   = "LAYERFS_REQUIRE"             // what must not be skipped, see package testenv

	stageInit = "init"
	stageList = "list" // to print the names of tests
)

const (
	// fuseLimit is how long a test may take; most need a second, if they get a
	// processor.
	fuseLimit = 2 * time.Minute

	// fuseGrace is how much longer its processes may take to say why.
	fuseGrace = 15 * time.Second

	// fuseAgain is how many tests get a second daemon.
	fuseAgain = 3
)

// onFuse is what a harness differs by with zfs-fuse.
func onFuse(h *drivertest.Harness) {
	h.WholeSeconds = true
	h.Deviates = map[string]string{
		"ACLs":             "a new file does not inherit the default ACL of its directory",
		"Chown":            "ids above 2147483647 are refused (MAXUID)",
		"FeatureAllXattrs": "each xattr can be set, but not each be read: see LargeXattrs",
		"LargeXattrs":      "getxattr into a buffer that is too short gives eight wrong bytes instead of ERANGE",
	}
	h.Skip = map[string]string{
		"ApplyNoSpace": "the daemon aborts at a write of which the pool has room for a part (zfsfuse_write, uio_resid)",
	}
	if os.Getenv(fuseStageEnv) == stageList {
		h.Root = func(tb testing.TB) string {
			tb.Skip("only its name is wanted")
			return ""
		}
	}
}

// TestFuse runs the tests of this package with zfs-fuse, each by itself.
func TestFuse(t *testing.T) {
	if os.Getenv(fuseEnv) == "" || os.Getenv(fuseStageEnv) != "" || os.Getenv(poolEnv) != "" {
		t.Skip("takes minutes; " + fuseEnv + "=1 runs it, as scripts/test does")
	}
	testenv.SkipUnsupported(t, fuseMissing(), "zfs-fuse")
	var again atomic.Int32
	for _, name := range fuseTests(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := runOnFuse(t, name)
			// A fault of the daemon that nobody can go round (decision 11) may cost
			// a test its daemon. It gets another one, but not each test does.
			if err != nil && again.Add(1) <= fuseAgain {
				t.Logf("with the first daemon: %v", err)
				err = runOnFuse(t, name)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// fuseMissing says what zfs-fuse lacks here.
func fuseMissing() error {
	missing := func(reason string) error {
		return &layerfs.UnsupportedError{Feature: "zfs-fuse", Reason: reason}
	}
	if os.Geteuid() != 0 {
		return missing("needs root")
	}
	if kernelMounts() {
		return missing("the kernel has ZFS, whose programs are used")
	}
	for _, tool := range []string{"zfs-fuse", "zfs", "zpool"} {
		if _, err := find(tool, ""); err != nil {
			return missing(err.Error())
		}
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0) // loads the module, which makes the other
	if err != nil {
		return missing(err.Error())
	}
	if err := f.Close(); err != nil {
		return missing(err.Error())
	}
	for _, dir := range append([]string{connections}, daemonDirs()...) {
		if _, err := os.Stat(dir); err != nil {
			return missing(err.Error())
		}
	}
	return nil
}

// daemonDirs are the directories that all daemons of a host share.
func daemonDirs() []string { return []string{"/run", "/var/lib/zfs", "/etc/zfs"} }

// fuseTests lists the tests of this package, and the cases of the conformance
// suite instead of it.
func fuseTests(t *testing.T) []string {
	t.Helper()
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
		cmd.Env = append(os.Environ(), fuseStageEnv+"="+stageList, poolEnv+"=none")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	tests, err := run("-test.list=^Test")
	require.NoError(t, err, tests)
	conformance, err := run("-test.v", "-test.run=^TestConformance$") // a case that ignores the skip fails
	require.True(t, err == nil || errors.As(err, new(*exec.ExitError)), "%v", err)
	require.NoError(t, wholeList(conformance))
	var names []string
	for name := range strings.FieldsSeq(tests) {
		if strings.HasPrefix(name, "Test") && name != "TestFuse" && name != "TestConformance" {
			names = append(names, name)
		}
	}
	cases := regexp.MustCompile(`(?m)^=== RUN +(TestConformance/[^/\n]+)$`).FindAllStringSubmatch(conformance, -1)
	require.NotEmpty(t, cases)
	for _, c := range cases {
		names = append(names, c[1])
	}
	return names
}

// wholeList returns an error if the output of a test's run ends before it does.
func wholeList(out string) error {
	panicked := regexp.MustCompile(`(?m)^panic: `).MatchString(out)
	if !panicked && regexp.MustCompile(`(?m)^(PASS|FAIL)$`).MatchString(out) {
		return nil
	}
	return fmt.Errorf("the list of cases is not whole:\n%s", out)
}

func TestWholeList(t *testing.T) {
	require.NoError(t, wholeList("=== RUN   TestA\n--- SKIP: TestA (0.00s)\nPASS\n"))
	require.NoError(t, wholeList("=== RUN   TestA\n--- FAIL: TestA (0.00s)\nFAIL\n"))
	require.Error(t, wholeList("=== RUN   TestA\n--- FAIL: TestA (0.00s)\npanic: why [recovered]\n\ngoroutine 1 [running]:\nFAIL\n"))
	require.Error(t, wholeList("=== RUN   TestA\n    --- PASS: TestA/b (0.00s)\n"))
}

// runOnFuse runs one test in namespaces of its own.
func runOnFuse(t *testing.T, name string) error {
	pattern := "^" + strings.ReplaceAll(name, "/", "$/^") + "$"
	cmd := exec.Command(os.Args[0], "-test.v", "-test.count=1", "-test.run="+pattern, "-test.timeout="+fuseLimit.String(),
		"-test.short="+strconv.FormatBool(testing.Short()))
	cmd.Env = append(os.Environ(), fuseStageEnv+"="+stageInit, fuseDirEnv+"="+t.TempDir())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// The kernel counts the death of the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	others := fuseMinors("/proc/self/mountinfo")
	require.NoError(t, cmd.Start())
	limit := time.AfterFunc(fuseLimit+fuseGrace, func() {
		// A process that waits for the daemon cannot be killed.
		abortConnections(cmd.Process.Pid, others)
		_ = cmd.Process.Kill()
	})
	err := cmd.Wait()
	if !limit.Stop() {
		err = errors.Join(err, fmt.Errorf("still ran after %v", fuseLimit+fuseGrace))
	}
	text := out.String()
	switch {
	case err == nil && strings.Contains(text, "--- PASS: "+name+" ("):
		return nil
	case err == nil && strings.Contains(text, "--- SKIP: "+name+" ("):
		t.Skip(lastMessage(text))
	}
	return fmt.Errorf("%w\n%s", cmp.Or(err, errors.New("it did not run")), text)
}

// lastMessage returns the last message of a test.
func lastMessage(text string) string {
	found := regexp.MustCompile(`(?m)^ +[\w.-]+\.go:\d+: (.*)$`).FindAllStringSubmatch(text, -1)
	if len(found) == 0 {
		return "no reason given"
	}
	return found[len(found)-1][1]
}

// abortConnections ends the FUSE connections of the file systems that the first
// process of namespaces sees, but for those of others, which are the host's: new
// namespaces begin with a copy of all mounts.
func abortConnections(pid int, others []int) {
	proc := fmt.Sprintf("/proc/%d", pid)
	for _, minor := range without(fuseMinors(proc+"/mountinfo"), others) {
		_ = os.WriteFile(filepath.Join(proc, "root", connection(minor), "abort"), []byte("1"), 0)
	}
}

// fuseMinors returns the device numbers of the file systems of zfs-fuse in a
// list of mounts.
func fuseMinors(path string) []int {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	list, err := mountinfo.GetMountsFromReader(f, mountinfo.FSTypeFilter("fuse.zfs", "fuse"))
	if err != nil {
		return nil
	}
	var minors []int
	for _, info := range list {
		if !slices.Contains(minors, info.Minor) {
			minors = append(minors, info.Minor)
		}
	}
	return minors
}

func without(minors, others []int) []int {
	return slices.DeleteFunc(minors, func(minor int) bool { return slices.Contains(others, minor) })
}

// fuseInit is the first process of the namespaces. When it ends the kernel ends
// all others.
func fuseInit() int {
	code, err := fuseInitRun(os.Getenv(fuseDirEnv))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return code
}

func fuseInitRun(dir string) (code int, err error) {
	if err := fuseMounts(dir); err != nil {
		return 0, err
	}
	others := fuseMinors("/proc/self/mountinfo")
	if err := startDaemon(); err != nil {
		return 0, err
	}
	if err := createPool("layerfs", filepath.Join(dir, "pool"), 1<<30, "-o", "ashift=12"); err != nil {
		return 0, err
	}
	tmp := filepath.Join(dir, "tmp")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return 0, err
	}
	// Each signal that meets a request to the file system sends an interrupt after
	// it, and the daemon waits for good if that is withdrawn, as the request has
	// been answered, between its poll and its read. So there are none to stop
	// goroutines.
	godebug := strings.Trim(os.Getenv("GODEBUG")+",asyncpreemptoff=1", ",")
	// There is a pool, so that nothing is skipped for the lack of one.
	required := strings.Trim(os.Getenv(requireEnv)+",zfs-fuse,zfs", ",")
	env := environ(poolEnv+"=layerfs", "TMPDIR="+tmp, "GODEBUG="+godebug, requireEnv+"="+required)
	test, err := os.StartProcess(os.Args[0], os.Args, &os.ProcAttr{Env: env, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return 0, err
	}
	go wakeDaemon(others)
	for { // all that lose their parent are this one's children
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, os.NewSyscallError("wait4", err)
		}
		if pid == test.Pid {
			if status.Signaled() {
				return 0, fmt.Errorf("the test was ended by %v", status.Signal())
			}
			return status.ExitStatus(), nil
		}
	}
}

// environ returns this process's environment with other values of some variables,
// and without what it is for. Of two values of one variable a program takes the
// first or the last as it likes.
func environ(set ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return name == fuseStageEnv || name == fuseDirEnv ||
			slices.ContainsFunc(set, func(s string) bool { return strings.HasPrefix(s, name+"=") })
	})
	return append(env, set...)
}

func TestEnviron(t *testing.T) {
	t.Setenv("TMPDIR", "/old")
	t.Setenv("TMPDIR_OF_ANOTHER", "kept")
	t.Setenv(fuseDirEnv, "/dir")
	env := environ("TMPDIR=/new", "LAYERFS_TEST_NEW=1")
	of := func(name string) (values []string) {
		for _, s := range env {
			if value, ok := strings.CutPrefix(s, name+"="); ok {
				values = append(values, value)
			}
		}
		return values
	}
	require.Equal(t, []string{"/new"}, of("TMPDIR"))
	require.Equal(t, []string{"kept"}, of("TMPDIR_OF_ANOTHER"))
	require.Equal(t, []string{"1"}, of("LAYERFS_TEST_NEW"))
	require.Empty(t, of(fuseDirEnv))
}

// fuseMounts covers what zfs-fuse shares with another one on the host: its
// socket, lock, settings and list of pools. All else is on a tmpfs at dir.
func fuseMounts(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount /", err)
	}
	if err := leaveOthers(dir); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return os.NewSyscallError("mount /proc", err)
	}
	if err := unix.Mount("fusectl", connections, "fusectl", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return os.NewSyscallError("mount fusectl", err)
	}
	for _, at := range append([]string{dir}, daemonDirs()...) {
		if err := unix.Mount("tmpfs", at, "tmpfs", 0, "mode=755"); err != nil {
			return os.NewSyscallError("mount "+at, err)
		}
	}
	return errors.Join(os.MkdirAll(daemonDir, 0o755), os.MkdirAll("/run/lock/zfs", 0o755))
}

// leaveOthers unmounts copies of mounts of the host's that a test does not need.
// Who owns the mounts would wait for these: a file system of FUSE ends, and a
// directory of an overlay or a loop device is free, with the last mount.
func leaveOthers(dir string) error {
	list, err := mountinfo.GetMounts(nil)
	if err != nil {
		return err
	}
	for _, at := range othersMounts(list, dir, os.Args[0]) {
		// It may have been below another one that is gone.
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "unmount", Path: at, Err: err}
		}
	}
	return nil
}

// othersMounts returns where file systems of FUSE are mounted, and what is
// mounted below the directories for temporary files, last mount first; but for
// what needed paths are on.
func othersMounts(list []*mountinfo.Info, needed ...string) (at []string) {
	below := func(path, dir string) bool { return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") }
	for _, info := range slices.Backward(list) {
		fuse := info.FSType == "fuse" || strings.HasPrefix(info.FSType, "fuse.")
		if !fuse && !below(info.Mountpoint, "/tmp") && !below(info.Mountpoint, "/dev/shm") {
			continue
		}
		if !slices.ContainsFunc(needed, func(path string) bool { return below(path, info.Mountpoint) }) {
			at = append(at, info.Mountpoint)
		}
	}
	return at
}

func TestOthersMounts(t *testing.T) {
	at := func(path, fstype string) *mountinfo.Info { return &mountinfo.Info{Mountpoint: path, FSType: fstype} }
	list := []*mountinfo.Info{
		at("/", "ext4"), at("/tmp", "tmpfs"), at("/dev/shm", "tmpfs"), at("/sys/fs/fuse/connections", "fusectl"),
		at("/home/u", "fuse.sshfs"), at("/tmp/x", "overlay"), at("/tmp/x/y", "fuse"), at("/tmp/disk", "xfs"), at("/dev/shm/m", "btrfs"),
		at("/tmpfoo", "ext4"), at("/src", "fuse"),
	}
	require.Equal(t, []string{"/dev/shm/m", "/tmp/x/y", "/tmp/x", "/home/u"}, othersMounts(list, "/tmp/disk/dir", "/src/zfs.test"))
}

// startDaemon starts zfs-fuse as a child. The distribution's settings have the
// kernel keep attributes and names for an hour, by which the mounts of a file
// that has several names differ; the defaults do not.
func startDaemon() error {
	path, err := find("zfs-fuse", "")
	if err != nil {
		return err
	}
	args := []string{path, "--no-daemon", "--no-kstat-mount", "--enable-xattr", "--fuse-mount-options", "default_permissions"}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if _, err := os.StartProcess(path, args, &os.ProcAttr{Files: []*os.File{null, null, null}}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), fuseGrace)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", daemonDir+"/zfs_socket")
		if err == nil {
			return c.Close()
		}
		if ctx.Err() != nil {
			return fmt.Errorf("zfs-fuse does not answer: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// wakeDaemon asks something of each file system, but for others, when a request to
// one has not been answered for long: the daemon may wait for one that was
// withdrawn.
func wakeDaemon(others []int) {
	waited := map[int]bool{}
	for {
		time.Sleep(300 * time.Millisecond)
		minors := without(fuseMinors("/proc/self/mountinfo"), others)
		stuck := false
		for _, minor := range minors {
			n, err := waiting(minor)
			waits := err == nil && n != "0"
			stuck = stuck || waits && waited[minor]
			waited[minor] = waits
		}
		if !stuck {
			continue
		}
		list, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("fuse.zfs", "fuse"))
		if err != nil {
			continue
		}
		for _, info := range list {
			if !slices.Contains(minors, info.Minor) {
				continue
			}
			go func() {
				var st unix.Statfs_t
				_ = unix.Statfs(info.Mountpoint, &st)
			}()
		}
		fmt.Fprintln(os.Stderr, "zfs-fuse was woken")
	}
}

// Where a mount cannot be moved aside, because the one around it is shared, Put
// fails as long as files are open, and nothing hangs.
func TestOpenFileOnSharedMount(t *testing.T) {
	requirePool(t)
	if kernelMounts() {
		t.Skip("the kernel's file system is detached")
	}
	root := newRootDir(t)
	require.NoError(t, unix.Mount(root, root, "", unix.MS_BIND, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(root, 0)) })
	require.NoError(t, unix.Mount("", root, "", unix.MS_SHARED, ""))
	d := mustOpen(t, root, &Options{})
	ctx := t.Context()
	require.NoError(t, d.Create(ctx, "a", "", nil))
	path, err := d.Get(ctx, "a", nil)
	require.NoError(t, err)
	f, err := os.Create(filepath.Join(path, "f"))
	require.NoError(t, err)
	require.ErrorIs(t, d.Put(ctx, "a"), layerfs.ErrInUse)
	_, err = f.WriteString("kept")
	require.NoError(t, errors.Join(err, f.Close()))
	require.NoError(t, d.Put(ctx, "a"))
	require.Equal(t, "kept", read(t, d, "a", "f"))
	require.NoError(t, errors.Join(d.Remove(ctx, "a"), d.Close()))
}
