package drivertest

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/layerfs/layerfs"
)

// compare says what a comparison overlooks, or looks at besides.
type compare struct {
	wholeSeconds bool
	noDirTimes   bool
	noSockets    bool // tar cannot hold them
	fewXattrs    bool // only user.* and security.*
	linkCounts   bool // st_nlink, which a union may get wrong although the links are right
}

// stack is a stack of layers beside its model: for each layer the plain
// directory that its tree must be equal to.
type stack struct {
	e     *env
	d     *inst
	name  string
	steps [][]string
	dirs  map[int]string // models made so far
	how   compare
}

func (e *env) newStack(d *inst, name string) *stack {
	return &stack{e: e, d: d, name: name, dirs: map[int]string{}}
}

// id returns the name of a layer; -1 is the empty base.
func (s *stack) id(i int) string {
	if i < 0 {
		return ""
	}
	return fmt.Sprintf("%s-%03d", s.name, i)
}

func (s *stack) top() int { return len(s.steps) - 1 }

// add makes a layer on top, with steps, and compares it with its model.
func (s *stack) add(steps ...string) error {
	i := len(s.steps)
	if err := s.d.Create(s.e.ctx, s.id(i), s.id(i-1), nil); err != nil {
		return err
	}
	return s.record(steps, func(path string) error {
		if err := makeTree(path, steps...); err != nil {
			return err
		}
		return s.e.stamp(path, i)
	})
}

// record notes the steps of a layer that exists, makes them with fn and
// compares the layer with its model twice: while it is mounted, and mounted
// again.
func (s *stack) record(steps []string, fn func(path string) error) error {
	i := len(s.steps)
	s.steps = append(s.steps, steps)
	model, err := s.model(i)
	if err != nil {
		return fmt.Errorf("[bug] model of layer %d: %w", i, err)
	}
	err = s.e.with(s.d, s.id(i), nil, func(path string) error {
		if err := fn(path); err != nil {
			return err
		}
		return compareTrees(model, path, s.how)
	})
	if err != nil {
		return fmt.Errorf("layer %d: %w", i, err)
	}
	return s.verify(i)
}

// verify compares a layer with its model.
func (s *stack) verify(i int) error {
	model, err := s.model(i)
	if err != nil {
		return err
	}
	err = s.e.with(s.d, s.id(i), nil, func(path string) error { return compareTrees(model, path, s.how) })
	if err != nil {
		return fmt.Errorf("layer %d, got again: %w", i, err)
	}
	return nil
}

// model returns the model of a layer, made by all steps up to it.
func (s *stack) model(i int) (string, error) {
	if i < 0 {
		return "", nil
	}
	if dir, ok := s.dirs[i]; ok {
		return dir, nil
	}
	dir := s.e.newDir("model")
	if err := s.replay(dir, i); err != nil {
		return "", err
	}
	s.dirs[i] = dir
	return dir, nil
}

// replay makes all steps up to a layer in an empty directory.
func (s *stack) replay(dir string, i int) error {
	if err := s.e.stamp(dir, 0); err != nil {
		return err
	}
	for n, steps := range s.steps[:i+1] {
		if err := makeTree(dir, steps...); err != nil {
			return fmt.Errorf("step of layer %d: %w", n, err)
		}
		if err := s.e.stamp(dir, n); err != nil {
			return err
		}
	}
	return nil
}

// check compares all layers with their models again, now that they are frozen,
// and Changes and Diff of each pair.
func (s *stack) check() error {
	for i := range s.steps {
		if err := s.verify(i); err != nil {
			return err
		}
	}
	for i := range s.steps {
		for base := -1; base < i; base++ {
			if err := s.checkChanges(i, base); err != nil {
				return err
			}
		}
	}
	return s.checkDiffs(nil)
}

func (s *stack) checkChanges(i, base int) error {
	model, err := s.model(i)
	if err != nil {
		return err
	}
	below, err := s.model(base)
	if err != nil {
		return err
	}
	wantList, err := walkChanges(below, model)
	if err != nil {
		return err
	}
	got, err := collect(s.d, s.e, s.id(i), s.id(base))
	if err != nil {
		return err
	}
	if err := sameChanges(wantList, got); err != nil {
		return fmt.Errorf("changes of layer %d against %d: %w", i, base, err)
	}
	return nil
}

