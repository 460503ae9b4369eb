package whiteout_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/whiteout"
)

func TestName(t *testing.T) {
	for _, tt := range []struct {
		base, want string // empty want: refused
	}{
		{"a", ".wh.a"},
		{".hidden", ".wh..hidden"},
		{"...", ".wh...."},
		{".wh", ".wh..wh"},
		{"x.wh.y", ".wh.x.wh.y"},
		{"\xff\n", ".wh.\xff\n"},
		{strings.Repeat("n", 251), ".wh." + strings.Repeat("n", 251)},
		{strings.Repeat("n", 252), ""},
		{"", ""},
		{".", ""},
		{"..", ""},
		{"a/b", ""},
		{"/", ""},
		{"a\x00", ""},
		{".wh.", ""},
		{".wh.a", ""},
		{".wh..opq", ""},
	} {
		t.Run(tt.base, func(t *testing.T) {
			got, err := whiteout.Name(tt.base)
			assert.Equal(t, tt.want, got)
			if tt.want != "" {
				assert.NoError(t, err)
				return
			}
			assert.ErrorIs(t, err, layerfs.ErrMalformed)
			assert.ErrorIs(t, err, fs.ErrInvalid)
			var ne *whiteout.NameError
			require.ErrorAs(t, err, &ne)
			assert.Equal(t, tt.base, ne.Name)
		})
	}
}

func TestTarget(t *testing.T) {
	const plain, wh, meta, bad = "plain", "whiteout", "meta", "malformed"
	for _, tt := range []struct{ name, class, base string }{
		{"a", plain, ""},
		{"", plain, ""},
		{".wh", plain, ""},
		{"a.wh.", plain, ""},
		{".WH.a", plain, ""},
		{".wh.a", wh, "a"},
		{".wh..a", wh, ".a"},
		{".wh....", wh, "..."},
		{".wh..wh", wh, ".wh"},
		{".wh..wh.", meta, ""},
		{".wh..wh..opq", meta, ""},
		{".wh..wh.plnk", meta, ""},
		{".wh..wh.aufs", meta, ""},
		{".wh..wh.orph", meta, ""},
		{".wh..wh.dir.1a2b", meta, ""},
		{".wh.", bad, ""},
		{".wh..", bad, ""},
		{".wh...", bad, ""},
		{".wh.a/b", bad, ""},
		{".wh./", bad, ""},
		{".wh../x", bad, ""},
		{"a/.wh.b", bad, ""},
		{".wh.a\x00", bad, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base, ok, err := whiteout.Target(tt.name)
			assert.Equal(t, tt.base, base)
			assert.Equal(t, tt.class == wh, ok)
			assert.Equal(t, tt.class == wh, whiteout.IsWhiteout(tt.name))
			assert.Equal(t, tt.class == meta, whiteout.IsMeta(tt.name))
			assert.Equal(t, tt.name == ".wh..wh..opq", whiteout.IsOpaque(tt.name))
			assert.Equal(t, tt.class == bad, errors.Is(err, layerfs.ErrMalformed))
			assert.Equal(t, strings.HasPrefix(tt.name, ".wh."), whiteout.IsReserved(tt.name))
		})
	}
}

func TestXattrNames(t *testing.T) {
	for _, tt := range []struct {
		name, escaped string
		private       bool
	}{
		{"user.x", "user.x", false},
		{"trusted.x", "trusted.x", false},
		{"security.overlay.opaque", "security.overlay.opaque", false},
		{"trusted.overlay", "trusted.overlay", false},
		{"trusted.overlayx.opaque", "trusted.overlayx.opaque", false},
		{"trusted.overlay.opaque", "trusted.overlay.overlay.opaque", true},
		{"user.overlay.whiteout", "user.overlay.overlay.whiteout", true},
		{"trusted.overlay.overlay.opaque", "trusted.overlay.overlay.overlay.opaque", false},
		{"trusted.overlay.overlay", "trusted.overlay.overlay.overlay", true},
		{"user.overlay.", "user.overlay.overlay.", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			assert.Equal(t, tt.escaped, whiteout.Escape(tt.name))
			assert.Equal(t, tt.private, whiteout.IsPrivate(tt.name))
			inner, ok := whiteout.Unescape(tt.escaped)
			assert.Equal(t, tt.name, inner)
			assert.Equal(t, tt.escaped != tt.name, ok)
		})
	}
}

func FuzzNames(f *testing.F) {
	for _, s := range []string{"a", ".wh.a", ".wh.", ".wh..", ".wh...", ".wh..wh..opq", "a/b", "\x00", strings.Repeat("x", 252)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if w, err := whiteout.Name(s); err == nil {
			base, ok, err := whiteout.Target(w)
			if base != s || !ok || err != nil || len(w) > 255 || whiteout.IsMeta(w) {
				t.Errorf("Target(Name(%q)) = %q, %v, %v", s, base, ok, err)
			}
		}
		base, ok, err := whiteout.Target(s)
		switch {
		case err != nil:
			if ok || base != "" || !errors.Is(err, layerfs.ErrMalformed) {
				t.Errorf("Target(%q) = %q, %v, %v", s, base, ok, err)
			}
		case ok:
			if base == "" || base == "." || base == ".." || strings.ContainsAny(base, "/\x00") || ".wh."+base != s {
				t.Errorf("Target(%q) = %q", s, base)
			}
			if w, err := whiteout.Name(base); len(s) <= 255 && (w != s || err != nil) {
				t.Errorf("Name(Target(%q)) = %q, %v", s, w, err)
			}
		}
	})
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"user.x", "trusted.overlay.opaque", "user.overlay.overlay.x", "trusted.overlay."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if e := whiteout.Escape(s); e != s {
			if whiteout.IsPrivate(e) {
				t.Errorf("Escape(%q) = %q is private", s, e)
			}
			if u, ok := whiteout.Unescape(e); u != s || !ok {
				t.Errorf("Unescape(Escape(%q)) = %q, %v", s, u, ok)
			}
		} else if whiteout.IsPrivate(s) {
			t.Errorf("Escape(%q) did nothing", s)
		}
		if u, ok := whiteout.Unescape(s); ok && whiteout.Escape(u) != s {
			t.Errorf("Escape(Unescape(%q)) = %q", s, whiteout.Escape(u))
		}
	})
}
