package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// Build says how test binaries are made.
type Build struct {
	Dir  string // of the module; "" is the current one
	Race bool
	Tags string
}

// Package is a package with tests, as go list tells.
type Package struct {
	ImportPath   string
	Dir          string
	Name         string
	Module       *struct{ Dir string }
	TestGoFiles  []string
	XTestGoFiles []string

	Binary string // path of the test binary, set by Build.Tests
}

// GuestDir returns where the files of the package are in the guest.
func (p *Package) GuestDir() string {
	rel := "."
	if p.Module != nil {
		if r, err := filepath.Rel(p.Module.Dir, p.Dir); err == nil {
			rel = filepath.ToSlash(r)
		}
	}
	return path.Join("/src", rel)
}

// flags returns what go build and go test have in common. The binaries are
// static: the race detector needs cgo, and with an external static link the
// guest needs no C library.
func (b *Build) flags() (args, env []string) {
	tags := b.Tags
	if b.Race {
		tags = strings.Trim("netgo,osusergo,"+tags, ",")
		args = append(args, "-race", "-ldflags", "-linkmode external -extldflags -static")
		env = []string{"CGO_ENABLED=1"}
	} else {
		env = []string{"CGO_ENABLED=0"}
	}
	if tags != "" {
		args = append(args, "-tags", tags)
	}
	return args, append(env, "GOOS=linux", "GOARCH=amd64")
}

func (b *Build) goTool(ctx context.Context, env []string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = b.Dir
	cmd.Env = append(os.Environ(), env...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s%s", args[0], err, errb.Bytes(), out.Bytes())
	}
	return out.Bytes(), nil
}

// List returns the packages that the patterns name.
func (b *Build) List(ctx context.Context, patterns []string) ([]*Package, error) {
	args, env := b.flags()
	if len(args) > 0 && args[0] == "-race" {
		args = append(args[:1:1], args[3:]...) // go list takes no -ldflags
	}
	out, err := b.goTool(ctx, env, append(append([]string{"list", "-json=ImportPath,Dir,Name,Module,TestGoFiles,XTestGoFiles"}, args...), patterns...)...)
	if err != nil {
		return nil, err
	}
	var pkgs []*Package
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p Package
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return pkgs, nil
		case err != nil:
			return nil, fmt.Errorf("go list: %w", err)
		}
		pkgs = append(pkgs, &p)
	}
}

// Tests makes the test binary of each package in dir. A package without tests
// keeps an empty Binary.
func (b *Build) Tests(ctx context.Context, dir string, pkgs []*Package) error {
	args, env := b.flags()
	for i, p := range pkgs {
		if len(p.TestGoFiles)+len(p.XTestGoFiles) == 0 {
			continue
		}
		bin := filepath.Join(dir, fmt.Sprintf("%d.test", i))
		if _, err := b.goTool(ctx, env, append(append([]string{"test", "-c", "-o", bin}, args...), p.ImportPath)...); err != nil {
			return err
		}
		p.Binary = bin
	}
	return nil
}

// Program builds a main package.
func (b *Build) Program(ctx context.Context, pkg, bin string) error {
	args, env := b.flags()
	_, err := b.goTool(ctx, env, append(append([]string{"build", "-o", bin}, args...), pkg)...)
	return err
}

// Files returns what a test may read: the regular files of the package's
// directory and its testdata.
func (p *Package) Files() ([]Extra, error) {
	entries, err := os.ReadDir(p.Dir)
	if err != nil {
		return nil, err
	}
	var out []Extra
	for _, e := range entries {
		if e.Type().IsRegular() || e.IsDir() && e.Name() == "testdata" {
			out = append(out, Extra{filepath.Join(p.Dir, e.Name()), path.Join(p.GuestDir(), e.Name())})
		}
	}
	return out, nil
}

// event is what test2json prints (go doc test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// Tally counts tests, subtests too.
type Tally struct{ Pass, Fail, Skip int }

// Add adds another tally.
func (t *Tally) Add(u Tally) { t.Pass += u.Pass; t.Fail += u.Fail; t.Skip += u.Skip }

// Report shows the output of one test binary as go test does: everything if
// Verbose, else what failed. Only with JSON are the events passed on as they
// are. It is an io.WriteCloser for what the binary writes.
type Report struct {
	Verbose bool
	JSON    bool

	out    io.Writer
	conv   *exec.Cmd
	in     io.WriteCloser
	done   chan error
	tally  Tally
	failed []string
	skips  []string
	open   map[string]bool
}

// NewReport starts test2json for a package.
func NewReport(ctx context.Context, pkg string, out io.Writer, verbose, asJSON bool) (*Report, error) {
	r := &Report{
		Verbose: verbose, JSON: asJSON, out: out,
		done: make(chan error, 1), open: map[string]bool{},
	}
	r.conv = exec.CommandContext(ctx, "go", "tool", "test2json", "-t", "-p", pkg)
	r.conv.Stderr = os.Stderr
	var err error
	if r.in, err = r.conv.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := r.conv.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.conv.Start(); err != nil {
		return nil, err
	}
	go func() { r.done <- r.events(stdout) }()
	return r, nil
}

// Write takes what the test binary wrote.
func (r *Report) Write(p []byte) (int, error) { return r.in.Write(p) }

// Close waits until everything is shown and returns the counts and the tests
// that failed, or that were still running at the end, and those skipped.
// passed is what the exit status says.
func (r *Report) Close(passed bool) (t Tally, failed, skipped []string, err error) {
	err = errors.Join(r.in.Close(), <-r.done, r.conv.Wait())
	for name := range r.open {
		// test2json reports no end of a benchmark that has one.
		if passed && strings.HasPrefix(name, "Benchmark") {
			r.tally.Pass++
			continue
		}
		r.failed = append(r.failed, name+" (did not end)")
	}
	return r.tally, r.failed, r.skips, err
}

// events reads the events of a package. The output of a test is kept until it
// is known how it ended, and dropped if all is well.
func (r *Report) events(in io.Reader) error {
	held := map[string][]string{}
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	var show error
	print := func(s string) {
		if _, err := io.WriteString(r.out, s); err != nil {
			show = errors.Join(show, err)
		}
	}
	for sc.Scan() {
		if r.JSON {
			print(sc.Text() + "\n")
		}
		var e event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			return fmt.Errorf("test2json: %w", err)
		}
		switch {
		case e.Action == "run":
			r.open[e.Test] = true
		case e.Action == "output" && !r.JSON:
			switch {
			case r.Verbose || e.Test == "" && e.Output != "PASS\n":
				print(e.Output)
			case e.Test != "":
				held[e.Test] = append(held[e.Test], e.Output)
			}
		case e.Test == "":
		case e.Action == "pass" || e.Action == "fail" || e.Action == "skip" || e.Action == "bench":
			delete(r.open, e.Test)
			switch e.Action {
			case "pass", "bench":
				r.tally.Pass++
			case "skip":
				r.tally.Skip++
				r.skips = append(r.skips, e.Test)
			case "fail":
				r.tally.Fail++
				r.failed = append(r.failed, e.Test)
				for _, s := range held[e.Test] {
					print(s)
				}
			}
			delete(held, e.Test)
		}
	}
	// What was running when the binary ended is what one wants to see.
	for name := range r.open {
		for _, s := range held[name] { // empty if everything is shown anyway
			print(s)
		}
	}
	return errors.Join(show, sc.Err())
}
