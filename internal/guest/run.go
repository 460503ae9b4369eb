package guest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Options is what a run is asked for. The zero value of a field is its default.
type Options struct {
	Cache   string        // directory; see [OpenCache]
	Update  bool          // look for newer packages
	Kernel  string        // package of the kernel; linux-image-cloud-amd64
	Accel   string        // "kvm", "tcg", or "auto", which probes
	ZFS     bool          // build and load the OpenZFS module
	Memory  int           // MiB; 2048
	CPUs    int           // 2
	Disk    int64         // bytes of each of the two sparse disks; 32 GiB
	Timeout time.Duration // of each package or command; 10 minutes
	Append  string        // words for the kernel's command line

	Build    Build
	Packages []string // patterns of packages with tests
	Programs []string // main packages that the guest has in /usr/local/bin
	Commands []string // shell commands to run, after the tests
	TestArgs []string // flags of the test binaries, such as -test.run=X
	Files    []Extra  // more files for the guest
	Env      []string // more environment, "NAME=value"

	Out       string // directory for what is left in LAYERFS_OUT; "" drops it
	KernelLog string // file to keep the kernel log in; "" keeps none
	Verbose   bool
	JSON      bool

	Stdout io.Writer // results
	Stderr io.Writer // what the run does, and the kernel log if it failed
}

func (o *Options) defaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.Memory, 2048)
	def(&o.CPUs, 2)
	if o.Kernel == "" {
		o.Kernel = "linux-image-cloud-amd64"
	}
	if o.Accel == "" {
		o.Accel = "auto"
	}
	if o.Disk == 0 {
		o.Disk = 32 << 30
	}
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
}

// bootLimit is how long a guest may take to say Hello, also with emulation on
// a busy host.
const bootLimit = 3 * time.Minute

// errFailed says that tests failed; what failed is on the standard output.
var errFailed = errors.New("FAIL")

