package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
)

// The exit statuses; see the command's documentation.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitInUse       = 4
	exitUnsupported = 5
	exitExists      = 6
	exitInput       = 7
	exitDamaged     = 8
	exitInterrupted = 130 // 128 + SIGINT, as shells have it
)

// usageError is a mistake in the arguments.
type usageError struct{ err error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// damagedError says that a check found something.
type damagedError struct{ problems int }

func (e damagedError) Error() string {
	if e.problems == 1 {
		return "1 problem found"
	}
	return fmt.Sprintf("%d problems found", e.problems)
}

// verdict is what an error means to the caller of the command.
type verdict struct {
	code int
	kind string // for machines
	hint string // for people; may be empty
}

// judge finds the verdict on an error. What is asked first is what says more:
// an interrupted copy may well have met a missing layer afterwards.
func judge(err error) verdict {
	if errors.Is(err, context.Canceled) {
		return verdict{exitInterrupted, "interrupted", ""}
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return verdict{exitUsage, "usage", "layerfs --help tells more"}
	}
	// Such as help on an unknown topic. A program that a driver ran has an
	// ExitCode as well, and means something else.
	_, ran := errors.AsType[*exec.ExitError](err)
	if _, ok := errors.AsType[cli.ExitCoder](err); ok && !ran {
		return verdict{exitUsage, "usage", ""}
	}
	if _, ok := errors.AsType[damagedError](err); ok {
		return verdict{exitDamaged, "damaged", ""}
	}
	for _, known := range []struct {
		is error
		verdict
	}{
		{layerfs.ErrInvalidID, verdict{exitUsage, "invalid_id", "an id is a letter or digit and up to 127 more, or any of _ . -"}},
		{layerfs.ErrNotExist, verdict{exitNotFound, "not_found", "layerfs ls lists the layers; --root says where"}},
		{errNoRoot, verdict{exitNotFound, "not_found", "layerfs import or create makes the first layer; --root says where"}},
		{layerfs.ErrExist, verdict{exitExists, "exists", ""}},
		{layerfs.ErrInUse, verdict{exitInUse, "in_use", "layerfs show tells whether it is mounted (layerfs umount) or has children"}},
		{layerfs.ErrNotHeld, verdict{exitInUse, "not_mounted", ""}},
		{layerfs.ErrIncomplete, verdict{exitDamaged, "incomplete", "layerfs rm removes it"}},
		{layerfs.ErrReadOnly, verdict{exitInUse, "read_only", "make a layer on top of it with layerfs create"}},
		{layerfs.ErrMalformed, verdict{exitInput, "malformed", ""}},
		{layerfs.ErrLimit, verdict{exitInput, "limit", ""}},
		{layerfs.ErrQuota, verdict{exitFailure, "quota", ""}},
		{errors.ErrUnsupported, verdict{exitUnsupported, "unsupported", "layerfs probe tells what works here"}},
	} {
		if errors.Is(err, known.is) {
			return known.verdict
		}
	}
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() > 0 {
		return verdict{exitFailure, "permission", "root may; without it --ignore-owners makes all files yours, and --devices skip leaves devices out"}
	}
	return verdict{exitFailure, "failure", ""}
}

// errorJSON is the line on standard error with --json.
type errorJSON struct {
	Error errorDetail `json:"error"`
}

type errorDetail struct {
	Code    int    `json:"code"` // exit status
	Kind    string `json:"kind"`
	Message string `json:"message"`
	Op      string `json:"op,omitempty"`
	Driver  string `json:"driver,omitempty"`
	ID      string `json:"id,omitempty"`
	Path    string `json:"path,omitempty"`
}

// report tells the user of an error and returns the exit status.
func (a *app) report(err error) int {
	if err == nil {
		return exitOK
	}
	v := judge(err)
	if a.json {
		d := errorDetail{Code: v.code, Kind: v.kind, Message: err.Error()}
		if e, ok := errors.AsType[*layerfs.Error](err); ok {
			d.Op, d.Driver, d.ID, d.Path = e.Op, e.Driver, e.ID, e.Path
		}
		_ = writeJSON(a.err, errorJSON{d}) // there is no other way to tell
		return v.code
	}
	if v.code == exitInterrupted {
		fmt.Fprintln(a.err, "layerfs: interrupted")
		return v.code
	}
	fmt.Fprintln(a.err, "layerfs:", printable(err.Error()))
	if v.hint != "" {
		fmt.Fprintf(a.err, "(%s)\n", v.hint)
	}
	return v.code
}
