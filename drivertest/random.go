package drivertest

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

func randomCases() []testCase {
	return []testCase{{name: "RandomHistories", run: testRandom}}
}

// testRandom makes stacks by random steps. The error names the seed, with
// which Harness.Seed makes the same history again.
func testRandom(e *env) error {
	first, count := e.h.Seed, e.h.Histories
	if first == 0 {
		first = 1
	}
	if count == 0 {
		count = 3
	}
	for seed := first; seed < first+uint64(count); seed++ {
		if err := e.randomHistory(seed); err != nil {
			return fmt.Errorf("seed %d: %w", seed, err)
		}
	}
	return nil
}

func (e *env) randomHistory(seed uint64) error {
	const layers, steps = 5, 30
	g := &generator{rng: rand.New(rand.NewPCG(seed, 2)), rename: e.d.Features().Rename, links: e.h.Deviates["HardLinkAcrossLayers"] == "", layer: map[string]int{}}
	d, err := e.other()
	if err != nil {
		return err
	}
	s := e.newStack(d, fmt.Sprintf("s%d", seed))
	// The steps are chosen by looking at a tree of their own.
	plan := e.newDir("plan")
	for n := range layers {
		g.now = n
		var list []string
		for range steps {
			step, err := g.step(plan)
			if err != nil {
				return err
			}
			if err := makeTree(plan, step); err != nil {
				return fmt.Errorf("[bug] step %q: %w", step, err)
			}
			g.note(plan)
			list = append(list, step)
		}
		if err := s.add(list...); err != nil {
			return fmt.Errorf("%w\nsteps of layer %d: %q", err, n, list)
		}
	}
	if err := s.check(); err != nil {
		return fmt.Errorf("%w\nsteps: %q", err, s.steps)
	}
	return nil
}

// generator chooses steps that are possible on a tree.
type generator struct {
	rng    *rand.Rand
	rename bool // directories of lower layers can be renamed
	links  bool // files of lower layers with several names can be written
	now    int
	layer  map[string]int // the layer that made a path
}

// note remembers which layer made what there is.
func (g *generator) note(root string) {
	seen := map[string]int{}
	_ = filepath.WalkDir(root, func(path string, _ fs.DirEntry, _ error) error {
		if n, ok := g.layer[path]; ok {
			seen[path] = n
		} else {
			seen[path] = g.now
		}
		return nil
	})
	g.layer = seen
}

// pick returns the path of some entry, relative to root, or false.
func (g *generator) pick(root string, match func(path string, fi fs.FileInfo) bool) (string, bool) {
	var list []string
	_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		if fi, err := entry.Info(); err == nil && match(path, fi) {
			list = append(list, path)
		}
		return nil
	})
	if len(list) == 0 {
		return "", false
	}
	slices.Sort(list)
	rel, err := filepath.Rel(root, list[g.rng.IntN(len(list))])
	return rel, err == nil
}

func (g *generator) dir(root string) string {
	if g.rng.IntN(3) == 0 {
		return "."
	}
	dir, ok := g.pick(root, func(_ string, fi fs.FileInfo) bool { return fi.IsDir() })
	if !ok {
		return "."
	}
	return dir
}

// free returns a path that is not taken.
func (g *generator) free(root string) string {
	dir := g.dir(root)
	for {
		path := filepath.Join(dir, string(rune('a'+g.rng.IntN(12)))+strconv.Itoa(g.rng.IntN(4)))
		if _, err := os.Lstat(filepath.Join(root, path)); err != nil {
			return path
		}
		if g.rng.IntN(8) == 0 {
			dir = "."
		}
		if g.rng.IntN(20) == 0 {
			return path + "-" + strconv.Itoa(g.rng.IntN(1e6))
		}
	}
}

func regular(_ string, fi fs.FileInfo) bool { return fi.Mode().IsRegular() }

func (g *generator) step(root string) (string, error) {
	any := func(string, fs.FileInfo) bool { return true }
	writable := func(path string, fi fs.FileInfo) bool {
		return fi.Mode().IsRegular() && (g.links || g.layer[path] == g.now || linkCount(fi) == 1)
	}
	notLink := func(path string, fi fs.FileInfo) bool {
		return fi.Mode().Type() != fs.ModeSymlink && (fi.IsDir() || writable(path, fi))
	}
	movable := func(path string, fi fs.FileInfo) bool {
		return (!fi.IsDir() || g.rename || g.layer[path] == g.now) && (g.links || linkCount(fi) == 1 || fi.IsDir())
	}
	for {
		switch n := g.rng.IntN(20); {
		case n < 5:
			return fmt.Sprintf("file %s content-%d", g.free(root), g.rng.IntN(1000)), nil
		case n < 7:
			return fmt.Sprintf("dir %s 0%o", g.free(root), 0o700|g.rng.IntN(0o100)), nil
		case n == 7:
			return fmt.Sprintf("symlink %s target-%d", g.free(root), g.rng.IntN(10)), nil
		case n == 8:
			if old, ok := g.pick(root, writable); ok {
				return fmt.Sprintf("link %s %s", g.free(root), old), nil
			}
		case n < 11:
			if path, ok := g.pick(root, writable); ok {
				return fmt.Sprintf("append %s more-%d", path, g.rng.IntN(1000)), nil
			}
		case n == 11:
			if path, ok := g.pick(root, writable); ok {
				return fmt.Sprintf("data %s %d %d", path, g.rng.IntN(20000), g.rng.IntN(100)), nil
			}
		case n == 12:
			if path, ok := g.pick(root, notLink); ok {
				return fmt.Sprintf("chmod %s 0%o", path, 0o700|g.rng.IntN(0o100)), nil
			}
		case n == 13:
			if path, ok := g.pick(root, notLink); ok && onLinux() {
				return fmt.Sprintf("xattr %s user.r%d v%d", path, g.rng.IntN(3), g.rng.IntN(100)), nil
			}
		case n == 14:
			if path, ok := g.pick(root, notLink); ok {
				return fmt.Sprintf("mtime %s %d.%09d", path, 1e9+g.rng.IntN(1e8), g.rng.IntN(1e9)), nil
			}
		case n < 17:
			if path, ok := g.pick(root, movable); ok {
				to := g.free(root)
				if rel, err := filepath.Rel(path, to); err == nil && filepath.IsLocal(rel) {
					continue // into itself
				}
				return fmt.Sprintf("rename %s %s", path, to), nil
			}
		case n == 17:
			if path, ok := g.pick(root, regular); ok && onLinux() {
				return "fifo " + g.free(root), nil
			} else if ok {
				return "rm " + path, nil
			}
		default:
			if path, ok := g.pick(root, func(p string, fi fs.FileInfo) bool {
				return any(p, fi) && (g.links || linkCount(fi) == 1 || fi.IsDir())
			}); ok {
				return "rm " + path, nil
			}
		}
	}
}
