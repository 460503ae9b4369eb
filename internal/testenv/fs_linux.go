package testenv

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
)

// Ext4 returns the empty root of a new ext4 file system of sizeMiB on a loop
// device, unmounted when the test ends. An option that begins with "-" is for
// mkfs.ext4 and may have several words ("-O quota,project"); others are mount
// options ("prjquota"). The test is skipped without root, mkfs.ext4 or loop
// devices, or if the kernel refuses the options.
func Ext4(tb testing.TB, sizeMiB int, opts ...string) string {
	tb.Helper()
	return loopFS(tb, "ext4", sizeMiB, []string{"-q", "-F"}, opts)
}

// XFS is [Ext4] for xfs; mkfs.xfs wants 300 MiB at least.
func XFS(tb testing.TB, sizeMiB int, opts ...string) string {
	tb.Helper()
	return loopFS(tb, "xfs", sizeMiB, []string{"-q", "-f"}, opts)
}

// Btrfs is [Ext4] for btrfs; mkfs.btrfs wants 109 MiB at least.
func Btrfs(tb testing.TB, sizeMiB int, opts ...string) string {
	tb.Helper()
	return loopFS(tb, "btrfs", sizeMiB, []string{"-q", "-f"}, opts)
}

// Tmpfs returns the empty root of a new tmpfs with the given mount options,
// unmounted when the test ends, with everything that is mounted below.
func Tmpfs(tb testing.TB, opts ...string) string {
	tb.Helper()
	RequireRoot(tb)
	dir := mountPoint(tb)
	flags, rest := mount.ParseOptions(opts...)
	if err := mount.Mount("tmpfs", "tmpfs", dir, flags, rest); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unmountAll(tb, dir, mount.Unmount) })
	return dir
}

// mountPoint makes a directory that is not TempDir itself: a mount there would
// make its removal fail with an unhelpful EBUSY if a test leaks one.
func mountPoint(tb testing.TB) string {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "fs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func loopFS(tb testing.TB, fstype string, sizeMiB int, mkfsArgs, opts []string) string {
	tb.Helper()
	RequireRoot(tb)
	mkfs := RequireTool(tb, "mkfs."+fstype, fstype)
	losetup := RequireTool(tb, "losetup", fstype)
	dir := mountPoint(tb)
	image := filepath.Join(filepath.Dir(dir), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(image, int64(sizeMiB)<<20); err != nil {
		tb.Fatal(err)
	}
	var mountOpts []string
	for _, o := range opts {
		if strings.HasPrefix(o, "-") {
			mkfsArgs = append(mkfsArgs, strings.Fields(o)...)
		} else {
			mountOpts = append(mountOpts, o)
		}
	}
	if out, err := exec.Command(mkfs, append(mkfsArgs, image)...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %s: %v\n%s", mkfs, strings.Join(mkfsArgs, " "), err, out)
	}
	device := attach(tb, losetup, fstype, image)
	tb.Cleanup(func() { detach(tb, losetup, device, image) })
	flags, rest := mount.ParseOptions(mountOpts...)
	if err := mount.Mount(fstype, device, dir, flags, rest); err != nil {
		if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EINVAL) && len(opts) > 0 {
			skip(tb, "mount "+fstype+" with "+strings.Join(opts, " ")+": "+err.Error(), fstype)
		}
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unmountAll(tb, dir, mount.UnmountNow) })
	return dir
}

// attach uses losetup and not internal/loop, whose own tests use this package.
func attach(tb testing.TB, losetup, fstype, image string) string {
	tb.Helper()
	// losetup asks for a free device and then attaches: another process may
	// have taken the device in between.
	var out []byte
	var err error
	for range 20 {
		out, err = exec.Command(losetup, "--find", "--show", image).CombinedOutput()
		if err == nil {
			return strings.TrimSpace(string(out))
		}
		time.Sleep(50 * time.Millisecond)
	}
	skip(tb, "attach a loop device: "+err.Error()+": "+string(out), fstype)
	return ""
}

func detach(tb testing.TB, losetup, device, image string) {
	tb.Helper()
	// If something keeps the device open, it goes away with that: lazily.
	if out, err := exec.Command(losetup, "--detach", device).CombinedOutput(); err != nil {
		tb.Errorf("losetup --detach %s: %v: %s", device, err, out)
	}
	backing := "/sys/block/" + filepath.Base(device) + "/loop/backing_file"
	// A mount namespace that another process made meanwhile has a copy of the
	// mount and keeps the device until it ends, such as that of a test in a
	// user namespace or of the making of test data.
	const patience = 2 * time.Minute
	for start := time.Now(); time.Since(start) < patience; time.Sleep(20 * time.Millisecond) {
		b, err := os.ReadFile(backing)
		if err != nil || strings.TrimSpace(string(b)) != image {
			return
		}
	}
	tb.Errorf("%s of %s is still in use", device, image)
}

// unmountAll unmounts dir and everything below it, the last mount first. A
// mount that is busy for a moment, such as one that is being written back, is
// tried again for five seconds. What a test left mounted below dir is its
// error.
func unmountAll(tb testing.TB, dir string, last func(string) error) {
	tb.Helper()
	list, err := mount.Under(dir)
	if err != nil {
		tb.Error(err)
		return
	}
	for i := len(list) - 1; i >= 0; i-- {
		point := list[i].Mountpoint
		unmount := mount.Unmount
		if point == dir {
			unmount = last
		}
		var err error
		for try := range 100 {
			if err = unmount(point); !errors.Is(err, unix.EBUSY) {
				break
			}
			if try == 99 {
				err = errors.Join(err, mount.Unmount(point))
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil && !errors.Is(err, mount.ErrNotMounted) {
			tb.Errorf("unmount %s (%s): %v", point, strconv.Quote(list[i].FSType), err)
		}
	}
}
