package fusesrv

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// reopen opens the state as another process would, without the first one's
// knowledge.
func reopen(t testing.TB, f *os.File) *State {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	s, err := OpenState(os.NewFile(uintptr(fd), "copy"))
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

type entry struct {
	count   uint64
	payload string
}

func content(s *State) map[stateKey]entry {
	m := map[stateKey]entry{}
	for _, kind := range []byte{kindMeta, kindInode, kindHandle} {
		s.each(kind, func(num, count uint64, b []byte) { m[stateKey{kind, num}] = entry{count, string(b)} })
	}
	return m
}

// TestState does the same to a state and to a map; another process finds in the
// memfd what the map has, also after it has grown many times.
func TestState(t *testing.T) {
	s, err := NewState()
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	kept := s.f
	replaced := 0
	s.OnReplace(func(f *os.File) error { kept, replaced = f, replaced+1; return nil })
	want := map[stateKey]entry{}
	r := rand.New(rand.NewPCG(3, 4))
	for step := range 40000 {
		kind := []byte{kindInode, kindHandle}[r.IntN(2)]
		k := stateKey{kind, uint64(r.IntN(1 + step/20))}
		switch r.IntN(4) {
		case 0:
			s.del(k.kind, k.num)
			delete(want, k)
		case 1:
			if e, ok := want[k]; ok {
				e.count = r.Uint64()
				s.count(k.kind, k.num, e.count)
				want[k] = e
			}
		default:
			head, tail := fmt.Sprint("h", step), fmt.Sprint(r.Uint64())[:r.IntN(10)]
			s.put(k.kind, k.num, uint64(step), []byte(head), tail)
			want[k] = entry{uint64(step), head + tail}
		}
		if step%8000 == 0 {
			require.Equal(t, want, content(reopen(t, kept)), "step %d", step)
		}
	}
	require.NoError(t, s.Err())
	require.Greater(t, replaced, 3)
	require.NoError(t, s.SetMeta([]byte("meta")))
	after := reopen(t, kept)
	assert.Equal(t, "meta", string(after.Meta()))
	want[stateKey{kindMeta, 0}] = entry{0, "meta"}
	assert.Equal(t, want, content(after))
}

// TestStateTorn: a process may be killed with a record half written. What was
// there before is there, and the half is not.
func TestStateTorn(t *testing.T) {
	s, err := NewState()
	require.NoError(t, err)
	defer s.Close()
	s.put(kindInode, 1, 7, []byte("first"), "")
	end := s.end
	s.put(kindInode, 1, 8, []byte("second"), "longer")
	whole := append([]byte(nil), s.m[end:s.end]...)
	for cut := range len(whole) {
		// Any order of the stores.
		for _, tail := range []bool{false, true} {
			part := make([]byte, len(whole))
			if tail {
				copy(part[cut:], whole[cut:])
			} else {
				copy(part, whole[:cut])
			}
			copy(s.m[end:], part)
			s.m[stateHead+24] = kindInode // not yet superseded
			got := content(reopen(t, s.f))
			e := got[stateKey{kindInode, 1}]
			ok := e == entry{7, "first"} || e.payload == "secondlonger"
			require.True(t, ok && len(got) == 1, "%v after %d, tail %v", got, cut, tail)
		}
	}
}

// TestStateWithout: a state that cannot be kept says so, and whoever comes later
// finds none rather than an old one.
func TestStateWithout(t *testing.T) {
	s, err := NewState()
	require.NoError(t, err)
	defer s.Close()
	lost := errors.New("the keeper does not answer")
	s.OnReplace(func(*os.File) error { return lost })
	var told []error
	s.OnFail(func(err error) { told = append(told, err) })
	for i := uint64(0); s.Err() == nil && i < 10000; i++ {
		s.put(kindInode, i, 1, make([]byte, 40), "name")
	}
	require.ErrorIs(t, s.Err(), lost)
	assert.Empty(t, content(reopen(t, s.f)))
	require.Equal(t, []error{lost}, told)
	s.OnFail(func(err error) { told = append(told, err) }) // too late to be told first
	require.Equal(t, []error{lost, lost}, told)
	s.put(kindInode, 1, 1, nil, "")
	s.count(kindInode, 1, 2)
	s.del(kindInode, 1)
	assert.Empty(t, content(reopen(t, s.f)))
	require.ErrorIs(t, s.SetMeta(nil), lost)
}

// TestStateVersion: the state of a later program is left alone, and what is none
// is not read.
func TestStateVersion(t *testing.T) {
	s, err := NewState()
	require.NoError(t, err)
	defer s.Close()
	s.put(kindInode, 5, 1, []byte("head"), "name")
	want := content(s)
	require.Len(t, want, 1)
	require.Equal(t, want, content(reopen(t, s.f)))
	refused := func() error {
		fd, err := unix.FcntlInt(s.f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		require.NoError(t, err)
		_, err = OpenState(os.NewFile(uintptr(fd), "copy"))
		require.Error(t, err)
		_, cerr := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		require.ErrorIs(t, cerr, unix.EBADF)
		return err
	}
	s.m[stateHead-1]++
	require.ErrorIs(t, refused(), ErrLaterState)
	s.m[0]++
	require.NotErrorIs(t, refused(), ErrLaterState)
	s.m[0]--
	s.m[stateHead-1]--
	require.Equal(t, want, content(reopen(t, s.f)))
}

// FuzzOpenState: whatever is in the memfd, opening it does not fail badly.
func FuzzOpenState(f *testing.F) {
	s, err := NewState()
	require.NoError(f, err)
	s.put(kindInode, 5, 1, make([]byte, savedHead), "name")
	s.put(kindHandle, 6, 0, make([]byte, 16), "")
	f.Add(append([]byte(nil), s.m[stateHead:s.end+64]...))
	f.Add([]byte{})
	require.NoError(f, s.Close())
	f.Fuzz(func(t *testing.T, b []byte) {
		file, m, err := stateFile(stateMin)
		require.NoError(t, err)
		copy(m[stateHead:], b)
		require.NoError(t, unix.Munmap(m))
		s, err := OpenState(file)
		require.NoError(t, err)
		s.each(kindInode, func(_, _ uint64, b []byte) { loadInode(b) })
		before := content(s)
		s.put(kindInode, 1, 2, []byte("new"), "")
		if s.Err() == nil {
			before[stateKey{kindInode, 1}] = entry{2, "new"}
			require.Equal(t, before, content(s))
		}
		require.NoError(t, s.Close())
	})
}

// BenchmarkState is what a file that comes and goes costs: a record made, its
// counter changed, and deleted.
func BenchmarkState(b *testing.B) {
	s, err := NewState()
	require.NoError(b, err)
	defer s.Close()
	var head [savedHead]byte
	for i := uint64(0); b.Loop(); i++ {
		s.put(kindInode, i, 1, head[:], "a-name-of-a-file")
		s.count(kindInode, i, 2)
		if i >= 1000 {
			s.del(kindInode, i-1000)
		}
	}
	require.NoError(b, s.Err())
}
