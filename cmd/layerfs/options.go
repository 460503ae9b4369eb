package main

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
)

// driverOption is a KEY of --opt DRIVER.KEY=VALUE.
type driverOption struct {
	driver, key, usage string
	set                func(o *auto.Options, value string) error
}

// driverOptions lists all options of all drivers.
func driverOptions() []driverOption {
	ov := func(o *auto.Options) *overlay.Options {
		if o.Overlay == nil {
			o.Overlay = new(overlay.Options)
		}
		return o.Overlay
	}
	bt := func(o *auto.Options) *btrfs.Options {
		if o.Btrfs == nil {
			o.Btrfs = new(btrfs.Options)
		}
		return o.Btrfs
	}
	vf := func(o *auto.Options) *vfs.Options {
		if o.VFS == nil {
			o.VFS = new(vfs.Options)
		}
		return o.VFS
	}
	return []driverOption{
		{"overlay", "redirect_dir", "on, off, follow or nofollow: rename directories of lower layers", func(o *auto.Options, v string) error {
			return choice(&ov(o).RedirectDir, v, "on", "off", "follow", "nofollow")
		}},
		{"overlay", "metacopy", "on or off: copy up attributes without content (needs redirect_dir=on)", func(o *auto.Options, v string) error {
			return choice(&ov(o).Metacopy, v, "on", "off")
		}},
		{"overlay", "xino", "on, off or auto: inode numbers that stay", func(o *auto.Options, v string) error {
			return choice(&ov(o).XIno, v, "on", "off", "auto")
		}},
		{"overlay", "userxattr", "on or off: marks in user.* xattrs", func(o *auto.Options, v string) error {
			return choice(&ov(o).UserXattr, v, "on", "off")
		}},
		{"overlay", "volatile", "on or off: never sync; layers do not survive a power failure", func(o *auto.Options, v string) error {
			return boolean(&ov(o).Volatile, v)
		}},
		{"overlay", "mount_option", "a further option of every overlay mount; may be repeated", func(o *auto.Options, v string) error {
			ov(o).MountOptions = append(ov(o).MountOptions, v)
			return nil
		}},
		{"overlay", "mount_program", "path of a program that mounts instead of the kernel, such as fuse-overlayfs", func(o *auto.Options, v string) error {
			ov(o).MountProgram = v
			return nil
		}},
		{"overlay", "size", "quota in bytes of layers without one of their own, such as 10G", func(o *auto.Options, v string) error {
			return size(&ov(o).Quota.Bytes, v)
		}},
		{"overlay", "inodes", "quota in files of layers without one of their own", func(o *auto.Options, v string) error {
			return count(&ov(o).Quota.Inodes, v)
		}},
		{"btrfs", "size", "quota in bytes of layers without one of their own, such as 10G", func(o *auto.Options, v string) error {
			return size(&bt(o).Size, v)
		}},
		{"btrfs", "min_space", "least quota in bytes that a layer may be given", func(o *auto.Options, v string) error {
			return size(&bt(o).MinSpace, v)
		}},
		{"btrfs", "mount_label", "SELinux label of layers without one of their own", func(o *auto.Options, v string) error {
			bt(o).MountLabel = v
			return nil
		}},
		{"btrfs", "quotas", "off, or turn qgroups or simple quotas on for the whole file system; default: what is there", func(o *auto.Options, v string) error {
			return choice(&bt(o).Quotas, v, btrfs.QuotasOff, btrfs.QuotasFull, btrfs.QuotasSimple)
		}},
		{"vfs", "ignore_owners", "on or off: all files belong to the caller", func(o *auto.Options, v string) error {
			return boolean(&vf(o).IgnoreOwners, v)
		}},
		{"vfs", "best_effort_xattrs", "on or off: go on without xattrs that cannot be stored", func(o *auto.Options, v string) error {
			return boolean(&vf(o).BestEffortXattrs, v)
		}},
		{"vfs", "reflink", "on or off: share blocks where the file system can", func(o *auto.Options, v string) error {
			var on bool
			err := boolean(&on, v)
			vf(o).NoReflink = !on
			return err
		}},
		{"vfs", "workers", "threads of a copy; 0 fits the machine", func(o *auto.Options, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 {
				return usagef("%q is no number of threads", v)
			}
			vf(o).Workers = n
			return nil
		}},
		{"vfs", "size", "quota in bytes of layers without one of their own, such as 10G", func(o *auto.Options, v string) error {
			return size(&vf(o).Quota.Bytes, v)
		}},
		{"vfs", "inodes", "quota in files of layers without one of their own", func(o *auto.Options, v string) error {
			return count(&vf(o).Quota.Inodes, v)
		}},
	}
}

// setDriverOptions sets all options, and returns all that is wrong with them.
func setDriverOptions(o *auto.Options, list []string) error {
	all := driverOptions()
	var errs []error
	for _, item := range list {
		name, value, ok := strings.Cut(item, "=")
		driver, key, dotted := strings.Cut(name, ".")
		if !ok || !dotted {
			errs = append(errs, usagef("option %q is not DRIVER.KEY=VALUE", item))
			continue
		}
		i := slices.IndexFunc(all, func(d driverOption) bool { return d.driver == driver && d.key == key })
		if i < 0 {
			errs = append(errs, unknownOption(all, driver, key))
			continue
		}
		if err := all[i].set(o, value); err != nil {
			errs = append(errs, usagef("option %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func unknownOption(all []driverOption, driver, key string) error {
	var keys []string
	for _, d := range all {
		if d.driver == driver {
			keys = append(keys, d.key)
		}
	}
	if keys == nil {
		if _, err := knownDriver(driver); err != nil {
			return err
		}
		return usagef("driver %s has no options", driver)
	}
	return usagef("driver %s has no option %q; it has %s", driver, key, strings.Join(keys, ", "))
}

func knownDriver(name string) (string, error) {
	name, err := auto.Lookup(name)
	if err != nil {
		return "", usageError{err}
	}
	return name, nil
}

// applicable makes sure that no option is for another driver.
func applicable(opts []string, driver string) error {
	for _, o := range opts {
		of, _, ok := strings.Cut(o, ".")
		if ok && of != driver {
			return usagef("option %q does not fit: the driver is %s", o, driver)
		}
	}
	return nil
}

func choice(field *string, value string, allowed ...string) error {
	if !slices.Contains(allowed, value) {
		return usagef("%q is not one of %s", value, strings.Join(allowed, ", "))
	}
	*field = value
	return nil
}

func boolean(field *bool, value string) error {
	var s string
	err := choice(&s, value, "on", "off")
	*field = s == "on"
	return err
}

func size(field *int64, value string) error {
	n, err := parseSize(value)
	if err == nil {
		*field = n
	}
	return err
}

func count(field *int64, value string) error {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < 0 {
		return usagef("%q is no number of files", value)
	}
	*field = n
	return nil
}

// parseSize reads a number of bytes: 4096, 10K, 1.5G, 2GiB, with powers of 1024
// as docker and truncate(1) have them.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "kKmMgGtTiIbB")
	unit := strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(s[len(digits):]), "b"), "i")
	shift, ok := map[string]int{"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[unit]
	f, err := strconv.ParseFloat(digits, 64)
	bytes := f * float64(int64(1)<<shift)
	if !ok || err != nil || !(bytes >= 0 && bytes < 1<<62) {
		return 0, usagef("%q is no size, such as 512M or 10G", s)
	}
	return int64(bytes), nil
}
