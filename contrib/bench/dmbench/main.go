//go:build linux

// Command dmbench measures package devmapper beside containerd's devmapper
// snapshotter: the life of a container on one base layer, each step by itself,
// both on pools in files of a tmpfs with the same table. It prints the result
// as Markdown. It needs root, device mapper, dmsetup and mkfs.ext4; without them
// run it in a guest:
//
//	go run ./internal/guest/cmd/vmtest -C contrib/bench -program ./dmbench -exec dmbench
//
// Rounds of all contestants alternate, and each round starts with another one,
// so that what else the machine does hits all alike.
//
// Containerd's Prepare also makes the device active, mounts it once to remove
// lost+found, and keeps it active; so its mount has less to do. What compares is
// also given as the sum of both steps.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	dmsnapshots "github.com/containerd/containerd/v2/plugins/snapshots/devmapper"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/internal/loop"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "dmbench:", err)
		os.Exit(1)
	}
}

// Sizes of both pools and of the layers.
const (
	dataSize     = 512 << 20
	metadataSize = 8 << 20
	baseSize     = 128 << 20
)

// goal is how many times faster than containerd's Create has to be.
const goal = 5

// contestant does the steps of a container's life. Containers are on one base
// layer that it has made.
type contestant struct {
	name    string
	create  func(ctx context.Context, id string) error
	mount   func(ctx context.Context, id string) (path string, err error)
	unmount func(ctx context.Context, id string) error
	remove  func(ctx context.Context, id string) error
}

// steps are the columns of the table; the last ones are sums.
func steps() []string {
	return []string{"create", "mount", "unmount", "remove", "create and mount", "whole life"}
}

func run(ctx context.Context, args []string, w io.Writer) (err error) {
	fs := flag.NewFlagSet("dmbench", flag.ContinueOnError)
	rounds := fs.Int("rounds", 11, "`number` of containers of each contestant that are measured")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if _, err := os.Stat("/run/udev/control"); err != nil {
		// Without udev, dmsetup makes the nodes below /dev/mapper itself, but
		// has to be told; see dmsetup(8). It runs in a process of its own, also
		// for containerd.
		if err := os.Setenv("DM_DISABLE_UDEV", "1"); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp("", "dmbench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := unix.Mount("tmpfs", work, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(work, 0)) }()

	var all []*contestant
	var table string
	for _, durability := range []layerfs.Durability{layerfs.DurabilityNone, layerfs.DurabilityMetadata} {
		c, pool, closeAll, err := ours(ctx, filepath.Join(work, durability.String()), durability)
		if err != nil {
			return err
		}
		defer closeAll()
		all, table = append(all, c), pool
	}
	c, closeAll, err := theirs(ctx, work, table)
	if err != nil {
		return err
	}
	defer closeAll()
	all = append(all, c)

	times := make(map[string]map[string][]time.Duration)
	for round := range *rounds + 1 {
		for i := range all {
			c := all[(i+round)%len(all)]
			took, err := c.live(ctx, "c"+strconv.Itoa(round))
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if round == 0 {
				continue // files of programs are read for the first time
			}
			if times[c.name] == nil {
				times[c.name] = make(map[string][]time.Duration)
			}
			for step, d := range took {
				times[c.name][step] = append(times[c.name][step], d)
			}
		}
	}
	return report(w, all, times, *rounds, table)
}

// live measures one container.
func (c *contestant) live(ctx context.Context, id string) (map[string]time.Duration, error) {
	took := make(map[string]time.Duration)
	step := func(name string, do func() error) error {
		start := time.Now()
		err := do()
		took[name] = time.Since(start)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	if err := step("create", func() error { return c.create(ctx, id) }); err != nil {
		return nil, err
	}
	var path string
	err := step("mount", func() (err error) { path, err = c.mount(ctx, id); return err })
	if err != nil {
		return nil, err
	}
	// It is the layer that was asked for, and it can be written.
	if _, err := os.Stat(filepath.Join(path, "base")); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(path, "own"), []byte(id), 0o644); err != nil {
		return nil, err
	}
	if err := step("unmount", func() error { return c.unmount(ctx, id) }); err != nil {
		return nil, err
	}
	if err := step("remove", func() error { return c.remove(ctx, id) }); err != nil {
		return nil, err
	}
	took["create and mount"] = took["create"] + took["mount"]
	took["whole life"] = took["create and mount"] + took["unmount"] + took["remove"]
	return took, nil
}

// ours is package devmapper. table is that of its pool.
func ours(ctx context.Context, root string, durability layerfs.Durability) (_ *contestant, table string, _ func(), err error) {
	d, err := devmapper.New(root, &devmapper.Options{
		Durability: durability, DataSize: dataSize, MetadataSize: metadataSize, BaseSize: baseSize, BlkDiscard: "off",
	})
	if err != nil {
		return nil, "", nil, err
	}
	closeAll := func() {
		if err := d.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "dmbench:", err)
		}
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()
	items, err := d.Status(ctx)
	if err != nil {
		return nil, "", nil, err
	}
	pool := ""
	for _, i := range items {
		if i.Key == "Pool Name" {
			pool = i.Value
		}
	}
	if table, err = dmsetup("table", pool); err != nil {
		return nil, "", nil, err
	}
	c := &contestant{
		name:    "layerfs, durability " + durability.String(),
		create:  func(ctx context.Context, id string) error { return d.Create(ctx, id, "base", nil) },
		mount:   func(ctx context.Context, id string) (string, error) { return d.Get(ctx, id, nil) },
		unmount: d.Put,
		remove:  d.Remove,
	}
	if err := d.Create(ctx, "base", "", nil); err != nil {
		return nil, "", nil, err
	}
	path, err := d.Get(ctx, "base", nil)
	if err != nil {
		return nil, "", nil, err
	}
	err = os.WriteFile(filepath.Join(path, "base"), nil, 0o644)
	return c, table, closeAll, errors.Join(err, d.Put(ctx, "base"))
}

// theirs is containerd's snapshotter on a pool with the same table.
func theirs(ctx context.Context, work, table string) (_ *contestant, _ func(), err error) {
	var undo []func() error
	closeAll := func() {
		for _, f := range slices.Backward(undo) {
			if err := f(); err != nil {
				fmt.Fprintln(os.Stderr, "dmbench:", err)
			}
		}
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()
	// 0 SECTORS thin-pool METADATA DATA BLOCK WATERMARK FEATURES…
	words := strings.Fields(table)
	if len(words) < 7 || words[2] != "thin-pool" {
		return nil, nil, fmt.Errorf("table of the pool: %q", table)
	}
	for i, file := range []struct {
		name string
		size int64
	}{{"containerd-metadata", metadataSize}, {"containerd-data", dataSize}} {
		path := filepath.Join(work, file.name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, file.size)); err != nil {
			return nil, nil, err
		}
		dev, err := loop.Attach(ctx, path, &loop.Options{DirectIOIfPossible: true})
		if err != nil {
			return nil, nil, err
		}
		undo = append(undo, dev.Detach)
		words[3+i] = dev.Path()
	}
	const pool = "dmbench-pool"
	if _, err := dmsetup("create", pool, "--table", strings.Join(words, " ")); err != nil {
		return nil, nil, err
	}
	undo = append(undo, func() error { _, err := dmsetup("remove", "--retry", pool); return err })
	s, err := dmsnapshots.NewSnapshotter(ctx, &dmsnapshots.Config{
		RootPath: filepath.Join(work, "containerd"), PoolName: pool, BaseImageSize: strconv.Itoa(baseSize), FileSystemType: "ext4",
	})
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, s.Close)
	c := containerd(s, filepath.Join(work, "target"))
	if err := os.Mkdir(filepath.Join(work, "target"), 0o755); err != nil {
		return nil, nil, err
	}
	mounts, err := s.Prepare(ctx, "making", "")
	if err != nil {
		return nil, nil, err
	}
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "base"), nil, 0o644)
	})
	if err == nil {
		err = s.Commit(ctx, "base", "making")
	}
	undo = append(undo, func() error { return s.Remove(context.WithoutCancel(ctx), "base") })
	return c, closeAll, err
}

