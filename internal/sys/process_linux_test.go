package sys

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestEnvironment(t *testing.T) {
	all := []string{"HOME=/root", "PATH=/bin:/a=b", "TOKEN=x", "PATHS=/y", "OWN=1", "GODEBUG=", "EMPTY"}
	require.Equal(t, []string{"PATH=/bin:/a=b", "GODEBUG="}, Environment(all))
	require.Equal(t, []string{"PATH=/bin:/a=b", "OWN=1", "GODEBUG="}, Environment(all, "OWN"))
	require.Empty(t, Environment(nil, "OWN"))
}

func TestStrangers(t *testing.T) {
	f, err := os.Open("/")
	require.NoError(t, err)
	defer f.Close()
	stray, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 30)
	require.NoError(t, err)
	defer unix.Close(stray)
	found := func(from int) (fds []int) {
		require.NoError(t, Strangers(from, func(fd int) { fds = append(fds, fd) }))
		return fds
	}
	require.Contains(t, found(3), stray)
	require.NotContains(t, found(3), int(f.Fd()))
	require.Contains(t, found(stray), stray)
	require.NotContains(t, found(stray+1), stray)
	require.NoError(t, Strangers(stray, func(fd int) {
		if fd == stray {
			unix.CloseOnExec(fd)
		}
	}))
	require.NotContains(t, found(3), stray)
}
