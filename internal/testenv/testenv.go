package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/layerfs/layerfs"
)

// requireEnv is the variable that lists what must not be skipped.
const requireEnv = "LAYERFS_REQUIRE"

// Required reports whether LAYERFS_REQUIRE lists name, or "all".
func Required(name string) bool { return listed(os.Getenv(requireEnv), name) }

func listed(list, name string) bool {
	for item := range strings.SplitSeq(list, ",") {
		if item = strings.TrimSpace(item); item == "all" || item != "" && item == name {
			return true
		}
	}
	return false
}

// skip skips the test, or fails it if LAYERFS_REQUIRE lists one of names.
func skip(tb testing.TB, reason string, names ...string) {
	tb.Helper()
	for _, name := range names {
		if Required(name) {
			tb.Fatalf("%s (%s lists %s, so this is a failure)", reason, requireEnv, name)
		}
	}
	tb.Skip(reason)
}

// RequireRoot skips the test unless it runs as root.
func RequireRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		skip(tb, "needs root", "root")
	}
}

// RequireTool skips the test unless the program name is found, and returns its
// path. LAYERFS_REQUIRE may list the tool or one of the backends that need it.
func RequireTool(tb testing.TB, name string, backends ...string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		// Debian keeps the administrator's tools out of other users' PATH.
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if path, err2 := exec.LookPath(dir + "/" + name); err2 == nil {
				return path
			}
		}
		skip(tb, fmt.Sprintf("needs %s: %v", name, err), append(backends, name)...)
	}
	return path
}

// RequireKernel skips the test on kernels older than version, such as "5.11",
// which lack feature.
func RequireKernel(tb testing.TB, version, feature string) {
	tb.Helper()
	want, err := parseVersion(version)
	if err != nil {
		tb.Fatal(err)
	}
	release, err := kernelRelease()
	if err != nil {
		skip(tb, fmt.Sprintf("%s needs Linux %s: %v", feature, version, err))
	}
	have, err := parseVersion(release)
	if err != nil {
		tb.Fatal(err)
	}
	if have.less(want) {
		skip(tb, fmt.Sprintf("%s needs Linux %s, this is %s", feature, version, release))
	}
}

// RequireFUSE skips the test unless it may mount FUSE file systems; backends are
// as for [SkipUnsupported].
func RequireFUSE(tb testing.TB, backends ...string) {
	tb.Helper()
	RequireRoot(tb)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		SkipUnsupported(tb, &layerfs.UnsupportedError{Feature: "FUSE", Reason: err.Error()}, backends...)
	}
}

// SkipUnsupported skips the test if err says that this host lacks something,
// and does nothing if it is nil or another error. It fails the test if
//
//   - err says which Linux would do ("Linux 5.11") and this one is as new, so
//     that the library must have been wrong, or
//   - LAYERFS_REQUIRE lists one of backends.
func SkipUnsupported(tb testing.TB, err error, backends ...string) {
	tb.Helper()
	if err == nil || !errors.Is(err, errors.ErrUnsupported) {
		return
	}
	release, _ := kernelRelease()
	if why := contradiction(err, release); why != "" {
		tb.Fatalf("%v (%s)", err, why)
	}
	skip(tb, err.Error(), backends...)
}

// contradiction says why err cannot be true on a kernel, if so.
func contradiction(err error, release string) string {
	var u *layerfs.UnsupportedError
	if !errors.As(err, &u) {
		return ""
	}
	since, ok := strings.CutPrefix(u.Since, "Linux ")
	if !ok || release == "" {
		return ""
	}
	want, werr := parseVersion(since)
	have, herr := parseVersion(release)
	if werr != nil {
		return fmt.Sprintf("[bug] version %q", u.Since)
	}
	if herr != nil || have.less(want) {
		return ""
	}
	return fmt.Sprintf("but this is Linux %s, which should have it", release)
}

// WithAndWithout runs fn twice, in subtests name=true and name=false, so that
// the way without a feature is tested where the feature is there.
func WithAndWithout(t *testing.T, name string, fn func(t *testing.T, on bool)) {
	t.Helper()
	for _, on := range []bool{true, false} {
		t.Run(name+"="+strconv.FormatBool(on), func(t *testing.T) { fn(t, on) })
	}
}

type version struct{ major, minor int }

func (v version) less(w version) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}

func parseVersion(s string) (version, error) {
	m := regexp.MustCompile(`^(\d+)(?:\.(\d+))?`).FindStringSubmatch(s)
	if m == nil {
		return version{}, fmt.Errorf("%q is no kernel version", s)
	}
	var v version
	var err error
	if v.major, err = strconv.Atoi(m[1]); err != nil {
		return version{}, err
	}
	if m[2] != "" {
		v.minor, err = strconv.Atoi(m[2])
	}
	return v, err
}

func kernelRelease() (string, error) {
	if runtime.GOOS != "linux" {
		return "", fmt.Errorf("this is %s", runtime.GOOS)
	}
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(b)), err
}
