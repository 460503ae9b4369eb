package drivertest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
)

// errQuota is what ext4 and btrfs say of a full quota.
const errQuota = unix.EDQUOT

func linuxFeatureCases() []testCase {
	return []testCase{
		{name: "FeatureAllXattrs", run: testAllXattrs},
		{name: "FeatureDeviceNodes", run: testDeviceNodes},
		{name: "FeatureSharedPageCache", needs: needRoot, run: testSharedPageCache},
	}
}

func testAllXattrs(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	return e.with(e.d, "a", nil, func(path string) error {
		var refused error
		for _, name := range []string{"user.a", "trusted.a", "security.a"} {
			if err := unix.Setxattr(filepath.Join(path, "f"), name, []byte("1"), 0); err != nil {
				refused = fmt.Errorf("setxattr %s: %w", name, err)
			}
		}
		if all := e.d.Features().AllXattrs; all != (refused == nil) {
			return fmt.Errorf("AllXattrs = %v, but %w", all, errors.Join(refused))
		}
		return nil
	})
}

func testDeviceNodes(e *env) error {
	if err := e.create("a", ""); err != nil {
		return err
	}
	return e.with(e.d, "a", nil, func(path string) error {
		err := makeTree(path, "char null 1 3")
		if can := e.d.Features().DeviceNodes; can != (err == nil) {
			return fmt.Errorf("DeviceNodes = %v, but mknod gives %v", can, err)
		}
		return nil
	})
}

// testSharedPageCache reads a file through one layer and asks whether its
// pages are in memory through another.
func testSharedPageCache(e *env) error {
	const size = 1 << 20
	if err := e.create("base", "", fmt.Sprintf("data f %d 1", size)); err != nil {
		return err
	}
	if err := errors.Join(e.create("a", "base"), e.create("b", "base")); err != nil {
		return err
	}
	var paths []string
	for _, id := range []string{"a", "b"} {
		path, err := e.d.Get(e.ctx, id, nil)
		if err != nil {
			return err
		}
		paths = append(paths, filepath.Join(path, "f"))
	}
	for _, path := range paths {
		if err := forget(path); err != nil {
			return err
		}
	}
	for _, path := range paths {
		n, err := cached(path, size)
		if err != nil {
			return err
		}
		if n > 0 {
			return skipf("the file system keeps files in memory")
		}
	}
	if _, err := os.ReadFile(paths[0]); err != nil {
		return err
	}
	n, err := cached(paths[1], size)
	if err != nil {
		return err
	}
	if shared := e.d.Features().SharedPageCache; shared != (n > 0) {
		return fmt.Errorf("SharedPageCache = %v, but after a read through one layer another has %d pages", shared, n)
	}
	return nil
}

// forget drops the pages of a file.
func forget(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(unix.Syncfs(int(f.Fd())), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// cached counts the pages of a file that are in memory.
func cached(path string, size int) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(m) }()
	pages, err := sys.Mincore(m)
	n := 0
	for _, p := range pages {
		n += int(p & 1)
	}
	return n, err
}

// limited runs fn as a container runs: without CAP_SYS_RESOURCE, with which a
// process may exceed the quotas of ext4 (fs/quota/dquot.c, ignore_hardlimit).
// Capabilities belong to a thread, so it has one of its own, which ends if it
// cannot be put right again.
func limited(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			done <- err
			return
		}
		without := data
		without[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
		if err := unix.Capset(&header, &without[0]); err != nil {
			done <- err
			return
		}
		err := fn()
		if rerr := unix.Capset(&header, &data[0]); rerr == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// tryMounts makes the mounts of a Mounter where that is permitted.
func (e *env) tryMounts(list []layerfs.Mount, frozen bool, names []string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	target := e.newDir("target")
	made := 0
	defer func() {
		for range made {
			if err := mount.Unmount(target); err != nil {
				e.Error(err)
			}
		}
	}()
	for _, m := range list {
		if err := mountOne(m, target); err != nil {
			return err
		}
		made++
	}
	if err := dirHolds(target, names...); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join(target, "written"), nil, 0o600)
	if frozen && e.d.Features().ReadOnlyViews && !e.d.Features().LiveBase {
		if err == nil {
			return errors.New("a frozen layer could be written")
		}
		return nil
	}
	if err != nil {
		return err
	}
	return os.Remove(filepath.Join(target, "written"))
}

// mountOne mounts as a container runtime would.
func mountOne(m layerfs.Mount, target string) error {
	var bind bool
	var rest []string
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			bind = true
			continue
		}
		rest = append(rest, o)
	}
	flags, data := mount.ParseOptions(rest...)
	if bind || m.Type == "bind" {
		return mount.Bind(m.Source, target, flags)
	}
	return (&mount.FS{Type: m.Type, Source: m.Source, Flags: flags, Options: data, Method: mount.Classic}).Mount(target)
}
