package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// A Worker is what a worker process has of its keeper. Its methods are safe for
// concurrent use.
type Worker struct {
	dir    string
	socket *os.File
	lock   *os.File
	kept   []Item

	mu       sync.Mutex
	seq      uint64                   // guarded by mu
	waiting  map[uint64]chan struct{} // guarded by mu
	link     *link                    // to the keeper, nil without one; guarded by mu
	starting bool                     // there will be another link soon; guarded by mu
	changed  chan struct{}            // closed and replaced when link or starting change; guarded by mu
	duties   Duties                   // guarded by mu; set when ready is closed
	next     *link                    // whose keeper knows what comes next; guarded by mu

	ready   chan struct{}
	proving atomic.Bool

	closing sync.Once
	closed  chan struct{}

	// resendAfter is how long an answer of the keeper may take before it is
	// asked again, and silence before it is killed.
	resendAfter, silence time.Duration
}

// Duties are what a worker that is ready can be asked for.
type Duties struct {
	// Hand stores all that a worker after this one needs. It is called when
	// the keeper was killed and there is a new one, which has nothing; maybe
	// again while it runs, and while other things are stored.
	Hand func() error
	// Alive reports whether the worker does its work. If that is not so for
	// long, or there is no answer, it is killed and replaced. nil: always.
	Alive func() bool
}

// A link is a connection to a keeper.
type link struct {
	conn  *Conn
	pid   int
	kill  func() // kills the keeper
	lost  chan struct{}
	whole chan struct{} // closed when the keeper has all there is

	sending sync.Mutex // held while something is sent, within a deadline of its own

	mu       sync.Mutex
	drops    []string  // still to be sent, before all else; guarded by mu
	dropped  time.Time // when the last one was sent; guarded by mu
	dropping bool      // somebody sends them; guarded by mu
}

func newLink(conn *Conn, pid int, kill func()) *link {
	return &link{conn: conn, pid: pid, kill: kill, lost: make(chan struct{}), whole: make(chan struct{})}
}

// send sends a message after the drops that were queued before. If the keeper
// does not read, the error matches os.ErrDeadlineExceeded after a while.
func (l *link) send(m message, within time.Duration, fds ...int) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	if err := l.conn.c.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	if err := l.sendDrops(); err != nil {
		return err
	}
	return l.conn.Send(m, fds...)
}

// sendDropsWithin is send of nothing but the drops.
func (l *link) sendDropsWithin(within time.Duration) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	if err := l.conn.c.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	return l.sendDrops()
}

// sendDrops sends the queued drops; sending is held.
func (l *link) sendDrops() error {
	for {
		l.mu.Lock()
		if len(l.drops) == 0 {
			l.drops = nil
			l.mu.Unlock()
			return nil
		}
		name := l.drops[0]
		l.mu.Unlock()
		err := l.conn.Send(message{Op: opDrop, Name: name})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return err // it was not sent
		}
		l.mu.Lock()
		l.drops, l.dropped = l.drops[1:], time.Now()
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// An Item is what an earlier worker had stored.
type Item struct {
	Name string
	FDs  []int
	Conn int
}

func runWorker(dir string, work func(*Worker) error) error {
	// What else there is comes from whatever ran between keeper and worker.
	if err := sys.Inherited(workerLock, workerControl, workerSocket); err != nil {
		return err
	}
	control, err := NewConn(os.NewFile(workerControl, "control"))
	if err != nil {
		return err
	}
	pid := os.Getppid()
	l := newLink(control, pid, killer(pid))
	close(l.whole)
	w := newWorker(dir, os.NewFile(workerSocket, socketName), os.NewFile(workerLock, lockName), l)
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
	go w.tend(l)
	return work(w)
}

func newWorker(dir string, socket, lock *os.File, l *link) *Worker {
	return &Worker{
		dir: dir, socket: socket, lock: lock, link: l,
		waiting: map[uint64]chan struct{}{}, changed: make(chan struct{}), ready: make(chan struct{}), closed: make(chan struct{}),
		resendAfter: resendAfter, silence: silence,
	}
}

// killer returns what kills the parent of this process, and nobody who gets
// its number later.
func killer(pid int) func() {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil || os.Getppid() != pid {
		return func() {} // it has ended, or this is before Linux 5.3
	}
	return func() { _ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) }
}

// resendAfter is far more than a keeper needs for an answer.
const resendAfter = 3 * time.Second

// maxKeeperPause is the longest pause between keepers that end before they have
// all. Until then there is no protection, and a start costs little.
const maxKeeperPause = time.Second

