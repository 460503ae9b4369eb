package watch

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// mask are the changes that can alter what a union shows. IN_EXCL_UNLINK
// spares events of files that have no name any more.
const mask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_MODIFY |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

// An Event is one change of a watched directory.
type Event struct {
	Token any    // what the directory was added with
	Name  string // the entry; "" for the directory itself
	Names bool   // the entry came, went or was renamed; otherwise it changed
}

// A Handler gets a client's events, in their order, on the hub's goroutine. It
// must not block, nor call the hub.
type Handler interface {
	Event(Event)
	// Lost says that events were dropped: anything may have changed.
	Lost()
}

// A Hub owns an inotify instance. Its methods are safe for concurrent use.
type Hub struct {
	f  *os.File
	fd int

	mu      sync.Mutex // guards what follows; never held over a Handler call
	dirs    map[int32]*dir
	clients map[*Client]bool
	bars    map[int32]chan struct{}
	closed  bool
	done    chan struct{}
}

type sub struct {
	c     *Client
	token any
}

type dir struct{ subs []sub }

// A Client is one receiver of events.
type Client struct {
	hub   *Hub
	h     Handler
	byTok map[any][]int32 // guarded by hub.mu
}

// New starts a hub.
func New() (*Hub, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	h := &Hub{
		f: os.NewFile(uintptr(fd), "inotify"), fd: fd,
		dirs: map[int32]*dir{}, clients: map[*Client]bool{}, bars: map[int32]chan struct{}{}, done: make(chan struct{}),
	}
	go h.loop()
	return h, nil
}

// Close ends the hub; clients get no more events.
func (h *Hub) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	err := h.f.Close()
	<-h.done
	return err
}

// Client adds a receiver.
func (h *Hub) Client(handler Handler) *Client {
	c := &Client{hub: h, h: handler, byTok: map[any][]int32{}}
	h.mu.Lock()
	h.clients[c] = true
	h.mu.Unlock()
	return c
}

// Close removes the client and its watches.
func (c *Client) Close() {
	c.hub.mu.Lock()
	defer c.hub.mu.Unlock()
	for tok := range c.byTok {
		c.remove(tok)
	}
	delete(c.hub.clients, c)
}

// Add watches the directory open as fd. Events carry token, which may have
// several directories.
func (c *Client) Add(token any, fd int) error {
	h := c.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	wd, err := unix.InotifyAddWatch(h.fd, "/proc/self/fd/"+strconv.Itoa(fd), mask)
	if err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	d := h.dirs[int32(wd)]
	if d == nil {
		d = &dir{}
		h.dirs[int32(wd)] = d
	}
	s := sub{c, token}
	for _, o := range d.subs {
		if o == s {
			return nil
		}
	}
	d.subs = append(d.subs, s)
	c.byTok[token] = append(c.byTok[token], int32(wd))
	return nil
}

// Remove ends the watches of token.
func (c *Client) Remove(token any) {
	c.hub.mu.Lock()
	defer c.hub.mu.Unlock()
	c.remove(token)
}

func (c *Client) remove(token any) {
	h := c.hub
	for _, wd := range c.byTok[token] {
		d := h.dirs[wd]
		if d == nil {
			continue
		}
		for i, s := range d.subs {
			if s.c == c && s.token == token {
				d.subs = append(d.subs[:i:i], d.subs[i+1:]...)
				break
			}
		}
		if len(d.subs) == 0 {
			delete(h.dirs, wd)
			if !h.closed {
				unix.InotifyRmWatch(h.fd, uint32(wd))
			}
		}
	}
	delete(c.byTok, token)
}

// Watches returns how many directories are watched.
func (h *Hub) Watches() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.dirs)
}

// Barrier returns when the handlers were told of all changes that happened
// before it was called. It sends a marker through the queue of events:
// removing a watch queues IN_IGNORED behind what is there.
func (h *Hub) Barrier(ctx context.Context) error {
	m, err := unix.MemfdCreate("barrier", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	defer unix.Close(m)
	reached := make(chan struct{})
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return os.ErrClosed
	}
	wd, err := unix.InotifyAddWatch(h.fd, "/proc/self/fd/"+strconv.Itoa(m), unix.IN_ATTRIB)
	if err == nil {
		h.bars[int32(wd)] = reached
		_, err = unix.InotifyRmWatch(h.fd, uint32(wd))
	}
	h.mu.Unlock()
	if err != nil {
		return os.NewSyscallError("inotify", err)
	}
	select {
	case <-reached:
		return nil
	case <-h.done:
		return os.ErrClosed
	case <-ctx.Done():
		h.mu.Lock()
		delete(h.bars, int32(wd))
		h.mu.Unlock()
		return ctx.Err()
	}
}

func (h *Hub) loop() {
	defer close(h.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := h.f.Read(buf)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		h.dispatch(buf[:n])
	}
}

// dispatch reads struct inotify_event: s32 wd, u32 mask, u32 cookie, u32 len,
// name.
func (h *Hub) dispatch(b []byte) {
	var subs []sub
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		m := binary.NativeEndian.Uint32(b[4:])
		l := int(binary.NativeEndian.Uint32(b[12:]))
		if unix.SizeofInotifyEvent+l > len(b) {
			return
		}
		name := b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+l]
		b = b[unix.SizeofInotifyEvent+l:]
		for i, c := range name {
			if c == 0 {
				name = name[:i]
				break
			}
		}
		subs = subs[:0]
		h.mu.Lock()
		if m&unix.IN_Q_OVERFLOW != 0 {
			// A barrier's marker may be among what was dropped.
			bars := h.bars
			h.bars = map[int32]chan struct{}{}
			var cs []*Client
			for c := range h.clients {
				cs = append(cs, c)
			}
			h.mu.Unlock()
			for _, c := range cs {
				c.h.Lost()
			}
			for _, b := range bars {
				close(b)
			}
			continue
		}
		if m&unix.IN_IGNORED != 0 {
			if c := h.bars[wd]; c != nil {
				close(c)
				delete(h.bars, wd)
			}
			if d := h.dirs[wd]; d != nil {
				// The directory is gone.
				delete(h.dirs, wd)
			}
			h.mu.Unlock()
			continue
		}
		if d := h.dirs[wd]; d != nil {
			subs = append(subs, d.subs...)
		}
		h.mu.Unlock()
		e := Event{Name: string(name), Names: m&(unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO) != 0}
		for _, s := range subs {
			e.Token = s.token
			s.c.h.Event(e)
		}
	}
}
