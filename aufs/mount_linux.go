package aufs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/unionfs"
	"github.com/layerfs/layerfs/union"
	"github.com/layerfs/layerfs/whiteout"
)

// plan returns the union of a chain of at least two layers.
func (m *mechanism) plan(chain lifecycle.Chain, readOnly bool) plan {
	p := plan{readOnly: readOnly, label: chain.Layer().MountLabel}
	for i, dir := range m.branches(chain) {
		perm := union.ROWH
		if i == 0 && !readOnly {
			perm = union.RW
		}
		p.branches = append(p.branches, union.Branch{Path: dir, Perm: perm})
	}
	return p
}

// Mount shows a layer at its path.
func (m *mechanism) Mount(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	rec := chain.Layer()
	target := m.Path(rec.ID)
	if len(chain) == 1 {
		// A union of one would only cost.
		var flags mount.Flags
		if mode.ReadOnly {
			flags |= mount.ReadOnly
		}
		return mount.Bind(m.branch(rec.ID), target, flags)
	}
	if mode.ReadOnly {
		if err := m.settle(ctx, chain); err != nil {
			return err
		}
		return m.engine.mount(ctx, m.plan(chain, true), target)
	}
	if m.engine.name() == Kernel {
		if err := m.settle(ctx, chain); err != nil {
			return err
		}
	}
	// What AUFS keeps in the root of a writable branch must not show as a
	// change of the root.
	var st unix.Stat_t
	if err := unix.Lstat(m.branch(rec.ID), &st); err != nil {
		return &os.PathError{Op: "lstat", Path: m.branch(rec.ID), Err: err}
	}
	if err := m.engine.mount(ctx, m.plan(chain, false), target); err != nil {
		return err
	}
	err := m.marked(rec.ID)
	if err == nil {
		err = setTimes(m.branch(rec.ID), &st)
	}
	if err == nil {
		// The kernel may know the times already; a change of the branches,
		// even to what they are, makes it forget them.
		err = m.engine.alter(ctx, target, verb{op: "mod", Branch: union.Branch{Path: m.branch(rec.ID), Perm: union.RW}})
	}
	if err != nil {
		return errors.Join(err, m.engine.unmount(context.WithoutCancel(ctx), target))
	}
	return nil
}

// marked makes the mark of a mounted layer, where the engine does not.
func (m *mechanism) marked(id string) error {
	if m.engine.name() != Kernel {
		return nil
	}
	return sys.WriteFile(m.mark(id), nil, 0o444, false)
}

// mark is the file that is in a branch while a union has it for writing.
// Package union makes it; with the kernel's AUFS this package does.
func (m *mechanism) mark(id string) string {
	return filepath.Join(m.branch(id), whiteout.MetaPrefix+"mounted")
}

// keepTimes runs something that must not change the times of a directory.
func keepTimes(dir string, run func() error) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	err := run()
	return errors.Join(err, setTimes(dir, &st))
}

func setTimes(dir string, st *unix.Stat_t) error {
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: dir, Err: err}
	}
	return nil
}

// settle mends the branch of a layer whose last union did not end in an
// orderly way: its server was killed, or the machine stopped. A branch that a
// union has now is left alone.
func (m *mechanism) settle(ctx context.Context, chain lifecycle.Chain) error {
	rec := chain.Layer()
	if len(chain) == 1 {
		return nil
	}
	if _, err := os.Lstat(m.mark(rec.ID)); err != nil {
		return ignoreMissing(err)
	}
	if m.engine.name() == Kernel {
		if mounted, err := mount.IsMountPoint(m.Path(rec.ID)); err != nil || mounted {
			return err
		}
	}
	cfg := &unionfs.Config{NoPlink: m.opts.NoPlink, Logger: m.log}
	for i, dir := range m.branches(chain) {
		perm := unionfs.ROWH
		if i == 0 {
			perm = unionfs.RW
		}
		cfg.Branches = append(cfg.Branches, unionfs.BranchSpec{Path: dir, Perm: perm})
	}
	return keepTimes(m.branch(rec.ID), func() error {
		u, mended, err := unionfs.Open(cfg)
		if errors.Is(err, unix.EBUSY) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("mend the branch of %s: %w", rec.ID, err)
		}
		for _, r := range mended {
			m.log.Info("repaired", "driver", name, "layer", rec.ID, "path", r.Path, "action", r.Action)
		}
		return errors.Join(u.FlushLinks(), u.Close(), context.Cause(ctx))
	})
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Unmount undoes Mount.
func (m *mechanism) Unmount(ctx context.Context, rec *lifecycle.Record) error {
	target := m.Path(rec.ID)
	if rec.Parent == "" {
		return ignoreMissing(mount.IgnoreNotMounted(unmountNow(target)))
	}
	err := keepTimes(m.branch(rec.ID), func() error {
		if err := m.engine.unmount(ctx, target); err != nil {
			return err
		}
		if m.engine.name() == Kernel {
			return removeIfThere(m.mark(rec.ID))
		}
		return m.released(ctx, rec.ID)
	})
	return ignoreMissing(mount.IgnoreNotMounted(err))
}

