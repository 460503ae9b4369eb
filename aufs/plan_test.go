package aufs

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/union"
)

func stackOf(n int, format string) []union.Branch {
	var list []union.Branch
	for i := range n {
		b := union.Branch{Path: fmt.Sprintf(format, i), Perm: union.ROWH}
		if i == 0 {
			b.Perm = union.RW
		}
		list = append(list, b)
	}
	return list
}

func TestKernelData(t *testing.T) {
	for name, tc := range map[string]struct {
		p     plan
		s     settings
		first string
	}{
		"two": {plan{branches: stackOf(2, "/d/%d")}, settings{}, "br:/d/0=rw:/d/1=ro+wh"},
		"options": {
			plan{branches: stackOf(2, "/d/%d")},
			settings{udba: union.Notify, xino: "/dev/shm/aufs.xino", dio: true, noPlink: true, dirPerm1: true, sum: true},
			"br:/d/0=rw:/d/1=ro+wh,dio,noplink,dirperm1,sum,xino=/dev/shm/aufs.xino,udba=notify",
		},
		"label":   {plan{branches: stackOf(1, "/d/%d"), label: "system_u:object_r:c_t:s0:c1,c2"}, settings{}, `br:/d/0=rw,context="system_u:object_r:c_t:s0:c1,c2"`},
		"default": {plan{branches: []union.Branch{{Path: "/d"}}}, settings{}, "br:/d=ro"},
	} {
		t.Run(name, func(t *testing.T) {
			first, more, err := kernelData(tc.p, tc.s)
			require.NoError(t, err)
			require.Empty(t, more)
			require.Equal(t, tc.first, first)
		})
	}
	for name, p := range map[string]plan{
		"no-branches": {},
		"comma":       {branches: []union.Branch{{Path: "/a,b"}}},
		"colon":       {branches: []union.Branch{{Path: "/a"}, {Path: "/a:b"}}},
		"equals":      {branches: []union.Branch{{Path: "/a=b"}}},
		"NUL":         {branches: []union.Branch{{Path: "/a\x00b"}}},
		"label":       {branches: stackOf(1, "/d/%d"), label: `a"b`},
		"too-long":    {branches: []union.Branch{{Path: "/" + strings.Repeat("x", pageSize)}}},
		"too-long-below": {branches: []union.Branch{
			{Path: "/a"}, {Path: "/" + strings.Repeat("x", pageSize)},
		}},
	} {
		t.Run("refuse-"+name, func(t *testing.T) {
			_, _, err := kernelData(p, settings{})
			require.Error(t, err)
		})
	}
}

// TestKernelDataPages: whatever does not fit into a page is appended, in order,
// each remount as full as it can be.
func TestKernelDataPages(t *testing.T) {
	s := settings{udba: union.None, xino: "/dev/shm/aufs.xino", dirPerm1: true}
	for _, n := range []int{1, 30, 31, 60, 127, 500} {
		for _, format := range []string{"/d/%d", "/var/lib/layers/aufs/diff/" + strings.Repeat("f", 64) + "%04d"} {
			p := plan{branches: stackOf(n, format)}
			first, more, err := kernelData(p, s)
			require.NoError(t, err)
			list, options, _ := strings.Cut(first, ",")
			require.Equal(t, "dirperm1,xino=/dev/shm/aufs.xino,udba=none", options)
			told := strings.Split(strings.TrimPrefix(list, "br:"), ":")
			require.Less(t, len(first), pageSize)
			for i, data := range more {
				require.Less(t, len(data), pageSize)
				verbs := strings.Split(data, ",")
				if i < len(more)-1 {
					next, _, _ := strings.Cut(more[i+1], ",")
					require.GreaterOrEqual(t, len(data)+1+len(next), pageSize, "another verb would have fitted")
				}
				for _, v := range verbs {
					branch, ok := strings.CutPrefix(v, "append:")
					require.True(t, ok)
					told = append(told, branch)
				}
			}
			require.Len(t, told, n)
			for i, text := range told {
				b, err := parseBranch(text)
				require.NoError(t, err)
				require.Equal(t, p.branches[i], b)
			}
		}
	}
}

