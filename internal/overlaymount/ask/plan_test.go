package ask

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/mount"
)

func TestParse(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		want Plan
		bad  string
	}{
		"writable": {
			args: []string{"-o", "lowerdir=/b:/a,upperdir=/u,workdir=/w", "/t"},
			want: Plan{Target: "/t", Lowers: []string{"/b", "/a"}, Upper: "/u"},
		},
		"read-only": {
			args: []string{"-o", "lowerdir=/b:/a,ro", "/t"},
			want: Plan{Target: "/t", Lowers: []string{"/b", "/a"}, ReadOnly: true},
		},
		"flags": {
			args: []string{"-olowerdir=/a", "-o", "userxattr,nosuid,nodev,noexec,suid,allow_other,default_permissions", "--", "-t"},
			want: Plan{Target: "-t", Lowers: []string{"/a"}, UserXattr: true, NoDev: true, NoExec: true},
		},
		"escapes": {
			args: []string{"-o", `lowerdir=/a\:1:/b\,2:/c\\:/=3,upperdir=/u\:\,,workdir=/w\\`, "/t"},
			want: Plan{Target: "/t", Lowers: []string{"/a:1", "/b,2", `/c\`, "/=3"}, Upper: "/u:,"},
		},
		"none":              {bad: "arguments"},
		"no-target":         {args: []string{"-o", "lowerdir=/a"}, bad: "arguments"},
		"two-targets":       {args: []string{"-o", "lowerdir=/a", "/t", "/u"}, bad: "arguments"},
		"no-lower":          {args: []string{"-o", "upperdir=/u", "/t"}, bad: "lowerdir is missing"},
		"empty-lower":       {args: []string{"-o", "lowerdir=/a::/b", "/t"}, bad: "lowerdir names no directory"},
		"empty-upper":       {args: []string{"-o", "lowerdir=/a,upperdir=", "/t"}, bad: "upperdir names no directory"},
		"work-alone":        {args: []string{"-o", "lowerdir=/a,workdir=/w", "/t"}, bad: "workdir needs upperdir"},
		"open-escape":       {args: []string{"-o", `lowerdir=/a\`, "/t"}, bad: "ends in a backslash"},
		"unknown-option":    {args: []string{"-o", "lowerdir=/a,squash_to_root", "/t"}, bad: `"squash_to_root" is not known`},
		"label":             {args: []string{"-o", `lowerdir=/a,context="u:r:t:s0:c1,c2"`, "/t"}, bad: "context"},
		"value-of-a-flag":   {args: []string{"-o", "lowerdir=/a,ro=no", "/t"}, bad: `"ro=no" is not known`},
		"unknown-argument":  {args: []string{"-f", "-o", "lowerdir=/a", "/t"}, bad: `"-f"`},
		"option-of-nothing": {args: []string{"-o"}, bad: "arguments"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(tt.args)
			if tt.bad != "" {
				require.ErrorContains(t, err, tt.bad)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tt.want, *got)
		})
	}
}

// FuzzEscapes takes apart what the plan of a kernel mount writes.
func FuzzEscapes(f *testing.F) {
	f.Add("/a", "/b:c", `/u\`)
	f.Add(",", `\,`, ":=")
	f.Add("\xff", "\n", "\u2028\x80")
	f.Fuzz(func(t *testing.T, a, b, upper string) {
		o := mount.Overlay{Lowers: []string{a, b}, Upper: upper, Work: "/w", UserXattr: true}
		if a == "" || b == "" || upper == "" || o.Validate() != nil {
			return
		}
		got, err := Parse([]string{"-o", o.Data(), "/t"})
		require.NoError(t, err)
		want := Plan{Target: "/t", Lowers: o.Lowers, Upper: upper, UserXattr: true}
		require.Equal(t, want, *got)
		// On its way to the server it stays the same.
		got.Log, want.Log = upper, upper
		sent, err := json.Marshal(got)
		require.NoError(t, err)
		var arrived Plan
		require.NoError(t, json.Unmarshal(sent, &arrived))
		require.Equal(t, want, arrived)
	})
}
