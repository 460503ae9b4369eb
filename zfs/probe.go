//go:build linux || freebsd

package zfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/undo"
)

// facts is what was found out by trying. A text says why something does not
// work, and is empty if it does.
type facts struct {
	Boot       string            `json:"boot"`
	Kernel     bool              `json:"kernel"`               // the file system is mounted by the kernel, not by a daemon
	Properties map[string]string `json:"properties,omitempty"` // that keep everything a file has
	Objects    int64             `json:"objects"`              // that an empty file system counts besides its root
	Diff       string            `json:"diff,omitempty"`
	Program    string            `json:"program,omitempty"`
	Xattrs     string            `json:"xattrs,omitempty"`
	Devices    string            `json:"devices,omitempty"`
	IDMap      string            `json:"idmap,omitempty"`
}

// prober finds the facts; tests put another in its place.
type prober func(ctx context.Context, m *mechanism) (facts, error)

// probeLock and probeName are no ids: no layer can be in the way.
const (
	probeLock = ".probe"
	probeName = "layerfs:probe:"
)

// probe makes a dataset, tries everything on it and destroys it.
func probe(ctx context.Context, m *mechanism) (f facts, err error) {
	unlock, err := m.dir.Lock(ctx, probeLock)
	if err != nil {
		return f, err
	}
	defer unlock()
	f.Kernel = kernelMounts()
	f.Program = reason(m.probeProgram(ctx))
	m.facts = f
	id := probeName + m.root
	if err := m.destroy(ctx, id); err != nil { // a crash's
		return f, err
	}
	var u undo.Stack
	defer func() {
		// As in a failure, because nothing may stay in either case.
		done := errors.New("probed")
		failed := done
		if err != nil {
			failed = err
		}
		u.Run(&failed)
		if err != nil || failed.Error() != done.Error() {
			err = failed
		}
	}()
	rec := &lifecycle.Record{ID: id}
	u.Push(func() error { return m.Delete(context.WithoutCancel(ctx), rec) })
	if err := m.probeCreate(ctx, rec); err != nil {
		return f, err
	}
	view := m.state(".probe")
	if err := os.Mkdir(view, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return f, err
	}
	u.Push(func() error { return removeDir(view) })
	if err := m.show(ctx, rec, view, lifecycle.Mode{}); err != nil {
		return f, err
	}
	u.Push(func() error { return m.hide(view) })
	f.Properties = m.facts.Properties
	f.Objects, err = filesIn(view)
	if err != nil {
		return f, err
	}
	f.Objects-- // the root is a file of the layer
	f.Xattrs, f.Devices, f.IDMap = probeMount(view)
	if f.Diff = withoutDiff(); f.Diff == "" {
		f.Diff = reason(m.probeDiff(ctx, id, view))
	}
	return f, nil
}

// probeCreate makes the dataset, with the properties that keep everything if
// zfs knows them.
func (m *mechanism) probeCreate(ctx context.Context, rec *lifecycle.Record) error {
	m.facts.Properties = fullProperties()
	err := m.make(ctx, rec)
	if err == nil || len(m.facts.Properties) == 0 {
		return err
	}
	m.facts.Properties = nil
	return m.make(ctx, rec)
}

// probeProgram makes sure that zfs runs the program that destroys a layer, with
// one that does not exist.
func (m *mechanism) probeProgram(ctx context.Context) error {
	done, err := m.destroyAtOnce(ctx, probeName+"none")
	if err == nil && !done {
		err = errors.New("zfs program does not tell that a dataset does not exist")
	}
	return err
}

// oddName has what zfs diff escapes, and a digit behind it, so that three and
// four octal digits are told apart.
const oddName = "a b\t0\\1é"

// probeDiff makes sure that zfs diff works and is understood.
func (m *mechanism) probeDiff(ctx context.Context, id, path string) error {
	snap := m.dataset(id) + "@" + snapshotPrefix + "probe"
	if _, err := m.tool.run(ctx, "snapshot", snap); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(path, oddName), nil, 0o600); err != nil {
		return err
	}
	changes, err := m.diff(ctx, snap, m.dataset(id), []string{path})
	if err != nil {
		return err
	}
	if !slices.Contains(changes, change{kind: '+', path: "/" + oddName}) {
		return fmt.Errorf("zfs diff does not tell of a new file: %q", changes)
	}
	return nil
}

func reason(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
