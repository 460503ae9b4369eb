// Command btrfsbench measures the btrfs driver beside the walks of
// moby/go-archive and containerd's continuity, beside containerd's btrfs
// snapshotter and beside the bare ioctls, on one btrfs loop file in one run, and
// prints the result as Markdown.
//
//	cd contrib/bench && CGO_ENABLED=1 go run ./btrfsbench [-rounds N] [-files N] [-only PART] [-dir DIR]
//
// It needs root, mkfs.btrfs and 3 GB in DIR, a tmpfs. containerd's snapshotter
// needs cgo and the kernel's headers; without cgo its row is missing.
//
// # How
//
// Two layers of 65,000 files, of which three differ (one changed, one removed,
// one added), are compared by all contestants in turn; rounds start with
// another one each. The file system is mounted noatime: else the first walk of
// a peer writes the access time of each directory it reads, which makes as many
// changes for the next. "Cold" drops the caches of the kernel before each; the
// image itself is on tmpfs and stays in memory. Every answer is checked. CPU is
// the time of all threads of this process and of its children; the kernel's own
// threads, which clean up removed subvolumes, are nobody's.
//
// "Bare ioctls" make and remove a snapshot, and sync nothing. "A synced record"
// is the least that anybody must add who is to know of the layer after a power
// failure: a small file that is written and synced between the two, and its
// removal, with a sync of its directory.
//
// The goals are the last table. The exit status is 0 if all are reached.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/contrib/bench/internal/timing"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "btrfsbench:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("btrfsbench", flag.ContinueOnError)
	b := &bench{w: w}
	fs.IntVar(&b.rounds, "rounds", 5, "`number` of measurements of each kind")
	fs.IntVar(&b.files, "files", 65000, "`number` of files of a layer")
	only := fs.String("only", "", "the one `part` to run: compare, growth or life")
	dir := fs.String("dir", "/dev/shm", "`directory` on a tmpfs to work in")
	if err := fs.Parse(args); err != nil {
		return err
	}
	named := func(p part) bool { return p.name == *only }
	if *only != "" && !slices.ContainsFunc(parts, named) {
		return fmt.Errorf("no part %q", *only)
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, to mount")
	}
	if b.dir, err = os.MkdirTemp(*dir, "layerfs-btrfsbench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.printHost()
	for _, part := range parts {
		if *only != "" && *only != part.name {
			continue
		}
		if err := part.run(b, ctx); err != nil {
			return err
		}
	}
	return b.printGoals()
}

// part is a group of measurements on file systems of its own.
type part struct {
	name string
	run  func(*bench, context.Context) error
}

var parts = []part{{"compare", (*bench).compare}, {"growth", (*bench).growth}, {"life", (*bench).life}}

type bench struct {
	w             io.Writer
	dir           string
	rounds, files int
	goals         []goal
}

// contestant does one thing once; prepare, if there is any, comes before the
// time counts.
type contestant struct {
	name string
	do   func(context.Context) error
}

// measure runs contestants in turn and returns the costs of each, fastest
// first.
func (b *bench) measure(ctx context.Context, prepare func() error, list []contestant) (map[string][]timing.Cost, error) {
	all := make(map[string][]timing.Cost)
	for round := range b.rounds {
		for i := range list {
			if err := context.Cause(ctx); err != nil {
				return nil, err
			}
			c := list[(i+round)%len(list)]
			if err := prepare(); err != nil {
				return nil, err
			}
			runtime.GC()
			spent, err := timing.Of(func() error { return c.do(ctx) })
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			all[c.name] = append(all[c.name], spent)
		}
	}
	for _, costs := range all {
		slices.SortFunc(costs, func(a, b timing.Cost) int { return cmp.Compare(a.Wall, b.Wall) })
	}
	return all, nil
}

func median(costs []timing.Cost) time.Duration { return costs[len(costs)/2].Wall }

func medianCPU(costs []timing.Cost) time.Duration {
	cpus := make([]time.Duration, len(costs))
	for i, c := range costs {
		cpus[i] = c.CPU
	}
	slices.Sort(cpus)
	return cpus[len(cpus)/2]
}

// table prints what was measured. Ratios are of one row to the others.
func (b *bench) table(title string, list []contestant, all map[string][]timing.Cost, per int, against string) {
	fmt.Fprintf(b.w, "\n### %s\n\n| | median ms | fastest ms | CPU ms | its time / %s | CPU |\n|---|---|---|---|---|---|\n", title, against)
	ms := func(d time.Duration) float64 { return float64(d) / float64(per) / 1e6 }
	base := all[against]
	for _, c := range list {
		costs := all[c.name]
		fmt.Fprintf(b.w, "| %s | %.3f | %.3f | %.3f | %.1f | %.1f |\n", c.name, ms(median(costs)), ms(costs[0].Wall), ms(medianCPU(costs)),
			float64(median(costs))/float64(median(base)), float64(medianCPU(costs))/float64(max(1, medianCPU(base))))
	}
}

// fileSystem makes a btrfs file system and returns where it is mounted.
func (b *bench) fileSystem(ctx context.Context) (dir string, unmount func() error, err error) {
	top, err := os.MkdirTemp(b.dir, "")
	if err != nil {
		return "", nil, err
	}
	image, dir := filepath.Join(top, "image"), filepath.Join(top, "fs")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 3<<30)); err != nil {
		return "", nil, err
	}
	for _, args := range [][]string{{"mkfs.btrfs", "-q", image}, {"mount", "-o", "loop,noatime", image, dir}} {
		if err := command(ctx, args...); err != nil {
			return "", nil, err
		}
	}
	return dir, func() error {
		// The program is not interrupted before it has cleaned up.
		return errors.Join(command(context.Background(), "umount", dir), os.RemoveAll(top))
	}, nil
}

func command(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// dropCaches makes what follows read from the disk.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func (b *bench) printHost() {
	var u unix.Utsname
	_ = unix.Uname(&u)
	fmt.Fprintf(b.w, "Measured on %s: Linux %s %s, %d processors, %s; median of %d rounds.\n", time.Now().UTC().Format(time.DateOnly),
		unix.ByteSliceToString(u.Release[:]), runtime.GOARCH, runtime.NumCPU(), runtime.Version(), b.rounds)
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return
	}
	var peers []string
	for _, dep := range info.Deps {
		switch dep.Path {
		case "github.com/containerd/containerd/v2", "github.com/containerd/continuity", "github.com/moby/go-archive", "github.com/containerd/btrfs/v2":
			peers = append(peers, dep.Path+" "+dep.Version)
		}
	}
	fmt.Fprintf(b.w, "Peers: %s.\n", strings.Join(peers, ", "))
}
