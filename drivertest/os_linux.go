package drivertest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/tree"
)

// makeTree makes steps in a tree, one after another; see tree.Make.
func makeTree(root string, steps ...string) error {
	for _, step := range steps { // at once, times would be set last
		if err := tree.Make(root, step); err != nil {
			return err
		}
	}
	return nil
}

// compareTrees returns an error that lists the differences of two trees.
func compareTrees(wantDir, gotDir string, how compare) error {
	opts := &tree.CompareOptions{WholeSeconds: how.wholeSeconds, IgnoreDirTime: how.noDirTimes}
	if how.noSockets {
		opts.IgnorePath = func(path string) bool {
			fi, err := os.Lstat(filepath.Join(wantDir, path))
			return err == nil && fi.Mode().Type() == fs.ModeSocket
		}
	}
	opts.IgnoreXattr = func(name string) bool {
		// How xfs stores what it shows as system.posix_acl_*.
		if strings.HasPrefix(name, "trusted.SGI_ACL_") {
			return true
		}
		return how.fewXattrs && (strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "system."))
	}
	diffs, err := tree.Compare(wantDir, gotDir, opts)
	if !how.linkCounts {
		diffs = slices.DeleteFunc(diffs, func(d tree.Difference) bool { return d.What == "link count" })
	}
	if err != nil || len(diffs) == 0 {
		return err
	}
	const shown = 12
	var b strings.Builder
	for _, d := range diffs[:min(len(diffs), shown)] {
		fmt.Fprintf(&b, "\n\t%s", d)
	}
	if len(diffs) > shown {
		fmt.Fprintf(&b, "\n\tand %d more", len(diffs)-shown)
	}
	return fmt.Errorf("want (left) and got (right) differ:%s", b.String())
}

// walkChanges is the oracle of Changes; an empty base is the empty tree.
func walkChanges(base, dir string) ([]layerfs.Change, error) { return tree.Changes(base, dir) }

// setTime sets the modification time of an entry, not following a link.
func setTime(path string, t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// mountsBelow lists the mount points below dir, without dir itself.
func mountsBelow(dir string) ([]string, error) {
	list, err := mount.Under(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range list {
		if m.Mountpoint != real {
			points = append(points, m.Mountpoint)
		}
	}
	return points, nil
}

// release unmounts what a failed case has left.
func release(points []string) {
	for i := len(points) - 1; i >= 0; i-- {
		_ = mount.Unmount(points[i])
	}
}

// openFiles counts the descriptors of this process.
func openFiles() (int, error) {
	list, err := os.ReadDir("/proc/self/fd")
	return len(list), err
}

// wantOwners compares owners.
func wantOwners(root string, owners map[string][2]uint32) error {
	for name, owner := range owners {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			return &os.PathError{Op: "lstat", Path: name, Err: err}
		}
		if st.Uid != owner[0] || st.Gid != owner[1] {
			return fmt.Errorf("%s belongs to %d:%d, want %d:%d", name, st.Uid, st.Gid, owner[0], owner[1])
		}
	}
	return nil
}

// noSpace is the error of a full disk.
func noSpace() error { return unix.ENOSPC }

// linkCount returns the number of names of a file.
func linkCount(fi fs.FileInfo) int {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 1
	}
	return int(st.Nlink)
}
