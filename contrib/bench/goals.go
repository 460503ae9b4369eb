package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// goal is a speed that this project set out to reach: the time of the fastest
// of others, on one task, divided by ours.
type goal struct {
	task   string
	others []string
	least  float64
}

func goals() []goal {
	var all []goal
	for _, layer := range []string{"base", "toolchain", "small"} {
		all = append(all,
			goal{"apply " + layer, goPeers(), 2},
			goal{"apply " + layer, []string{gnu}, 1})
	}
	return append(all,
		goal{"write small", goPeers(), 2},
		goal{"write small", []string{gnu}, 1},
		goal{taskChanges, []string{moby}, 3},
		goal{taskLifeTmpfs, []string{bare}, 1 / 1.3},
		goal{taskLifeExt4, []string{containerd}, 1},
		goal{"full copy base", []string{gnu}, 2},
		goal{"full copy toolchain", []string{gnu}, 2},
		goal{"full copy small", []string{gnu}, 2})
}

// printGoals says which goals were reached, of the tasks that ran.
func printGoals(w io.Writer, measured map[string][]row) error {
	var b strings.Builder
	b.WriteString("\n### Goals\n\n| task | against | speed wanted | speed reached | |\n|---|---|---|---|---|\n")
	line := func(task, against string, want, got float64) {
		verdict := "reached"
		if got < want {
			verdict = "**not reached**"
		}
		fmt.Fprintf(&b, "| %s | %s | %.2f | %.2f | %s |\n", task, against, want, got, verdict)
	}
	n := b.Len()
	for _, g := range goals() {
		rows := measured[g.task]
		mine, theirs, who := median(rows, ours), 0.0, ""
		for _, name := range g.others {
			if t := median(rows, name); t > 0 && (theirs == 0 || t < theirs) {
				theirs, who = t, name
			}
		}
		if mine > 0 && theirs > 0 {
			line(g.task, who, g.least, theirs/mine)
		}
	}
	// A compressed layer in at most 1.1 of the time of what takes longer.
	for _, layer := range []string{"base", "toolchain", "small"} {
		for _, kind := range []string{"apply.gz", "apply.zst"} {
			rows := measured[kind+" "+layer]
			mine, alone := median(rows, ours), max(median(rows, unpack), median(measured["apply "+layer], ours))
			if mine > 0 && alone > 0 && median(measured["apply "+layer], ours) > 0 {
				line(kind+" "+layer, "the longer of decompressing and applying alone", 1/1.1, alone/mine)
			}
		}
	}
	if b.Len() == n {
		return nil
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// median returns a contestant's, or 0 if it did not take part.
func median(rows []row, who string) float64 {
	i := slices.IndexFunc(rows, func(r row) bool { return r.who == who })
	if i < 0 {
		return 0
	}
	return rows[i].median
}
