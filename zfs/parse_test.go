package zfs

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The lines are as "zfs diff -FH" of OpenZFS 2.1.11 printed them.
func TestParseDiff(t *testing.T) {
	out := "M\t/\t/m/\n" +
		"M\tF\t/m/dir/file\n" +
		"M\tF\t/m/linked\t(+1)\n" +
		"-\t/\t/m/gone\n" +
		"+\t@\t/m/a\\0040b\\0134\\0303\\0251\n" +
		"R\tF\t/m/old\\0011\t/m/new\n"
	got, err := parseDiff([]byte(out), []string{"/elsewhere", "/m"})
	require.NoError(t, err)
	assert.Equal(t, []change{
		{kind: 'M', path: "/"},
		{kind: 'M', path: "/dir/file"},
		{kind: 'M', path: "/linked"},
		{kind: '-', path: "/gone"},
		{kind: '+', path: "/a b\\é"},
		{kind: 'R', path: "/old\t", to: "/new"},
	}, got)

	none, err := parseDiff(nil, nil)
	require.NoError(t, err)
	assert.Empty(t, none)
}

func TestParseDiffMountedAtRoot(t *testing.T) {
	got, err := parseDiff([]byte("M\tF\t/a\n"), []string{"/"})
	require.NoError(t, err)
	assert.Equal(t, []change{{kind: 'M', path: "/a"}}, got)
}

func TestParseDiffRefuses(t *testing.T) {
	for name, line := range map[string]string{
		"kind":            "X\tF\t/m/a",
		"no type":         "M\t/m/a",
		"short":           "M",
		"escape short":    "M\tF\t/m/a\\00",
		"escape digits":   "M\tF\t/m/a\\0098",
		"escape too big":  "M\tF\t/m/a\\0777",
		"escape zero":     "M\tF\t/m/a\\0000",
		"rename alone":    "R\tF\t/m/a",
		"rename outside":  "R\tF\t/m/a\t/n/a",
		"outside":         "M\tF\t/n/a",
		"half a name":     "M\tF\t/mm/a",
		"dots":            "M\tF\t/m/../a",
		"empty component": "M\tF\t/m//a",
		"extra":           "M\tF\t/m/a\t+1",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseDiff([]byte(line+"\n"), []string{"/m"})
			assert.Error(t, err)
		})
	}
	_, err := parseDiff([]byte("M\tF\t/m/m/a\n"), []string{"/m", "/m/m"})
	assert.ErrorContains(t, err, "two mounts")
}

func FuzzParseDiff(f *testing.F) {
	f.Add("M\tF\t/m/a\\0040b\n+\t/\t/m/d\nR\tF\t/m/x\t/m/y\n-\t|\t/m/\\0777\n")
	f.Add("M\tF\t/m/a\t(-1)\n")
	f.Fuzz(func(t *testing.T, out string) {
		list, err := parseDiff([]byte(out), []string{"/m"})
		if err != nil {
			return
		}
		for _, c := range list {
			for _, p := range []string{c.path, c.to} {
				if p == "" && c.kind != 'R' {
					continue
				}
				if !strings.HasPrefix(p, "/") || strings.Contains(p+"/", "/../") || strings.Contains(p, "\x00") {
					t.Fatalf("path %q of %q", p, out)
				}
			}
			// Written back and read again it is the same.
			line := string(c.kind) + "\tF\t" + escape("/m"+c.path)
			if c.kind == 'R' {
				line += "\t" + escape("/m"+c.to)
			}
			again, err := parseDiff([]byte(line+"\n"), []string{"/m"})
			if err != nil || len(again) != 1 || again[0] != c {
				t.Fatalf("%v written as %q is read as %v, %v", c, line, again, err)
			}
		}
	})
}

func TestSuspect(t *testing.T) {
	s := newSuspect()
	for _, c := range []change{
		{kind: 'M', path: "/"},
		{kind: 'M', path: "/a/f"},
		{kind: '+', path: "/a/d"},
		{kind: 'R', path: "/x", to: "/a/y"},
		{kind: 'M', path: "/b/f/<xattrdir>/user.x"},
	} {
		s.note(c)
	}
	assert.True(t, s.isNamed())
	assert.False(t, s.isWhole())
	a := s.child("a")
	assert.False(t, a.isNamed(), "a path on the way is not named")
	assert.True(t, a.child("f").isNamed())
	assert.False(t, a.child("f").isWhole())
	assert.True(t, a.child("d").isWhole())
	assert.True(t, a.child("y").isWhole())
	assert.True(t, s.child("x").isWhole())
	assert.True(t, s.child("b").child("f").isNamed())
	assert.Nil(t, s.child("none").child("f"))
	assert.False(t, s.child("none").isWhole())
}

func TestCheckDataset(t *testing.T) {
	for _, good := range []string{"tank", "tank/a b", "tank/a:b/-x", "t/.x"} {
		assert.NoError(t, checkDataset(good), good)
	}
	for _, bad := range []string{"-tank", "/tank", "tank/", "tank//a", "tank/..", "tank/a@b", "tank/%x", "tank/é", "1tank", strings.Repeat("a", 256), ""} {
		assert.Error(t, checkDataset(bad), bad)
	}
}

func TestOptionsValidate(t *testing.T) {
	assert.NoError(t, new(Options).validate())
	o := &Options{Dataset: "a@b", Properties: map[string]string{"mountpoint": "/", "x=y": "", "org.layerfs:layer": "z"}, RefQuota: -1}
	err := o.validate()
	for _, text := range []string{"Dataset", `"mountpoint"`, `"x=y"`, `"org.layerfs:layer"`, "negative"} {
		assert.ErrorContains(t, err, text)
	}
}

func TestMarked(t *testing.T) {
	rows, err := table([]byte("t\t-\nt/a\troot:a\nt/b\tother:b\nt/c\troot:b\nt/d\t-\n"), 2)
	require.NoError(t, err)
	assert.Equal(t, []string{"a"}, marked(rows, "t", "root"))
	_, err = table([]byte("a\n"), 2)
	assert.Error(t, err)
}
