package guest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// toolPackages are the packages whose programs a guest has.
var toolPackages = []string{
	"e2fsprogs", "xfsprogs", "btrfs-progs", "thin-provisioning-tools", "dmsetup",
	"busybox-static", "attr", "acl", "util-linux", "mount", "fuse3", "libcap2-bin",
}

// zfsPackages are the programs of OpenZFS.
var zfsPackages = []string{"zfsutils-linux"}

// tools are the programs that are taken from the packages, by path. Shared
// libraries follow from what the programs name.
var tools = []string{
	"sbin/mke2fs", "sbin/mkfs.ext4", "sbin/resize2fs", "sbin/e2fsck", "sbin/fsck.ext4", "sbin/tune2fs",
	"sbin/dumpe2fs", "sbin/debugfs", "usr/bin/lsattr", "usr/bin/chattr", "usr/sbin/filefrag",
	"sbin/mkfs.xfs", "usr/sbin/xfs_growfs", "sbin/xfs_repair", "usr/sbin/xfs_io", "usr/sbin/xfs_db",
	"usr/sbin/xfs_quota",
	"sbin/mkfs.btrfs", "bin/btrfs",
	"usr/sbin/pdata_tools", "usr/sbin/thin_check", "usr/sbin/thin_delta", "usr/sbin/thin_dump",
	"usr/sbin/thin_ls", "usr/sbin/thin_repair", "usr/sbin/thin_restore", "usr/sbin/thin_rmap",
	"sbin/dmsetup", "sbin/blkdiscard", "sbin/fstrim", "sbin/losetup", "sbin/blkid", "bin/lsblk",
	"usr/bin/unshare", "usr/bin/nsenter", "bin/mount", "bin/umount", "bin/findmnt",
	"usr/bin/getfattr", "usr/bin/setfattr", "usr/bin/getfacl", "usr/bin/setfacl",
	"bin/fusermount3", "sbin/setcap", "sbin/getcap",
}

var zfsTools = []string{"sbin/zfs", "sbin/zpool", "usr/sbin/zdb", "usr/sbin/zstreamdump", "sbin/mount.zfs"}

// bootModules must load before anything is sent to the host, the others are
// what the tests need. What a kernel lacks of optionalModules is left out.
var (
	bootModules = []string{"virtio_pci", "virtio_console", "virtio_blk"}
	testModules = []string{
		"dm_mod", "dm_thin_pool", "loop", "overlay", "fuse", "xfs", "btrfs",
		"quota_v2", "crc32c_intel",
	}
	optionalModules = []string{
		"ext4", "dm_flakey", "dm_snapshot", "dm_log_writes", "dm_delay", "dm_zero", "erofs",
	}
)

// Kernel is an unpacked kernel.
type Kernel struct {
	Release string // as uname -r tells
	Version string // of the package
	Image   string // path of the compressed kernel
	Modules string // path of the directory with its modules
}

var imagePackage = regexp.MustCompile(`^linux-image-(\d[^=]*)=(.*)$`)

// Kernel returns the kernel that a package stands for, such as
// linux-image-cloud-amd64.
func (c *Cache) Kernel(ctx context.Context, pkg string) (*Kernel, error) {
	all, err := c.Resolve(ctx, pkg)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, imagePackage.MatchString)
	if i < 0 {
		return nil, fmt.Errorf("guest: package %s brings no kernel image", pkg)
	}
	m := imagePackage.FindStringSubmatch(all[i])
	root, err := c.Unpack(ctx, "kernel-"+m[1], all[i:i+1])
	if err != nil {
		return nil, err
	}
	k := &Kernel{
		Release: m[1], Version: m[2],
		Image:   filepath.Join(root, "boot", "vmlinuz-"+m[1]),
		Modules: filepath.Join(root, "lib", "modules", m[1]),
	}
	if _, err := os.Stat(k.Image); err != nil {
		return nil, err
	}
	return k, nil
}

// Tools returns a tree with the named packages and the libraries they need.
func (c *Cache) Tools(ctx context.Context, name string, pkgs ...string) (string, error) {
	all, err := c.Resolve(ctx, pkgs...)
	if err != nil {
		return "", err
	}
	// Interpreters and what only they need are for scripts, of which none is
	// in the image.
	keep := slices.DeleteFunc(slices.Clone(all), func(p string) bool {
		n, _, _ := strings.Cut(p, "=")
		return !slices.Contains(pkgs, n) &&
			n != "zlib1g" && (!strings.HasPrefix(n, "lib") || strings.HasPrefix(n, "libpython") || strings.HasPrefix(n, "libicu"))
	})
	return c.Unpack(ctx, name, keep)
}

