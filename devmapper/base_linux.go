package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/undo"
)

func mkfsPath(fs string) (string, error) {
	path, err := tool("mkfs." + fs)
	if err != nil {
		return "", &layerfs.UnsupportedError{Feature: "a new root with " + fs, Reason: err.Error()}
	}
	return path, nil
}

// makeBase makes the device that base layers are snapshots of, with an empty
// file system. It starts over if a crash left a half of it.
func (m *mechanism) makeBase(ctx context.Context, s *poolState) (err error) {
	if err := m.removeDevice(ctx, m.deviceName("+base", false)); err != nil {
		return err
	}
	m.step("base: create")
	err = m.message(dm.CreateThin(baseID))
	if errors.Is(err, unix.EEXIST) {
		if err := m.deleteThin(baseID); err != nil {
			return err
		}
		err = m.message(dm.CreateThin(baseID))
	}
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run(&err)
	u.Push(func() error { return m.deleteThin(baseID) })
	m.step("base: activate")
	path, release, err := m.activateBase(ctx, *s, false)
	if err != nil {
		return err
	}
	err = m.format(ctx, path, s)
	if rerr := release(); err == nil {
		err = rerr
	}
	if err != nil {
		return err
	}
	m.step("base: save")
	return m.saveState(*s)
}

// activateBase activates the base device under a name of its own.
func (m *mechanism) activateBase(ctx context.Context, s poolState, readOnly bool) (path string, release func() error, err error) {
	name := m.deviceName("+base", false)
	if err := m.removeDevice(ctx, name); err != nil { // left by a crash
		return "", nil, err
	}
	info, err := m.activateThin(name, m.uuidOf("base"), baseID, s.BaseSize, readOnly)
	if err != nil {
		return "", nil, err
	}
	release = func() error { return m.removeDevice(context.WithoutCancel(ctx), name) }
	path, err = m.nodes.Path(info.Device)
	if err != nil {
		return "", nil, errors.Join(err, release())
	}
	return path, release, nil
}

// format makes the file system, and makes its root look like an empty layer.
func (m *mechanism) format(ctx context.Context, path string, s *poolState) error {
	mkfs, err := mkfsPath(s.FS)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, mkfs, append(mkfsArgs(s.FS, m.opts.MkfsArgs), path)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", mkfs, strings.Join(cmd.Args[1:], " "), err, strings.TrimSpace(string(out)))
	}
	root, err := m.mountDevice(path, sbWritable, 0, "", false)
	if err != nil {
		return err
	}
	err = func() error {
		dir := procPath(root)
		if err := os.Remove(dir + "/lost+found"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Chmod(dir+"/.", 0o755); err != nil {
			return err
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(root.Fd()), &st); err != nil {
			return &os.PathError{Op: "statfs", Path: path, Err: err}
		}
		s.BaseInodes = int64(st.Files - st.Ffree)
		return nil
	}()
	if err := errors.Join(err, root.Close()); err != nil {
		return err
	}
	sb, err := readSuper(path, s.FS)
	if err != nil {
		return err
	}
	s.BaseUUID = sb.uuid
	return nil
}

// mkfsArgs are the arguments of mkfs. The device is known to read as zeroes, so
// nothing needs to be discarded or zeroed; layers are mounted with
// noinit_itable, or each would zero inode tables of its own.
func mkfsArgs(fs string, more []string) []string {
	if fs == "xfs" {
		return append([]string{"-q", "-f", "-K"}, more...)
	}
	return append([]string{"-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"}, more...)
}

// checkBase makes sure that the pool is this root's: its base device has the
// file system that the root made.
func (m *mechanism) checkBase(ctx context.Context, s poolState) error {
	path, release, err := m.activateBase(ctx, s, true)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("the pool %s has no base device, so it is not this root's: %w", m.pool, err)
	}
	if err != nil {
		return err
	}
	sb, err := readSuper(path, s.FS)
	if err == nil && sb.uuid != s.BaseUUID {
		err = fmt.Errorf("the pool %s is not this root's: its base device has uuid %s, not %s", m.pool, sb.uuid, s.BaseUUID)
	}
	return errors.Join(err, release())
}
