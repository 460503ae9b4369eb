package main

import (
	"errors"
	"fmt"

	"github.com/layerfs/layerfs/contrib/bench/internal/timing"
)

// goal is a ratio that this project set out to reach, and what it is.
type goal struct {
	what, against string
	wanted        float64
	most          bool // wanted is the largest that will do, not the smallest
	wall, cpu     float64
}

func (g goal) reached() bool {
	if g.most {
		return g.wall <= g.wanted
	}
	return g.wall >= g.wanted
}

// atLeast notes that the fastest of others is to take so many times what mine does.
func (b *bench) atLeast(wanted float64, what, mine string, all map[string][]timing.Cost, others ...string) {
	var g *goal
	for _, other := range others {
		if all[other] == nil {
			continue
		}
		wall, cpu := ratios(all[other], all[mine])
		if g == nil || wall < g.wall {
			g = &goal{what: what, against: other, wanted: wanted, wall: wall, cpu: cpu}
		}
	}
	if g != nil {
		b.goals = append(b.goals, *g)
	}
}

// atMost notes that mine is to take at most so many times what the other does.
func (b *bench) atMost(wanted float64, what, mine string, all map[string][]timing.Cost, other string) {
	wall, cpu := ratios(all[mine], all[other])
	b.goals = append(b.goals, goal{what: what, against: other, wanted: wanted, most: true, wall: wall, cpu: cpu})
}

// ratios divides medians.
func ratios(x, y []timing.Cost) (wall, cpu float64) {
	return float64(median(x)) / float64(median(y)), float64(medianCPU(x)) / float64(max(1, medianCPU(y)))
}

// printGoals says which goals were reached, of the parts that ran.
func (b *bench) printGoals() error {
	if len(b.goals) == 0 {
		return nil
	}
	fmt.Fprint(b.w, "\n### Goals\n\n| | against | wanted | reached, by medians | | by CPU time |\n|---|---|---|---|---|---|\n")
	missed := 0
	for _, g := range b.goals {
		sign, verdict := "≥", "reached"
		if g.most {
			sign = "≤"
		}
		if !g.reached() {
			verdict = "**not reached**"
			missed++
		}
		fmt.Fprintf(b.w, "| %s | %s | %s %.1f | %.2f | %s | %.2f |\n", g.what, g.against, sign, g.wanted, g.wall, verdict, g.cpu)
	}
	if missed > 0 {
		return errors.New("not all goals are reached")
	}
	return nil
}