// tend hears what keepers say, and replaces those that are killed.
func (w *Worker) tend(l *link) {
	defer func() {
		w.mu.Lock()
		w.set(nil, false)
		w.mu.Unlock()
	}()
	pause := time.Duration(0)
	for {
		if err := w.listen(l); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			say("keeper:", err)
			l.kill() // there must not be two
		}
		select {
		case <-l.whole:
			pause = 0
		default: // it may end for a reason of its own
		}
		w.mu.Lock()
		w.set(nil, w.isReady())
		w.mu.Unlock()
		close(l.lost)
		l.conn.Close()
		select {
		case <-w.ready: // what there is to keep is not known before
		case <-w.closed:
			return
		}
		for l = nil; l == nil; {
			select {
			case <-time.After(pause):
			case <-w.closed:
				return
			}
			pause = min(max(2*pause, minPause), maxKeeperPause)
			w.mu.Lock()
			w.set(nil, true)
			w.mu.Unlock()
			var err error
			if l, err = w.startKeeper(); err != nil {
				say("another keeper:", err)
			}
			w.mu.Lock()
			w.set(l, false)
			w.mu.Unlock()
		}
		say("the keeper was killed; there is another:", l.pid)
		go w.handOver(l)
	}
}

func (w *Worker) isReady() bool {
	select {
	case <-w.ready:
		return true
	default:
		return false
	}
}

// set changes the link; mu is held.
func (w *Worker) set(l *link, starting bool) {
	w.link, w.starting = l, starting
	close(w.changed)
	w.changed = make(chan struct{})
}

// startKeeper runs a keeper for this worker. It is a child, and is nobody's
// when the worker ends.
func (w *Worker) startKeeper() (*link, error) {
	mine, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	conn, err := NewConn(mine)
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		conn.Close()
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), null.Fd(), os.Stderr.Fd(), theirs.Fd(), 0, w.lock.Fd(), uintptr(pidfd)}
	// Not by os.File.Fd, which makes it block: this process goes on with it.
	raw, err := w.socket.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	var pid int
	cerr := raw.Control(func(fd uintptr) {
		files[workerSocket] = fd
		pid, _, err = syscall.StartProcess(self, []string{os.Args[0], Arg, roleAdopt, w.dir}, &syscall.ProcAttr{
			Dir: "/", Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
		})
	})
	if err = errors.Join(cerr, err); err != nil {
		conn.Close()
		return nil, fmt.Errorf("start keeper: %w", err)
	}
	p, err := os.FindProcess(pid)
	if err != nil { // it does not fail on Unix
		conn.Close()
		return nil, err
	}
	go func() { _, _ = p.Wait() }()
	return newLink(conn, pid, func() { _ = p.Kill() }), nil
}

// handOver gives a new keeper all there is.
func (w *Worker) handOver(l *link) {
	for {
		err := w.duties.Hand()
		select {
		case <-l.lost:
			return
		default:
		}
		if err == nil {
			close(l.whole)
			return
		}
		say("hand over to another keeper:", err)
		select {
		case <-l.lost:
			return
		case <-time.After(time.Second):
		}
	}
}

// listen hears what the keeper says, until there is nothing more: io.EOF if it
// has ended.
func (w *Worker) listen(l *link) error {
	for {
		var m message
		fds, err := l.conn.Recv(&m)
		if err != nil {
			return err
		}
		CloseAll(fds)
		switch m.Op {
		case opPing:
			if w.proving.CompareAndSwap(false, true) { // else it does not come to an end
				go w.prove(l)
			}
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

// prove tells the keeper that the worker is alive, if it is.
func (w *Worker) prove(l *link) {
	defer w.proving.Store(false)
	if w.isReady() && w.duties.Alive != nil && !w.duties.Alive() {
		return
	}
	_ = l.send(message{Op: opPong}, w.resendAfter)
}

// Dir returns the directory of the helper.
func (w *Worker) Dir() string { return w.dir }

// Keeper returns the number of the keeper's process, 0 if there is none.
func (w *Worker) Keeper() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.link == nil {
		return 0
	}
	return w.link.pid
}

// Kept returns what earlier workers stored. The descriptors are the caller's.
func (w *Worker) Kept() []Item { return w.kept }

// Store gives the keeper descriptors, whose numbers stay the caller's, instead
// of what it has under that name, and returns when it has them. conn is 0, or
// the number of a FUSE connection whose device comes first.
func (w *Worker) Store(name string, conn int, fds ...int) error {
	return withoutKeeper(w.tell(message{Op: opStore, Name: name, Conn: conn}, fds...))
}

// current returns the link, and waits for one that comes soon.
func (w *Worker) current() (*link, error) {
	for {
		w.mu.Lock()
		l, starting, changed := w.link, w.starting, w.changed
		w.mu.Unlock()
		if l != nil {
			return l, nil
		}
		if !starting {
			return nil, ErrNoKeeper
		}
		<-changed
	}
}

// tell sends a message and waits until the keeper has done what it says: the
// next one, if it is killed before it says so. What is told may be done twice.
// The error matches ErrNoKeeper if there is none.
func (w *Worker) tell(m message, fds ...int) error {
	for {
		l, err := w.current()
		if err != nil {
			return err
		}
		if err = w.tellOn(l, m, fds...); !errors.Is(err, ErrNoKeeper) {
			return err
		}
		<-l.lost
	}
}

// tellOn is tell with one keeper.
func (w *Worker) tellOn(l *link, m message, fds ...int) error {
	done := make(chan struct{})
	w.mu.Lock()
	w.seq++
	seq := w.seq
	w.waiting[seq] = done
	w.mu.Unlock()
	m.Seq = seq
	defer func() {
		w.mu.Lock()
		delete(w.waiting, seq)
		w.mu.Unlock()
	}()
	again := time.NewTicker(w.resendAfter)
	defer again.Stop()
	for began := time.Now(); ; {
		// One that does not read is found silent below.
		if err := l.send(m, w.resendAfter, fds...); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return noKeeper(err)
		}
		select {
		case <-done:
			return nil
		case <-l.lost:
			return ErrNoKeeper
		case <-again.C:
		}
		// An answer can be lost: a keeper does not wait for who does not read.
		w.killSilent(l, began)
	}
}

// killSilent kills a keeper that has done nothing since began, if that is long
// ago.
func (w *Worker) killSilent(l *link, began time.Time) {
	if time.Since(began) > w.silence {
		say("the keeper gives no sign of life")
		l.kill()
	}
}

// ErrNoKeeper says that the keeper of a worker has ended.
var ErrNoKeeper = errors.New("the helper has lost the process that would start it again")

func noKeeper(err error) error {
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN) || errors.Is(err, net.ErrClosed) {
		return ErrNoKeeper
	}
	return err
}