// Run does everything the package comment says. The error is nil only if every
// package and command ran to its end and none failed.
func Run(ctx context.Context, o Options) (err error) {
	o.defaults()
	start := time.Now()
	logf := func(format string, args ...any) {
		fmt.Fprintf(o.Stderr, "vmtest: "+format+"\n", args...)
	}
	c, err := OpenCache(o.Cache, o.Update, logf)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(c.dir, "run-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	r := &runner{o: &o, logf: logf}
	initrd, k, accel, err := r.prepare(ctx, c, dir)
	if err != nil {
		return err
	}
	if len(r.job.Commands) == 0 {
		logf("nothing to run")
		return nil
	}
	logf("prepared in %s; booting %s with %s", time.Since(start).Round(time.Millisecond), k.Release, accel)

	m := &Machine{
		Kernel: k.Image, Initrd: initrd, Dir: dir, Memory: o.Memory, CPUs: o.CPUs,
		Accel: accel, Disks: []int64{o.Disk, o.Disk}, Append: o.Append,
	}
	err = r.boot(ctx, m)
	return errors.Join(err, r.kernelLog(m, err != nil))
}

// runner is the state of one run.
type runner struct {
	o    *Options
	logf func(string, ...any)
	job  Job
	pkgs []*Package // of the first commands of the job, in the same order

	cur     int // command that runs, -1 if none
	report  *Report
	ended   map[int]bool
	failed  []string
	total   Tally
	skipped int
}

// prepare fills the cache, builds the binaries and writes the image.
func (r *runner) prepare(ctx context.Context, c *Cache, dir string) (initrd string, k *Kernel, accel string, err error) {
	unlock, err := c.Lock()
	if err != nil {
		return "", nil, "", err
	}
	locked := true
	free := func() error {
		if !locked {
			return nil
		}
		locked = false
		return unlock()
	}
	defer func() { err = errors.Join(err, free()) }()

	if k, err = c.Kernel(ctx, r.o.Kernel); err != nil {
		return "", nil, "", err
	}
	zfs := ""
	if r.o.ZFS {
		if zfs, err = c.ZFS(ctx, k); err != nil {
			return "", nil, "", err
		}
	}
	base, must, may, err := c.BaseImage(ctx, k, zfs)
	if err != nil {
		return "", nil, "", err
	}
	init := filepath.Join(dir, "init")
	// Init is part of this module, whatever module the tests are in.
	plain := &Build{}
	if err := plain.Program(ctx, "github.com/layerfs/layerfs/internal/guest/cmd/vminit", init); err != nil {
		return "", nil, "", err
	}
	if accel = r.o.Accel; accel == "auto" {
		if accel, err = c.Accel(ctx, k, init); err != nil {
			return "", nil, "", err
		}
	}
	if err := free(); err != nil {
		return "", nil, "", err
	}

	extra, err := r.collect(ctx, dir)
	if err != nil {
		return "", nil, "", err
	}
	r.job.Modules, r.job.Optional = must, may
	r.job.Scratch, r.job.Out = true, r.o.Out != ""
	r.job.Env = append([]string{"LAYERFS_GUEST=1", "LAYERFS_DISK=/dev/vdb"}, r.o.Env...)
	initrd = filepath.Join(dir, "initrd")
	return initrd, k, accel, WriteImage(initrd, base, init, &r.job, extra)
}

// collect builds what runs in the guest and lists the commands.
func (r *runner) collect(ctx context.Context, dir string) ([]Extra, error) {
	extra := r.o.Files
	seconds := int(r.o.Timeout.Seconds())
	if len(r.o.Packages) > 0 {
		pkgs, err := r.o.Build.List(ctx, r.o.Packages)
		if err != nil {
			return nil, err
		}
		if err := r.o.Build.Tests(ctx, dir, pkgs); err != nil {
			return nil, err
		}
		for _, p := range pkgs {
			if p.Binary == "" {
				if !r.o.JSON {
					fmt.Fprintf(r.o.Stdout, "?   \t%s\t[no test files]\n", p.ImportPath)
				}
				continue
			}
			files, err := p.Files()
			if err != nil {
				return nil, err
			}
			bin := fmt.Sprintf("/usr/local/lib/tests/%d.test", len(r.pkgs))
			extra = append(append(extra, files...), Extra{p.Binary, bin})
			r.pkgs = append(r.pkgs, p)
			r.job.Commands = append(r.job.Commands, Command{
				Name: p.ImportPath, Dir: p.GuestDir(), Timeout: seconds + 30,
				// test2json's own form of -test.v marks its lines, so that no
				// output of a test is taken for one. Go's time limit comes
				// first: it tells which test hangs.
				Argv: append([]string{
					bin, "-test.v=test2json", "-test.paniconexit0",
					fmt.Sprintf("-test.timeout=%ds", seconds),
				}, r.o.TestArgs...),
			})
		}
	}
	for i, p := range r.o.Programs {
		bin := filepath.Join(dir, fmt.Sprintf("program%d", i))
		if err := r.o.Build.Program(ctx, p, bin); err != nil {
			return nil, err
		}
		name, err := filepath.Abs(p)
		if err != nil {
			return nil, err
		}
		extra = append(extra, Extra{bin, "/usr/local/bin/" + filepath.Base(name)})
	}
	for _, c := range r.o.Commands {
		r.job.Commands = append(r.job.Commands, Command{
			Name: c, Argv: []string{"/bin/sh", "-c", c}, Dir: "/root", Timeout: seconds,
		})
	}
	return extra, nil
}

// boot runs the machine and judges what came.
func (r *runner) boot(ctx context.Context, m *Machine) (err error) {
	limit := bootLimit
	for _, c := range r.job.Commands {
		limit += time.Duration(c.Timeout+30) * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the guest took longer than %s", limit))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	hello := time.AfterFunc(bootLimit, func() { stop(fmt.Errorf("the guest said nothing for %s", bootLimit)) })
	defer hello.Stop()

	r.cur, r.ended = -1, map[int]bool{}
	start := time.Now()
	var tarw *io.PipeWriter
	var untar sync.WaitGroup
	var untarErr error
	if r.o.Out != "" {
		pr, pw := io.Pipe()
		tarw = pw
		untar.Go(func() {
			untarErr = unpackResults(pr, r.o.Out)
			_, _ = io.Copy(io.Discard, pr) // what follows the archive's end
		})
	}
	runErr := m.Run(ctx, func(k Kind, data []byte) error {
		switch k {
		case Hello:
			hello.Stop()
			r.logf("kernel %s runs after %s", data, time.Since(start).Round(time.Millisecond))
		case Note:
			r.logf("guest: %s", data)
		case File:
			if tarw == nil {
				return errors.New("results that nobody asked for")
			}
			_, err := tarw.Write(data)
			return err
		default:
			return r.frame(ctx, k, data)
		}
		return nil
	})
	if tarw != nil {
		tarw.Close()
		untar.Wait()
	}
	if runErr != nil && r.report != nil {
		runErr = errors.Join(runErr, r.closeReport(Ended{Index: r.cur, Code: -1, Error: "the guest ended"}))
	}
	for i, c := range r.job.Commands {
		if !r.ended[i] {
			r.failed = append(r.failed, c.Name+": did not run to its end")
		}
	}
	if runErr == nil {
		runErr = untarErr
	}
	r.logf("%s in the guest", time.Since(start).Round(time.Millisecond))
	return r.summary(runErr)
}

// frame handles what a command did.
func (r *runner) frame(ctx context.Context, k Kind, data []byte) error {
	switch k {
	case Begin:
		i, err := strconv.Atoi(string(data))
		if err != nil || i < 0 || i >= len(r.job.Commands) || r.cur >= 0 {
			return fmt.Errorf("guest: begin of command %q", data)
		}
		r.cur = i
		if i < len(r.pkgs) {
			r.report, err = NewReport(ctx, r.pkgs[i].ImportPath, r.o.Stdout, r.o.Verbose, r.o.JSON)
		}
		return err
	case Output:
		if r.report != nil {
			_, err := r.report.Write(data)
			return err
		}
		_, err := r.o.Stdout.Write(data)
		return err
	case End:
		var e Ended
		if err := json.Unmarshal(data, &e); err != nil || e.Index != r.cur || r.cur < 0 {
			return fmt.Errorf("guest: end of command %q", data)
		}
		return r.closeReport(e)
	}
	return fmt.Errorf("guest: frame %q", k)
}

// closeReport judges one command and prints its line.
func (r *runner) closeReport(e Ended) error {
	name := r.job.Commands[e.Index].Name
	r.ended[e.Index] = e.Error == "" || e.Code >= 0
	r.cur = -1
	why := e.Error
	if e.Code > 0 {
		why = fmt.Sprintf("exit status %d", e.Code)
	}
	if r.report == nil {
		if why != "" {
			r.failed = append(r.failed, name+": "+why)
		}
		return nil
	}
	tally, failed, skipped, err := r.report.Close(why == "")
	r.report = nil
	r.total.Add(tally)
	for _, f := range failed {
		r.failed = append(r.failed, name+": "+f)
	}
	if why == "" && tally == (Tally{}) && len(r.o.TestArgs) == 0 {
		why = "ran no test" // with -run that is usual for some of the packages
	}
	if why != "" && len(failed) == 0 {
		r.failed = append(r.failed, name+": "+why)
	}
	if !r.o.JSON {
		line := fmt.Sprintf("ok  \t%s\t%.3fs", name, e.Seconds)
		if why != "" || len(failed) > 0 {
			line = fmt.Sprintf("FAIL\t%s\t%.3fs\t%s", name, e.Seconds, why)
		}
		if len(skipped) > 0 {
			line += fmt.Sprintf("\t(%d skipped)", len(skipped))
		}
		fmt.Fprintln(r.o.Stdout, line)
	}
	return err
}

// summary says what failed. The last line is one that counts on its own.
func (r *runner) summary(err error) error {
	if len(r.pkgs) > 0 && len(r.failed) == 0 && r.total.Pass == 0 {
		r.failed = append(r.failed, "no test passed")
	}
	for _, f := range r.failed {
		r.logf("failed: %s", f)
	}
	if len(r.pkgs) > 0 && !r.o.JSON {
		fmt.Fprintf(r.o.Stdout, "guest: %d passed, %d failed, %d skipped\n", r.total.Pass, max(r.total.Fail, len(r.failed)), r.total.Skip)
	}
	if err == nil && len(r.failed) > 0 {
		err = errFailed
	}
	return err
}

// unpackResults writes the files of a tar stream below dir. The guest runs
// what is tested, so its names are not trusted.
func unpackResults(in io.Reader, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("results: %w", err)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(strings.TrimSuffix(h.Name, "/"), 0o755)
		case tar.TypeReg:
			err = writeResult(root, h.Name, tr)
		}
		if err != nil {
			return fmt.Errorf("results: %w", err)
		}
	}
}

