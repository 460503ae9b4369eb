package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// shell runs a command of the user's. What it prints goes to standard error, as
// standard output is for results.
func (a *app) shell(ctx context.Context, command string, env []string) error {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = io.Writer(a.err), a.err
	// What it leaves running keeps its output open.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &exit):
		// Not wrapped: its status is not one of this command's.
		return fmt.Errorf("%s: %s", command, exit.ProcessState)
	}
	return fmt.Errorf("%s: %w", command, err)
}
