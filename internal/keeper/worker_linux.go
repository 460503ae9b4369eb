package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Worker is what a worker process has of its keeper. Its methods are safe for
// concurrent use.
type Worker struct {
	dir     string
	control *Conn
	socket  *os.File
	lock    *os.File
	kept    []Item

	mu      sync.Mutex
	seq     uint64                   // guarded by mu
	waiting map[uint64]chan struct{} // guarded by mu
	gone    chan struct{}            // closed when there is no keeper any more

	closing sync.Once
	closed  chan struct{}
}

// An Item is what an earlier worker had stored.
type Item struct {
	Name string
	FDs  []int
	Conn int
}

func runWorker(dir string, work func(*Worker) error) error {
	// Whoever passes a descriptor on may make it block.
	for _, fd := range []int{workerControl, workerSocket} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	for _, fd := range []int{workerControl, workerSocket, workerLock} {
		unix.CloseOnExec(fd)
	}
	// What else there is comes from whatever ran between keeper and worker.
	if err := strangers(workerLock+1, func(fd int) { unix.Close(fd) }); err != nil {
		return err
	}
	control, err := NewConn(os.NewFile(workerControl, "control"))
	if err != nil {
		return err
	}
	w := &Worker{
		dir: dir, control: control, socket: os.NewFile(workerSocket, socketName), lock: os.NewFile(workerLock, lockName),
		waiting: map[uint64]chan struct{}{}, gone: make(chan struct{}), closed: make(chan struct{}),
	}
	for {
		var m message
		fds, err := control.Recv(&m)
		if err != nil {
			return fmt.Errorf("what the keeper has: %w", err)
		}
		if m.Op == opGo {
			break
		}
		if m.Op == opItem {
			w.kept = append(w.kept, Item{m.Name, fds, m.Conn})
		}
	}
	go w.listen()
	return work(w)
}

// listen hears what the keeper says.
func (w *Worker) listen() {
	defer close(w.gone)
	for {
		var m message
		fds, err := w.control.Recv(&m)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "keeper:", err)
			}
			return
		}
		CloseAll(fds)
		switch m.Op {
		case opPing:
			_ = w.control.Send(message{Op: opPong})
		case opAck:
			w.mu.Lock()
			if c := w.waiting[m.Seq]; c != nil {
				close(c)
				delete(w.waiting, m.Seq)
			}
			w.mu.Unlock()
		}
	}
}

// Dir returns the directory of the helper.
func (w *Worker) Dir() string { return w.dir }

// Kept returns what earlier workers stored. The descriptors are the caller's.
func (w *Worker) Kept() []Item { return w.kept }

// Store gives the keeper descriptors, whose numbers stay the caller's, instead
// of what it has under that name, and returns when it has them. conn is 0, or
// the number of a FUSE connection whose device comes first.
func (w *Worker) Store(name string, conn int, fds ...int) error {
	return withoutKeeper(w.tell(message{Op: opStore, Name: name, Conn: conn}, fds...))
}

// tell sends a message and waits until the keeper has done what it says. The
// error matches ErrNoKeeper if that has ended.
func (w *Worker) tell(m message, fds ...int) error {
	done := make(chan struct{})
	w.mu.Lock()
	w.seq++
	seq := w.seq
	w.waiting[seq] = done
	w.mu.Unlock()
	m.Seq = seq
	if err := w.control.Send(m, fds...); err != nil {
		w.mu.Lock()
		delete(w.waiting, seq)
		w.mu.Unlock()
		return noKeeper(err)
	}
	select {
	case <-done:
		return nil
	case <-w.gone:
		return ErrNoKeeper
	}
}

// ErrNoKeeper says that the keeper of a worker has ended.
var ErrNoKeeper = errors.New("the helper has lost the process that would start it again")

func noKeeper(err error) error {
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN) {
		return ErrNoKeeper
	}
	return err
}

// withoutKeeper is the result of telling the keeper what to keep: if there is
// none any more, there is nothing to be done about it.
func withoutKeeper(err error) error {
	if errors.Is(err, ErrNoKeeper) {
		return nil
	}
	return err
}

// Alone reports whether the keeper has ended: who ends then is not followed by
// another worker.
func (w *Worker) Alone() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// Drop makes the keeper close what it has under a name, and under names that
// begin with it and a slash, and returns when it has.
func (w *Worker) Drop(name string) error {
	return withoutKeeper(w.tell(message{Op: opDrop, Name: name}))
}

// DropLater is Drop that does not wait.
func (w *Worker) DropLater(name string) error {
	return withoutKeeper(noKeeper(w.control.Send(message{Op: opDrop, Name: name})))
}

// Next names the program, with its first arguments, that replaces this worker
// when it ends with [ExitNext], and returns when the keeper knows. The error
// matches [ErrNoKeeper] if there is none: the worker must not end then.
func (w *Worker) Next(argv []string) error { return w.tell(message{Op: opNext, Argv: argv}) }

// Ready tells the keeper that the worker goes on with all that earlier ones
// stored. One that ends before is replaced after a pause.
func (w *Worker) Ready() error {
	return withoutKeeper(noKeeper(w.control.Send(message{Op: opReady})))
}

// Accept takes a call. While there is no descriptor or memory for one, calls
// wait. Close ends it; any error is for good.
func (w *Worker) Accept() (*Conn, error) {
	for {
		var call *os.File
		if err := w.patiently(func() (err error) {
			call, err = w.accept()
			return err
		}); err != nil {
			return nil, err
		}
		var c net.Conn
		err := w.patiently(func() (err error) {
			c, err = net.FileConn(call)
			return err
		})
		call.Close()
		if err != nil {
			continue // this one call failed
		}
		if u, ok := c.(*net.UnixConn); ok {
			return &Conn{u}, nil
		}
		c.Close()
	}
}

// patiently calls f until it does not fail for want of descriptors or memory,
// which others may give back, or w is closed.
func (w *Worker) patiently(f func() error) error {
	for told := false; ; told = true {
		err := f()
		if !scarce(err) {
			return err
		}
		if !told {
			fmt.Fprintln(os.Stderr, time.Now().Format(time.RFC3339), "calls wait:", err)
		}
		select {
		case <-w.closed:
			return os.ErrClosed
		case <-time.After(scarcePause):
		}
	}
}

const scarcePause = 100 * time.Millisecond

// scarce reports whether what failed may work later.
func scarce(err error) bool {
	for _, no := range []syscall.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ENOSPC} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

func (w *Worker) accept() (*os.File, error) {
	raw, err := w.socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	cerr := raw.Read(func(s uintptr) bool {
		fd, _, err = unix.Accept4(int(s), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return err != unix.EAGAIN && err != unix.ECONNABORTED && err != unix.EINTR
	})
	if cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, os.NewSyscallError("accept", err)
	}
	return os.NewFile(uintptr(fd), "call"), nil
}

// Close makes Accept return.
func (w *Worker) Close() error {
	w.closing.Do(func() { close(w.closed) })
	return w.socket.Close()
}