func writeResult(root *os.Root, name string, in io.Reader) (err error) {
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(f, in)
	return err
}

// kernelBug matches what a kernel says when something is wrong with itself.
// Warnings are shown and not taken for a failure: an emulated machine is slow
// enough to cause some.
var (
	kernelBug  = regexp.MustCompile(`BUG: |Oops: |Kernel panic|general protection fault|hung_task|blocked for more than|UBSAN:|KASAN:`)
	kernelWarn = regexp.MustCompile(`WARNING: CPU|INFO: rcu`)
)

// kernelLog keeps the log if asked to, and shows it if the run failed or if the
// kernel has a bug to report, which is an error.
func (r *runner) kernelLog(m *Machine, failed bool) error {
	data, err := os.ReadFile(m.ConsoleLog())
	if err != nil {
		return err
	}
	if r.o.KernelLog != "" {
		if err := os.WriteFile(r.o.KernelLog, data, 0o644); err != nil {
			return err
		}
	}
	var bug error
	if b := kernelBug.Find(data); b != nil {
		bug = fmt.Errorf("the kernel reported %q", b)
	}
	if w := kernelWarn.Find(data); w != nil {
		r.logf("the kernel reported %q", w)
	} else if bug == nil && !failed {
		return nil
	}
	const shown = 300
	lines := bytes.SplitAfter(data, []byte("\n"))
	lines = lines[max(0, len(lines)-shown):]
	w := bufio.NewWriter(r.o.Stderr)
	fmt.Fprintf(w, "--- the last lines of the kernel log\n")
	for _, l := range lines {
		w.Write(l)
	}
	fmt.Fprintf(w, "\n--- end of the kernel log\n")
	return errors.Join(bug, w.Flush())
}