// BaseImage writes the part of the initramfs that is the same for every run:
// tools and modules. It returns the file and the order of the modules.
func (c *Cache) BaseImage(ctx context.Context, k *Kernel, zfsModules string) (file string, boot, optional []string, err error) {
	roots := []string{}
	t, err := c.Tools(ctx, "tools", toolPackages...)
	if err != nil {
		return "", nil, nil, err
	}
	roots = append(roots, t)
	progs := slices.Clone(tools)
	if zfsModules != "" {
		z, err := c.Tools(ctx, "zfs", zfsPackages...)
		if err != nil {
			return "", nil, nil, err
		}
		roots = append(roots, z)
		progs = append(progs, zfsTools...)
	}
	boot, optional, err = moduleOrder(k, zfsModules)
	if err != nil {
		return "", nil, nil, err
	}
	parts := append(slices.Concat(roots, progs, boot, optional), k.Modules, zfsModules, imageFormat)
	dir, err := c.Once(filepath.Join("images", "base-"+k.Release+"-"+digest(parts)), func(dir string) error {
		c.logf("making the image for %s", k.Release)
		return writeBase(filepath.Join(dir, "base.cpio"), k, roots, progs, slices.Concat(boot, optional))
	})
	if err != nil {
		return "", nil, nil, err
	}
	return filepath.Join(dir, "base.cpio"), guestModules(boot), guestModules(optional), nil
}

// imageFormat changes when writeBase does, so that no old image is used.
const imageFormat = "1"

// moduleOrder returns the files of the modules that must and that may load.
func moduleOrder(k *Kernel, zfsModules string) (must, may []string, err error) {
	builtin, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, nil, err
	}
	dirs := []string{filepath.Join(k.Modules, "kernel")}
	want := slices.Concat(bootModules, testModules)
	if zfsModules != "" {
		dirs = append(dirs, zfsModules)
		want = append(want, "zfs")
	}
	tree, err := OpenModules(builtin, dirs...)
	if err != nil {
		return nil, nil, err
	}
	if must, err = tree.Order(want...); err != nil {
		return nil, nil, err
	}
	for _, m := range optionalModules {
		files, err := tree.Order(m)
		if err != nil {
			continue // this kernel lacks it
		}
		for _, f := range files {
			if !slices.Contains(must, f) && !slices.Contains(may, f) {
				may = append(may, f)
			}
		}
	}
	return must, may, nil
}

// guestModules returns where the files are in the guest.
func guestModules(files []string) []string {
	out := make([]string, len(files))
	for i, f := range files {
		out[i] = path.Join("/lib/layerfs-modules", filepath.Base(f))
	}
	return out
}

