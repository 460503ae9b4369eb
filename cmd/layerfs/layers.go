package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
)

// createFlags are the flags of commands that make a layer.
func createFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "read-only", Usage: "the layer is filled once and never written again"},
		&cli.StringSliceFlag{Name: "label", Usage: "`KEY=VALUE` to keep with the layer; may be repeated"},
		&cli.StringFlag{Name: "size", Usage: "the layer may take this many `BYTES`, such as 10G"},
		&cli.Int64Flag{Name: "inodes", Usage: "the layer may have this `NUMBER` of files"},
		&cli.StringFlag{Name: "selinux-label", Usage: "SELinux `LABEL` of the tree"},
	}
}

func createOptions(cmd *cli.Command) (*layerfs.CreateOptions, error) {
	o := &layerfs.CreateOptions{ReadOnly: cmd.Bool("read-only"), MountLabel: cmd.String("selinux-label")}
	for _, l := range cmd.StringSlice("label") {
		key, value, ok := strings.Cut(l, "=")
		if !ok || key == "" {
			return nil, usagef("label %q is not KEY=VALUE", l)
		}
		if o.Labels == nil {
			o.Labels = make(map[string]string)
		}
		o.Labels[key] = value
	}
	if s := cmd.String("size"); s != "" {
		n, err := parseSize(s)
		if err != nil {
			return nil, err
		}
		o.Quota.Bytes = n
	}
	if o.Quota.Inodes = cmd.Int64("inodes"); o.Quota.Inodes < 0 {
		return nil, usagef("%d is no number of files", o.Quota.Inodes)
	}
	return o, nil
}

func (a *app) create() *cli.Command {
	return &cli.Command{
		Name: "create", Usage: "make a layer", ArgsUsage: "ID [PARENT]", Category: "layers",
		Description: "Makes an empty base layer, or a layer on PARENT, which is frozen from then on.",
		Flags:       createFlags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 2)
			if err != nil {
				return err
			}
			opts, err := createOptions(cmd)
			if err != nil {
				return err
			}
			if err := layerfs.CheckID(arg[0]); err != nil {
				return err
			}
			bar := a.meter("create "+arg[0], 0)
			defer bar.done()
			opts.Progress = bar.set
			d, err := a.open()
			return with(d, err, func(d layerfs.Driver) error {
				if err := d.Create(ctx, arg[0], arg[1], opts); err != nil {
					return err
				}
				bar.done()
				return a.made(ctx, d, arg[0])
			})
		},
	}
}

// made prints a layer that was made.
func (a *app) made(ctx context.Context, d layerfs.Driver, id string) error {
	if !a.json {
		return a.say("%s", id)
	}
	info, err := d.Stat(ctx, id, nil)
	if err != nil {
		return err
	}
	return writeJSON(a.out, newLayerJSON(info))
}

// say prints a line.
func (a *app) say(format string, args ...any) error {
	_, err := fmt.Fprintf(a.out, format+"\n", args...)
	return err
}

func (a *app) rm() *cli.Command {
	return &cli.Command{
		Name: "rm", Usage: "remove layers", ArgsUsage: "ID...", Category: "layers",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "remove the layers on top of them, too"}},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.NArg() == 0 {
				return usagef("rm needs %s", cmd.ArgsUsage)
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				ids := cmd.Args().Slice()
				if cmd.Bool("recursive") {
					if ids, err = withDescendants(ctx, d, ids); err != nil {
						return err
					}
				}
				return a.remove(ctx, d, ids)
			})
		},
	}
}

func (a *app) remove(ctx context.Context, d layerfs.Driver, ids []string) error {
	for _, id := range ids {
		if err := d.Remove(ctx, id); err != nil {
			return err
		}
		if a.json {
			if err := writeJSON(a.out, idJSON{id}); err != nil {
				return err
			}
		} else if !a.quiet {
			if err := a.say("%s", id); err != nil {
				return err
			}
		}
	}
	return nil
}

// withDescendants returns layers and all on top of them, topmost first.
func withDescendants(ctx context.Context, d layerfs.Driver, ids []string) ([]string, error) {
	list, err := d.List(ctx)
	if err != nil {
		return nil, err
	}
	gone := make(map[string]bool)
	for _, id := range ids {
		if _, err := d.Stat(ctx, id, nil); err != nil {
			return nil, err
		}
		gone[id] = true
	}
	var order []string
	for _, l := range list { // parents first
		if gone[l.ID] || gone[l.Parent] {
			gone[l.ID] = true
			order = append(order, l.ID)
		}
	}
	slices.Reverse(order)
	return order, nil
}

func (a *app) ls() *cli.Command {
	return &cli.Command{
		Name: "ls", Usage: "list the layers", ArgsUsage: "[ID]", Category: "layers",
		Description: "Lists all layers as a tree, or only ID and what is on top of it.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "usage", Usage: "also what each layer takes, which may read it all"},
			&cli.BoolFlag{Name: "flat", Usage: "a table without a tree, by id"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 0, 1)
			if err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				list, err := a.list(ctx, d, arg[0], cmd.Bool("usage"))
				if err != nil {
					return err
				}
				if a.json || a.quiet {
					return a.printLines(list)
				}
				return a.printTable(list, !cmd.Bool("flat"))
			})
		},
	}
}

// list describes the layers from id up, or all.
func (a *app) list(ctx context.Context, d layerfs.Driver, id string, usage bool) ([]layerfs.Info, error) {
	list, err := d.List(ctx)
	if err != nil {
		return nil, err
	}
	if id != "" {
		ids, err := withDescendants(ctx, d, []string{id})
		if err != nil {
			return nil, err
		}
		list = slices.DeleteFunc(list, func(i layerfs.Info) bool { return !slices.Contains(ids, i.ID) })
	}
	if !usage {
		return list, nil
	}
	for i := range list {
		if list[i].Incomplete != "" {
			continue
		}
		info, err := d.Stat(ctx, list[i].ID, &layerfs.StatOptions{Usage: true})
		if errors.Is(err, layerfs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			return nil, err
		}
		list[i] = info
	}
	return list, nil
}

