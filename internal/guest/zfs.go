package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// ZFS returns a directory with the OpenZFS modules for the kernel, which are
// compiled the first time: about 3 minutes on two cores. It needs gcc and
// make; nothing is installed.
//
// The sources are those of the package zfs-dkms, the steps those of its
// dkms.conf.
func (c *Cache) ZFS(ctx context.Context, k *Kernel) (string, error) {
	all, err := c.Resolve(ctx, "zfs-dkms", "linux-headers-"+k.Release)
	if err != nil {
		return "", err
	}
	pkgs := slices.DeleteFunc(slices.Clone(all), func(p string) bool {
		return !strings.HasPrefix(p, "linux-headers-") && !strings.HasPrefix(p, "linux-kbuild-") && !strings.HasPrefix(p, "zfs-dkms=")
	})
	i := slices.IndexFunc(pkgs, func(p string) bool { return strings.HasPrefix(p, "zfs-dkms=") })
	if i < 0 {
		return "", errors.New("guest: apt knows no zfs-dkms")
	}
	_, version, _ := strings.Cut(pkgs[i], "=")
	name := fmt.Sprintf("zfs-%s-%s-%s", version, k.Release, digest([]string{k.Version}))
	return c.Once(filepath.Join("modules", name), func(dir string) error {
		debs, err := c.download(ctx, pkgs)
		if err != nil {
			return err
		}
		return c.compileZFS(ctx, k, debs, dir)
	})
}

// compileZFS leaves the modules in dir.
func (c *Cache) compileZFS(ctx context.Context, k *Kernel, debs []string, dir string) error {
	tree, err := os.MkdirTemp(c.dir, "tmp-zfs-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	for _, deb := range debs {
		if _, err := command(ctx, "", "dpkg-deb", "-x", deb, tree); err != nil {
			return err
		}
	}
	src := filepath.Join(tree, "usr", "src")
	headers := filepath.Join(src, "linux-headers-"+k.Release)
	// The makefile names the installed place of the common headers.
	mk := filepath.Join(headers, "Makefile")
	text, err := os.ReadFile(mk)
	if err != nil {
		return err
	}
	common, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "include /usr/src/")
	if !ok {
		return fmt.Errorf("%s: unknown form: %q", mk, text)
	}
	if err := os.WriteFile(mk, []byte("include "+filepath.Join(src, common)+"\n"), 0o644); err != nil {
		return err
	}
	zfs, err := filepath.Glob(filepath.Join(src, "zfs-*"))
	if err != nil {
		return err
	}
	if len(zfs) != 1 {
		return fmt.Errorf("zfs-dkms: %d source directories", len(zfs))
	}
	c.logf("compiling OpenZFS for %s, some minutes", k.Release)
	if _, err := command(ctx, zfs[0], "./configure", "--prefix=/usr", "--with-config=kernel",
		"--with-linux="+filepath.Join(src, filepath.Dir(common)), "--with-linux-obj="+headers); err != nil {
		return err
	}
	if _, err := command(ctx, zfs[0], "make", "-s", "-j"+strconv.Itoa(runtime.NumCPU())); err != nil {
		return err
	}
	n := 0
	err = filepath.WalkDir(filepath.Join(zfs[0], "module"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Ext(p) != ".ko" {
			return err
		}
		n++
		to := filepath.Join(dir, d.Name())
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, data, 0o644); err != nil {
			return err
		}
		// Debugging information is most of its size.
		_, err = command(ctx, "", "strip", "--strip-debug", to)
		return err
	})
	if err == nil && n == 0 {
		err = errors.New("zfs-dkms: no module was made")
	}
	return err
}
