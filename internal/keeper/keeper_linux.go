package keeper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/sys"
)

// Arg is the argument that makes a program a helper.
const Arg = "layerfs-helper"

// Roles of a helper, the argument behind Arg; then comes the directory.
const (
	roleStart   = "start"
	roleKeep    = "keep"
	roleAdopt   = "adopt" // keep, of a worker that runs already
	roleWork    = "work"
	roleVersion = "version" // tell Program.Version
)

const (
	lockName   = "lock"
	socketName = "socket"
	logName    = "log"
	maxLog     = 1 << 20

	// patience is how long a new keeper waits for an old one to end.
	patience = 10 * time.Second
	// pulse is how often a worker is asked for a sign of life, silence how long
	// it may take: far more than a busy host needs, since a worker that is
	// killed costs its clients a pause, too.
	pulse   = 5 * time.Second
	silence = 30 * time.Second
	// A worker that dies of its own fault faults times within faultTime is
	// not started again.
	faults    = 5
	faultTime = time.Minute
	// Between workers that end before they are ready there are pauses, the
	// first so short that a user notices nothing, each twice as long as the one
	// before: what kills them may be the want of memory for what they do.
	minPause = 10 * time.Millisecond
	maxPause = 5 * time.Second
)

// item is what a keeper has under a name.
type item struct {
	fds  []int
	conn int // number of a FUSE connection, or 0
}

// message goes between keeper and worker. Its form must stay: after an upgrade
// an old keeper has a new worker.
type message struct {
	Op   string // below
	Name string
	Conn int
	Seq  uint64
	Argv sys.ByteStrings
}

const (
	opItem  = "item"  // keeper: kept from earlier, with descriptors
	opGo    = "go"    // keeper: that was all
	opPing  = "ping"  // keeper
	opAck   = "ack"   // keeper: Seq is done
	opPong  = "pong"  // worker
	opStore = "store" // worker: with descriptors, replaces what is there
	opDrop  = "drop"  // worker
	opNext  = "next"  // worker: the program to run after this worker
	opReady = "ready" // worker: it goes on with what there was
)

// A Program is what a helper does.
type Program struct {
	Work func(*Worker) error
	// Version is that of what a worker stores: one of a lower version cannot
	// go on with it. See [Version].
	Version int
}

// Main is what a helper program does: it must be called first thing in main.
// It returns false if the arguments are not those of a helper. Else the program
// has played its part, with the given exit status.
func Main(args []string, p Program) (status int, helper bool) {
	if len(args) != 4 || args[1] != Arg {
		return 0, false
	}
	var err error
	dir := args[3]
	if args[2] != roleWork {
		// Whoever waits for what is printed may have gone: no reason to end.
		signal.Ignore(unix.SIGPIPE)
	}
	switch args[2] {
	case roleStart:
		err = start(dir)
	case roleKeep:
		err = keep(dir)
	case roleAdopt:
		err = adopt(dir)
	case roleWork:
		err = runWorker(dir, p.Work)
	case roleVersion:
		_, err = fmt.Println(p.Version)
	default:
		err = fmt.Errorf("role %q", args[2])
	}
	if err != nil {
		say(args[2], err)
		return 1, true
	}
	return 0, true
}

// say writes a line of the log.
func say(a ...any) {
	fmt.Fprintln(os.Stderr, append([]any{time.Now().Format(time.RFC3339)}, a...)...)
}

// self is the program that runs, even if its file was replaced or removed.
const self = "/proc/self/exe"

// ExitNext is the exit status of a worker that makes room for another.
const ExitNext = 10

