package mount

import (
	"fmt"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	const first = `22 27 0:21 / /proc rw,relatime - proc proc rw`
	const last = `40 27 0:30 / /a\040b\134c\012 ro shared:5 master:1 - tmpfs a\040b rw,size=4k`
	for _, size := range []int{10, maxLine - 200, maxLine, 64 << 10, 300 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			long := `30 27 0:29 / /over rw - overlay overlay rw,lowerdir=` + strings.Repeat("/x", size/2)
			list, err := parse(strings.NewReader(first+"\n"+long+"\n"+last+"\n"), nil)
			require.NoError(t, err)
			require.Len(t, list, 3)
			assert.Equal(t, "/over", list[1].Mountpoint)
			assert.Equal(t, mountinfo.Info{
				ID: 40, Parent: 27, Minor: 30, Root: "/", Mountpoint: "/a b\\c\n", Options: "ro",
				Optional: "shared:5 master:1", FSType: "tmpfs", Source: "a b", VFSOptions: "rw,size=4k",
			}, list[2])
			assert.True(t, isShared(list[2].Optional))
			assert.False(t, isShared(list[1].Optional))
			assert.False(t, isShared("master:1 propagate_from:2 unbindable"))
		})
	}
	_, err := parse(strings.NewReader("garbage\n"), nil)
	require.Error(t, err)
	list, err := parse(strings.NewReader(""), nil)
	require.NoError(t, err)
	assert.Empty(t, list)
}

func TestListedAgreesWithQuery(t *testing.T) {
	for _, path := range []string{"/", "/proc", "/proc/sys", "/proc/self", t.TempDir()} {
		want, err := Query(path)
		require.NoError(t, err)
		got, err := listed(path)
		require.NoError(t, err)
		assert.Equal(t, want.MountPoint, got, path)
	}
}
