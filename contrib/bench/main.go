package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.podman.io/storage/pkg/reexec"

	"github.com/layerfs/layerfs/internal/fixture"
)

func main() {
	if reexec.Init() { // go.podman.io/storage mounts in a child of ours
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// job is one measurement, as its process gets it.
type job struct {
	Who  string // contestant
	Kind string // what to do
	Tar  string // layer for apply and bare
	Dir  string // directory for all that is made
	Tree string // tree that is read
	Old  string // tree it is compared with
	N    int    // number of containers
	FS   string // file system to make and work on, instead of Dir's

	Since time.Time // when Tree was an exact copy of Old
}

// result is what a measurement's process prints.
type result struct {
	Seconds float64
	CPU     float64 // seconds of user and system time
	Peak    int64   // bytes; 0 if another program did the work
}

func run(ctx context.Context, args []string, w io.Writer) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	rounds := fs.Int("rounds", 3, "`number` of measurements of each kind; of memory there is one")
	only := fs.String("only", "", "`regexp` of the tasks to run, such as '^apply small'")
	dir := fs.String("dir", "/dev/shm", "`directory` on a tmpfs to work in")
	child := fs.String("job", "", "`JSON` of one measurement; for bench itself")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *child != "" {
		return measure(ctx, *child, w)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root, to mount and to own files")
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	layers, err := fixture.Bench(ctx, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(*dir, "layerfs-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	b := bench{work: work, rounds: *rounds, layers: layers}
	tasks, err := b.tasks(ctx, match)
	if err != nil {
		return err
	}
	if err := printHost(w, *rounds, layers); err != nil {
		return err
	}
	measured := map[string][]row{}
	for _, t := range tasks {
		rows, err := b.run(ctx, t)
		if err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
		if err := printTask(w, t, rows); err != nil {
			return err
		}
		measured[t.name] = rows
	}
	return printGoals(w, measured)
}

// measure is the process of one measurement.
func measure(ctx context.Context, text string, w io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	f, ok := contestants()[j.Kind][j.Who]
	if !ok {
		return fmt.Errorf("no contestant %s for %s", j.Who, j.Kind)
	}
	spent, err := f(ctx, &j)
	if err != nil {
		return err
	}
	r := result{Seconds: spent.Wall.Seconds(), CPU: spent.CPU.Seconds()}
	if !external(j.Who) {
		if r.Peak, err = peak(); err != nil {
			return err
		}
	}
	return json.NewEncoder(w).Encode(r)
}

// peak returns the largest resident size of this process. Unlike ru_maxrss it
// does not start with that of the parent.
func peak() (int64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/self/status has no VmHWM")
}

// task is one table.
type task struct {
	name string
	unit string // "s" or "µs", of one round or of one container
	job  job    // without Who and Dir
	once bool   // one round is enough
	who  []string
}

// row is one contestant's line of a table.
type row struct {
	who           string
	median, least float64 // seconds
	cpu           float64 // seconds of user and system time, median
	peak          int64
}

type bench struct {
	work   string // immutable
	rounds int    // immutable
	layers []fixture.Layer
}

// Names of tasks that goals refer to.
const (
	taskChanges   = "changes of two copies of small, 1 changed"
	taskLifeTmpfs = "life cycle of a container, tmpfs, durability none"
	taskLifeExt4  = "life cycle of a container, ext4, durability metadata"
	memoryTask    = "memory: "
)

// Numbers of files for which memory is compared.
const (
	fewFiles  = 20_000
	manyFiles = 200_000
)

func files(n int) string { return fmt.Sprintf("%d files of 16 bytes", n) }

// reflinkers are the file systems where a copy can share the data.
func reflinkers() []string { return []string{"xfs", "btrfs"} }

// tasks lists the tables and makes the trees that they read.
func (b *bench) tasks(ctx context.Context, match *regexp.Regexp) ([]task, error) {
	var tasks []task
	all := contestants()
	add := func(name, unit string, j job, prepare func(*job) error) error {
		if !match.MatchString(name) {
			return nil
		}
		if prepare != nil {
			if err := prepare(&j); err != nil {
				return fmt.Errorf("prepare %s: %w", name, err)
			}
		}
		var who []string
		for name := range all[j.Kind] {
			who = append(who, name)
		}
		slices.Sort(who)
		tasks = append(tasks, task{name, unit, j, strings.HasPrefix(name, memoryTask), who})
		return nil
	}
	tree := func(l fixture.Layer) func(*job) error {
		return func(j *job) (err error) { j.Tree, err = b.extract(ctx, l.Name, l.Tar); return err }
	}
	for _, l := range b.layers {
		if err := add("apply "+l.Name, "s", job{Kind: "apply", Tar: l.Tar}, nil); err != nil {
			return nil, err
		}
	}
	for _, l := range b.layers {
		for _, name := range []string{l.Gzip, l.Zstd} {
			kind := "apply" + filepath.Ext(name)
			if err := add(kind+" "+l.Name, "s", job{Kind: kind, Tar: name}, nil); err != nil {
				return nil, err
			}
		}
	}
	for _, l := range b.layers {
		if err := add("write "+l.Name, "s", job{Kind: "write"}, tree(l)); err != nil {
			return nil, err
		}
	}
	small := b.layers[2]
	if err := add(taskChanges, "s", job{Kind: "changes"}, func(j *job) error {
		var err error
		if j.Old, err = b.extract(ctx, small.Name, small.Tar); err != nil {
			return err
		}
		j.Tree = filepath.Join(b.work, "changed")
		if err := command(ctx, "cp", "-a", j.Old, j.Tree); err != nil {
			return err
		}
		j.Since = time.Now()
		return changeOne(j.Tree)
	}); err != nil {
		return nil, err
	}
	for _, life := range [][2]string{{taskLifeTmpfs, ""}, {taskLifeExt4, "ext4"}} {
		if err := add(life[0], "µs", job{Kind: "lifecycle", N: 300, FS: life[1]}, nil); err != nil {
			return nil, err
		}
	}
	for _, l := range b.layers {
		if err := add("full copy "+l.Name, "s", job{Kind: "copy", Tar: l.Tar}, tree(l)); err != nil {
			return nil, err
		}
	}
	for _, fs := range reflinkers() {
		if err := add("full copy small, "+fs, "s", job{Kind: "copy", Tar: small.Tar, FS: fs}, nil); err != nil {
			return nil, err
		}
	}
	for _, n := range []int{fewFiles, manyFiles} {
		name := files(n)
		path := filepath.Join(b.work, strconv.Itoa(n)+".tar")
		generate := func(*job) error { return generateTar(path, n) }
		if err := add(memoryTask+"apply "+name, "s", job{Kind: "apply", Tar: path}, generate); err != nil {
			return nil, err
		}
		if err := add(memoryTask+"write "+name, "s", job{Kind: "write"}, func(j *job) (err error) {
			if err := generate(j); err != nil {
				return err
			}
			j.Tree, err = b.extract(ctx, strconv.Itoa(n), path)
			return err
		}); err != nil {
			return nil, err
		}
	}
	return tasks, nil
}

// extract makes a tree once, by GNU tar.
func (b *bench) extract(ctx context.Context, name, path string) (string, error) {
	dir := filepath.Join(b.work, "tree-"+name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	return dir, command(ctx, "tar", tarExtract(path, dir)...)
}

// run measures one task, all contestants in turn.
func (b *bench) run(ctx context.Context, t task) ([]row, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	info, err := os.Stderr.Stat()
	progress := err == nil && info.Mode()&os.ModeCharDevice != 0
	results := map[string][]result{}
	rounds := b.rounds
	if t.once {
		rounds = 1
	}
	for round := range rounds {
		for i := range t.who {
			who := t.who[(i+round)%len(t.who)]
			if progress {
				fmt.Fprintf(os.Stderr, "\r\033[K%s: round %d of %d: %s", t.name, round+1, rounds, who)
			}
			r, err := b.one(ctx, self, t.job, who)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", who, err)
			}
			results[who] = append(results[who], r)
		}
	}
	if progress {
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
	var rows []row
	for who, rs := range results {
		slices.SortFunc(rs, func(a, b result) int { return cmp.Compare(a.Seconds, b.Seconds) })
		r := row{who: who, least: rs[0].Seconds, median: rs[len(rs)/2].Seconds}
		if n := len(rs); n%2 == 0 {
			r.median = (rs[n/2-1].Seconds + rs[n/2].Seconds) / 2
		}
		cpus := make([]float64, len(rs))
		for i, one := range rs {
			r.peak = max(r.peak, one.Peak)
			cpus[i] = one.CPU
		}
		slices.Sort(cpus)
		r.cpu = cpus[len(cpus)/2]
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b row) int { return cmp.Compare(a.median, b.median) })
	return rows, nil
}

// one runs one measurement in a process and mount namespace of its own.
func (b *bench) one(ctx context.Context, self string, j job, who string) (r result, err error) {
	j.Who = who
	j.Dir, err = os.MkdirTemp(b.work, "job-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(j.Dir)
	if err := os.Chmod(j.Dir, 0o755); err != nil {
		return r, err
	}
	text, err := json.Marshal(j)
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-job", string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var out, msgs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msgs
	if err := cmd.Run(); err != nil {
		return r, fmt.Errorf("%w\n%s", err, strings.TrimSpace(msgs.String()))
	}
	return r, json.Unmarshal(out.Bytes(), &r)
}

// command runs a program that only speaks when it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}

// version returns the version of a module in this program.
func version(module string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == module {
			return dep.Version
		}
	}
	return "unknown"
}
