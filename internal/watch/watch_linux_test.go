package watch

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

type recorder struct {
	mu   sync.Mutex
	got  []string
	lost int
}

func (r *recorder) Event(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, fmt.Sprintf("%v %s %v", e.Token, e.Name, e.Names))
}

func (r *recorder) Lost() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost++
}

func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

func mustNew(t *testing.T) *Hub {
	h, err := New()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, h.Close()) })
	return h
}

func add(t *testing.T, c *Client, token any, dir string) {
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, c.Add(token, int(f.Fd())))
}

func TestEvents(t *testing.T) {
	h, dir := mustNew(t), t.TempDir()
	var a, b recorder
	ca, cb := h.Client(&a), h.Client(&b)
	add(t, ca, "one", dir)
	add(t, ca, "one", dir)
	add(t, cb, "two", dir)
	assert.Equal(t, 1, h.Watches())
	p := filepath.Join(dir, "x")
	require.NoError(t, os.WriteFile(p, []byte("1"), 0o600))
	require.NoError(t, h.Barrier(context.Background()))
	assert.Equal(t, []string{"one x true", "one x false"}, a.take())
	assert.Equal(t, []string{"two x true", "two x false"}, b.take())

	ca.Remove("one")
	require.NoError(t, os.Rename(p, p+"y"))
	require.NoError(t, h.Barrier(context.Background()))
	assert.Empty(t, a.take())
	assert.Equal(t, []string{"two x true", "two xy true"}, b.take())
	cb.Close()
	assert.Equal(t, 0, h.Watches())
}

// The queue holds fs.inotify.max_queued_events; what does not fit is told as
// lost, and a barrier still returns.
func TestOverflow(t *testing.T) {
	var max int
	s, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	require.NoError(t, err)
	_, err = fmt.Sscan(string(s), &max)
	require.NoError(t, err)
	if max > 1<<16 {
		t.Skipf("a queue of %d events takes too long to fill", max)
	}
	h, dir := mustNew(t), t.TempDir()
	block := &blocker{entered: make(chan struct{}), leave: make(chan struct{})}
	c := h.Client(block)
	add(t, c, 1, dir)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "first"), nil, 0o600))
	<-block.entered
	for i := range max/2 + 2000 {
		// Alternating names, since equal events in a row are merged.
		require.NoError(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o700))
		require.NoError(t, os.Remove(filepath.Join(dir, fmt.Sprint(i))))
	}
	close(block.leave)
	require.NoError(t, h.Barrier(context.Background()))
	block.mu.Lock()
	defer block.mu.Unlock()
	assert.Positive(t, block.lost)
}

type blocker struct {
	recorder
	once           sync.Once
	entered, leave chan struct{}
}

func (b *blocker) Event(Event) {
	b.once.Do(func() { close(b.entered) })
	<-b.leave
}

type lostFunc func()

func (lostFunc) Event(Event) {}
func (f lostFunc) Lost()     { f() }

// Whoever waits for a barrier must know of the loss when it returns.
func TestOverflowIsToldFirst(t *testing.T) {
	h := mustNew(t)
	reached := make(chan struct{})
	told := 0
	for range 2 {
		h.Client(lostFunc(func() {
			told++
			select {
			case <-reached:
				t.Error("the barrier was reached before")
			default:
			}
		}))
	}
	h.mu.Lock()
	h.bars[77] = reached
	h.mu.Unlock()
	event := make([]byte, unix.SizeofInotifyEvent)
	binary.NativeEndian.PutUint32(event, ^uint32(0))
	binary.NativeEndian.PutUint32(event[4:], unix.IN_Q_OVERFLOW)
	h.dispatch(event)
	assert.Equal(t, 2, told)
	select {
	case <-reached:
	default:
		t.Error("the barrier was not reached")
	}
	assert.Empty(t, h.bars)
}
