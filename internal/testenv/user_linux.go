package testenv

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Nobody is the user and group id of tests that run without privileges.
const Nobody = 65534

// Unprivileged runs fn in a process without any privilege: this test program
// is started again as user [Nobody] with only the calling test selected. If
// the tests do not run as root, fn runs right here.
//
// fn must not use what the test made before the call: the second process runs
// the test from its beginning. t.TempDir is a directory of its own there.
// Call it first and once in a test or subtest.
func Unprivileged(t *testing.T, fn func(t *testing.T)) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv(childEnv) != "" {
		fn(t)
		return
	}
	rerun(t, &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: Nobody, Gid: Nobody},
		Pdeathsig:  unix.SIGKILL,
	})
}

// InUserNamespace runs fn like [Unprivileged], but as root of a new user and
// mount namespace in which only the unprivileged user exists, as with
// `unshare -Urm`: one user and one group are mapped. The test is skipped where
// such namespaces are forbidden.
func InUserNamespace(t *testing.T, fn func(t *testing.T)) {
	t.Helper()
	if os.Getenv(childEnv) == "userns" {
		fn(t)
		return
	}
	uid, gid := os.Geteuid(), os.Getegid()
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if uid == 0 {
		uid, gid = Nobody, Nobody
		// The mapping is written by this process, which may map any id.
		attr.Credential = &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true}
	}
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
	rerun(t, attr)
}

// childEnv tells the second process what it is.
const childEnv = "LAYERFS_TESTENV_CHILD"

// rerun runs the calling test alone in a new process and takes over its result.
func rerun(t *testing.T, attr *syscall.SysProcAttr) {
	t.Helper()
	// The program and the directory must be within reach of the other user.
	dir, err := os.MkdirTemp("/tmp", "layerfs-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	tmp := filepath.Join(dir, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		for _, p := range []string{dir, tmp} {
			if err := os.Chown(p, Nobody, Nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	program := filepath.Join(dir, "program.test")
	if err := copyProgram(program); err != nil {
		t.Fatal(err)
	}
	kind := "user"
	if attr.Cloneflags&unix.CLONE_NEWUSER != 0 {
		kind = "userns"
	}
	cmd := exec.Command(program, "-test.v", "-test.count=1", "-test.run="+pattern(t.Name()))
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), childEnv+"="+kind, "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); kind == "userns" && err != nil && !errors.As(err, &exit) {
		skip(t, "needs user namespaces: "+err.Error(), kind)
	}
	t.Logf("%s:\n%s", kind, out)
	switch {
	case err != nil:
		t.Fatalf("test as %s: %v", kind, err)
	case strings.Contains(string(out), "--- SKIP: "+t.Name()+" "):
		t.Skip("skipped as " + kind)
	case !strings.Contains(string(out), "--- PASS: "+t.Name()+" "):
		t.Fatal("[bug] the test did not run")
	}
}

// pattern selects exactly one test, whose name has slashes if it is a subtest.
func pattern(name string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	return strings.Join(parts, "/")
}

func copyProgram(to string) error {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}
