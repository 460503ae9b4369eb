package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/vfs"
)

func (a *app) demo() *cli.Command {
	return &cli.Command{
		Name: "demo", Usage: "show and measure on this host what layers are good for", Category: "host",
		Description: "Imports a real tree as a base layer, stacks a layer on it, starts containers, changes one,\n" +
			"writes what was changed, applies it elsewhere and compares. All of it is in a temporary\n" +
			"directory that is removed at the end. Numbers are what was measured in this run.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "`DIR` or tar stream to import; default: the source tree of the Go toolchain"},
			&cli.IntFlag{Name: "containers", Usage: "start `N` containers; default: 100, or 3 where each is a full copy"},
			&cli.StringFlag{Name: "dir", Usage: "make the temporary directory in `DIR`; default: that of the system"},
			&cli.BoolFlag{Name: "keep", Usage: "leave the layers and say where they are"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if _, err := args(cmd, 0, 0); err != nil {
				return err
			}
			if cmd.IsSet("containers") && cmd.Int("containers") < 1 {
				return usagef("%d containers are too few to show anything", cmd.Int("containers"))
			}
			from := cmd.String("from")
			if from == "" {
				var err error
				if from, err = goSource(ctx); err != nil {
					return err
				}
			}
			return a.runDemo(ctx, from, cmd.String("dir"), cmd.Int("containers"), cmd.Bool("keep"))
		},
	}
}

// goSource finds the source tree of the Go toolchain.
func goSource(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find the Go toolchain to import: %w (or name something with --from)", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "src")
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("the Go toolchain has no source: %w (name something with --from)", err)
	}
	return dir, nil
}

// demo is one run.
type demo struct {
	a    *app
	text *printer
	r    demoJSON

	temp string
	d    layerfs.Driver // the driver that is shown
	full layerfs.Driver // full copies, to compare with; also "elsewhere"
	from string

	victims victims
	ids     []string // the containers
	paths   []string // their trees
}

// The layers of a demo.
const (
	baseID  = "base"
	layerID = "layer"
	copyID  = "copy" // only elsewhere
)

func (a *app) runDemo(ctx context.Context, from, dir string, containers int, keep bool) (err error) {
	temp, err := os.MkdirTemp(dir, "layerfs-demo-")
	if err != nil {
		return err
	}
	dm := &demo{a: a, text: &printer{w: a.out, off: a.json}, temp: temp, from: from}
	defer func() { err = errors.Join(err, dm.cleanUp(context.WithoutCancel(ctx), keep)) }()
	if err := dm.open(); err != nil {
		return err
	}
	dm.r.Containers.Count = containers
	if containers == 0 {
		dm.r.Containers.Count = 100
		if !dm.d.Features().ConstantCreate {
			dm.r.Containers.Count = 3
		}
	}
	for _, step := range []func(context.Context) error{
		dm.host, dm.importBase, dm.stack, dm.copies, dm.start, dm.change, dm.elsewhere, dm.memory, dm.stop,
	} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	if a.json {
		return writeJSON(a.out, dm.r)
	}
	return dm.text.err
}

// open opens the driver and the one it is compared with.
func (dm *demo) open() error {
	p := dm.a.place()
	p.root = filepath.Join(dm.temp, "layers")
	opts, err := dm.a.options(p)
	if err != nil {
		return err
	}
	// Who may not give files away gets a tree of files of his own.
	own := os.Geteuid() > 0
	if opts.VFS == nil {
		opts.VFS = new(vfs.Options)
	}
	opts.VFS.IgnoreOwners = opts.VFS.IgnoreOwners || own
	if dm.d, err = auto.Open(p.root, opts); err != nil {
		return err
	}
	if err := applicable(p.opts, dm.d.Name()); err != nil {
		return err
	}
	dm.full, err = vfs.New(filepath.Join(dm.temp, "elsewhere"), &vfs.Options{
		// Not to wait for the disk is in favour of the copies.
		Durability: layerfs.DurabilityNone, IgnoreOwners: own, NoReflink: true,
	})
	return err
}

// cleanUp releases and removes everything. It goes on after an error: what one
// driver keeps is no reason to leave the rest.
func (dm *demo) cleanUp(ctx context.Context, keep bool) error {
	var errs []error
	for _, d := range []layerfs.Driver{dm.d, dm.full} {
		if d == nil {
			continue
		}
		list, err := d.List(ctx)
		errs = append(errs, err)
		for i := len(list) - 1; i >= 0; i-- {
			for list[i].Mounted {
				if err := d.Put(ctx, list[i].ID); err != nil {
					if !errors.Is(err, layerfs.ErrNotHeld) {
						errs = append(errs, err)
					}
					break
				}
			}
			if !keep {
				errs = append(errs, d.Remove(ctx, list[i].ID))
			}
		}
		errs = append(errs, d.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up %s: %w", dm.temp, err)
	}
	if !keep {
		return os.RemoveAll(dm.temp)
	}
	dm.text.section("Kept")
	dm.text.say("layerfs --root %s ls", filepath.Join(dm.temp, "layers"))
	return dm.text.err
}
