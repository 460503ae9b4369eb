package ask

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
)

// The commands of the program, each its first argument; the second is the
// target.
const (
	Start = "mount-overlay-start" // runs the next one, and ends
	Serve = "mount-overlay-serve"
)

// Descriptors that both commands are started with.
const (
	ConnFD   = 3 + iota // a stream socket to the caller
	DeviceFD            // /dev/fuse, which the caller mounts
)

// A Request is what the caller says first. Then it says true: the device is
// mounted.
type Request struct {
	Plan   Plan
	Device int // number of the device's descriptor in the caller
}

// An Answer comes for both.
type Answer struct {
	Error string
	Errno syscall.Errno // that Error comes from, 0 for none
	Mount Call          // the first one: how to mount
}

// Failed is the answer that tells an error.
func Failed(err error) Answer {
	a := Answer{Error: err.Error()}
	errors.As(err, &a.Errno)
	return a
}

// err returns the error that an answer tells, which matches what it comes from.
func (a *Answer) err() error {
	switch {
	case a.Error == "":
		return nil
	case a.Errno == 0:
		return errors.New(a.Error)
	}
	return &failure{a.Error, a.Errno}
}

type failure struct {
	text  string
	errno syscall.Errno
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.errno }

// Call has the arguments of mount(2).
type Call struct {
	Source, FSType string
	Flags          uintptr
	Data           string
}

// StartedEnv is set for the program. One that does not know what to do would
// ask itself again, and again.
const StartedEnv = "LAYERFS_MOUNT_PROGRAM"

// Mount mounts a plan, and returns when a server of the program serves it. A
// Mount that failed leaves nothing mounted. The error matches EBUSY if the upper
// directory stays in use. ctx bounds it.
func Mount(ctx context.Context, program string, p *Plan) (err error) {
	if os.Getenv(StartedEnv) != "" {
		return errors.New("this process was started as a mount program, but does not call Main first in its main function")
	}
	if err := p.absolute(); err != nil {
		return err
	}
	// Not by package os, whose poller is for what is mounted already.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	// The server must be the only one that has it when the mount is there.
	defer dev.Close()
	conn, err := start(ctx, program, p.Target, dev)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() {
		if cause := context.Cause(ctx); cause != nil && err != nil {
			err = errors.Join(cause, err)
		}
	}()
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	call, err := exchange(in, out, Request{*p, fd})
	if err != nil {
		return err
	}
	if err := unix.Mount(call.Source, p.Target, call.FSType, call.Flags, call.Data); err != nil {
		return &os.PathError{Op: "mount", Path: p.Target, Err: err}
	}
	err = dev.Close()
	if err == nil {
		_, err = exchange(in, out, true)
	}
	if err != nil {
		return errors.Join(err, mount.IgnoreNotMounted(mount.Unmount(p.Target)))
	}
	return nil
}

func exchange(in *json.Decoder, out *json.Encoder, v any) (Call, error) {
	var a Answer
	if err := out.Encode(v); err != nil {
		return a.Mount, fmt.Errorf("the server has ended: %w", err)
	}
	if err := in.Decode(&a); err != nil {
		return a.Mount, fmt.Errorf("the server gave no answer: %w", err)
	}
	return a.Mount, a.err()
}

// start runs a server, which is no child of this process.
func start(ctx context.Context, program, target string, dev *os.File) (*os.File, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(p[1]), "server")
	defer theirs.Close()
	if err := unix.SetNonblock(p[0], true); err != nil { // so that it knows of deadlines
		unix.Close(p[0])
		return nil, os.NewSyscallError("fcntl", err)
	}
	conn := os.NewFile(uintptr(p[0]), "caller")
	cmd := exec.CommandContext(ctx, program, Start, target)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), StartedEnv+"=1")
	cmd.ExtraFiles = []*os.File{theirs, dev}
	cmd.WaitDelay = time.Second
	if err := Run(ctx, cmd); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Run runs a command that was made with ctx. The error has the name of the
// program and what it said to standard error, which cmd.Stderr is not set for;
// it matches the cause of ctx if that has ended.
func Run(ctx context.Context, cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Args[0]), err, strings.TrimSpace(stderr.String()))
}