// start runs a keeper and ends when that is ready.
func start(dir string) error {
	// What the program had open, and somebody may wait for the end of, ends
	// with this process.
	if err := sys.Strangers(3, unix.CloseOnExec); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	logFile, err := sys.OpenLog(filepath.Join(dir, logName), maxLog)
	if err != nil {
		w.Close()
		return err
	}
	defer logFile.Close()
	cmd := &exec.Cmd{
		Path: self, Args: []string{os.Args[0], Arg, roleKeep, dir}, Dir: "/", Env: sys.Environment(os.Environ(), helperEnv),
		Stdout: w, Stderr: logFile, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	told, err := io.ReadAll(r)
	if err == nil && string(told) != ready {
		err = fmt.Errorf("the keeper did not start: %s", told)
	}
	return err
}

const ready = "ready"

// trimLog moves what is in the log to log.old when it is long. Both processes
// have the file open, and append: so it is emptied and not replaced. What is
// written meanwhile may be lost. f is standard error, which may be something
// else.
func trimLog(dir string, f *os.File) error {
	path := filepath.Join(dir, logName)
	there, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil || !os.SameFile(fi, there) || fi.Size() <= maxLog {
		return err
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	// Its end, which tells what happened last.
	if _, err := from.Seek(-maxLog, io.SeekEnd); err != nil {
		return err
	}
	if err := os.Remove(path + ".old"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	to, err := os.OpenFile(path+".old", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	// Even if there is no room for a copy: more so then.
	return errors.Join(err, to.Close(), f.Truncate(0))
}

// keep is the keeper.
func keep(dir string) error {
	k, err := newKeeper(dir)
	if err != nil {
		fmt.Print(err)
		return err
	}
	if k == nil {
		fmt.Print(ready) // there is one
		return nil
	}
	defer k.close()
	first := func() {
		fmt.Print(ready)
		os.Stdout.Close() // whoever started us waits for the end of it
	}
	return k.run(nil, first)
}

// Descriptors that keeper and worker start with.
const (
	workerControl = 3 + iota
	workerSocket
	workerLock
	workerProcess // a keeper that adopts: of the worker's process
)

// goodPath is keeper.good in a worker that starts: behind its other descriptors.
const goodPath = "/proc/self/fd/6"

// adopt is a keeper in the place of one that was killed. The worker, which runs
// on, has started it and gives it all there is; the lock and the socket are the
// same as ever, so nobody else notices.
func adopt(dir string) error {
	if err := sys.Inherited(workerProcess, workerControl, workerSocket); err != nil {
		return err
	}
	conn, err := NewConn(os.NewFile(workerControl, "worker"))
	if err != nil {
		return err
	}
	k := &keeper{
		dir: dir, lock: os.NewFile(workerLock, lockName), socket: os.NewFile(workerSocket, socketName),
		start: own(dir), items: map[string]item{}, pulse: pulse, silence: silence,
	}
	defer k.close()
	w := &worker{
		conn: conn, prog: k.start, done: make(chan error, 1), given: true,
		kill: func() error { return unix.PidfdSendSignal(workerProcess, unix.SIGKILL, nil, 0) },
	}
	go func() { w.done <- ended(workerProcess) }()
	return k.run(w, nil)
}

// ended waits for the end of a process that is no child.
func ended(pidfd int) error {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
		switch err {
		case nil:
			return errEnded
		case unix.EINTR, unix.EAGAIN, unix.ENOMEM:
		default:
			return os.NewSyscallError("poll pidfd", err)
		}
	}
}

// A program is what a worker runs.
type program struct {
	path string
	argv []string // with the arguments of a worker
}

// own is the program of this process.
func own(dir string) program { return program{self, []string{self, Arg, roleWork, dir}} }

type keeper struct {
	dir    string
	lock   *os.File
	socket *os.File
	start  program // of the next worker
	// good is the program of the last worker that was ready, if it is another
	// than this.
	good           *os.File
	next           bool // the worker has said what comes after it
	ready          bool // the worker has come as far as to take calls
	pause          time.Duration
	items          map[string]item
	died           []time.Time // workers of their own fault
	pulse, silence time.Duration
}

// newKeeper takes the lock and makes the socket; nil if another keeper is at
// work.
func newKeeper(dir string) (*keeper, error) {
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	k := &keeper{
		dir: dir, lock: lock, start: own(dir), items: map[string]item{}, pulse: pulse, silence: silence,
	}
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		locked := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if locked == nil {
			break
		}
		c, err := connect(dir)
		if err == nil {
			c.Close()
		}
		if err == nil || errors.Is(err, unix.EAGAIN) {
			lock.Close()
			return nil, nil
		}
		if time.Now().After(end) {
			lock.Close()
			return nil, &os.PathError{Op: "flock", Path: lock.Name(), Err: locked}
		}
	}
	if k.socket, err = listen(dir); err != nil {
		lock.Close()
		return nil, err
	}
	return k, nil
}

func (k *keeper) close() {
	k.socket.Close()
	k.lock.Close()
	if k.good != nil {
		k.good.Close()
	}
	for _, it := range k.items {
		CloseAll(it.fds)
	}
}

// sockaddr is the address of the socket, which must fit into 108 bytes
// (unix(7)): through a descriptor of the directory it always does.
func sockaddr(dir *os.File) *unix.SockaddrUnix {
	return &unix.SockaddrUnix{Name: "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + socketName}
}

func listen(path string) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), socketName, 0); err != nil && err != unix.ENOENT {
		return nil, &os.PathError{Op: "unlink", Path: path + "/" + socketName, Err: err}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	if err = unix.Fchmod(fd, 0o600); err == nil { // before it has a name
		err = unix.Bind(fd, sockaddr(dir))
	}
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err != nil {
		f.Close()
		return nil, &os.PathError{Op: "listen", Path: path + "/" + socketName, Err: err}
	}
	return f, nil
}

// connect calls the worker. EAGAIN says that too many calls wait already.
func connect(path string) (*Conn, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, sockaddr(dir)); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: path + "/" + socketName, Err: err}
	}
	return NewConn(os.NewFile(uintptr(fd), "call"))
}

