package aufs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/keeper"
	"github.com/layerfs/layerfs/internal/unionhost"
	"github.com/layerfs/layerfs/union"
)

// Main makes a program the helper of [Options.Helper], and must be called first
// in its main function, before it does anything else. In a process that was
// started as a helper it does not return. In any other it does nothing but
// return the command that starts this program as one.
func Main() []string {
	if status, helper := keeper.Main(os.Args, unionhost.Program()); helper {
		os.Exit(status)
	}
	return keeper.Self()
}

// helperEngine has unions served by a helper process. Each call is one of the
// helper's; it keeps no state of its own.
type helperEngine struct {
	set    settings
	client *unionhost.Client
	log    *slog.Logger
}

// tool is the helper if none is named.
const tool = "layerfs"

func newHelper(set settings, dir string, command []string, log *slog.Logger) (engine, error) {
	if len(command) == 0 {
		command = []string{tool}
	}
	path, err := exec.LookPath(command[0])
	if err == nil {
		path, err = filepath.Abs(path) // the helper starts in /
	}
	if err != nil {
		return nil, &layerfs.UnsupportedError{
			Feature: "a helper that serves the fuse engine",
			Reason:  err.Error() + "; name a program that calls aufs.Main in Options.Helper, or set Options.InProcess",
		}
	}
	command = append([]string{path}, command[1:]...)
	return &helperEngine{set, &unionhost.Client{Dir: dir, Command: command}, log}, nil
}

func (*helperEngine) name() Engine { return FUSE }

func (e *helperEngine) mount(ctx context.Context, p plan, target string) error {
	if p.label != "" {
		return noLabel
	}
	cfg := unionhost.Config{
		Target: target, UDBA: unionhost.UDBA(e.set.udba), ReadOnly: p.readOnly, NoPlink: e.set.noPlink, SumFree: e.set.sum,
	}
	for _, b := range p.branches {
		cfg.Branches = append(cfg.Branches, unionhost.Branch{Path: b.Path, Perm: string(b.Perm)})
	}
	repaired, err := untilFree(ctx, func() ([]unionhost.Repaired, error) { return e.client.Mount(ctx, cfg) })
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("the union that was last mounted is still in use: %w: %w", layerfs.ErrInUse, err)
	}
	if err != nil {
		return err
	}
	for _, r := range repaired {
		e.log.Info("repaired", "driver", name, "branch", r.Branch, "path", r.Path, "action", r.Action)
	}
	return nil
}

// unmount waits until the helper has let the branches go, if nobody works in
// them.
func (e *helperEngine) unmount(ctx context.Context, target string) error {
	if err := unmountNow(target); err != nil {
		return err
	}
	if err := e.client.Wait(ctx, target); err != nil {
		e.log.Warn("wait for the helper", "driver", name, "target", target, "error", err)
	}
	return nil
}

func (e *helperEngine) alter(ctx context.Context, target string, v verb) error {
	b := unionhost.Branch{Path: v.Path, Perm: string(v.Perm)}
	if b.Perm == "" {
		b.Perm = string(union.RO)
	}
	switch v.op {
	case "add":
		return elsewhere(e.client.Insert(ctx, target, v.at, b))
	case "append":
		return elsewhere(e.client.Insert(ctx, target, -1, b))
	case "mod":
		return elsewhere(e.client.Modify(ctx, target, b))
	case "del":
		return elsewhere(e.client.Delete(ctx, target, v.Path))
	}
	return fmt.Errorf("[bug] verb %q", v.op)
}

// elsewhere is for what no helper serves: a driver with another engine does,
// or nobody.
func elsewhere(err error) error {
	if errors.Is(err, unionhost.ErrNotServed) {
		return errElsewhere
	}
	return err
}

func (e *helperEngine) branches(target string) (list []union.Branch, err error) {
	branches, err := e.client.Branches(context.Background(), target)
	for _, b := range branches {
		list = append(list, union.Branch{Path: b.Path, Perm: union.Perm(b.Perm)})
	}
	return list, elsewhere(err)
}

func (e *helperEngine) flush(ctx context.Context, target string) error {
	return elsewhere(e.client.Flush(ctx, target))
}

func (e *helperEngine) sync(ctx context.Context, target string) error {
	return elsewhere(e.client.Sync(ctx, target))
}

func (e *helperEngine) close() error { return e.client.Close() }

// ReplaceHelper makes the helper that serves this root's mounts, if there is one,
// go on with the program of [Options.Helper], as after an upgrade. Whoever uses
// a mount meanwhile waits for some milliseconds. The error matches
// [errors.ErrUnsupported] if the driver uses no helper. A program of an earlier
// version that cannot go on with what is mounted is refused; so is this one if its
// file was removed or replaced. The mounts then stay as they are.
func (d *Driver) ReplaceHelper(ctx context.Context) error {
	e, ok := d.m.engine.(*helperEngine)
	var err error = &layerfs.UnsupportedError{Feature: "replacing the helper", Reason: "the driver uses none"}
	if ok {
		err = e.client.Replace(ctx)
	}
	if errors.Is(err, unionhost.ErrNotServed) {
		err = nil
	}
	if err != nil {
		return &layerfs.Error{Op: "replace helper", Driver: name, Err: err}
	}
	return nil
}

// noLabel says that labels are not for the FUSE engine.
var noLabel error = &layerfs.UnsupportedError{Feature: "a mount label with the fuse engine", Reason: "it keeps security.selinux of the branches"}
