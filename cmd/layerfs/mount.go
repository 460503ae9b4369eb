package main

import (
	"context"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
)

func (a *app) mount() *cli.Command {
	return &cli.Command{
		Name: "mount", Usage: "make the tree of a layer available and print its path", ArgsUsage: "ID", Category: "trees",
		Description: "The tree stays after the command ends, until umount has been called as often as mount,\nor the machine restarts.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "read-only", Aliases: []string{"r"}, Usage: "nothing can be written"},
			&cli.StringSliceFlag{Name: "uid-map", Usage: "`CONTAINER:HOST:SIZE`: the tree shows the host's user ids; may be repeated"},
			&cli.StringSliceFlag{Name: "gid-map", Usage: "the same for group ids"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			ids, err := idMap(cmd)
			if err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				path, err := d.Get(ctx, arg[0], &layerfs.GetOptions{ReadOnly: cmd.Bool("read-only"), Persist: true, IDMap: ids})
				if err != nil {
					return err
				}
				if a.json {
					return writeJSON(a.out, mountJSON{arg[0], path})
				}
				return a.say("%s", path)
			})
		},
	}
}

func (a *app) umount() *cli.Command {
	return &cli.Command{
		Name: "umount", Usage: "undo one mount of a layer", ArgsUsage: "ID", Category: "trees", Aliases: []string{"unmount"},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				if err := d.Put(ctx, arg[0]); err != nil {
					return err
				}
				if a.json {
					return writeJSON(a.out, idJSON{arg[0]})
				}
				return nil
			})
		},
	}
}
