package auto

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/layerfs/layerfs"
)

// Report is what [Probe] found of one driver.
type Report struct {
	Driver   string
	Err      error            // why the driver does not work below the root; nil if it does
	Features layerfs.Features // what it can do, if Err is nil

	never map[string]string
}

// Ability is one row of a [Report]: a field of [layerfs.Features].
type Ability struct {
	Name   string // of the field
	Have   bool
	Reason string // why not; empty if Have
}

// Abilities lists every ability in the order of [layerfs.Features], each with
// a reason if it is missing. A driver that does not work has none.
func (r *Report) Abilities() []Ability {
	f := &r.Features
	list := []Ability{
		{Name: "ConstantCreate", Have: f.ConstantCreate},
		{Name: "SharedPageCache", Have: f.SharedPageCache},
		{Name: "ReadOnlyViews", Have: f.ReadOnlyViews},
		{Name: "NativeChanges", Have: f.NativeChanges},
		{Name: "NativeDiff", Have: f.NativeDiff},
		{Name: "Quota", Have: f.Quota},
		{Name: "InodeQuota", Have: f.InodeQuota},
		{Name: "IDMap", Have: f.IDMap},
		{Name: "Rename", Have: f.Rename},
		{Name: "LiveBase", Have: f.LiveBase},
		{Name: "AllXattrs", Have: f.AllXattrs},
		{Name: "DeviceNodes", Have: f.DeviceNodes},
	}
	for i := range list {
		a := &list[i]
		if r.Err != nil {
			a.Have, a.Reason = false, r.Err.Error()
		} else if !a.Have {
			a.Reason = r.reason(a.Name)
		}
	}
	return list
}

func (r *Report) reason(name string) string {
	for _, s := range []string{r.Features.Reasons[name], r.never[name]} {
		if s != "" {
			return s
		}
	}
	return r.Driver + " has no way to do it"
}

// Describe reports on a driver that is open.
func Describe(d layerfs.Driver) Report {
	r := Report{Driver: d.Name(), Features: d.Features()}
	if b, err := find(backends(), r.Driver); err == nil {
		r.never = b.never
	}
	return r
}

// Probe opens every driver with default options (in sizes that fit a trial) in
// a temporary directory below root, asks it what it can do, and removes the directory. If root does
// not exist, the nearest parent that does takes its place; neither it nor
// anything in it is changed. The reports are in the default order of choice.
//
// A driver that does not work is a report; the error is for a directory that
// cannot be written and for ctx. Whoever wants to know about certain options
// has to open the driver with them.
func Probe(ctx context.Context, root string) ([]Report, error) {
	return probe(ctx, backends(), root)
}

func probe(ctx context.Context, all []backend, root string) (_ []Report, err error) {
	defer func() {
		if err != nil {
			err = &layerfs.Error{Op: "probe", Driver: "auto", Path: root, Err: err}
		}
	}()
	at, err := existing(root)
	if err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp(at, ".layerfs-probe-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	reports := make([]Report, 0, len(all))
	for _, b := range all {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		r := Report{Driver: b.name, never: b.never}
		opts := b.probe
		if opts == nil {
			opts = new(Options)
		}
		d, err := b.open(temp, opts)
		if err == nil {
			r.Features, err = d.Features(), d.Close()
		}
		r.locate(err, temp, root)
		reports = append(reports, r)
	}
	return reports, nil
}

// locate keeps the error of a trial, and names root where its texts and those
// of the features name the directory of the trial, which nobody will find.
func (r *Report) locate(err error, temp, root string) {
	for name, reason := range r.Features.Reasons {
		r.Features.Reasons[name] = strings.ReplaceAll(reason, temp, root)
	}
	if err == nil {
		return
	}
	cause := err
	if e, ok := errors.AsType[*layerfs.Error](err); ok {
		cause = e.Err // the report says already what was opened
	}
	r.Err = &trialError{strings.ReplaceAll(cause.Error(), temp, root), err}
}

// trialError is an error under another text.
type trialError struct {
	text string
	err  error
}

func (e *trialError) Error() string { return e.text }
func (e *trialError) Unwrap() error { return e.err }

// existing returns root or its nearest parent that is there.
func existing(root string) (string, error) {
	path, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	for {
		fi, err := os.Stat(path)
		switch {
		case err == nil && fi.IsDir():
			return path, nil
		case err == nil:
			return "", fmt.Errorf("%s is no directory", path)
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
		up := filepath.Dir(path)
		if up == path {
			return "", err
		}
		path = up
	}
}