// containerd does the steps as its clients do.
func containerd(s snapshots.Snapshotter, target string) *contestant {
	var mounts []mount.Mount
	return &contestant{
		name: "containerd " + version("github.com/containerd/containerd/v2"),
		create: func(ctx context.Context, id string) (err error) {
			mounts, err = s.Prepare(ctx, id, "base")
			return err
		},
		mount:   func(context.Context, string) (string, error) { return target, mount.All(mounts, target) },
		unmount: func(context.Context, string) error { return mount.UnmountAll(target, 0) },
		remove:  s.Remove,
	}
}

// version returns the version of a module in this program.
func version(module string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == module {
				return dep.Version
			}
		}
	}
	return "unknown"
}

func dmsetup(args ...string) (string, error) {
	out, err := exec.Command("dmsetup", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("dmsetup %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

// report prints the medians, and the ratio to the first contestant's.
func report(w io.Writer, all []*contestant, times map[string]map[string][]time.Duration, rounds int, table string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Linux %s %s, %d processors, %s; median of %d containers, in ms; pools with the table %q on a tmpfs, ext4.\n\n|",
		unix.ByteSliceToString(u.Release[:]), runtime.GOARCH, runtime.NumCPU(), runtime.Version(), rounds, table)
	for _, s := range steps() {
		fmt.Fprintf(&b, " | %s", s)
	}
	fmt.Fprintf(&b, " |\n|---%s|\n", strings.Repeat("|---", len(steps())))
	median := make(map[string]map[string]float64)
	for _, c := range all {
		median[c.name] = make(map[string]float64)
		fmt.Fprintf(&b, "| %s", c.name)
		for _, s := range steps() {
			list := slices.Sorted(slices.Values(times[c.name][s]))
			median[c.name][s] = (list[(len(list)-1)/2] + list[len(list)/2]).Seconds() * 1e3 / 2
			fmt.Fprintf(&b, " | %.2f", median[c.name][s])
		}
		b.WriteString(" |\n")
	}
	peer := all[len(all)-1].name
	for _, c := range all[:len(all)-1] {
		fmt.Fprintf(&b, "| times faster, %s", strings.TrimPrefix(c.name, "layerfs, "))
		for _, s := range steps() {
			fmt.Fprintf(&b, " | %.1f", median[peer][s]/median[c.name][s])
		}
		b.WriteString(" |\n")
	}
	ratio := median[peer]["create"] / median[all[0].name]["create"]
	verdict := "reached"
	if ratio < goal {
		verdict = "**not reached**"
	}
	// A row of the table of scripts/bench.
	fmt.Fprintf(&b, "\ngoal: | Create, %s | %.1f ms | %s: %.1f ms | %.1f faster | ≥ %d | %s |\n",
		strings.TrimPrefix(all[0].name, "layerfs, "), median[all[0].name]["create"], peer, median[peer]["create"], ratio, goal, verdict)
	_, err := io.WriteString(w, b.String())
	return err
}
