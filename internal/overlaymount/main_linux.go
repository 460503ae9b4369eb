package overlaymount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fusesrv"
	"github.com/layerfs/layerfs/internal/overlaymount/ask"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/unionfs"
)

// command is the first argument of the program when it is called by hand.
const command = "mount-overlay"

// Main is what the program does, and must be called first thing in main. It
// returns false if the arguments are not those of one of its commands. Else the
// program has played its part, with the given exit status: 2 for wrong usage.
func Main(args []string) (status int, program bool) {
	if len(args) < 2 {
		return 0, false
	}
	var err error
	switch args[1] {
	case ask.Start:
		err = start(args)
	case ask.Serve:
		err = serve()
	case command:
		var p *ask.Plan
		if p, err = ask.Parse(args[2:]); err != nil {
			status = 2
		} else {
			err = ask.Mount(context.Background(), ask.Self, p)
		}
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "layerfs: %s: %v\n", args[1], err)
		status = max(status, 1)
	}
	return status, true
}

// start runs the server, so that it is no child of the caller's.
func start(args []string) error {
	if len(args) != 3 {
		return errors.New("the argument is the target")
	}
	// What the caller had open, and somebody may wait for the end of, ends with
	// this process.
	if err := sys.Strangers(3, unix.CloseOnExec); err != nil {
		return err
	}
	var files []*os.File
	for _, fd := range []int{ask.ConnFD, ask.DeviceFD} {
		f := os.NewFile(uintptr(fd), "inherited")
		if f == nil {
			return os.ErrInvalid
		}
		files = append(files, f)
	}
	cmd := &exec.Cmd{
		Path: ask.Self, Args: []string{os.Args[0], ask.Serve, args[2]}, Dir: "/",
		Env: sys.Environment(os.Environ(), ask.StartedEnv), ExtraFiles: files, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// serve opens what the caller asks for, serves it when that has mounted it, and
// returns when the mount is gone.
func serve() error {
	conn := os.NewFile(ask.ConnFD, "caller")
	if conn == nil {
		return os.ErrInvalid
	}
	// The device must not block, for the server's poller; the caller's end may.
	if err := sys.Inherited(ask.DeviceFD, ask.DeviceFD); err != nil {
		return err
	}
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var req ask.Request
	if err := in.Decode(&req); err != nil {
		return err
	}
	logTo(req.Plan.Log)
	if err := answer(conn, in, out, &req); err != nil {
		return fmt.Errorf("%s %s: %w", time.Now().Format(time.RFC3339), req.Plan.Target, err)
	}
	return nil
}

// maxLog is the size of a log, in bytes, that the next server puts aside.
const maxLog = 1 << 20

// logTo makes a file what this process says to standard error, a panic included.
// One that cannot be had is no reason not to serve.
func logTo(path string) {
	if path == "" {
		return
	}
	f, err := sys.OpenLog(path, maxLog)
	if err != nil {
		return
	}
	defer f.Close()
	_ = unix.Dup3(int(f.Fd()), unix.Stderr, 0)
}

// newLog returns what the server of a mount tells things.
func newLog(p *ask.Plan) *slog.Logger {
	h := slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})
	return slog.New(h).With("target", p.Target)
}

// answer does what the caller asks for. The error is for the log.
func answer(conn *os.File, in *json.Decoder, out *json.Encoder, req *ask.Request) error {
	fs, err := open(&req.Plan)
	if err != nil {
		return tell(out, err)
	}
	srv, err := mounted(in, out, req, fs)
	if err != nil {
		return errors.Join(err, fs.Close())
	}
	if err := conn.Close(); err != nil {
		return err
	}
	<-srv.Done()
	return errors.Join(fs.FlushLinks(), fs.Close())
}

// tell answers with an error, which it returns if there is nobody who hears.
func tell(out *json.Encoder, err error) error {
	if oerr := out.Encode(ask.Failed(err)); oerr != nil {
		return errors.Join(err, oerr)
	}
	return nil
}

// mounted begins to serve. If the caller ends before it has mounted, there is
// nothing to be served; if it ends right after that, others will find the mount.
func mounted(in *json.Decoder, out *json.Encoder, req *ask.Request, fs *unionfs.FS) (*fusesrv.Server, error) {
	cfg := serverConfig(&req.Plan, fs)
	var a ask.Answer
	a.Mount.Source, a.Mount.FSType, a.Mount.Flags, a.Mount.Data = cfg.MountCall(req.Device)
	if err := out.Encode(a); err != nil {
		return nil, err
	}
	if err := in.Decode(new(bool)); err != nil {
		return nil, err
	}
	srv, err := fusesrv.Serve(cfg, ask.DeviceFD)
	if err != nil {
		return nil, errors.Join(err, tell(out, err))
	}
	_ = out.Encode(ask.Answer{}) // the kernel tells when it is to end, not the caller
	return srv, nil
}

// busyFor is how long a mount waits for the one before it, which lets go of the
// upper directory a moment after it was unmounted.
const busyFor = 5 * time.Second

// open opens what the caller asks for, as long as there is one: nobody looks
// after a server that changes the upper directory later.
func open(p *ask.Plan) (*unionfs.FS, error) {
	end := time.Now().Add(busyFor)
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if err := called(); err != nil {
			return nil, err
		}
		fs, _, err := unionfs.Open(engineConfig(p))
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fs, err
		}
		time.Sleep(wait)
	}
}

// called fails if the caller has ended.
func called() error {
	poll := []unix.PollFd{{Fd: ask.ConnFD, Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(poll, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n > 0:
			return errors.New("the caller has ended")
		}
		return nil
	}
}

// engineConfig is the union of a plan.
func engineConfig(p *ask.Plan) *unionfs.Config {
	c := &unionfs.Config{Format: unionfs.Overlay{User: p.UserXattr}, Logger: newLog(p)}
	if p.Upper != "" {
		perm := unionfs.RW
		if p.ReadOnly {
			perm = unionfs.ROWH
		}
		c.Branches = append(c.Branches, unionfs.BranchSpec{Path: p.Upper, Perm: perm})
	}
	for _, dir := range p.Lowers {
		c.Branches = append(c.Branches, unionfs.BranchSpec{Path: dir, Perm: unionfs.ROWH})
	}
	return c
}

// serverConfig is how it is served.
func serverConfig(p *ask.Plan, fs *unionfs.FS) fusesrv.Config {
	return fusesrv.Config{
		FS: fs, Target: p.Target,
		UDBA:     fusesrv.None, // lower directories of an overlay do not change
		ReadOnly: p.ReadOnly || p.Upper == "",
		NoSuid:   p.NoSuid, NoDev: p.NoDev, NoExec: p.NoExec,
		Source: "overlay", Logger: newLog(p),
	}
}
