package drivertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// Harness says how to make the driver under test.
type Harness struct {
	// Name appears in the names of benchmarks and tells the harnesses of one
	// test program apart.
	Name string

	// New opens a driver on root, which exists. It is called several times on
	// one root, also while other drivers are open there.
	New func(root string) (layerfs.Driver, error)

	// Root returns a new, empty directory for a driver; nil means a
	// directory of its own in tb.TempDir.
	Root func(tb testing.TB) string

	// Small returns a new directory on a file system with about this many
	// bytes free, for the cases about a full disk; nil skips them.
	Small func(tb testing.TB, bytes int64) string

	// Home returns the directory that holds the driver's .layerfs directory,
	// for the cases about what a crash leaves; nil skips them. Drivers that do
	// not keep their records that way have cases of their own.
	Home func(root string) string

	// Deviates has the cases that fail by design, and why.
	Deviates map[string]string

	// Skip has the cases that cannot even be run, because they hang or disturb
	// what else runs on the host, and why.
	Skip map[string]string

	// WholeSeconds says that the file system of the layers keeps whole seconds.
	WholeSeconds bool

	// Seed is the first seed of the random histories and Histories their
	// number; the defaults are 1 and 3.
	Seed      uint64
	Histories int
}

// A caseFunc returns an error if the driver does not behave.
type caseFunc func(*env) error

type testCase struct {
	name  string
	needs need
	run   caseFunc
}

// need says what a case cannot do without.
type need uint8

const (
	needRoot  need = 1 << iota // to run as root
	needHome                   // Harness.Home
	needSmall                  // Harness.Small
	needIdle                   // no other work: compares times
)

func allCases() []testCase {
	return slices.Concat(lifecycleCases(), holdCases(), processCases(), recoveryCases(),
		treeCases(), streamCases(), optionalCases(), featureCases(), randomCases(), systemCases())
}

// Run runs the conformance suite as subtests of t.
func Run(t *testing.T, h Harness) {
	t.Helper()
	for _, name := range h.unknown() {
		t.Errorf("Deviates or Skip names %q, which is no case", name)
	}
	for _, c := range allCases() {
		t.Run(c.name, func(t *testing.T) { h.runCase(t, c) })
	}
	t.Run(fsSuite, func(t *testing.T) { h.runFSSuite(t) })
}

func (h Harness) runCase(t *testing.T, c testCase) {
	switch {
	case h.Skip[c.name] != "":
		t.Skip(h.Skip[c.name])
	case c.needs&needRoot != 0 && os.Geteuid() != 0:
		testenv.RequireRoot(t)
	case c.needs&needHome != 0 && h.Home == nil:
		t.Skip("the harness has no Home")
	case c.needs&needSmall != 0 && h.Small == nil:
		t.Skip("the harness has no Small")
	case c.needs&needIdle != 0 && !testenv.Idle():
		testenv.RequireIdle(t)
	}
	e := newEnv(t, h)
	finished := false
	t.Cleanup(func() { // a case or a harness may have ended the test
		if !finished {
			if err := e.finish(); err != nil {
				t.Error(err)
			}
		}
	})
	err := c.run(e)
	finished = true
	if cerr := e.finish(); err == nil {
		err = cerr
	}
	h.judge(t, c.name, err)
}

// judge decides what the outcome of a case means.
func (h Harness) judge(t *testing.T, name string, err error) {
	t.Helper()
	var skip *skipError
	if errors.As(err, &skip) {
		testenv.SkipUnsupported(t, skip.cause, h.Name)
		t.Skip(skip.reason)
	}
	failure, known := h.verdict(name, err)
	switch {
	case failure != nil:
		t.Error(failure)
	case known != "":
		t.Log(known)
	}
}

// verdict says whether the outcome of a case is a failure, or what known
// deviation it is.
func (h Harness) verdict(name string, err error) (failure error, known string) {
	why, deviates := h.Deviates[name]
	switch {
	case deviates && err == nil:
		return fmt.Errorf("Deviates lists %s (%s), but it passes", name, why), ""
	case deviates:
		return nil, fmt.Sprintf("deviates (%s): %v", why, err)
	}
	return err, ""
}

// unknown returns the names in Deviates and Skip that are no cases.
func (h Harness) unknown() []string {
	known := map[string]bool{fsSuite: true}
	for _, c := range allCases() {
		known[c.name] = true
	}
	var names []string
	for _, list := range []map[string]string{h.Deviates, h.Skip} {
		for _, name := range slices.Sorted(maps.Keys(list)) {
			if !known[name] {
				names = append(names, name)
			}
		}
	}
	return names
}

// skipError says why a case cannot be run here.
type skipError struct {
	reason string
	cause  error // set if the library said it
}

func (s *skipError) Error() string { return "skip: " + s.reason }

func skipf(format string, args ...any) error {
	return &skipError{reason: fmt.Sprintf(format, args...)}
}

// env is what a case works in.
type env struct {
	testing.TB
	ctx  context.Context
	h    Harness
	root string
	d    *inst // on root

	mu    sync.Mutex
	insts []*inst // guarded by mu
	dirs  int     // guarded by mu; temporary directories made
	tmp   string
}

func newEnv(tb testing.TB, h Harness) *env {
	tb.Helper()
	e := &env{TB: tb, ctx: context.Background(), h: h, tmp: tb.TempDir()}
	e.root = e.newRoot()
	d, err := e.open(e.root)
	if err != nil {
		testenv.SkipUnsupported(tb, err, h.Name)
		tb.Fatal(err)
	}
	e.d = d
	return e
}

func (e *env) newRoot() string {
	e.Helper()
	if e.h.Root != nil {
		return e.h.Root(e.TB)
	}
	return e.newDir("root")
}

