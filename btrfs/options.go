package btrfs

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/layerfs/layerfs"
)

// The values of [Options.Quotas].
const (
	QuotasOff    = "off"
	QuotasFull   = "qgroups"
	QuotasSimple = "simple"
)

// Options are the options of [New]. The zero value, and nil, are the defaults.
type Options struct {
	// Durability is what is on stable storage when a call returns; default
	// [layerfs.DurabilityMetadata]. A snapshot makes the kernel commit
	// whatever the policy.
	Durability layerfs.Durability

	// Logger is told what has no other way back; default silent.
	Logger *slog.Logger

	// Size is the quota, in bytes, of layers that are created without one;
	// 0 means none. It needs quotas.
	Size int64

	// MinSpace is the least quota, in bytes, that a layer may be given. A
	// smaller one is an error, as a layer that cannot even hold its own
	// metadata is of no use.
	MinSpace int64

	// MountLabel is the SELinux label of layers that are created without one.
	// All files of a layer are given its label by Create, Clone, Apply and
	// Rollback, which takes as long as a walk over its tree; those that somebody
	// makes later get theirs from the kernel. A child of a labelled layer that is
	// to have none itself has the files of its parent, with their labels.
	MountLabel string

	// Quotas says what to do about quotas, which are a property of the whole
	// file system: "" uses what is there, "off" uses none even if they are on,
	// "qgroups" turns qgroups on (the kernel then counts shared and exclusive
	// bytes, and deletion of snapshots costs), "simple" turns simple quotas on
	// (Linux 6.7; bytes count for the layer that wrote them). New fails if the
	// other kind is on: a change would lose all limits. Quotas are never
	// turned off.
	Quotas string
}

func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Durability > layerfs.DurabilityFull {
		bad("durability %v is unknown", o.Durability)
	}
	switch o.Quotas {
	case "", QuotasOff, QuotasFull, QuotasSimple:
	default:
		bad("Quotas %q is not one of off, qgroups, simple", o.Quotas)
	}
	if o.Size < 0 || o.MinSpace < 0 {
		bad("Size %d, MinSpace %d: negative", o.Size, o.MinSpace)
	}
	if o.Size > 0 && o.Size < o.MinSpace {
		bad("Size %d is less than MinSpace %d", o.Size, o.MinSpace)
	}
	if o.Size > 0 && o.Quotas == QuotasOff {
		bad("Size needs quotas, which Quotas turns off")
	}
	return errors.Join(errs...)
}