// withoutKeeper is the result of telling the keeper what to keep: if there is
// none, the next one will be told.
func withoutKeeper(err error) error {
	if errors.Is(err, ErrNoKeeper) {
		return nil
	}
	return err
}

// Drop makes the keeper close what it has under a name, and under names that
// begin with it and a slash, and returns when it has.
func (w *Worker) Drop(name string) error {
	return withoutKeeper(w.tell(message{Op: opDrop, Name: name}))
}

// DropLater is Drop that waits for nothing, so that it may be called with locks
// held. What is stored after it stays stored, under the same name too.
func (w *Worker) DropLater(name string) {
	w.mu.Lock()
	l := w.link
	w.mu.Unlock()
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drops = append(l.drops, name)
	if !l.dropping {
		l.dropping = true
		go w.drop(l)
	}
}

// drop sends the queued drops until there are none.
func (w *Worker) drop(l *link) {
	for began := time.Now(); ; {
		l.mu.Lock()
		left := len(l.drops)
		l.dropping = left > 0
		if l.dropped.After(began) {
			began = l.dropped
		}
		l.mu.Unlock()
		if left == 0 {
			return
		}
		err := l.sendDropsWithin(w.resendAfter)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.killSilent(l, began)
		case errors.Is(noKeeper(err), ErrNoKeeper):
			l.mu.Lock()
			l.drops, l.dropping = nil, false // the next one does not have them
			l.mu.Unlock()
			return
		default:
			say("drop:", err)
		}
	}
}

// Next names the program, with its first arguments, that replaces this worker
// when it ends with [ExitNext], and returns when the keeper knows. The error
// matches [ErrNoKeeper] if there is none that has all: the worker must not end
// then.
func (w *Worker) Next(argv []string) error {
	next := message{Op: opNext, Argv: argv}
	enough := time.NewTimer(w.silence)
	defer enough.Stop()
	for {
		l, err := w.current()
		if err != nil {
			return err
		}
		select {
		case <-l.whole:
		case <-l.lost:
			continue
		case <-enough.C:
			return ErrNoKeeper
		}
		err = w.tellOn(l, next)
		if errors.Is(err, ErrNoKeeper) {
			<-l.lost
			continue
		}
		if err == nil {
			w.mu.Lock()
			w.next = l
			w.mu.Unlock()
		}
		return err
	}
}

// Followed reports whether the keeper that Next told is still there, which
// starts the next worker.
func (w *Worker) Followed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next != nil && w.link == w.next
}

// Ready tells the keeper that the worker goes on with all that earlier ones
// stored. One that ends before is replaced after a pause.
func (w *Worker) Ready(d Duties) error {
	w.mu.Lock()
	w.duties = d
	w.mu.Unlock()
	close(w.ready)
	w.mu.Lock()
	l := w.link
	w.mu.Unlock()
	if l == nil {
		return nil // there will be one
	}
	return withoutKeeper(noKeeper(l.send(message{Op: opReady}, w.resendAfter)))
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
			say("calls wait:", err)
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
