//go:build linux || freebsd

package zfs

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
)

// What the driver says of zfs diff is what Changes does.
func TestDescribe(t *testing.T) {
	linux := runtime.GOOS == "linux"
	for name, c := range map[string]struct {
		facts  facts
		opts   Options
		native bool
		reason string // on Linux
	}{
		"zfs diff":                 {native: linux},
		"none":                     {facts: facts{Diff: "unrecognized command"}, reason: "unrecognized command"},
		"unwanted":                 {opts: Options{WalkChanges: true}, reason: "Options.WalkChanges is set"},
		"neither there nor wanted": {facts: facts{Diff: "unrecognized command"}, opts: Options{WalkChanges: true}, reason: "Options.WalkChanges is set"},
	} {
		t.Run(name, func(t *testing.T) {
			m := &mechanism{opts: c.opts, facts: c.facts}
			m.describe()
			f := m.Features()
			for _, field := range []struct {
				name string
				have bool
			}{{"NativeChanges", f.NativeChanges}, {"NativeDiff", f.NativeDiff}} {
				assert.Equal(t, c.native, field.have, field.name)
				if linux {
					assert.Equal(t, c.reason, f.Reasons[field.name])
				} else {
					assert.NotEmpty(t, f.Reasons[field.name])
				}
			}
		})
	}
}