// released waits until the union that had a branch has let it go, which it
// does after its last link was made real: it may be served by another driver
// or process. One that is still in use is not waited for long.
func (m *mechanism) released(ctx context.Context, id string) error {
	f, err := os.Open(m.branch(id))
	if err != nil {
		return err
	}
	defer f.Close()
	const patience = 500 * time.Millisecond // it is for order, not for safety
	_, err = sys.WaitUnlocked(ctx, f, patience)
	return err
}

// State looks at a layer's path. A mount whose server has died is detached:
// nobody can use it any more, and a later Get must not take it for usable.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	target := m.Path(id)
	mounted, err := mount.IsMountPoint(target)
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	dead, err := endDead(target)
	if err != nil {
		return lifecycle.State{}, err
	}
	if dead {
		return lifecycle.State{}, m.bury(id)
	}
	st, err := mount.Ask(target, mount.AnswerWithin)
	switch {
	case err == nil:
		return lifecycle.State{Mounted: true, ReadOnly: st.ReadOnly}, nil
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED):
		return lifecycle.State{}, m.bury(id)
	}
	return lifecycle.State{}, err
}

// bury detaches a dead mount and mends its branch.
func (m *mechanism) bury(id string) error {
	if err := mount.IgnoreNotMounted(mount.Unmount(m.Path(id))); err != nil {
		return err
	}
	chain, err := m.chain(id)
	if err != nil {
		return nil // a layer that is broken otherwise, or being removed, needs no mending
	}
	return m.settle(context.Background(), chain)
}

// chain loads a layer and its ancestors.
func (m *mechanism) chain(id string) (lifecycle.Chain, error) {
	var c lifecycle.Chain
	for at := id; at != ""; {
		rec, err := m.dir.Load(at)
		if err != nil {
			return nil, err
		}
		if c.Index(at) >= 0 {
			return nil, fmt.Errorf("%s is its own ancestor", at)
		}
		c = append(c, rec)
		at = rec.Parent
	}
	return c, nil
}

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	points := filepath.Join(m.home, "mnt")
	infos, err := mount.Under(points)
	if err != nil {
		return nil, err
	}
	// The list has resolved paths.
	if points, err = filepath.EvalSymlinks(points); err != nil {
		return nil, err
	}
	var ids []string
	for _, info := range infos {
		if rel, err := filepath.Rel(points, info.Mountpoint); err == nil && filepath.Base(rel) == rel && rel != "." {
			ids = append(ids, rel)
		}
	}
	return ids, nil
}

// View shows the merged tree by a read-only union of its own.
func (m *mechanism) View(ctx context.Context, chain lifecycle.Chain) (lifecycle.View, error) {
	if len(chain) == 1 {
		return lifecycle.View{Path: m.branch(chain.Layer().ID), Release: func() error { return nil }}, nil
	}
	if err := m.ready(ctx, chain); errors.Is(err, lifecycle.ErrDecline) {
		return m.live(chain.Layer().ID)
	} else if err != nil {
		return lifecycle.View{}, err
	}
	return m.aside(ctx, chain)
}

// ready makes sure that the branch of a layer tells all there is to know of it:
// that pseudo-links are real. It declines where another process serves the
// layer and has some that are not.
func (m *mechanism) ready(ctx context.Context, chain lifecycle.Chain) error {
	id := chain.Layer().ID
	if len(chain) == 1 {
		return nil
	}
	if err := m.settle(ctx, chain); err != nil {
		return err
	}
	has, err := hasPlinks(m.branch(id))
	if err != nil || !has {
		return err
	}
	err = m.engine.flush(ctx, m.Path(id))
	switch {
	case errors.Is(err, mount.ErrNotMounted):
		return nil // a leftover
	case err == errElsewhere: //nolint:errorlint // the engine returns it bare
		if mounted, err := mount.IsMountPoint(m.Path(id)); err != nil || !mounted {
			return err
		}
		return fmt.Errorf("another process has links that are not real yet: %w", lifecycle.ErrDecline)
	}
	return err
}

