package unionhost

import (
	"log/slog"
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/keeper"
	"github.com/layerfs/layerfs/internal/unionfs"
)

// stateOf returns a descriptor of a state with a blob.
func stateOf(t *testing.T, blob []byte) (fd int) {
	t.Helper()
	s, err := fusesrv.NewState()
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.SetMeta(blob))
	require.NoError(t, s.Hand(func(f *os.File) (err error) {
		fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		return err
	}))
	return fd
}

// laterMeta is what a later version might have.
type laterMeta struct{ Version, Config int }

// laterState is a state that a later version of package fusesrv has made.
func laterState(t *testing.T) int {
	fd := stateOf(t, blob(t, meta{Version, Config{}}))
	var head [8]byte
	_, err := unix.Pread(fd, head[:], 0)
	require.NoError(t, err)
	head[7]++
	_, err = unix.Pwrite(fd, head[:], 0)
	require.NoError(t, err)
	return fd
}

func blob(t *testing.T, m any) []byte {
	t.Helper()
	b, err := keeper.Marshal(m)
	require.NoError(t, err)
	return b
}

// TestGoOnFails: what cannot go on keeps nothing open, so that the branches are
// free and their file systems can be unmounted.
func TestGoOnFails(t *testing.T) {
	empty := func(t *testing.T) int {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
		require.NoError(t, err)
		return fd
	}
	missing := Config{UDBA: "none", Branches: []Branch{{Path: "/nowhere/at/all", Perm: "rw"}}}
	watched := missing
	watched.UDBA = "notify"
	for name, tc := range map[string]struct {
		state func(*testing.T) int // nil: no state
		err   string
	}{
		"no state":       {nil, "no device and state"},
		"empty state":    {empty, "a state of 0 bytes"},
		"no blob":        {func(t *testing.T) int { return stateOf(t, nil) }, "state: "},
		"later version":  {func(t *testing.T) int { return stateOf(t, blob(t, meta{Version + 1, missing})) }, fusesrv.ErrLaterState.Error()},
		"later form":     {func(t *testing.T) int { return stateOf(t, blob(t, laterMeta{Version + 1, 3})) }, fusesrv.ErrLaterState.Error()},
		"later state":    {laterState, fusesrv.ErrLaterState.Error()},
		"no branch":      {func(t *testing.T) int { return stateOf(t, blob(t, meta{Version, missing})) }, "/nowhere/at/all"},
		"watched branch": {func(t *testing.T) int { return stateOf(t, blob(t, meta{Version, watched})) }, "/nowhere/at/all"},
	} {
		t.Run(name, func(t *testing.T) {
			var pipe [2]int
			require.NoError(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
			defer unix.Close(pipe[0])
			end := func() int {
				fd, err := unix.FcntlInt(uintptr(pipe[1]), unix.F_DUPFD_CLOEXEC, 0)
				require.NoError(t, err)
				return fd
			}
			it := keeper.Item{Name: "1", FDs: []int{end()}}
			if tc.state != nil {
				it.FDs = append(it.FDs, tc.state(t), end(), end())
			}
			kept := map[uint64]*os.File{1: os.NewFile(uintptr(end()), "kept")}
			require.NoError(t, unix.Close(pipe[1]))
			h := &host{log: slog.New(slog.DiscardHandler), unions: map[string]*union{}}
			require.ErrorContains(t, h.goOn(it, kept), tc.err)
			if h.hub != nil {
				require.NoError(t, h.hub.Close())
			}
			n, err := unix.Read(pipe[0], make([]byte, 1))
			assert.NoError(t, err, "something is still open")
			assert.Zero(t, n)
			if tc.state != nil {
				_, err = unix.FcntlInt(uintptr(it.FDs[1]), unix.F_GETFD, 0)
				assert.ErrorIs(t, err, unix.EBADF, "the state is still open")
			}
			assert.Empty(t, h.unions)
		})
	}
}

// TestStoreLocksFails: a state that cannot be handed over leaves no descriptor
// of a lock behind, with which the branch would stay locked.
func TestStoreLocksFails(t *testing.T) {
	perm, err := unionfs.ParsePerm("rw")
	require.NoError(t, err)
	fs, _, err := unionfs.Open(&unionfs.Config{Branches: []unionfs.BranchSpec{{Path: t.TempDir(), Perm: perm}}})
	require.NoError(t, err)
	locks, err := fs.Locks()
	require.NoError(t, err)
	require.NotEmpty(t, locks)
	keeper.CloseAll(locks)
	st, err := fusesrv.NewState()
	require.NoError(t, err)
	require.NoError(t, st.Close())
	before := descriptors(t)
	u := &union{fs: fs, st: st}
	require.ErrorIs(t, u.storeLocks(), os.ErrClosed)
	require.Equal(t, before, descriptors(t))
	require.NoError(t, fs.Close())
}

// descriptors returns how many this process has open.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	for fd := range 1 << 10 {
		if _, err := os.Lstat("/proc/self/fd/" + strconv.Itoa(fd)); err == nil {
			n++
		}
	}
	return n
}
