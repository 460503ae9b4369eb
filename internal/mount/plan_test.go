package mount

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestOverlayData(t *testing.T) {
	for _, tt := range []struct {
		name string
		plan Overlay
		want string
	}{
		{"plain", Overlay{Lowers: []string{"/b", "/a"}, Upper: "/u", Work: "/w"}, "lowerdir=/b:/a,upperdir=/u,workdir=/w"},
		{"read-only", Overlay{Lowers: []string{"/b", "/a"}}, "lowerdir=/b:/a"},
		{"escapes", Overlay{Lowers: []string{`/a:b`, `/c,d`, `/e\f`}, Upper: `/u:,\`, Work: "/w"}, `lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u\:\,\\,workdir=/w`},
		{"bytes", Overlay{Lowers: []string{"/a b", "/\n\xff\""}}, "lowerdir=/a b:/\n\xff\""},
		{
			"options",
			Overlay{
				Lowers: []string{"/b", "/a"}, UserXattr: true, Volatile: true, Metacopy: "on", RedirectDir: "nofollow",
				Index: "off", NFSExport: "off", XIno: "auto", Label: "u:r:t:s0:c1,c2", Options: []string{"uuid=on", "flag"},
			},
			`lowerdir=/b:/a,userxattr,volatile,metacopy=on,redirect_dir=nofollow,index=off,nfs_export=off,xino=auto,context="u:r:t:s0:c1,c2",uuid=on,flag`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.NoError(t, tt.plan.Validate())
			assert.Equal(t, tt.want, tt.plan.Data())
			assert.Equal(t, tt.want, strings.Join(tt.plan.MountOptions(), ","))
			lowers, upper, work := kernelParse(tt.plan.Data())
			assert.Equal(t, tt.plan.Lowers, lowers)
			assert.Equal(t, tt.plan.Upper, upper)
			assert.Equal(t, tt.plan.Work, work)
		})
	}
}

// kernelParse takes a data string apart as ovl_next_opt, ovl_split_lowerdirs
// and ovl_unescape of fs/overlayfs do; SELinux quotes are not looked at.
func kernelParse(data string) (lowers []string, upper, work string) {
	split := func(s string, sep byte) []string {
		var out []string
		start := 0
		for i := 0; i < len(s); i++ {
			switch s[i] {
			case '\\':
				i++
			case sep:
				out = append(out, s[start:i])
				start = i + 1
			}
		}
		return append(out, s[start:])
	}
	unescape := func(s string) string {
		var b strings.Builder
		for i := 0; i < len(s); i++ {
			if s[i] == '\\' {
				if i++; i == len(s) {
					break
				}
			}
			b.WriteByte(s[i])
		}
		return b.String()
	}
	for _, opt := range split(data, ',') {
		k, v, _ := strings.Cut(opt, "=")
		switch k {
		case "lowerdir":
			for _, p := range split(v, ':') {
				lowers = append(lowers, unescape(p))
			}
		case "upperdir":
			upper = unescape(v)
		case "workdir":
			work = unescape(v)
		}
	}
	return lowers, upper, work
}

func FuzzOverlayData(f *testing.F) {
	f.Add("/a:b", `/c\`, "/d,e", "/w")
	f.Add("/", "/ ", "/\n", "upperdir=/x")
	f.Fuzz(func(t *testing.T, a, b, upper, work string) {
		o := Overlay{Lowers: []string{a, b}, Upper: upper, Work: work}
		if o.Validate() != nil {
			t.Skip()
		}
		lowers, gotUpper, gotWork := kernelParse(o.Data())
		if !slices.Equal(lowers, o.Lowers) || gotUpper != upper || gotWork != work {
			t.Errorf("data %q is read as %q, %q, %q, want %q, %q, %q", o.Data(), lowers, gotUpper, gotWork, o.Lowers, upper, work)
		}
	})
}

func TestOverlaySettings(t *testing.T) {
	o := Overlay{Lowers: []string{`/a:\,`, "/b"}, Upper: "/u", Work: "/w", Volatile: true, Options: []string{"a=b=c,d"}}
	assert.Equal(t, []Setting{
		{Key: "lowerdir+", Value: `/a:\,`, Layer: true},
		{Key: "lowerdir+", Value: "/b", Layer: true},
		{Key: "upperdir", Value: "/u", Layer: true},
		{Key: "workdir", Value: "/w", Layer: true},
		{Key: "volatile", Flag: true},
		{Key: "a", Value: "b=c,d"},
	}, o.Settings())
}

func TestOverlayValidate(t *testing.T) {
	many := make([]string, MaxLowers+1)
	for i := range many {
		many[i] = fmt.Sprint("/", i)
	}
	for _, tt := range []struct {
		name string
		plan Overlay
		want []string // parts of the error; empty means valid
	}{
		{"empty", Overlay{}, []string{"no lower layer"}},
		{"one-lower", Overlay{Lowers: []string{"/a"}}, []string{"two lower layers"}},
		{"one-lower-upper", Overlay{Lowers: []string{"/a"}, Upper: "/u", Work: "/w"}, nil},
		{"no-work", Overlay{Lowers: []string{"/a"}, Upper: "/u"}, []string{"both upper"}},
		{"most", Overlay{Lowers: many[:MaxLowers]}, nil},
		{"too-many", Overlay{Lowers: many}, []string{"501 lower layers"}},
		{"nul", Overlay{Lowers: []string{"/a\x00", "/b"}}, []string{"NUL"}},
		{"empty-path", Overlay{Lowers: []string{"/a", ""}}, []string{"empty lower layer"}},
		{"empty-option", Overlay{Lowers: []string{"/a", "/b"}, Options: []string{""}}, []string{"empty option"}},
		{"all-at-once", Overlay{Work: "/w", Flags: Recursive}, []string{"no lower layer", "both upper", "recursive"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.plan.Validate()
			if len(tt.want) == 0 {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			for _, part := range tt.want {
				assert.ErrorContains(t, err, part)
			}
		})
	}
}

func TestParseOptions(t *testing.T) {
	for _, tt := range []struct {
		in    []string
		flags Flags
		rest  []string
	}{
		{nil, 0, nil},
		{[]string{"defaults"}, 0, nil},
		{[]string{"ro,noatime,discard", "data=ordered"}, ReadOnly | NoAtime, []string{"discard", "data=ordered"}},
		{[]string{"ro", "rw", "nosuid,nodev,noexec,nodiratime,nosymfollow"}, NoSuid | NoDev | NoExec | NoDirAtime | NoSymFollow, nil},
		{[]string{"noatime,strictatime"}, StrictAtime, nil},
		{[]string{"strictatime,relatime,sync"}, 0, []string{"sync"}},
		{[]string{"x-systemd.automount,_netdev,nofail"}, 0, nil},
		{[]string{"nosuid,suid,nodev,dev,noexec,exec,nosymfollow,symfollow,nodiratime,diratime"}, 0, nil},
	} {
		t.Run(strings.Join(tt.in, "+"), func(t *testing.T) {
			flags, rest := ParseOptions(tt.in...)
			assert.Equal(t, tt.flags, flags)
			assert.Equal(t, tt.rest, rest)
		})
	}
}

func TestMethodString(t *testing.T) {
	for m, want := range map[Method]string{Auto: "auto", NewAPI: "newapi", Classic: "classic", Descriptors: "descriptors", 9: "Method(9)"} {
		assert.Equal(t, want, m.String())
	}
}

func ExampleOverlay_Data() {
	o := Overlay{Lowers: []string{"/layers/b:1", "/layers/a"}, Upper: "/up", Work: "/work"}
	fmt.Fprintln(os.Stdout, o.Data())
	// Output: lowerdir=/layers/b\:1:/layers/a,upperdir=/up,workdir=/work
}