func (a *app) printLines(list []layerfs.Info) error {
	for _, i := range list {
		var err error
		if a.json {
			err = writeJSON(a.out, newLayerJSON(i))
		} else {
			err = a.say("%s", i.ID)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printTable(list []layerfs.Info, asTree bool) error {
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 8, 2, ' ', 0)
	usage := slices.ContainsFunc(list, func(i layerfs.Info) bool { return i.Usage != nil })
	fmt.Fprint(w, "LAYER\tSTATE\tCREATED")
	if usage {
		fmt.Fprint(w, "\tSIZE\tFILES")
	}
	fmt.Fprintln(w, "\tLABELS")
	row := func(name string, i layerfs.Info) {
		fmt.Fprintf(w, "%s\t%s\t%s", name, state(i), i.Created.Format(time.DateTime))
		if i.Usage != nil {
			fmt.Fprintf(w, "\t%s\t%d", humanBytes(i.Usage.Bytes), i.Usage.Inodes)
		} else if usage {
			fmt.Fprint(w, "\t-\t-")
		}
		fmt.Fprintf(w, "\t%s\n", printable(labels(i.Labels)))
	}
	if asTree {
		eachInTree(list, row)
	} else {
		list = slices.Clone(list)
		slices.SortFunc(list, func(a, b layerfs.Info) int { return cmp.Compare(a.ID, b.ID) })
		for _, i := range list {
			row(i.ID, i)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(table.String()) {
		if err := a.say("%s", strings.TrimRight(line, " \n")); err != nil { // of empty cells
			return err
		}
	}
	return nil
}

// eachInTree calls a function for each layer with its name in a drawn tree.
// Layers whose parent is not in the list are roots.
func eachInTree(list []layerfs.Info, row func(name string, i layerfs.Info)) {
	known := make(map[string]bool)
	for _, i := range list {
		known[i.ID] = true
	}
	children := make(map[string][]layerfs.Info)
	for _, i := range list {
		parent := i.Parent
		if !known[parent] {
			parent = ""
		}
		children[parent] = append(children[parent], i)
	}
	var draw func(parent, indent string, depth int)
	draw = func(parent, indent string, depth int) {
		for n, i := range children[parent] {
			branch, below := "├─ ", "│  "
			if n == len(children[parent])-1 {
				branch, below = "└─ ", "   "
			}
			if depth == 0 {
				branch, below = "", ""
			}
			row(indent+branch+i.ID, i)
			draw(i.ID, indent+below, depth+1)
		}
	}
	draw("", "", 0)
}

// state is a layer in a word or two.
func state(i layerfs.Info) string {
	var words []string
	switch {
	case i.Incomplete != "":
		words = append(words, "incomplete")
	case i.Frozen():
		words = append(words, "frozen")
	default:
		words = append(words, "writable")
	}
	if i.Mounted {
		words = append(words, "mounted")
	}
	return strings.Join(words, ",")
}

func labels(m map[string]string) string {
	var list []string
	for k, v := range m {
		list = append(list, k+"="+v)
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func (a *app) show() *cli.Command {
	return &cli.Command{
		Name: "show", Usage: "describe a layer", ArgsUsage: "ID", Category: "layers",
		Action: func(ctx context.Context, cmd *cli.Command) error {
			arg, err := args(cmd, 1, 1)
			if err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error { return a.showLayer(ctx, d, arg[0]) })
		},
	}
}

func (a *app) showLayer(ctx context.Context, d layerfs.Driver, id string) error {
	info, err := d.Stat(ctx, id, nil)
	if err != nil {
		return err
	}
	if info.Incomplete == "" { // what it takes can be told of whole layers only
		if info, err = d.Stat(ctx, id, &layerfs.StatOptions{Usage: true}); err != nil {
			return err
		}
	}
	chain := []string{}
	for at := info.Parent; at != "" && len(chain) < 10000; { // a bound, as records may be damaged
		chain = append(chain, at)
		up, err := d.Stat(ctx, at, nil)
		if err != nil {
			break // check tells
		}
		at = up.Parent
	}
	if a.json {
		l := newLayerJSON(info)
		l.Chain = chain
		return writeJSON(a.out, l)
	}
	return a.showText(d, info, chain)
}

func (a *app) showText(d layerfs.Driver, i layerfs.Info, chain []string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	line := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%s:\t%s\n", key, printable(fmt.Sprintf(format, args...)))
	}
	line("Layer", "%s", i.ID)
	line("Driver", "%s", d.Name())
	line("On", "%s", cmp.Or(strings.Join(chain, " on "), "nothing (a base layer)"))
	line("Created", "%s", i.Created.Format(time.RFC3339))
	line("State", "%s", strings.ReplaceAll(state(i), ",", ", "))
	if i.Incomplete != "" {
		line("Incomplete", "%s", i.Incomplete)
	}
	line("Children", "%d", i.Children)
	line("Path", "%s", i.Path)
	if i.Usage != nil {
		line("Takes", "%s, %d files", humanBytes(i.Usage.Bytes), i.Usage.Inodes)
	}
	if i.Quota.Bytes > 0 {
		line("Limit", "%s", humanBytes(i.Quota.Bytes))
	}
	if i.Quota.Inodes > 0 {
		line("Limit", "%d files", i.Quota.Inodes)
	}
	if len(i.Labels) > 0 {
		line("Labels", "%s", labels(i.Labels))
	}
	return w.Flush()
}