func TestVerb(t *testing.T) {
	b := union.Branch{Path: "/x", Perm: union.ROWH}
	for want, v := range map[string]verb{
		"add:0:/x=ro+wh":  {op: "add", Branch: b},
		"add:3:/x=ro":     {op: "add", at: 3, Branch: union.Branch{Path: "/x"}},
		"append:/x=ro+wh": {op: "append", Branch: b},
		"mod:/x=rw":       {op: "mod", Branch: union.Branch{Path: "/x", Perm: union.RW}},
		"del:/x":          {op: "del", Branch: b},
	} {
		got, err := v.data()
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := verb{op: "nonsense", Branch: b}.data()
	require.Error(t, err)
	_, err = verb{op: "del", Branch: union.Branch{Path: "/a,del:/b"}}.data()
	require.Error(t, err)
}

func TestParseBranch(t *testing.T) {
	for text, want := range map[string]union.Branch{
		"/a=rw\n":             {Path: "/a", Perm: union.RW},
		"/a=rw+nolwh\n":       {Path: "/a", Perm: union.RW},
		"/a=ro":               {Path: "/a", Perm: union.RO},
		"/a=ro+wh":            {Path: "/a", Perm: union.ROWH},
		"/a=rr+wh+icex\n":     {Path: "/a", Perm: union.ROWH},
		"/a=rr\n":             {Path: "/a", Perm: union.RR},
		"/with=sign,:x=ro+wh": {Path: "/with=sign,:x", Perm: union.ROWH},
	} {
		got, err := parseBranch(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got)
	}
	for _, text := range []string{"", "=rw", "/a", "/a=", "/a=xx", "/a\n/b=rw"} {
		_, err := parseBranch(text)
		require.Error(t, err, "%q", text)
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]int{"br0": 0, "br126": 126, "brid0": -1, "br": -1, "br-1": -1, "br+1": -1, "xi_path": -1} {
		n, ok := parseBranchName(text)
		require.Equal(t, want >= 0, ok, text)
		if ok {
			require.Equal(t, want, n)
		}
	}
	for text, want := range map[string]string{
		"rw,si=9aac41967ae8dbc4":         "9aac41967ae8dbc4",
		"rw,relatime,si=1f,dio,dirperm1": "1f",
		"rw,xi=3,si=zz":                  "",
		"rw,nosi=1":                      "",
		"":                               "",
	} {
		id, ok := superID(text)
		require.Equal(t, want != "", ok, text)
		if ok {
			require.Equal(t, want, id)
		}
	}
	for text, want := range map[string]uint64{"12.34": 12, "18446744073709551615.1": 1<<64 - 1, "12": 0, "a.1": 0, "1.b": 0, ".": 0} {
		ino, ok := parsePlink(text)
		require.Equal(t, want != 0, ok, text)
		if ok {
			require.Equal(t, want, ino)
		}
	}
	const list = "nodev\tsysfs\nnodev\taufs\n\text4\n"
	require.True(t, hasFS(list, "aufs"))
	require.True(t, hasFS(list, "ext4"))
	require.False(t, hasFS(list, "nodev"))
	require.False(t, hasFS("nodev\taufs2\n", "aufs"))
}

func TestServer(t *testing.T) {
	ns, pid, ok := parseSource(serverSource(4026531836, 77))
	require.True(t, ok)
	require.Equal(t, uint64(4026531836), ns)
	require.Equal(t, 77, pid)
	for _, s := range []string{"", "aufs", "aufs:", "aufs:1", "aufs:x:1", "aufs:1:x", "aufs:1:0", "aufs:1:-3", "union:1:2"} {
		_, _, ok := parseSource(s)
		require.False(t, ok, s)
	}
	const status = "Name:\taufs.test\nState:\t%s\nTgid:\t7\nSigPnd:\t%s\nShdPnd:\t%s\nSigBlk:\t0000000000000100\n"
	const none, usr1, kill = "0000000000000000", "0000000000000200", "0000000000000100"
	for _, tc := range []struct {
		state, own, shared string
		dead               bool
	}{
		{"S (sleeping)", none, none, false},
		{"T (stopped)", usr1, usr1, false},
		{"Z (zombie)", none, none, true},
		{"X (dead)", none, none, true},
		{"D (disk sleep)", kill, none, true},
		{"D (disk sleep)", none, kill, true},
	} {
		require.Equal(t, tc.dead, statusDead(fmt.Sprintf(status, tc.state, tc.own, tc.shared)), "%+v", tc)
	}
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"durability": {Durability: 9},
		"engine":     {Engine: "xfs"},
		"udba":       {UDBA: "sometimes"},
		"dirperm1":   {DirPerm1: "yes"},
		"live":       {LiveBase: true, UDBA: union.None},
		"quota":      {Quota: layerfs.Quota{Bytes: -1}},
		"xino":       {XIno: "relative"},
		"xino-comma": {XIno: "/a,b"},
	} {
		t.Run(name, func(t *testing.T) { require.Error(t, o.validate()) })
	}
	both := (&Options{UDBA: "x", DirPerm1: "y"}).validate()
	require.ErrorContains(t, both, "UDBA")
	require.ErrorContains(t, both, "DirPerm1")
	for name, tc := range map[string]struct {
		o            Options
		kernel, fuse bool
	}{
		"default":     {Options{}, true, true},
		"strict":      {Options{UDBA: union.Strict}, false, true},
		"live-reval":  {Options{LiveBase: true, UDBA: union.Reval}, false, true},
		"live-notify": {Options{LiveBase: true, UDBA: union.Notify}, true, true},
		"xino":        {Options{XIno: "/dev/shm/x"}, true, false},
		"dirperm1":    {Options{DirPerm1: "on"}, true, true},
		"nodirperm1":  {Options{DirPerm1: "off"}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			for e, can := range map[Engine]bool{Kernel: tc.kernel, FUSE: tc.fuse} {
				err := tc.o.excludes(e)
				require.Equal(t, can, err == nil, "%s: %v", e, err)
				require.True(t, can || errors.Is(err, errors.ErrUnsupported))
			}
		})
	}
}