func hasPlinks(branch string) (bool, error) {
	f, err := os.Open(filepath.Join(branch, whiteout.PlinkDir))
	if err != nil {
		return false, ignoreMissing(err)
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	return len(names) > 0, ignoreEnd(err)
}

// live shows a mounted layer as it is mounted.
func (m *mechanism) live(id string) (lifecycle.View, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Path(id), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return lifecycle.View{}, &os.PathError{Op: "open_tree", Path: m.Path(id), Err: err}
	}
	f := os.NewFile(uintptr(fd), m.Path(id))
	// The dot makes it a directory to those who do not follow links.
	return lifecycle.View{Path: procPath(f) + "/.", Release: f.Close}, nil
}

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// aside mounts a read-only union where nobody else looks.
func (m *mechanism) aside(ctx context.Context, chain lifecycle.Chain) (_ lifecycle.View, err error) {
	s, err := m.newScratch(ctx)
	if err != nil {
		return lifecycle.View{}, err
	}
	target := filepath.Join(s.dir, mountPoint)
	release := func() error {
		err := mount.IgnoreNotMounted(m.engine.unmount(context.WithoutCancel(ctx), target))
		return errors.Join(err, s.remove())
	}
	if err := m.engine.mount(ctx, m.plan(chain, true), target); err != nil {
		return lifecycle.View{}, errors.Join(err, release())
	}
	return lifecycle.View{Path: target, Release: release}, nil
}

// A scratch is a directory with a mount point. Its lock tells that it is in
// use.
type scratch struct {
	dir  string
	lock *os.File
}

// scratchLock is the key under which scratch directories are made and cleared.
// It is no id of a layer.
const scratchLock = ".scratch"

const (
	scratchPrefix = ".view-"
	probePrefix   = ".probe-"
	mountPoint    = "mnt"
	// A probe is made without a lock, before it is known whether the home can
	// be one at all, so a new one is nothing that was left.
	newProbe = time.Minute
)

func (m *mechanism) newScratch(ctx context.Context) (*scratch, error) {
	unlock, err := m.dir.Lock(ctx, scratchLock)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return makeScratch(m.home, scratchPrefix)
}

func makeScratch(home, prefix string) (_ *scratch, err error) {
	s := new(scratch)
	if s.dir, err = os.MkdirTemp(home, prefix); err != nil {
		return nil, err
	}
	if s.lock, err = os.Open(s.dir); err != nil {
		return nil, errors.Join(err, os.Remove(s.dir))
	}
	err = unix.Flock(int(s.lock.Fd()), unix.LOCK_EX)
	if err == nil {
		err = os.Mkdir(filepath.Join(s.dir, mountPoint), 0o700)
	}
	if err != nil {
		return nil, errors.Join(err, s.remove())
	}
	return s, nil
}

// remove removes the directory. Nothing may be mounted in it any more: what is
// mounted is not emptied.
func (s *scratch) remove() error {
	if err := unix.Rmdir(filepath.Join(s.dir, mountPoint)); err != nil && !errors.Is(err, unix.ENOENT) {
		return errors.Join(&os.PathError{Op: "rmdir", Path: s.dir, Err: err}, s.lock.Close())
	}
	return errors.Join(os.RemoveAll(s.dir), s.lock.Close())
}

// clearScratch removes what probes and views of processes that died left.
func (m *mechanism) clearScratch(ctx context.Context) error {
	unlock, err := m.dir.Lock(ctx, scratchLock)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(m.home)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), probePrefix) {
			if fi, err := e.Info(); err != nil || time.Since(fi.ModTime()) < newProbe {
				continue
			}
		} else if !strings.HasPrefix(e.Name(), scratchPrefix) {
			continue
		}
		s := &scratch{dir: filepath.Join(m.home, e.Name())}
		if s.lock, err = os.Open(s.dir); err != nil {
			return err
		}
		if unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			s.lock.Close()
			continue // in use
		}
		if _, err := endDead(filepath.Join(s.dir, mountPoint)); err != nil {
			return errors.Join(err, s.lock.Close())
		}
		err := mount.IgnoreNotMounted(mount.Unmount(filepath.Join(s.dir, mountPoint)))
		if ignoreMissing(err) != nil {
			return errors.Join(err, s.lock.Close())
		}
		if err := s.remove(); err != nil {
			return err
		}
	}
	return nil
}
