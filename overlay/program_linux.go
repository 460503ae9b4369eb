package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/overlaymount/ask"
	"github.com/layerfs/layerfs/internal/sys"
)

func checkProgram(path string) error {
	if err := unix.Access(path, unix.X_OK); err != nil {
		return &layerfs.UnsupportedError{Feature: "mount program " + path, Reason: err.Error()}
	}
	return nil
}

// runProgram mounts by the mount program, which goes to the background when
// the mount is there. That of package union serves what this process mounts.
func (m *mechanism) runProgram(ctx context.Context, plan *mount.Overlay, target string) error {
	if err := plan.Validate(); err != nil {
		return err
	}
	options := plan.MountOptions()
	if plan.Flags&mount.ReadOnly != 0 {
		options = append(options, "ro")
	}
	args := []string{"-o", strings.Join(options, ","), target}
	if !m.opts.union() {
		return run(ctx, m.opts.MountProgram, args...)
	}
	p, err := ask.Parse(args)
	if err == nil {
		p.Log = filepath.Join(m.home, ".layerfs", "mount-program.log")
		err = ask.Mount(ctx, m.opts.MountProgram, p)
	}
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", layerfs.ErrInUse, err)
	}
	if err != nil {
		err = fmt.Errorf("mount program %s: %w", m.opts.MountProgram, err)
	}
	return err
}

// Released waits until package union has let go of a layer that is not mounted:
// until then its files are not as they will be. The error matches
// [layerfs.ErrInUse] if it does not for long.
func (m *mechanism) Released(ctx context.Context, id string) error {
	if !m.opts.union() {
		return nil
	}
	f, err := os.Open(m.upper(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	const patience = 500 * time.Millisecond // a server needs some milliseconds
	free, err := sys.WaitUnlocked(ctx, f, patience)
	if err == nil && !free {
		err = fmt.Errorf("%w: a mount of it lives on, by files open in it or in another mount namespace", layerfs.ErrInUse)
	}
	return err
}

// still waits until a layer is released unless it is mounted, by whomever.
func (m *mechanism) still(ctx context.Context, id string) error {
	if !m.opts.union() {
		return nil
	}
	mounted, err := mount.IsMountPoint(m.Path(id))
	if err != nil || mounted {
		return err
	}
	err = m.Released(ctx, id)
	if errors.Is(err, layerfs.ErrInUse) {
		// It may have been mounted meanwhile.
		if mounted, merr := mount.IsMountPoint(m.Path(id)); merr == nil && mounted {
			return nil
		}
	}
	return err
}

// unmountProgram unmounts what a mount program mounted; without privilege only
// the helper of libfuse may.
func unmountProgram(ctx context.Context, path string) error {
	err := mount.Unmount(path)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	st, serr := mount.Ask(path, mount.AnswerWithin)
	if serr == nil && !st.MountPoint {
		return mount.ErrNotMounted
	}
	return run(ctx, "fusermount3", "-u", "-z", "--", path)
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return ask.Run(ctx, cmd)
}

// viewProgram mounts a view in a directory whose lock tells that it is in use;
// clearViews removes those of processes that died.
func (m *mechanism) viewProgram(ctx context.Context, plan *mount.Overlay) (_ lifecycle.View, err error) {
	dir, err := os.MkdirTemp(m.home, ".view-")
	if err != nil {
		return lifecycle.View{}, err
	}
	lock, err := os.Open(dir)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return lifecycle.View{}, errors.Join(err, os.Remove(dir))
	}
	root := filepath.Join(dir, "root")
	release := func() error {
		err := mount.IgnoreNotMounted(unmountProgram(context.Background(), root))
		return errors.Join(err, removeIfThere(root), os.Remove(dir), lock.Close())
	}
	if err := os.Mkdir(root, 0o700); err != nil {
		return lifecycle.View{}, errors.Join(err, release())
	}
	if err := m.runProgram(ctx, plan, root); err != nil {
		return lifecycle.View{}, errors.Join(err, release())
	}
	return lifecycle.View{Path: root, Release: release}, nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// clearViews removes the views of mount programs whose process died.
func (m *mechanism) clearViews() error {
	dirs, err := filepath.Glob(filepath.Join(globEscape(m.home), ".view-*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		lock, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			continue // in use
		}
		root := filepath.Join(dir, "root")
		err = mount.IgnoreNotMounted(unmountProgram(context.Background(), root))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		err = errors.Join(err, removeIfThere(root), removeIfThere(dir), lock.Close())
		if err != nil {
			return err
		}
	}
	return nil
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}
