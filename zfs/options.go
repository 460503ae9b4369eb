package zfs

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/layerfs/layerfs"
)

// Options are the options of [New]. The zero value, and nil, are the defaults.
type Options struct {
	// Durability is what is on stable storage when a call returns; default
	// [layerfs.DurabilityMetadata]. Datasets are always durable when zfs
	// returns.
	Durability layerfs.Durability

	// Logger is told what has no other way back; default silent.
	Logger *slog.Logger

	// Dataset is the parent of the layers' datasets, such as "tank/layers". It
	// must exist and need not be mounted. Default is the dataset that is
	// mounted at the root directory or nearest above it. A root keeps the
	// dataset it was first opened with. A new root's may have 96 bytes, so that
	// there is room for all ids.
	Dataset string

	// Properties are set on the dataset of each layer that is made, such as
	// "compression": "lz4". Those that this package sets itself are refused.
	Properties map[string]string

	// Quota is the quota of layers that are created without one. Inodes must
	// be 0: ZFS counts objects for each user, not for each file system.
	Quota layerfs.Quota

	// RefQuota limits the size of a layer's tree in bytes, what it shares with
	// its parents included (property refquota); 0 means no limit.
	RefQuota int64

	// Zfs and Zpool are the programs; default are those in PATH or in /sbin
	// and /usr/sbin.
	Zfs, Zpool string

	// WalkChanges compares whole trees even where zfs diff works.
	WalkChanges bool
}

// own are the properties this package sets itself.
var own = []string{"canmount", "mountpoint", "quota", "refquota", "readonly", "snapdir", "zoned", "jailed"}

// validate returns all that is wrong with the options themselves.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Durability > layerfs.DurabilityFull {
		bad("durability %v is unknown", o.Durability)
	}
	if o.Dataset != "" {
		if err := checkDataset(o.Dataset); err != nil {
			bad("Dataset: %w", err)
		}
	}
	for name, value := range o.Properties {
		switch {
		case name == "" || strings.ContainsAny(name, "=@/ \t\n\x00") || strings.HasPrefix(name, "-"):
			bad("property %q is no name", name)
		case strings.HasPrefix(name, "org.layerfs:"):
			bad("property %q is the driver's own", name)
		case strings.ContainsRune(value, 0):
			bad("property %s has a NUL byte", name)
		}
		for _, p := range own {
			if name == p {
				bad("property %q is the driver's own", name)
			}
		}
	}
	if o.Quota.Bytes < 0 || o.RefQuota < 0 {
		bad("quota of %d bytes and refquota of %d bytes: negative", o.Quota.Bytes, o.RefQuota)
	}
	if o.Quota.Inodes != 0 {
		errs = append(errs, inodeQuota())
	}
	return errors.Join(errs...)
}

func inodeQuota() error {
	return &layerfs.UnsupportedError{Feature: "a limit of files in a zfs layer", Reason: "zfs counts objects for each user, not for each file system"}
}