// newDir makes an empty directory with mode 0755.
func (e *env) newDir(name string) string {
	e.Helper()
	e.mu.Lock()
	e.dirs++
	n := e.dirs
	e.mu.Unlock()
	dir := filepath.Join(e.tmp, fmt.Sprintf("%s%d", name, n))
	if err := os.Mkdir(dir, 0o755); err != nil {
		e.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		e.Fatal(err)
	}
	return dir
}

// open opens a driver; finish closes it.
func (e *env) open(root string) (*inst, error) {
	d, err := e.h.New(root)
	if err != nil {
		return nil, err
	}
	i := &inst{Driver: d, root: root, held: map[string]int{}}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.insts = append(e.insts, i)
	return i, nil
}

// other opens a driver on a new root.
func (e *env) other() (*inst, error) { return e.open(e.newRoot()) }

// inst is an open driver that remembers what a case holds.
type inst struct {
	layerfs.Driver
	root string

	mu     sync.Mutex
	held   map[string]int // guarded by mu
	closed bool           // guarded by mu
}

// Unwrap lets the optional operations through.
func (i *inst) Unwrap() layerfs.Driver { return i.Driver }

func (i *inst) note(id string, n int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held[id] += n
}

// Get counts what it gets.
func (i *inst) Get(ctx context.Context, id string, opts *layerfs.GetOptions) (string, error) {
	path, err := i.Driver.Get(ctx, id, opts)
	if err == nil {
		i.note(id, 1)
	}
	return path, err
}

// Put counts what it releases.
func (i *inst) Put(ctx context.Context, id string) error {
	err := i.Driver.Put(ctx, id)
	if err == nil {
		i.note(id, -1)
	}
	return err
}

// Close remembers that it was called.
func (i *inst) Close() error {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	return i.Driver.Close()
}

// finish releases and removes everything, which has to work whatever a case
// did, and looks for what is left.
func (e *env) finish() error {
	var errs []error
	ctx := context.Background()
	roots := map[string]*inst{}
	for _, i := range e.insts {
		if i.closed {
			if roots[i.root] == nil {
				roots[i.root] = nil
			}
			continue
		}
		roots[i.root] = i
		for id, n := range i.held {
			for range n {
				if err := i.Driver.Put(ctx, id); err != nil && !errors.Is(err, layerfs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	for root, i := range roots {
		if i == nil {
			d, err := e.open(root)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			i = d
		}
		errs = append(errs, removeAll(ctx, i))
	}
	for _, i := range e.insts {
		if !i.closed {
			errs = append(errs, i.Close())
		}
	}
	for root := range roots {
		left, err := mountsBelow(root)
		if err != nil {
			errs = append(errs, err)
		}
		if len(left) > 0 {
			errs = append(errs, fmt.Errorf("mounts are left: %s", strings.Join(left, ", ")))
			release(left)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// removeAll removes all layers, children first.
func removeAll(ctx context.Context, d layerfs.Driver) error {
	infos, err := d.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, info := range slices.Backward(infos) {
		errs = append(errs, d.Remove(ctx, info.ID))
	}
	return errors.Join(errs...)
}

// with runs fn on the tree of a layer.
func (e *env) with(d *inst, id string, opts *layerfs.GetOptions, fn func(path string) error) error {
	path, err := d.Get(e.ctx, id, opts)
	if err != nil {
		return err
	}
	err = fn(path)
	return errors.Join(err, d.Put(e.ctx, id))
}

// fill makes a tree in a layer.
func (e *env) fill(d *inst, id string, lines ...string) error {
	return e.with(d, id, nil, func(path string) error { return makeTree(path, lines...) })
}

// create makes a layer with content.
func (e *env) create(id, parent string, lines ...string) error {
	if err := e.d.Create(e.ctx, id, parent, nil); err != nil {
		return err
	}
	if len(lines) == 0 {
		return nil
	}
	return e.fill(e.d, id, lines...)
}

// holds makes sure that a layer's tree has just these regular files at its
// top, name by name with content, given as name=content.
func (e *env) holds(d *inst, id string, want ...string) error {
	return e.with(d, id, nil, func(path string) error { return dirHolds(path, want...) })
}

func dirHolds(path string, want ...string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	var got []string
	for _, entry := range entries {
		text := entry.Name()
		if entry.Type().IsRegular() {
			b, err := os.ReadFile(filepath.Join(path, entry.Name()))
			if err != nil {
				return err
			}
			text += "=" + string(b)
		}
		got = append(got, text)
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%s holds %q, want %q", path, got, want)
	}
	return nil
}

// want checks an error of a driver: that it matches all targets, is one
// *layerfs.Error and names operation and layer.
func want(err error, op, id string, targets ...error) error {
	if err == nil {
		return fmt.Errorf("%s %q: no error, want %v", op, id, errors.Join(targets...))
	}
	for _, target := range targets {
		if !errors.Is(err, target) {
			return fmt.Errorf("%s %q: error %q does not match %q", op, id, err, target)
		}
	}
	var le *layerfs.Error
	if !errors.As(err, &le) {
		return fmt.Errorf("%s %q: error %q is a %T, no *layerfs.Error", op, id, err, err)
	}
	if le.Op != op || le.ID != id || le.Driver == "" {
		return fmt.Errorf("%s %q: error %q says op %q, driver %q, id %q", op, id, err, le.Op, le.Driver, le.ID)
	}
	if rest := le.Err; errors.As(rest, new(*layerfs.Error)) {
		return fmt.Errorf("%s %q: error %q is wrapped twice", op, id, err)
	}
	return nil
}

// lines splits a text into the steps of a layer.
func lines(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return out
}

func onLinux() bool { return runtime.GOOS == "linux" }
