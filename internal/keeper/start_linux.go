package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Self is the command that runs this very program.
func Self() []string { return []string{self} }

// Named returns a command without what only this process understands: [Self] is
// the program of whoever runs it, which is another one in the keeper. The error
// matches [os.ErrNotExist] if the file of this program was removed or replaced.
func Named(command []string) ([]string, error) {
	if len(command) == 0 || command[0] != self {
		return command, nil
	}
	path, err := os.Readlink(self)
	if err != nil {
		return nil, err
	}
	running, err := os.Stat(self)
	if err != nil {
		return nil, err
	}
	// The kernel appends " (deleted)", which a name may also end with.
	named, err := os.Stat(path)
	if err != nil || !os.SameFile(running, named) {
		return nil, &os.PathError{Op: "find the file of this program", Path: path, Err: os.ErrNotExist}
	}
	return append([]string{path}, command[1:]...), nil
}

// Dial calls the worker of a directory, with a helper started by the given
// command if there is none. Without a command, the error then matches
// [ErrNone]. The directory is made if it is missing. ctx bounds the call; the
// caller closes the connection.
func Dial(ctx context.Context, dir string, command []string) (*Conn, error) {
	for try := 0; ; {
		c, err := connect(dir)
		if err == nil {
			return c, nil
		}
		missing := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
		if !missing && !errors.Is(err, unix.EAGAIN) {
			return nil, err
		}
		if missing && len(command) == 0 {
			return nil, ErrNone
		}
		if missing {
			if try++; try > 50 {
				return nil, fmt.Errorf("the helper does not stay: %w", err)
			}
			if err := Start(ctx, dir, command); err != nil {
				return nil, err
			}
			continue
		}
		// Its backlog is full. Calls wait there while there is no worker, and
		// so does this one, for as long as the caller wants.
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// Version returns the Version of the program that a command runs, as a worker
// would be run. The error tells of programs that know nothing of it.
func Version(ctx context.Context, command []string, dir string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], append(command[1:len(command):len(command)], Arg, roleVersion, dir)...)
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("ask %s for its version: %w", command[0], err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return 0, fmt.Errorf("%s is no helper: it calls itself version %.20q", command[0], out)
	}
	return n, nil
}

// ErrNone says that there is no helper at work.
var ErrNone = errors.New("no helper is at work")

// Gone waits until no helper is at work in a directory, up to a second.
func Gone(ctx context.Context, dir string) error {
	f, err := os.Open(dir + "/" + lockName)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	defer f.Close()
	// It is locked shared, so that a keeper that starts now gets it in its own
	// time.
	_, err = sys.WaitUnlocked(ctx, f, time.Second)
	return err
}

// helperEnv is set in the environment of helpers. A program that is started as
// one, but does not know, would start another, which would start another.
const helperEnv = "LAYERFS_HELPER"

// startFor is how long a helper may take to start: more than it waits for an
// old one to end.
const startFor = 3 * patience

// Start runs a helper for a directory and returns when it takes calls.
func Start(ctx context.Context, dir string, command []string) error {
	if os.Getenv(helperEnv) != "" {
		return errors.New("this process was started as a helper, but does not call Main first in its main function")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startFor, fmt.Errorf("helper %s did not start within %v", command[0], startFor))
	defer cancel()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	args := append(command[1:len(command):len(command)], Arg, roleStart, dir)
	cmd := exec.CommandContext(ctx, command[0], args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.WaitDelay = time.Second // for what it leaves running with its output open
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if text := strings.TrimSpace(string(out)); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return fmt.Errorf("start helper %s: %w", command[0], err)
}
