package zfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// tool runs the programs. It is immutable.
type tool struct {
	zfs, zpool string
	pool       string        // whose health explains a call that does not end
	patience   time.Duration // after which the health of the pool is looked at

	// turn waits for this call's turn, where calls must not be made at the same
	// time; nil means that they may. The turn lasts until all descriptors of the
	// file are closed, of which the program gets one: it may outlive this process.
	// It is not killed then, because whom it asks would go on while the next call
	// has its turn.
	turn func(ctx context.Context) (*os.File, error)
}

// CommandError is the error of a zfs or zpool that failed.
type CommandError struct {
	Args   []string // with the program's name
	Stderr string   // trimmed
	Err    error    // *exec.ExitError, or why it could not be run
}

// Error returns, for example,
// "zfs destroy tank/a: dataset is busy (exit status 1)".
func (e *CommandError) Error() string {
	text := e.Stderr
	if text == "" {
		return strings.Join(e.Args, " ") + ": " + e.Err.Error()
	}
	return fmt.Sprintf("%s: %s (%v)", strings.Join(e.Args, " "), strings.ReplaceAll(text, "\n", "; "), e.Err)
}

// Unwrap returns the cause.
func (e *CommandError) Unwrap() error { return e.Err }

// says reports whether err is of a program that printed text. The programs
// run with LC_ALL=C, so that their texts are those of their sources.
func says(err error, texts ...string) bool {
	var c *CommandError
	if !errors.As(err, &c) {
		return false
	}
	for _, text := range texts {
		if strings.Contains(c.Stderr, text) {
			return true
		}
	}
	return false
}

// What the programs say; all versions since zfs-fuse do. libzfs_util.c,
// zfs_standard_error_fmt.
const (
	textMissing = "does not exist"
	// textNoParent is what clone says if the snapshot goes while it runs
	// (libzfs_dataset.c, zfs_clone: it takes it for the parent of the clone).
	textNoParent = "no such parent"
	textExists   = "already exists"
	textBusy     = "busy"
	textMounted  = "already mounted"
	textNoSpace  = "out of space"
	textOption   = "invalid option" // of getopt: an older program

	textSuspended = "I/O is currently suspended"

	textNoSnapshot = "could not find any snapshots to destroy"
)

// errLeft says that a program did not end and was left behind. What it was to
// do may happen any time later.
var errLeft = errors.New("it is left behind")

// unfinished reports whether err is of a call of which something may be left that
// still has the files it was given: the other end of a pipe to it sees no end.
func unfinished(ctx context.Context, err error) bool {
	return err != nil && (errors.Is(err, errLeft) || ctx.Err() != nil)
}

// ErrSuspended says that the pool does not answer until an administrator has
// repaired its devices and called zpool clear.
var ErrSuspended = errors.New("pool is suspended")

// grace is how long a program that is given up may take to end. A process in a
// call to a suspended pool cannot be killed at all.
const grace = 2 * time.Second

// run runs zfs and returns its output.
func (t *tool) run(ctx context.Context, args ...string) ([]byte, error) {
	var out bytes.Buffer
	if err := t.pipe(ctx, nil, &out, t.zfs, args...); err != nil {
		return nil, err // a program that was left behind may still write to out
	}
	return out.Bytes(), nil
}

// rows runs zfs and parses its output.
func (t *tool) rows(ctx context.Context, columns int, args ...string) ([][]string, error) {
	out, err := t.run(ctx, args...)
	if err != nil {
		return nil, err
	}
	return table(out, columns)
}

// pipe runs a program; all that run are started here. When ctx is done it is
// killed. While it runs for long the pool is looked at, so that a suspended pool
// is an error and not a hang; the program is then left behind until the pool
// lives again. One that has a turn is never killed but left behind.
func (t *tool) pipe(ctx context.Context, in io.Reader, out io.Writer, program string, args ...string) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	var held []*os.File
	if t.turn != nil {
		f, err := t.turn(ctx)
		if err != nil {
			return err
		}
		defer f.Close()
		held = append(held, f)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &stderr
	cmd.ExtraFiles = held
	cmd.WaitDelay = grace
	fail := func(err error) error {
		name := program[strings.LastIndexByte(program, '/')+1:]
		said, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\nusage:") // a list of all it can do
		var failed error = &CommandError{Args: append([]string{name}, args...), Stderr: said, Err: err}
		if says(failed, textSuspended) {
			failed = fmt.Errorf("pool %s: %w: %w", t.pool, ErrSuspended, failed)
		}
		return failed
	}
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	look := time.NewTicker(t.patience)
	defer look.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fail(err)
			}
			return nil
		case <-ctx.Done():
			if t.turn == nil {
				_ = cmd.Process.Kill() // it may have ended
			}
			if ends(done) {
				return context.Cause(ctx)
			}
			// stderr still belongs to the process.
			return fmt.Errorf("%w; %s does not end: %w", context.Cause(ctx), program, errLeft)
		case <-look.C:
			if !t.suspended() {
				continue
			}
			abandon(cmd, done) // to be told as left behind even if it has ended: it may have done its work
			return fmt.Errorf("%s %s: pool %s: %w; %w", program, strings.Join(args, " "), t.pool, ErrSuspended, errLeft)
		}
	}
}

// abandon kills a process and reports whether it has ended.
func abandon(cmd *exec.Cmd, done <-chan error) bool {
	_ = cmd.Process.Kill() // it may have ended
	return ends(done)
}

// ends waits for a process for a moment.
func ends(done <-chan error) bool {
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// suspended reports whether the pool is known to be suspended. Where calls take
// turns it is not: it would have to be asked beside the call it is about.
func (t *tool) suspended() bool {
	if t.turn != nil {
		return false
	}
	if state := t.state(); state != "" {
		return state == stateSuspended
	}
	var out bytes.Buffer
	cmd := exec.Command(t.zpool, "list", "-H", "-o", "health", t.pool)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout = &out
	if cmd.Start() != nil {
		return false
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err == nil && strings.TrimSpace(out.String()) == stateSuspended
	case <-time.After(grace):
		abandon(cmd, done)
		return false
	}
}

// stateSuspended is the state of a suspended pool.
const stateSuspended = "SUSPENDED"

// state returns the state of the pool if the kernel tells it, as that of Linux
// does since OpenZFS 0.8 (spa_state_init, module/zfs/spa_stats.c). It takes no
// call that may itself wait for the pool.
func (t *tool) state() string {
	b, err := os.ReadFile("/proc/spl/kstat/zfs/" + t.pool + "/state")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// find returns the path of a program. Administrators' programs are not in
// every user's PATH.
func find(name, option string) (string, error) {
	if option != "" {
		return exec.LookPath(option)
	}
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/sbin/", "/usr/sbin/", "/usr/local/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p, nil
		}
	}
	return "", err
}
