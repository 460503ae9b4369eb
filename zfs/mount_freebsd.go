package zfs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

// FreeBSD mounts a dataset once; other views of it are made with nullfs(5).
// mount(8) is used rather than nmount(2), whose options differ between
// releases.

// kernelMounts reports that the kernel mounts: there is no other ZFS.
func kernelMounts() bool { return true }

// turns returns nothing: calls may be made at the same time.
func turns() func(context.Context) (*os.File, error) { return nil }

// clearAsides does nothing: no mount is ever moved aside.
func (m *mechanism) clearAsides(string) error { return nil }

// fullProperties are none: ACLs are NFSv4 ones by default, and xattrs are
// extattr(2), which are kept.
func fullProperties() map[string]string { return nil }

// mountTable lists the mounts.
func mountTable() ([]unix.Statfs_t, error) {
	for {
		n, err := unix.Getfsstat(nil, unix.MNT_NOWAIT)
		if err != nil {
			return nil, os.NewSyscallError("getfsstat", err)
		}
		list := make([]unix.Statfs_t, n+8)
		got, err := unix.Getfsstat(list, unix.MNT_NOWAIT)
		if err != nil {
			return nil, os.NewSyscallError("getfsstat", err)
		}
		if got < len(list) {
			return list[:got], nil
		}
	}
}

func sourceOf(st *unix.Statfs_t) string { return unix.ByteSliceToString(st.Mntfromname[:]) }
func targetOf(st *unix.Statfs_t) string { return unix.ByteSliceToString(st.Mntonname[:]) }
func typeOf(st *unix.Statfs_t) string   { return unix.ByteSliceToString(st.Fstypename[:]) }

// datasetAt returns the dataset that path is on.
func datasetAt(path string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return "", &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if typeOf(&st) != "zfs" {
		return "", &layerfs.UnsupportedError{Feature: name, Reason: fmt.Sprintf("%s is on %s, and no dataset is given", path, typeOf(&st))}
	}
	return sourceOf(&st), nil
}

// Mount shows a layer at its path.
func (m *mechanism) Mount(ctx context.Context, chain lifecycle.Chain, mode lifecycle.Mode) error {
	if !mode.ReadOnly {
		if err := m.forget(ctx, chain.Layer().ID); err != nil {
			return err
		}
	}
	return m.show(ctx, chain.Layer(), m.Path(chain.Layer().ID), mode)
}

// labels returns why a layer cannot have a mount label.
func (m *mechanism) labels() error {
	return &layerfs.UnsupportedError{Feature: "a mount label", Reason: "it is SELinux's, and this is FreeBSD"}
}

// show mounts a layer, whose lock is held, at target.
func (m *mechanism) show(ctx context.Context, rec *lifecycle.Record, target string, mode lifecycle.Mode) error {
	if rec.MountLabel != "" {
		return m.labels()
	}
	if mode.IDMap != nil {
		return &layerfs.UnsupportedError{Feature: "mapping of owners", Reason: "FreeBSD has no mapped mounts"}
	}
	stage := m.stage(rec.ID)
	mounted, err := at(stage)
	if err != nil {
		return err
	}
	if !mounted {
		if err := os.MkdirAll(stage, 0o700); err != nil {
			return err
		}
		if err := mountWith(ctx, "zfs", "rw", m.dataset(rec.ID), stage); err != nil {
			return err
		}
	}
	how := "rw"
	if mode.ReadOnly {
		how = "ro"
	}
	if err := mountWith(ctx, "nullfs", how, stage, target); err != nil {
		return errors.Join(err, m.unstage(rec.ID))
	}
	return nil
}

func mountWith(ctx context.Context, fstype, how, source, target string) error {
	out, err := exec.CommandContext(ctx, "/sbin/mount", "-t", fstype, "-o", how, "--", source, target).CombinedOutput()
	if err != nil {
		return &os.PathError{Op: "mount", Path: target, Err: fmt.Errorf("%s: %w", strings.TrimSpace(string(out)), err)}
	}
	return nil
}

