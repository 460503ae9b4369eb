package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/transfer"
)

func (a *app) copy() *cli.Command {
	return &cli.Command{
		Name: "copy", Usage: "copy a layer, and the ancestors that are missing there, to another root or driver", ArgsUsage: "ID", Category: "content",
		Description: "Each layer goes as a stream whose digest is compared at both ends. If it fails, the layer\nthat was being copied is removed; ancestors that are whole stay.",
		Flags: append(applyFlags(),
			&cli.StringFlag{Name: "to", Usage: "`DIR` of the copies; default: --root, with another driver"},
			&cli.StringFlag{Name: "to-driver", Usage: "`NAME` of the driver there"},
			&cli.StringSliceFlag{Name: "to-opt", Usage: "`DRIVER.KEY=VALUE`, an option of the driver there; may be repeated"},
			&cli.StringFlag{Name: "as", Usage: "`ID` of the copy; default: the same"},
			&cli.BoolFlag{Name: "verify", Usage: "compare the trees afterwards, byte for byte"},
			&cli.BoolFlag{Name: "no-quota", Usage: "copy without limits"},
		),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			apply, err := applyOptions(cmd)
			if err != nil {
				return err
			}
			if as := cmd.String("as"); as != "" {
				if err := layerfs.CheckID(as); err != nil {
					return err
				}
			}
			to := place{cmd.String("to"), cmd.String("to-driver"), cmd.StringSlice("to-opt")}
			switch {
			case to.root == "" && to.driver == "":
				return usagef("copy needs --to DIR or --to-driver NAME")
			case to.root == "":
				to.root = a.root
			}
			d, err := a.existing()
			return with(d, err, func(src layerfs.Driver) error {
				if sameRoot(to.root, a.root) && (to.driver == "" || to.driver == src.Name()) {
					return usagef("the copy would be where the layer is: give another --to or --to-driver")
				}
				// A typing mistake in the id must not make a root.
				if _, err := src.Stat(ctx, arg[0], nil); err != nil {
					return err
				}
				dst, err := a.openAt(to)
				return with(dst, err, func(dst layerfs.Driver) error {
					return a.copyLayers(ctx, src, dst, arg[0], &transfer.Options{
						As: cmd.String("as"), Verify: cmd.Bool("verify"), NoQuota: cmd.Bool("no-quota"), Apply: *apply,
					})
				})
			})
		},
	}
}

func sameRoot(a, b string) bool {
	a, errA := filepath.Abs(a)
	b, errB := filepath.Abs(b)
	return errors.Join(errA, errB) == nil && a == b
}

func (a *app) copyLayers(ctx context.Context, src, dst layerfs.Driver, id string, opts *transfer.Options) error {
	bars := meters{a: a}
	defer bars.done()
	opts.Progress = func(id string, p layerfs.Progress) { bars.set("copy "+id, p) }
	var printing error
	opts.Copied = func(l transfer.Layer) {
		bars.done()
		printing = errors.Join(printing, a.printCopied(l))
	}
	return errors.Join(transfer.Copy(ctx, src, dst, id, opts), printing)
}

func (a *app) printCopied(l transfer.Layer) error {
	switch {
	case a.json:
		return writeJSON(a.out, newCopiedJSON(l))
	case a.quiet:
		return nil
	case l.Existed:
		return a.say("%s: is there", l.ID)
	}
	how := ""
	if l.Verified {
		how = ", trees compared"
	}
	return a.say("%s: copied, %s, %s of content, %s%s", l.ID, entries(l.Result.Entries), humanBytes(l.Result.Bytes), l.Result.Digest, how)
}
