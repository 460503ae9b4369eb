package drivertest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/continuity/fs/fstest"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

// fsSuite is the name of the case that is the suite of continuity.
const fsSuite = "FSSuite"

// expectEnv is set in the process that runs the suite for a driver that
// deviates from it.
const expectEnv = "LAYERFS_DRIVERTEST_FSSUITE"

// runFSSuite runs the suite with which containerd tests the appliers of its
// layers. A driver that deviates runs it in a process of its own, whose failure
// is no failure here.
func (h Harness) runFSSuite(t *testing.T) {
	testenv.RequireRoot(t)
	if why := h.Skip[fsSuite]; why != "" {
		t.Skip(why)
	}
	why, deviates := h.Deviates[fsSuite]
	if !deviates || os.Getenv(expectEnv) != "" {
		fstest.FSSuite(t, &fsApplier{tb: t, h: h})
		return
	}
	parts := strings.Split(t.Name(), "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	cmd := exec.Command(os.Args[0], "-test.run="+strings.Join(parts, "/"), "-test.count=1")
	cmd.Env = append(os.Environ(), expectEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("Deviates lists %s (%s), but it passes", fsSuite, why)
		return
	}
	t.Logf("deviates (%s): %v\n%s", why, err, out)
}

// fsApplier makes each step of the suite in a layer, and shows the suite what
// the Diff of that layer gives in another driver.
type fsApplier struct {
	tb testing.TB
	h  Harness
}

type fsState struct {
	e      *env
	to     *inst
	parent string
	n      int
}

type fsKey struct{}

// TestContext opens two drivers for one test of the suite.
func (a *fsApplier) TestContext(ctx context.Context) (context.Context, func(), error) {
	e := newEnv(a.tb, a.h)
	to, err := e.other()
	if err != nil {
		return nil, nil, err
	}
	done := func() {
		if err := e.finish(); err != nil {
			a.tb.Error(err)
		}
	}
	return context.WithValue(ctx, fsKey{}, &fsState{e: e, to: to}), done, nil
}

// Apply makes a layer.
func (a *fsApplier) Apply(ctx context.Context, step fstest.Applier) (string, func(), error) {
	s, ok := ctx.Value(fsKey{}).(*fsState)
	if !ok {
		return "", nil, fmt.Errorf("[bug] a context of another suite")
	}
	id := fmt.Sprintf("step%d", s.n)
	s.n++
	for _, d := range []layerfs.Driver{s.e.d, s.to} {
		if err := d.Create(ctx, id, s.parent, nil); err != nil {
			return "", nil, err
		}
	}
	if err := s.e.with(s.e.d, id, nil, step.Apply); err != nil {
		return "", nil, err
	}
	if err := pipe(s.e, s.e.d, id, s.parent, s.to, id, nil); err != nil {
		return "", nil, err
	}
	s.parent = id
	path, err := s.to.Get(ctx, id, nil)
	if err != nil {
		return "", nil, err
	}
	return path, func() {
		if err := s.to.Put(ctx, id); err != nil {
			a.tb.Error(err)
		}
	}, nil
}