// writeBase writes the archive.
func writeBase(file string, k *Kernel, roots, progs, modules []string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriterSize(f, 1<<20)
	a := NewCpio(w)
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "mnt", "root", "etc", "var/tmp", "var/lib", "usr/bin", "usr/sbin"} {
		if err := a.Dir(d); err != nil {
			return err
		}
	}
	// As on every merged-usr system: a program is found under both names.
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := a.Symlink(d, "usr/"+d); err != nil {
			return err
		}
	}
	// The kernel opens it as init's standard streams before devtmpfs is there.
	if err := a.Char("dev/console", 5, 1); err != nil {
		return err
	}
	for i, m := range guestModules(modules) {
		if err := a.File("usr"+m, modules[i]); err != nil {
			return err
		}
	}
	l := linker{roots: roots, out: a}
	for _, p := range progs {
		if err := l.add(p); err != nil {
			return err
		}
	}
	if err := l.busybox(); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
		"etc/group":         "root:x:0:\nnogroup:x:65534:\n",
		"etc/hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
	} {
		if err := a.Bytes(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := a.Symlink("etc/mtab", "/proc/self/mounts"); err != nil {
		return err
	}
	for _, conf := range []string{"etc/mke2fs.conf"} {
		host, err := l.find(conf)
		if err != nil {
			return err
		}
		if err := a.File(conf, host); err != nil {
			return err
		}
	}
	return errors.Join(a.Close(), w.Flush())
}

// linker adds programs with the shared libraries they name, taken from the
// unpacked packages.
type linker struct {
	roots []string
	out   *Cpio
}

// find returns the file of the packages with that path, in a merged or an
// unmerged tree.
func (l *linker) find(name string) (string, error) {
	alt := strings.TrimPrefix(name, "usr/")
	if alt == name {
		alt = "usr/" + name
	}
	for _, root := range l.roots {
		for _, n := range []string{name, alt} {
			p := filepath.Join(root, n)
			if _, err := os.Lstat(p); err == nil {
				return p, nil
			}
		}
	}
	return "", &fs.PathError{Op: "find in packages", Path: name, Err: fs.ErrNotExist}
}

// add puts a program or library, and what it needs, into the image.
func (l *linker) add(name string) error {
	host, err := l.find(name)
	if err != nil {
		return err
	}
	to := name
	if !strings.HasPrefix(to, "usr/") && !strings.HasPrefix(to, "etc/") {
		to = "usr/" + to
	}
	if l.out.have[to] {
		return nil
	}
	if st, err := os.Lstat(host); err != nil {
		return err
	} else if st.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(host)
		if err != nil {
			return err
		}
		if !path.IsAbs(target) {
			target = path.Join("/"+path.Dir(name), target)
		}
		if err := l.out.Symlink(to, target); err != nil {
			return err
		}
		return l.add(strings.TrimPrefix(target, "/"))
	}
	if err := l.out.File(to, host); err != nil {
		return err
	}
	f, err := elf.Open(host)
	if err != nil {
		return fmt.Errorf("%s: %w", host, err)
	}
	defer f.Close()
	if in := f.Section(".interp"); in != nil {
		b, err := in.Data()
		if err != nil {
			return err
		}
		if err := l.add(strings.Trim(string(b), "/\x00")); err != nil {
			return err
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", host, err)
	}
	for _, lib := range libs {
		if err := l.library(lib); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (l *linker) library(lib string) error {
	var err error
	for _, dir := range []string{"lib/x86_64-linux-gnu", "lib", "lib64"} {
		if _, err = l.find(path.Join(dir, lib)); err == nil {
			return l.add(path.Join(dir, lib))
		}
	}
	return err
}

// applets are the names under which busybox is called; what the packages have
// comes first.
var applets = strings.Fields(`sh ash awk basename cat chmod chown chroot cmp cp cut date dd df diff dirname
	dmesg du echo env expr false find free grep gunzip gzip head hostname id ip kill ln ls lsmod lsof md5sum mkdir mkfifo
	mknod mktemp modprobe mount mountpoint mv nproc od pgrep pidof pivot_root printf ps pwd readlink realpath
	rm rmdir sed seq setsid sha256sum sleep sort stat stty sync sysctl tail tar tee test time timeout top touch tr
	true truncate umount uname uniq usleep vi wc which xargs xz yes zcat [`)

func (l *linker) busybox() error {
	host, err := l.find("bin/busybox")
	if err != nil {
		return err
	}
	if err := l.out.File("usr/bin/busybox", host); err != nil {
		return err
	}
	for _, a := range applets {
		if err := l.out.Symlink("usr/bin/"+a, "busybox"); err != nil {
			return err
		}
	}
	return nil
}

// Extra is a file or a directory of the host that the guest has.
type Extra struct{ Host, Guest string }

// WriteImage writes the initramfs of one run: the base, init, the job and the
// extra files.
func WriteImage(file, base, init string, job *Job, extra []Extra) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriterSize(f, 1<<20)
	if base != "" {
		b, err := os.Open(base)
		if err != nil {
			return err
		}
		defer b.Close()
		if _, err := w.ReadFrom(b); err != nil {
			return err
		}
	}
	a := NewCpio(w)
	if err := a.File("init", init); err != nil {
		return err
	}
	data, err := json.Marshal(job)
	if err != nil {
		return err
	}
	if err := a.Bytes(JobPath, data, 0o644); err != nil {
		return err
	}
	for _, e := range extra {
		st, err := os.Stat(e.Host)
		if err != nil {
			return err
		}
		add := a.File
		if st.IsDir() {
			add = a.Tree
		}
		if err := add(e.Guest, e.Host); err != nil {
			return err
		}
	}
	return errors.Join(a.Close(), w.Flush())
}

// digest names a list.
func digest(parts []string) string {
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(h[:8])
}
