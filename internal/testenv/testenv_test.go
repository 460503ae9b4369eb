package testenv

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

// recorder is a testing.TB that says how a test would have ended.
type recorder struct {
	testing.TB
	end string
	msg string
}

func (r *recorder) Helper() {}
func (r *recorder) Skip(args ...any) {
	r.stop("skip", fmt.Sprint(args...))
}
func (r *recorder) Fatal(args ...any) { r.stop("fatal", fmt.Sprint(args...)) }
func (r *recorder) Fatalf(format string, args ...any) {
	r.stop("fatal", fmt.Sprintf(format, args...))
}

func (r *recorder) stop(end, msg string) {
	r.end, r.msg = end, msg
	panic(r)
}

// record runs f, whose calls of Skip and Fatal end it.
func record(t *testing.T, f func(tb testing.TB)) (r *recorder) {
	r = &recorder{TB: t}
	defer func() {
		if p := recover(); p != nil && p != any(r) {
			panic(p)
		}
	}()
	f(r)
	return r
}

func TestSkipUnsupported(t *testing.T) {
	release, kerr := kernelRelease()
	for _, tt := range []struct {
		name    string
		require string
		err     error
		want    string
		linux   bool
	}{
		{"nil", "", nil, "", false},
		{"other", "", errors.New("other"), "", false},
		{"plain", "", errors.ErrUnsupported, "skip", false},
		{"no-version", "", &layerfs.UnsupportedError{Feature: "x"}, "skip", false},
		{"wrapped", "", fmt.Errorf("a: %w", &layerfs.UnsupportedError{Feature: "x"}), "skip", false},
		{"old", "", &layerfs.UnsupportedError{Feature: "x", Since: "Linux 999.1"}, "skip", false},
		{"should-be-there", "", &layerfs.UnsupportedError{Feature: "x", Since: "Linux 2.6"}, "fatal", true},
		{"wrapped-should-be-there", "", fmt.Errorf("a: %w", &layerfs.UnsupportedError{Feature: "x", Since: "Linux 3.1"}), "fatal", true},
		{"other-version", "", &layerfs.UnsupportedError{Feature: "x", Since: "OpenZFS 2.2"}, "skip", false},
		{"bad-version", "", &layerfs.UnsupportedError{Feature: "x", Since: "Linux six"}, "fatal", true},
		{"required", "vfs, overlay", errors.ErrUnsupported, "fatal", false},
		{"required-all", "all", errors.ErrUnsupported, "fatal", false},
		{"required-other", "vfs,over", errors.ErrUnsupported, "skip", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.linux && kerr != nil {
				t.Skip(kerr)
			}
			t.Setenv(requireEnv, tt.require)
			r := record(t, func(tb testing.TB) { SkipUnsupported(tb, tt.err, "overlay") })
			assert.Equal(t, tt.want, r.end, "%s (kernel %s)", r.msg, release)
		})
	}
}

func TestRequire(t *testing.T) {
	t.Setenv(requireEnv, "")
	assert.Equal(t, "skip", record(t, func(tb testing.TB) { RequireTool(tb, "no-such-tool-at-all", "xfs") }).end)
	assert.Equal(t, "skip", record(t, func(tb testing.TB) { RequireKernel(tb, "999.0", "x") }).end)
	t.Setenv(requireEnv, "xfs")
	assert.Equal(t, "fatal", record(t, func(tb testing.TB) { RequireTool(tb, "no-such-tool-at-all", "xfs") }).end)
	t.Setenv(requireEnv, "no-such-tool-at-all")
	assert.Equal(t, "fatal", record(t, func(tb testing.TB) { RequireTool(tb, "no-such-tool-at-all") }).end)
	assert.Equal(t, "fatal", record(t, func(tb testing.TB) { RequireKernel(tb, "x", "x") }).end)
	if _, err := kernelRelease(); err == nil {
		assert.Empty(t, record(t, func(tb testing.TB) { RequireKernel(tb, "3.0", "x") }).end)
	}
}

func TestVersion(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		less bool
	}{
		{"5.4", "5.11", true},
		{"5.11", "5.4", false},
		{"6", "6.0", false},
		{"5.19.3-foo", "6.0", true},
		{"6.18.44-fc", "6.18", false},
		{"10.0", "9.9", false},
	} {
		a, err := parseVersion(tt.a)
		require.NoError(t, err)
		b, err := parseVersion(tt.b)
		require.NoError(t, err)
		assert.Equal(t, tt.less, a.less(b), "%s < %s", tt.a, tt.b)
	}
	_, err := parseVersion("v6")
	require.Error(t, err)
}

func TestWithAndWithout(t *testing.T) {
	var got []string
	WithAndWithout(t, "feature", func(t *testing.T, on bool) { got = append(got, fmt.Sprint(t.Name(), on)) })
	assert.Equal(t, []string{"TestWithAndWithout/feature=truetrue", "TestWithAndWithout/feature=falsefalse"}, got)
}
