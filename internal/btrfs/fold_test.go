package btrfs

import (
	"bytes"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func foldOf(tb testing.TB, cmds ...[]any) (*Delta, error) {
	tb.Helper()
	start := []any{OpSnapshot, AttrPath, "s", AttrUUID, UUID{1}, AttrCtransid, uint64(9), AttrCloneUUID, UUID{2}, AttrCloneCtransid, uint64(8)}
	cmds = append(append([][]any{start}, cmds...), []any{OpEnd})
	dec, err := NewDecoder(bytes.NewReader(build(tb, 1, cmds...)))
	require.NoError(tb, err)
	return Fold(dec)
}

func TestFold(t *testing.T) {
	rename := func(a, b string) []any { return []any{OpRename, AttrPath, a, AttrPathTo, b} }
	mkfile := func(a string) []any { return []any{OpMkfile, AttrPath, a} }
	unlink := func(a string) []any { return []any{OpUnlink, AttrPath, a} }
	chmod := func(a string) []any { return []any{OpChmod, AttrPath, a, AttrMode, uint64(0)} }
	link := func(a, b string) []any { return []any{OpLink, AttrPath, a, AttrPathLink, b} }
	for name, c := range map[string]struct {
		cmds [][]any
		want []string // places, the temporary names left out
	}{
		"attributes":   {[][]any{chmod(""), chmod("a/b")}, []string{"", "a/b"}},
		"create":       {[][]any{mkfile("o9-9-0"), rename("o9-9-0", "d/f")}, []string{"d/f"}},
		"remove":       {[][]any{unlink("d/f")}, []string{"d/f"}},
		"move":         {[][]any{rename("d/f", "e/g"), chmod("e/g")}, []string{"d/f", "e/g"}},
		"exchange":     {[][]any{rename("a", "o1-1-0"), rename("b", "a"), rename("o1-1-0", "b")}, []string{"a", "b"}},
		"dir moved":    {[][]any{rename("d", "e"), chmod("e/x/y"), unlink("e/z")}, []string{"d", "d/x/y", "d/z", "e", "e/x/y", "e/z"}},
		"dir replaced": {[][]any{rename("d", "o1-1-0"), {OpMkdir, AttrPath, "d"}, rename("o1-1-0/f", "d/f")}, []string{"d", "d/f"}},
		"moved twice":  {[][]any{rename("a", "b"), rename("b/c", "d"), rename("d", "b/e"), chmod("b/e/f")}, []string{"a", "a/c", "a/c/f", "a/e", "b", "b/c", "b/e", "b/e/f", "d"}},
		"new link":     {[][]any{mkfile("n"), link("d/m", "n"), unlink("n"), chmod("d/m")}, []string{"d/m", "n"}},
		"old link":     {[][]any{link("d/m", "f")}, []string{"d/m", "f"}},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := foldOf(t, c.cmds...)
			require.NoError(t, err)
			places, _ := d.paths()
			slices.Sort(places)
			places = slices.DeleteFunc(slices.Compact(places), func(s string) bool { return s != "" && s[0] == 'o' })
			require.Equal(t, c.want, places)
		})
	}
	for name, cmds := range map[string][][]any{
		"removed":       {unlink("a"), chmod("a")},
		"below removed": {unlink("a"), chmod("a/b")},
		"rename gone":   {rename("a", "b"), rename("a", "c")},
		"into itself":   {rename("a", "a/b")},
		"root":          {unlink("")},
		"link to dir":   {chmod("a/b"), link("c", "a")},
		"below link":    {link("a", "f"), mkfile("a/x")},
		"link loop":     {mkfile("a"), link("b", "a"), rename("b", "a/x")},
		"new file gone": {mkfile("a"), unlink("a"), link("b", "a")},
		"start twice":   {{OpSubvol, AttrPath, "s", AttrUUID, UUID{1}, AttrCtransid, uint64(9)}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := foldOf(t, cmds...)
			require.ErrorIs(t, err, layerfs.ErrMalformed)
		})
	}
}

func TestSpans(t *testing.T) {
	ext := func(off, n uint64) []any {
		return []any{OpUpdateExtent, AttrPath, "f", AttrFileOffset, off, AttrSize, n}
	}
	d, err := foldOf(t, ext(4096, 4096), ext(8192, 4096), ext(0, 1), ext(5000, 10), []any{OpTruncate, AttrPath, "f", AttrSize, uint64(20000)})
	require.NoError(t, err)
	n, err := d.lookup("f")
	require.NoError(t, err)
	require.Equal(t, []span{{0, 1}, {4096, 12288}, {20000, 1<<63 - 1}}, n.spans())
}