// unstage unmounts the dataset when nothing shows it any more.
func (m *mechanism) unstage(id string) error {
	stage := m.stage(id)
	list, err := mountTable()
	if err != nil {
		return err
	}
	for i := range list {
		if typeOf(&list[i]) == "nullfs" && sourceOf(&list[i]) == stage {
			return nil
		}
	}
	if err := unmount(stage); err != nil {
		return err
	}
	return removeDir(stage)
}

func unmount(path string) error {
	mounted, err := at(path)
	if err != nil || !mounted {
		return err
	}
	err = unix.Unmount(path, 0)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(path, unix.MNT_FORCE)
	}
	if err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// at reports whether something is mounted just at path.
func at(path string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	real, err := filepath.EvalSymlinks(path)
	return targetOf(&st) == real, err
}

// hide unmounts what is mounted at path, and the dataset behind it if that was
// its last view.
func (m *mechanism) hide(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	mounted, err := at(path)
	if err != nil || !mounted {
		return err
	}
	if err := unmount(path); err != nil {
		return err
	}
	if dir, id := filepath.Split(sourceOf(&st)); typeOf(&st) == "nullfs" && filepath.Clean(dir) == m.state("stage") {
		return m.unstage(id)
	}
	return nil
}

// Unmount undoes Mount.
func (m *mechanism) Unmount(_ context.Context, rec *lifecycle.Record) error {
	return m.hide(m.Path(rec.ID))
}

// State looks at a layer's path.
func (m *mechanism) State(id string) (lifecycle.State, error) {
	mounted, err := at(m.Path(id))
	if err != nil || !mounted {
		return lifecycle.State{}, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.Path(id), &st); err != nil {
		return lifecycle.State{}, &os.PathError{Op: "statfs", Path: m.Path(id), Err: err}
	}
	return lifecycle.State{Mounted: true, ReadOnly: st.Flags&unix.MNT_RDONLY != 0}, nil
}

// Mounted lists the layers that are mounted.
func (m *mechanism) Mounted() ([]string, error) {
	graph, err := filepath.EvalSymlinks(m.graph())
	if err != nil {
		return nil, err
	}
	list, err := mountTable()
	if err != nil {
		return nil, err
	}
	var ids []string
	for i := range list {
		if target := targetOf(&list[i]); filepath.Dir(target) == graph {
			ids = append(ids, filepath.Base(target))
		}
	}
	return ids, nil
}

// probeMount tries what the file system mounted at path can hold.
func probeMount(path string) (xattrs, devices, idmap string) {
	if _, err := unix.ExtattrGetLink(path, unix.EXTATTR_NAMESPACE_USER, "layerfs", 0, 0); err != nil && !errors.Is(err, unix.ENOATTR) {
		xattrs = err.Error()
	} else {
		xattrs = "FreeBSD has no trusted and security xattrs"
	}
	return xattrs, "FreeBSD ignores device nodes outside of devfs", "FreeBSD has no mapped mounts"
}

// filesIn counts the objects of the file system that is mounted at path.
func filesIn(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Files) - st.Ffree, nil
}

// syncMount does nothing: what is written is in a transaction group at once.
func syncMount(string) error { return nil }

// withoutDiff says why Changes does not use zfs diff here even where it works.
func withoutDiff() string {
	return "the comparison that zfs diff needs reads xattrs in Linux's form, and this is FreeBSD"
}

// NativeChanges leaves the comparison to the walk.
func (m *mechanism) NativeChanges(context.Context, lifecycle.Chain, int) iter.Seq2[layerfs.Change, error] {
	return func(yield func(layerfs.Change, error) bool) {
		yield(layerfs.Change{}, fmt.Errorf("%w: %s", lifecycle.ErrDecline, withoutDiff()))
	}
}
