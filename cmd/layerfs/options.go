package main

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/auto"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/union"
	"github.com/layerfs/layerfs/vfs"
	"github.com/layerfs/layerfs/zfs"
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
	zf := func(o *auto.Options) *zfs.Options {
		if o.ZFS == nil {
			o.ZFS = new(zfs.Options)
		}
		return o.ZFS
	}
	au := func(o *auto.Options) *aufs.Options {
		if o.AUFS == nil {
			o.AUFS = new(aufs.Options)
		}
		return o.AUFS
	}
	dm := func(o *auto.Options) *devmapper.Options {
		if o.Devmapper == nil {
			o.Devmapper = new(devmapper.Options)
		}
		return o.Devmapper
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
		{"overlay", "mount_program", "path of a program that mounts instead of the kernel, such as fuse-overlayfs or layerfs", func(o *auto.Options, v string) error {
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
		{"zfs", "dataset", "dataset that holds those of the layers; default: the one that is mounted there", func(o *auto.Options, v string) error {
			zf(o).Dataset = v
			return nil
		}},
		{"zfs", "property", "NAME=VALUE of each layer's dataset; may be repeated", func(o *auto.Options, v string) error {
			name, value, ok := strings.Cut(v, "=")
			if !ok {
				return usagef("%q is not NAME=VALUE", v)
			}
			if zf(o).Properties == nil {
				zf(o).Properties = make(map[string]string)
			}
			zf(o).Properties[name] = value
			return nil
		}},
		{"zfs", "size", "quota in bytes of layers without one of their own, such as 10G", func(o *auto.Options, v string) error {
			return size(&zf(o).Quota.Bytes, v)
		}},
		{"zfs", "refquota", "most bytes of a layer's tree, with what it shares", func(o *auto.Options, v string) error {
			return size(&zf(o).RefQuota, v)
		}},
		{"zfs", "zfs", "path of the program zfs", func(o *auto.Options, v string) error {
			zf(o).Zfs = v
			return nil
		}},
		{"zfs", "zpool", "path of the program zpool", func(o *auto.Options, v string) error {
			zf(o).Zpool = v
			return nil
		}},
		{"zfs", "walk_changes", "on or off: compare whole trees even where zfs diff works", func(o *auto.Options, v string) error {
			return boolean(&zf(o).WalkChanges, v)
		}},
		{"aufs", "engine", "auto, kernel or fuse: what merges the branches", func(o *auto.Options, v string) error {
			return choice(&au(o).Engine, v, aufs.Auto, aufs.Kernel, aufs.FUSE)
		}},
		{"aufs", "helper", "path of the program that serves the fuse engine's mounts; default: this one", func(o *auto.Options, v string) error {
			au(o).Helper = []string{v}
			return nil
		}},
		{"aufs", "live_base", "on or off: base layers can be changed while layers on them are mounted", func(o *auto.Options, v string) error {
			return boolean(&au(o).LiveBase, v)
		}},
		{"aufs", "udba", "none, notify, reval or strict: how direct changes of branches are noticed", func(o *auto.Options, v string) error {
			return choice(&au(o).UDBA, v, union.None, union.Notify, union.Reval, union.Strict)
		}},
		{"aufs", "dirperm1", "on or off: the permissions of a directory are those of its topmost instance", func(o *auto.Options, v string) error {
			return choice(&au(o).DirPerm1, v, "on", "off")
		}},
		{"aufs", "dio", "on or off: the kernel's AUFS opens files with O_DIRECT", func(o *auto.Options, v string) error {
			return boolean(&au(o).Dio, v)
		}},
		{"aufs", "plink", "on or off: hard links survive a copy-up", func(o *auto.Options, v string) error {
			return inverse(&au(o).NoPlink, v)
		}},
		{"aufs", "sum", "on or off: statfs adds up the file systems of the branches", func(o *auto.Options, v string) error {
			return boolean(&au(o).Sum, v)
		}},
		{"aufs", "xino", "path of the kernel's AUFS's file of inode numbers", func(o *auto.Options, v string) error {
			au(o).XIno = v
			return nil
		}},
		{"aufs", "size", "quota in bytes of layers without one of their own, such as 10G", func(o *auto.Options, v string) error {
			return size(&au(o).Quota.Bytes, v)
		}},
		{"aufs", "inodes", "quota in files of layers without one of their own", func(o *auto.Options, v string) error {
			return count(&au(o).Quota.Inodes, v)
		}},
		// The names are those of Docker's dm.* options, where it had them.
		{"devmapper", "basesize", "bytes of a layer's file system; default 10G", func(o *auto.Options, v string) error {
			return size(&dm(o).BaseSize, v)
		}},
		{"devmapper", "loopdatasize", "bytes of the pool's data file; default 100G", func(o *auto.Options, v string) error {
			return size(&dm(o).DataSize, v)
		}},
		{"devmapper", "loopmetadatasize", "bytes of the pool's metadata file; default 2G", func(o *auto.Options, v string) error {
			return size(&dm(o).MetadataSize, v)
		}},
		{"devmapper", "datadev", "block device for the pool's data; its content is lost in a new root", func(o *auto.Options, v string) error {
			dm(o).DataDevice = v
			return nil
		}},
		{"devmapper", "metadatadev", "block device for the pool's metadata", func(o *auto.Options, v string) error {
			dm(o).MetadataDevice = v
			return nil
		}},
		{"devmapper", "thinpooldev", "name of an active thin pool that nobody else uses", func(o *auto.Options, v string) error {
			dm(o).ThinPoolDevice = v
			return nil
		}},
		{"devmapper", "blocksize", "bytes of the pool's blocks; default 64K", func(o *auto.Options, v string) error {
			return size(&dm(o).BlockSize, v)
		}},
		{"devmapper", "fs", "ext4 or xfs", func(o *auto.Options, v string) error {
			return choice(&dm(o).FS, v, "ext4", "xfs")
		}},
		{"devmapper", "mkfsarg", "a further argument of mkfs; may be repeated", func(o *auto.Options, v string) error {
			dm(o).MkfsArgs = append(dm(o).MkfsArgs, v)
			return nil
		}},
		{"devmapper", "mountopt", "a further mount option of every layer; may be repeated", func(o *auto.Options, v string) error {
			dm(o).MountOptions = append(dm(o).MountOptions, v)
			return nil
		}},
		{"devmapper", "blkdiscard", "on or off: discard a device before its deletion", func(o *auto.Options, v string) error {
			return choice(&dm(o).BlkDiscard, v, "on", "off")
		}},
		{"devmapper", "discard", "on or off: the pool gives freed blocks back", func(o *auto.Options, v string) error {
			return inverse(&dm(o).IgnoreDiscard, v)
		}},
		{"devmapper", "discard_passdown", "on or off: and so does what is below it", func(o *auto.Options, v string) error {
			return inverse(&dm(o).NoDiscardPassdown, v)
		}},
		{"devmapper", "use_deferred_removal", "on or off: the kernel removes devices when their last user goes", func(o *auto.Options, v string) error {
			return inverse(&dm(o).NoDeferredRemoval, v)
		}},
		{"devmapper", "use_deferred_deletion", "on or off: layers in use are deleted later", func(o *auto.Options, v string) error {
			return inverse(&dm(o).NoDeferredDeletion, v)
		}},
		{"devmapper", "min_free_space", "percent of the pool below which no layer is made; default 10, -1 is no limit", func(o *auto.Options, v string) error {
			return integer(&dm(o).MinFreeSpace, v)
		}},
		{"devmapper", "extend_threshold", "use in percent from which on a pool in files grows; 0 is never", func(o *auto.Options, v string) error {
			return integer(&dm(o).ExtendThreshold, v)
		}},
		{"devmapper", "extend_percent", "by how much it grows", func(o *auto.Options, v string) error {
			return integer(&dm(o).ExtendPercent, v)
		}},
		{"devmapper", "error_if_no_space", "on or off: writes fail at once when the pool is full", func(o *auto.Options, v string) error {
			return boolean(&dm(o).ErrorIfNoSpace, v)
		}},
		{"devmapper", "xfs_nospace_max_retries", "how often xfs tries to write to a full pool; -1 is for ever", func(o *auto.Options, v string) error {
			n := new(int)
			err := integer(n, v)
			dm(o).XFSNoSpaceRetries = n
			return err
		}},
		{"devmapper", "prefix", "of the names of all devices", func(o *auto.Options, v string) error {
			dm(o).Prefix = v
			return nil
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

func choice[S ~string](field *S, value string, allowed ...S) error {
	if i := slices.Index(allowed, S(value)); i >= 0 {
		*field = allowed[i]
		return nil
	}
	names := make([]string, len(allowed))
	for i, a := range allowed {
		names[i] = string(a)
	}
	return usagef("%q is not one of %s", value, strings.Join(names, ", "))
}

func boolean(field *bool, value string) error {
	var s string
	err := choice(&s, value, "on", "off")
	*field = s == "on"
	return err
}

// inverse is for options that the driver has the other way round.
func inverse(field *bool, value string) error {
	var on bool
	err := boolean(&on, value)
	*field = !on
	return err
}

func integer(field *int, value string) error {
	n, err := strconv.Atoi(value)
	if err != nil {
		return usagef("%q is no number", value)
	}
	*field = n
	return nil
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
