package vfs

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/layerfs/layerfs"
)

// Options are the options of [New]. The zero value is the default.
type Options struct {
	// Durability says what is on stable storage when a call returns; the
	// default is layerfs.DurabilityMetadata.
	Durability layerfs.Durability

	// Logger gets what has no other way back, such as what was recovered
	// after a crash; nil means silent.
	Logger *slog.Logger

	// Quota limits each new layer that CreateOptions gives no limit of its own:
	// the whole copy, with what comes from the parent. New fails if the file
	// system cannot limit it; see [Driver.SetQuota].
	Quota layerfs.Quota

	// IgnoreOwners makes every file belong to the caller, for users with a
	// single id. Owners are then neither kept by Apply nor compared.
	IgnoreOwners bool

	// BestEffortXattrs logs xattrs that the file system cannot store, instead
	// of failing. Such layers have other file capabilities, ACLs or labels
	// than their image.
	BestEffortXattrs bool

	// NoReflink copies data also where blocks could be shared, for those
	// who want every layer to have its own blocks.
	NoReflink bool

	// Workers is the number of threads a copy or an Apply uses; 0 means a
	// number that fits the machine.
	Workers int
}

func (o *Options) validate() error {
	var errs []error
	if o.Durability > layerfs.DurabilityFull {
		errs = append(errs, fmt.Errorf("durability %s is unknown", o.Durability))
	}
	if o.Quota.Bytes < 0 || o.Quota.Inodes < 0 {
		errs = append(errs, fmt.Errorf("quota of %d bytes and %d inodes: negative", o.Quota.Bytes, o.Quota.Inodes))
	}
	if o.Workers < 0 {
		errs = append(errs, fmt.Errorf("%d workers", o.Workers))
	}
	return errors.Join(errs...)
}