func collect(d layerfs.Driver, e *env, id, base string) ([]layerfs.Change, error) {
	var list []layerfs.Change
	for c, err := range d.Changes(e.ctx, id, base) {
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// sameChanges compares two lists, whose order counts.
func sameChanges(wantList, got []layerfs.Change) error {
	if slices.Equal(wantList, got) {
		return nil
	}
	var b strings.Builder
	show := func(what string, list, not []layerfs.Change) {
		for _, c := range list {
			if !slices.Contains(not, c) {
				fmt.Fprintf(&b, "\n\t%s %q", what, c.String())
			}
		}
	}
	show("missing", wantList, got)
	show("too much", got, wantList)
	if b.Len() == 0 {
		fmt.Fprintf(&b, " in order: %q, want %q", got, wantList)
	}
	return fmt.Errorf("changes differ:%s", b.String())
}

// checkDiffs applies Diff of each layer to a driver on another root, layer by
// layer, and compares; and of the top against every base below it.
func (s *stack) checkDiffs(opts *layerfs.DiffOptions) error {
	to, err := s.e.other()
	if err != nil {
		return err
	}
	how := s.how
	how.noSockets = true
	if opts != nil && opts.Profile != layerfs.ProfileFull {
		how.wholeSeconds, how.fewXattrs = true, true
	}
	for i := range s.steps {
		if err := s.transfer(to, s.id(i), s.id(i-1), i, i-1, opts, how); err != nil {
			return err
		}
	}
	for base := -1; base < s.top()-1; base++ {
		id := fmt.Sprintf("%s-on-%d", s.name, base+1)
		if err := s.transfer(to, id, s.id(base), s.top(), base, opts, how); err != nil {
			return err
		}
	}
	return nil
}

// transfer makes layer id on parent by Apply of the Diff of layer i against
// base, and compares it with the model of i.
func (s *stack) transfer(to *inst, id, parent string, i, base int, opts *layerfs.DiffOptions, how compare) error {
	fail := func(err error) error { return fmt.Errorf("diff of layer %d against %d: %w", i, base, err) }
	if err := to.Create(s.e.ctx, id, parent, nil); err != nil {
		return fail(err)
	}
	if err := pipe(s.e, s.d, s.id(i), s.id(base), to, id, opts); err != nil {
		return fail(err)
	}
	model, err := s.model(i)
	if err != nil {
		return err
	}
	err = s.e.with(to, id, nil, func(path string) error { return compareTrees(model, path, how) })
	if err != nil {
		return fail(fmt.Errorf("applied elsewhere: %w", err))
	}
	return nil
}

// pipe applies a Diff of one driver to a layer of another.
func pipe(e *env, from layerfs.Driver, id, base string, to layerfs.Driver, toID string, opts *layerfs.DiffOptions) (err error) {
	r, err := from.Diff(e.ctx, id, base, opts)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.Close(); err == nil {
			err = cerr
		}
	}()
	_, err = to.Apply(e.ctx, toID, r, nil)
	return err
}

// readDiff returns a Diff as bytes.
func readDiff(e *env, d layerfs.Driver, id, base string, opts *layerfs.DiffOptions) ([]byte, error) {
	r, err := d.Diff(e.ctx, id, base, opts)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}

// old is before every time of the machine and after every time that stamp or a
// step sets.
var old = time.Date(2015, 1, 1, 0, 0, 0, 0, time.UTC)

// stamp gives every entry that was modified now a time that depends on its
// path and layer alone. Where the driver keeps whole seconds, the others lose
// what is less, so that a model has the times that its layer can have.
func (e *env) stamp(root string, layer int) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// The entry may know what the file was like when the directory was read,
		// and another name of it may have been stamped since.
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if !onLinux() && fi.Mode().Type() == fs.ModeSymlink {
			return nil
		}
		t := fi.ModTime()
		if !t.Before(old) {
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			t = stampTime(rel, layer)
		}
		if e.h.WholeSeconds {
			t = time.Unix(t.Unix(), 0)
		}
		if t.Equal(fi.ModTime()) {
			return nil
		}
		return setTime(path, t)
	})
}

func stampTime(rel string, layer int) time.Time {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s", layer, rel)
	sum := h.Sum64()
	return time.Unix(1e9+int64(sum%1e8), int64(sum>>32)%1e9)
}

// history makes a stack of layers with the given steps, and checks it.
func history(layers ...string) caseFunc { return historyWith(compare{}, layers...) }

func historyWith(how compare, layers ...string) caseFunc {
	return func(e *env) error {
		s := e.newStack(e.d, "layer")
		s.how = how
		for _, text := range layers {
			if err := s.add(lines(text)...); err != nil {
				return err
			}
		}
		return s.check()
	}
}

// readFile reads a file below a root as text.
func readFile(elem ...string) (string, error) {
	b, err := os.ReadFile(filepath.Join(elem...))
	return string(b), err
}
