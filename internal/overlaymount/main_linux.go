package overlaymount

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// The commands, each the first argument of the program.
const (
	command = "mount-overlay"
	server  = command + "-serve" // started by the other one
)

// self is the program that runs, even if its file was replaced or removed.
const self = "/proc/self/exe"

// answerFD is the descriptor that a server answers on: a broken pipe on one of
// the first three would end it, see package os/signal.
const answerFD = 3

// answer is what a server says once.
type answer struct{ Error string }

// Main is what the program does, and must be called first thing in main. It
// returns false if the arguments are not those of the command. Else the program
// has played its part, with the given exit status: 2 for wrong usage.
func Main(args []string) (status int, program bool) {
	if len(args) < 2 {
		return 0, false
	}
	switch args[1] {
	case server:
		if err := serve(); err != nil {
			return 1, true
		}
		return 0, true
	case command:
	default:
		return 0, false
	}
	p, err := parse(args[2:])
	if err != nil {
		status = 2
	} else if err = start(p); err != nil {
		status = 1
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "layerfs: %s: %v\n", command, err)
	}
	return status, true
}

// start runs a server and returns when the mount is there.
func start(p *plan) (err error) {
	if err := p.absolute(); err != nil {
		return err
	}
	cmd := &exec.Cmd{
		Path: self, Args: []string{os.Args[0], server, p.Target}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return errors.Join(err, in.Close())
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	err = gob.NewEncoder(in).Encode(p)
	if err = errors.Join(err, in.Close()); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	var a answer
	if err := gob.NewDecoder(r).Decode(&a); err != nil {
		// It ended, as it holds the other end until then.
		return errors.Join(errors.New("the server gave no answer"), err, cmd.Wait())
	}
	if a.Error != "" {
		return errors.Join(errors.New(a.Error), ignoreExit(cmd.Wait()))
	}
	return cmd.Process.Release()
}

// ignoreExit is for a process that has told its error.
func ignoreExit(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// serve mounts what standard input has, says so, and returns when the mount is
// gone.
func serve() error {
	out := os.NewFile(answerFD, "answer")
	if out == nil {
		return os.ErrInvalid
	}
	unix.CloseOnExec(answerFD)
	h, err := mountPlan(os.Stdin)
	var a answer
	if err != nil {
		a.Error = err.Error()
	}
	werr := errors.Join(gob.NewEncoder(out).Encode(a), out.Close())
	if err != nil {
		return err
	}
	if werr != nil {
		// Whoever wanted the mount has gone, and does not know that it is there.
		werr = errors.Join(werr, h.Detach(context.Background()))
	}
	<-h.Done()
	return werr
}

// busyFor is how long a mount waits for the one before it, which lets go of the
// upper directory a moment after it was unmounted.
const busyFor = 5 * time.Second

func mountPlan(r io.Reader) (*union.Handle, error) {
	var p plan
	if err := gob.NewDecoder(r).Decode(&p); err != nil {
		return nil, err
	}
	end := time.Now().Add(busyFor)
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		h, err := union.Mount(context.Background(), p.Target, p.config())
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return h, err
		}
		time.Sleep(wait)
	}
}
