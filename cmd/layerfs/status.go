package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v3"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/auto"
)

func (a *app) status() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "tell about the root and its driver", Category: "host",
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if _, err := args(cmd, 0, 0); err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error { return a.printStatus(ctx, d) })
		},
	}
}

func (a *app) printStatus(ctx context.Context, d layerfs.Driver) error {
	items, err := d.Status(ctx)
	if err != nil {
		return err
	}
	list, err := d.List(ctx)
	if err != nil {
		return err
	}
	report := auto.Describe(d)
	if a.json {
		s := statusJSON{
			Root: a.root, Driver: d.Name(), Layers: len(list), Status: []statusItemJSON{},
			MaxDepth: report.Features.MaxDepth, Abilities: newAbilitiesJSON(&report),
		}
		for _, i := range items {
			s.Status = append(s.Status, statusItemJSON(i))
		}
		return writeJSON(a.out, s)
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "Root:\t%s\nDriver:\t%s\nLayers:\t%d\n", printable(a.root), d.Name(), len(list))
	for _, i := range items {
		fmt.Fprintf(w, "%s:\t%s\n", i.Key, printable(i.Value))
	}
	printAbilities(w, &report)
	return w.Flush()
}

func newAbilitiesJSON(r *auto.Report) map[string]abilityJSON {
	m := make(map[string]abilityJSON)
	for _, ab := range r.Abilities() {
		m[ab.Name] = abilityJSON{ab.Have, ab.Reason}
	}
	return m
}

func printAbilities(w *tabwriter.Writer, r *auto.Report) {
	depth := "no limit"
	if r.Features.MaxDepth > 0 {
		depth = fmt.Sprint(r.Features.MaxDepth, " layers")
	}
	fmt.Fprintf(w, "MaxDepth:\t%s\n", depth)
	for _, ab := range r.Abilities() {
		answer := "yes"
		if !ab.Have {
			answer = "no: " + printable(ab.Reason)
		}
		fmt.Fprintf(w, "%s:\t%s\n", ab.Name, answer)
	}
}

func (a *app) probe() *cli.Command {
	return &cli.Command{
		Name: "probe", Usage: "tell what each driver could do in the root, and why not", Category: "host",
		Description: "Tries every driver with default options in a temporary directory. Nothing is changed.",
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if _, err := args(cmd, 0, 0); err != nil {
				return err
			}
			if a.root == "" {
				return usagef("no root: give --root or LAYERFS_ROOT")
			}
			reports, err := auto.Probe(ctx, a.root)
			if err != nil {
				return err
			}
			prior, err := auto.Prior(a.root)
			if err != nil {
				return err
			}
			if a.json {
				return a.probeJSON(reports, prior)
			}
			return a.probeText(reports, prior)
		},
	}
}

func (a *app) probeJSON(reports []auto.Report, prior []string) error {
	for _, r := range reports {
		line := probeJSON{
			Driver: r.Driver, Works: r.Err == nil, Prior: slices.Contains(prior, r.Driver),
			MaxDepth: r.Features.MaxDepth, Abilities: newAbilitiesJSON(&r),
		}
		if r.Err != nil {
			line.Reason = r.Err.Error()
		}
		if err := writeJSON(a.out, line); err != nil {
			return err
		}
	}
	return nil
}

// probeText prints a table of drivers and abilities, with the reason for each
// "no" below.
func (a *app) probeText(reports []auto.Report, prior []string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprint(w, "DRIVER")
	for _, r := range reports {
		fmt.Fprintf(w, "\t%s", r.Driver)
	}
	fmt.Fprint(w, "\nworks")
	for _, r := range reports {
		fmt.Fprintf(w, "\t%s", yes(r.Err == nil))
	}
	fmt.Fprint(w, "\nhas layers here")
	for _, r := range reports {
		fmt.Fprintf(w, "\t%s", yes(slices.Contains(prior, r.Driver)))
	}
	fmt.Fprint(w, "\nMaxDepth")
	for _, r := range reports {
		depth := "-"
		if r.Err == nil {
			if depth = fmt.Sprint(r.Features.MaxDepth); depth == "0" {
				depth = "no limit"
			}
		}
		fmt.Fprintf(w, "\t%s", depth)
	}
	fmt.Fprintln(w)
	var why strings.Builder
	all := make([][]auto.Ability, len(reports))
	for i, r := range reports {
		all[i] = r.Abilities()
	}
	for row := range all[0] {
		fmt.Fprint(w, all[0][row].Name)
		for _, abilities := range all {
			fmt.Fprintf(w, "\t%s", yes(abilities[row].Have))
		}
		fmt.Fprintln(w)
	}
	for i, r := range reports {
		if r.Err != nil {
			fmt.Fprintf(&why, "  %s does not work: %s\n", r.Driver, printable(r.Err.Error()))
			continue
		}
		for _, ab := range all[i] {
			if !ab.Have {
				fmt.Fprintf(&why, "  %s %s: %s\n", r.Driver, ab.Name, printable(ab.Reason))
			}
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if why.Len() == 0 || a.quiet {
		return nil
	}
	return a.say("\nWhy not:\n%s", strings.TrimSuffix(why.String(), "\n"))
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) check() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "compare the records of the layers with what is on disk and mounted", Category: "host",
		Description: "Without --repair nothing is changed, but opening the root finishes what a crash left.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "repair", Usage: "mend what can be mended; no layer in the list is removed"}},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if _, err := args(cmd, 0, 0); err != nil {
				return err
			}
			d, err := a.existing()
			return with(d, err, func(d layerfs.Driver) error {
				var mended []layerfs.Problem
				if cmd.Bool("repair") {
					if mended, err = layerfs.Repair(ctx, d); err != nil {
						return err
					}
				}
				left, err := layerfs.Check(ctx, d)
				if err != nil {
					return err
				}
				return a.printProblems(recovered(d), mended, left)
			})
		},
	}
}

// recovered tells what the opening of a driver mended.
func recovered(d layerfs.Driver) []layerfs.Problem {
	if r, ok := d.(interface{ Recovered() []layerfs.Problem }); ok {
		return r.Recovered()
	}
	return nil
}

func (a *app) printProblems(opened, mended, left []layerfs.Problem) error {
	print := func(list []layerfs.Problem, repaired bool) error {
		for _, p := range list {
			var err error
			if a.json {
				err = writeJSON(a.out, problemJSON{p.ID, p.Path, p.Reason, p.Repair, repaired})
			} else {
				err = a.say("%s", problemText(p, repaired))
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := errors.Join(print(opened, true), print(mended, true), print(left, false)); err != nil {
		return err
	}
	if len(left) > 0 {
		return damagedError{len(left)}
	}
	if a.json || a.quiet {
		return nil
	}
	return a.say("no problems")
}

func problemText(p layerfs.Problem, repaired bool) string {
	s := strings.TrimSpace(p.ID + " " + p.Path)
	if s != "" {
		s += ": "
	}
	s = printable(s + p.Reason)
	switch {
	case repaired && p.Repair != "":
		return s + " (mended: " + p.Repair + ")"
	case repaired:
		return s + " (mended)"
	case p.Repair != "":
		return s + " (--repair: " + p.Repair + ")"
	}
	return s + " (only removing the layer helps)"
}