// run runs workers until one has nothing more to do, beginning with w, which may
// be nil. first is called when the first one has been started.
func (k *keeper) run(w *worker, first func()) error {
	for {
		var err error
		k.next = false
		if k.ready = w != nil; !k.ready {
			w, err = k.startWorker()
		}
		if first != nil {
			first()
			first = nil
		}
		if err == nil {
			err = k.attend(w)
			if (err == nil || err == errEnded) && len(k.items) == 0 { //nolint:errorlint // alone, and not with another
				return nil
			}
			if err == nil {
				err = errNotDone
			}
		}
		w = nil
		say("worker:", err)
		if k.hopeless(err) {
			return fmt.Errorf("the worker dies again and again: %w", errors.Join(err, k.abort()))
		}
		if k.ready {
			k.pause = 0
		} else {
			k.pause = min(max(2*k.pause, minPause), maxPause)
			time.Sleep(k.pause)
		}
	}
}

// hopeless reports whether to give up. Who is killed from outside can try
// again as often as that happens, and so can who does not get what is needed to
// start.
func (k *keeper) hopeless(err error) bool {
	if scarce(err) || errors.Is(err, unix.EAGAIN) { // of fork(2)
		return false
	}
	if errors.Is(err, errEnded) && !errors.Is(err, errSilent) {
		return false // for a reason that nobody knows
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && !errors.Is(err, errSilent) {
		ws, ok := exit.Sys().(syscall.WaitStatus)
		if ok && (ws.Signaled() && fromOutside(ws.Signal()) || k.next && ws.ExitStatus() == ExitNext) {
			return false
		}
	}
	// Not with the new program, then with the old: one that was never ready
	// may not know what another has stored, and one that was may have a fault
	// that the keeper's own has not.
	ready, start := k.ready, k.start.path
	k.start = own(k.dir)
	if !ready && k.good != nil && start != goodPath {
		k.start.path = goodPath
	}
	now := time.Now()
	k.died = append(k.died, now)
	if len(k.died) < faults {
		return false
	}
	k.died = k.died[len(k.died)-faults:]
	return now.Sub(k.died[0]) < faultTime
}

// fromOutside reports whether a signal that ended a worker was somebody's wish.
func fromOutside(s syscall.Signal) bool {
	switch s {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP:
		return true
	}
	return false
}

// abort ends all connections.
func (k *keeper) abort() error {
	var errs []error
	for _, it := range k.items {
		if it.conn != 0 && len(it.fds) > 0 && fusesrv.Connected(it.fds[0]) {
			errs = append(errs, fusesrv.Abort(it.conn))
		}
	}
	return errors.Join(errs...)
}

var (
	errEnded   = errors.New("it ended") // no child, which would tell how
	errSilent  = errors.New("it gives no sign of life")
	errNotDone = errors.New("it ended, but there was something to do") // maybe no worker at all
)

type worker struct {
	conn  *Conn
	prog  program
	child *os.Process // nil: it is none, and runs this program
	kill  func() error
	done  chan error
	given bool // it has what is kept, since that is from it
}

func (k *keeper) startWorker() (*worker, error) {
	mine, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	conn, err := NewConn(mine)
	if err != nil {
		theirs.Close()
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: k.start.path, Args: k.start.argv, Dir: "/", Stderr: os.Stderr,
		ExtraFiles: []*os.File{theirs, k.socket, k.lock},
	}
	if k.start.path == goodPath {
		cmd.ExtraFiles = append(cmd.ExtraFiles, k.good) // the worker closes it
	}
	err = cmd.Start()
	theirs.Close() // so that a send fails when the worker has died
	if err != nil {
		conn.Close()
		return nil, err
	}
	w := &worker{conn: conn, prog: k.start, child: cmd.Process, kill: cmd.Process.Kill, done: make(chan error, 1)}
	go func() { w.done <- cmd.Wait() }()
	return w, nil
}

// hand gives a worker what there is, and reports whether it could. A worker
// that does not read makes it wait until the connection is closed.
func (k *keeper) hand(w *worker) bool {
	for name, it := range k.items {
		if err := w.conn.Send(message{Op: opItem, Name: name, Conn: it.conn}, it.fds...); err != nil {
			return false
		}
	}
	return w.conn.Send(message{Op: opGo}) == nil
}

// attend serves a worker until it ends, and returns nil if it has nothing more
// to do.
func (k *keeper) attend(w *worker) error {
	handed := make(chan bool, 1)
	reads := false // it has read what there is
	if w.given {
		handed <- true
	} else {
		go func() { handed <- k.hand(w) }()
	}
	defer func() {
		w.conn.Close()
		if handed != nil {
			<-handed
		}
	}()
	type got struct {
		m   message
		fds []int
	}
	in := make(chan got)
	lost := make(chan struct{})
	go func() {
		defer close(lost)
		for {
			var g got
			var err error
			if g.fds, err = w.conn.Recv(&g.m); err != nil {
				return
			}
			in <- g
		}
	}()
	beat := time.NewTicker(k.pulse)
	defer beat.Stop()
	heard := time.Now()
	var killed time.Time
	for {
		// What a worker says before it has been given all has to wait: the items
		// are being read.
		var said chan got
		if handed == nil {
			said = in
		}
		select {
		case reads = <-handed:
			handed = nil
			heard = time.Now()
		case g := <-said:
			switch g.m.Op {
			case opPong, opReady, opNext:
				// Not what it stores: a part of it may work, and not the whole.
				heard = time.Now()
			}
			k.handle(w, g.m, g.fds)
		case err := <-w.done:
			// It has left nobody who has the other end open, unless it runs
			// programs: then the ends of sends and receives are not seen.
			_ = w.conn.SetDeadline(time.Now().Add(pulse))
			if handed != nil {
				<-handed
				handed = nil
			}
			// What it had still sent counts.
			for open := true; open; {
				select {
				case g := <-in:
					k.handle(w, g.m, g.fds)
				case <-lost:
					open = false
				}
			}
			if err != nil && !killed.IsZero() {
				return errors.Join(errSilent, err)
			}
			return err
		case <-beat.C:
			if err := trimLog(k.dir, os.Stderr); err != nil {
				say("log:", err)
			}
			switch {
			case time.Since(heard) < k.silence:
				if reads {
					w.tell(message{Op: opPing})
				}
			case killed.IsZero():
				killed = time.Now()
				_ = w.kill()
			case time.Since(killed) > k.pulse:
				// It waits in the kernel, maybe for a mount that waits for it.
				if err := k.abort(); err != nil {
					say("abort:", err)
				}
			}
		}
	}
}

// tell sends what needs no answer. A worker that does not listen must not keep
// the keeper.
func (w *worker) tell(m message) {
	_ = w.conn.c.SetWriteDeadline(time.Now().Add(time.Second))
	_ = w.conn.Send(m)
}

// proven notes that the program of a worker can do what it should. The next one
// is the very same, whatever happens to its file.
func (k *keeper) proven(w *worker) error {
	if w.child == nil || w.prog.path == goodPath {
		return nil
	}
	var good *os.File
	if w.prog.path != self {
		fd, err := unix.Open("/proc/"+strconv.Itoa(w.child.Pid)+"/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: w.prog.path, Err: err}
		}
		good = os.NewFile(uintptr(fd), w.prog.path)
		if w.child.Signal(syscall.Signal(0)) != nil {
			return good.Close() // it has ended, and this may be somebody else
		}
	}
	if k.good != nil {
		k.good.Close()
	}
	k.good, k.start = good, own(k.dir) // without what has started it
	if good != nil {
		k.start.path = goodPath
	}
	return nil
}

func (k *keeper) handle(w *worker, m message, fds []int) {
	switch m.Op {
	case opStore:
		old := k.items[m.Name]
		k.items[m.Name] = item{fds, m.Conn}
		fds = old.fds
	case opDrop:
		for name, it := range k.items {
			if name == m.Name || strings.HasPrefix(name, m.Name+"/") {
				fds = append(fds, it.fds...)
				delete(k.items, name)
			}
		}
	case opReady:
		k.ready = true
		if err := k.proven(w); err != nil {
			say("program of the worker:", err)
		}
	case opNext:
		k.next, k.ready = true, true
		if len(m.Argv) > 0 {
			k.start = program{m.Argv[0], append(m.Argv, Arg, roleWork, k.dir)}
		}
	}
	CloseAll(fds)
	if m.Seq != 0 {
		w.tell(message{Op: opAck, Seq: m.Seq})
	}
}
