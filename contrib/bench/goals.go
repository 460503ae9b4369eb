package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// goal is a speed that this project set out to reach: the time of the fastest
// of others, on one task, divided by that of a row of ours.
type goal struct {
	task   string
	mine   string
	others []string
	least  float64
}

func goals() []goal {
	var all []goal
	for _, layer := range []string{"base", "toolchain", "small"} {
		for _, mine := range []string{ours, oursDigest} {
			all = append(all,
				goal{"apply " + layer, mine, goPeers(), 2},
				goal{"apply " + layer, mine, []string{gnu}, 1})
		}
	}
	all = append(all,
		goal{"write base", ours, []string{gnu}, 1},
		goal{"write small", ours, goPeers(), 2},
		goal{"write small", ours, []string{gnu}, 1},
		// What the drivers do: they know when a layer was copied.
		goal{taskChanges, oursSince, []string{moby}, 3},
		goal{taskLifeTmpfs, ours, []string{bare}, 1 / 1.3},
		goal{taskLifeExt4, ours, []string{containerd}, 1})
	for _, what := range []string{"base", "toolchain", "small"} {
		all = append(all, goal{"full copy " + what, ours, []string{gnu}, 2})
	}
	for _, fs := range reflinkers() {
		all = append(all, goal{"full copy small, " + fs, ours, []string{gnu}, 2})
	}
	return all
}

// printGoals says which goals were reached, of the tasks that ran.
func printGoals(w io.Writer, measured map[string][]row) error {
	var b strings.Builder
	b.WriteString("\n### Goals\n\nThrift is the same ratio of CPU time, which other work on the host changes less.\n\n" +
		"| task | row | against | speed wanted | speed reached | | thrift |\n|---|---|---|---|---|---|---|\n")
	line := func(task, mine, against string, want, got float64, thrift string) {
		verdict := "reached"
		if got < want {
			verdict = "**not reached**"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %.2f | %.2f | %s | %s |\n", task, mine, against, want, got, verdict, thrift)
	}
	n := b.Len()
	for _, g := range goals() {
		rows := measured[g.task]
		mine, theirs, who := find(rows, g.mine), row{}, ""
		for _, name := range g.others {
			if r := find(rows, name); r.median > 0 && (who == "" || r.median < theirs.median) {
				theirs, who = r, name
			}
		}
		if mine.median > 0 && who != "" {
			thrift := ""
			if mine.cpu > 0 {
				thrift = fmt.Sprintf("%.2f", theirs.cpu/mine.cpu)
			}
			line(g.task, g.mine, who, g.least, theirs.median/mine.median, thrift)
		}
	}
	// A compressed layer in at most 1.1 of the time of what takes longer.
	for _, layer := range []string{"base", "toolchain", "small"} {
		plain := find(measured["apply "+layer], ours).median
		for _, kind := range []string{"apply.gz", "apply.zst"} {
			rows := measured[kind+" "+layer]
			mine, alone := find(rows, ours).median, max(find(rows, unpack).median, plain)
			if mine > 0 && plain > 0 {
				line(kind+" "+layer, ours, "the longer of decompressing and applying alone", 1/1.1, alone/mine, "")
			}
		}
	}
	if b.Len() == n {
		b.Reset()
	}
	printMemory(&b, measured)
	_, err := io.WriteString(w, b.String())
	return err
}

// printMemory says how memory grows with the number of entries.
func printMemory(b *strings.Builder, measured map[string][]row) {
	head := fmt.Sprintf("\n### Memory\n\n| peak MB | %d files | %d files | growth |\n|---|---|---|---|\n", fewFiles, manyFiles)
	for _, kind := range []string{"apply ", "write "} {
		for _, many := range measured[memoryTask+kind+files(manyFiles)] {
			few := find(measured[memoryTask+kind+files(fewFiles)], many.who)
			if few.peak == 0 || many.peak == 0 {
				continue
			}
			fmt.Fprintf(b, "%s| %s%s | %.0f | %.0f | %.2f |\n", head, kind, many.who,
				float64(few.peak)/1e6, float64(many.peak)/1e6, float64(many.peak)/float64(few.peak))
			head = ""
		}
	}
}

// find returns a contestant's row, an empty one if it did not take part.
func find(rows []row, who string) row {
	i := slices.IndexFunc(rows, func(r row) bool { return r.who == who })
	if i < 0 {
		return row{}
	}
	return rows[i]
}
