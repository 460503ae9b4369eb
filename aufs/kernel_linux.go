package aufs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/tree"
	"github.com/layerfs/layerfs/union"
	"github.com/layerfs/layerfs/whiteout"
)

// aufsMagic is AUFS_SUPER_MAGIC of uapi/linux/aufs_type.h, "aufs".
const aufsMagic = 0x61756673

// mountFunc is mount(2).
type mountFunc func(source, target, fstype string, flags uintptr, data string) error

// kernelEngine mounts the kernel's AUFS. What it mounts, any process can
// unmount and change.
type kernelEngine struct {
	set  settings
	call mountFunc
	sys  string // /sys/fs/aufs
	proc string // /proc/fs/aufs/plink_maint
}

func newKernel(set settings) *kernelEngine {
	return &kernelEngine{set: set, call: unix.Mount, sys: "/sys/fs/aufs", proc: "/proc/fs/aufs/plink_maint"}
}

func (*kernelEngine) name() Engine { return Kernel }

func (*kernelEngine) close() error { return nil }

// mount mounts the branches that fit into a page and appends the others. If
// that fails, nothing is mounted.
func (k *kernelEngine) mount(ctx context.Context, p plan, target string) error {
	first, more, err := kernelData(p, k.set)
	if err != nil {
		return err
	}
	var flags uintptr
	if p.readOnly {
		flags = unix.MS_RDONLY
	}
	if err := k.call("none", target, "aufs", flags, first); err != nil {
		return &os.PathError{Op: "mount", Path: target, Err: err}
	}
	for _, data := range more {
		err := context.Cause(ctx)
		if err == nil {
			err = k.call("none", target, "aufs", flags|unix.MS_REMOUNT, data)
		}
		if err != nil {
			if uerr := mount.Unmount(target); uerr != nil {
				err = fmt.Errorf("%w (rollback: %v)", err, uerr)
			}
			return &os.PathError{Op: "remount", Path: target, Err: err}
		}
	}
	return nil
}

func (k *kernelEngine) unmount(ctx context.Context, target string) error {
	// Else names of a file that were not copied up fall back to the old
	// content (aufs(5), Pseudo Link).
	if err := mount.IgnoreNotMounted(k.flush(ctx, target)); err != nil {
		return err
	}
	return unmountNow(target)
}

func (k *kernelEngine) alter(_ context.Context, target string, v verb) error {
	data, err := v.data()
	if err != nil {
		return err
	}
	if err := k.call("none", target, "aufs", unix.MS_REMOUNT, data); err != nil {
		return &os.PathError{Op: "remount " + v.op, Path: v.Path, Err: err}
	}
	return nil
}

// superID returns the id of a mounted union.
func (k *kernelEngine) superID(target string) (string, error) {
	infos, err := mount.Under(target)
	if err != nil {
		return "", err
	}
	for _, info := range slices.Backward(infos) {
		if id, ok := superID(info.VFSOptions); ok && info.FSType == "aufs" && info.Mountpoint == target {
			return id, nil
		}
	}
	return "", &os.PathError{Op: "mountinfo", Path: target, Err: mount.ErrNotMounted}
}

func (k *kernelEngine) branches(target string) ([]union.Branch, error) {
	id, err := k.superID(target)
	if err != nil {
		return nil, err
	}
	return readBranches(filepath.Join(k.sys, "si_"+id))
}

// readBranches reads the branches of a union from its directory in sysfs, in
// order.
func readBranches(dir string) ([]union.Branch, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	type numbered struct {
		at int
		union.Branch
	}
	var list []numbered
	for _, e := range entries {
		at, ok := parseBranchName(e.Name())
		if !ok {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		b, err := parseBranch(string(text))
		if err != nil {
			return nil, err
		}
		list = append(list, numbered{at, b})
	}
	slices.SortFunc(list, func(a, b numbered) int { return cmp.Compare(a.at, b.at) })
	branches := make([]union.Branch, len(list))
	for i, n := range list {
		branches[i] = n.Branch
	}
	return branches, nil
}

// flush makes pseudo-links real, as auplink(8) does: in the maintenance mode of
// the union, every name of a linked file is changed by nothing, which copies
// it up as a hard link; then the pseudo-links are dropped.
func (k *kernelEngine) flush(ctx context.Context, target string) error {
	if k.set.noPlink {
		return nil
	}
	branches, err := k.branches(target)
	if err != nil {
		return err
	}
	inos, err := plinks(branches)
	if err != nil || len(inos) == 0 {
		return err
	}
	id, err := k.superID(target)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		// The mode belongs to a thread; others wait until it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- k.maintain(ctx, target, id, inos)
	}()
	return <-done
}

// plinks returns the inode numbers of the pseudo-links on writable branches.
func plinks(branches []union.Branch) (map[uint64]bool, error) {
	inos := make(map[uint64]bool)
	for _, b := range branches {
		if b.Perm != union.RW {
			continue
		}
		entries, err := os.ReadDir(filepath.Join(b.Path, whiteout.PlinkDir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if ino, ok := parsePlink(e.Name()); ok {
				inos[ino] = true
			}
		}
	}
	return inos, nil
}

func (k *kernelEngine) maintain(ctx context.Context, target, id string, inos map[uint64]bool) (err error) {
	f, err := os.OpenFile(k.proc, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteString("si=" + id); err != nil {
		return err
	}
	err = tree.Walk(ctx, target, func(e *tree.Entry) error {
		if e.IsDir() || !inos[e.Stat.Ino] {
			return nil
		}
		if err := unix.Fchownat(e.Dir, e.Name, -1, -1, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "fchownat", Path: e.Path, Err: err}
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = f.WriteString("clean")
	return err
}

// probeKernel finds out whether the kernel's AUFS works with branches in the
// home, and whether it knows dirperm1.
func (m *mechanism) probeKernel(s settings) (dirPerm1 bool, err error) {
	no := func(reason string) error {
		return &layerfs.UnsupportedError{Feature: "AUFS", Reason: reason}
	}
	list, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return false, err
	}
	if !hasFS(string(list), "aufs") {
		return false, no("/proc/filesystems does not have it")
	}
	try := func(dirPerm1 bool) error {
		s.dirPerm1 = dirPerm1
		k := newKernel(s)
		return m.try(func(branches []union.Branch, target string) error {
			if err := k.mount(context.Background(), plan{branches: branches}, target); err != nil {
				return no(err.Error())
			}
			return mount.UnmountNow(target)
		})
	}
	if try(true) == nil {
		return true, nil
	}
	return false, try(false)
}

// xinoPath returns where the table of inode numbers is made: not below a
// branch, and where it can grow to many times the size of what it is about,
// all holes (aufs(5), xino).
func xinoPath(wanted, home string) string {
	if wanted != "" {
		return wanted
	}
	const usual = "/dev/shm"
	var st unix.Statfs_t
	if unix.Statfs(usual, &st) == nil && st.Type == unix.TMPFS_MAGIC {
		return usual + "/aufs.xino"
	}
	return filepath.Join(home, ".layerfs", "aufs.xino")
}

// homeFits reports why branches below home could not be told to AUFS.
func homeFits(home string) error {
	if err := checkPath(home); err != nil {
		return &layerfs.UnsupportedError{Feature: "the kernel engine on this root", Reason: err.Error()}
	}
	if strings.HasPrefix(home, "/proc/") {
		return &layerfs.UnsupportedError{Feature: "the kernel engine on this root", Reason: "AUFS takes no branch on procfs"}
	}
	return nil
}

// sync has nothing to do: with udba=notify a change shows at the next access.
func (*kernelEngine) sync(context.Context, string) error { return nil }
