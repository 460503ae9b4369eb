package auto

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
	"github.com/layerfs/layerfs/zfs"
)

// Options are the options of [Open]. The zero value, and nil, are the defaults.
type Options struct {
	// Driver names the driver to open, whatever else is in the root. Empty
	// means a choice.
	Driver string

	// Priority is the order of choice; drivers that are not listed are not
	// chosen. Empty means the order of [Drivers].
	Priority []string

	// LiveBase puts the drivers whose base layers can be changed under running
	// containers first. It does not matter where Priority is given.
	LiveBase bool

	// Durability is for backends whose own options leave it at the default.
	Durability layerfs.Durability

	// Logger is for backends whose own options have none. It is also told
	// which drivers were passed over and why. Nil means silent.
	Logger *slog.Logger

	// Overlay are the options of package overlay, if it is chosen.
	Overlay *overlay.Options

	// Btrfs are the options of package btrfs, if it is chosen.
	Btrfs *btrfs.Options

	// ZFS are the options of package zfs, if it is chosen.
	ZFS *zfs.Options

	// AUFS are the options of package aufs, if it is chosen. It needs a
	// helper; see there.
	AUFS *aufs.Options

	// Devmapper are the options of package devmapper, if it is chosen.
	Devmapper *devmapper.Options

	// VFS are the options of package vfs, if it is chosen.
	VFS *vfs.Options
}

// Drivers returns the names of the drivers of this version, in the default
// order of choice.
func Drivers() []string { return names(backends()) }

// Lookup returns the name of a driver that is named as people do: by its name
// or by the directory of its layers. The error names all drivers.
func Lookup(name string) (string, error) {
	b, err := find(backends(), name)
	if err != nil {
		return "", err
	}
	return b.name, nil
}

// Open opens the driver that fits root, which is made if it is new; see the
// package documentation for the choice. opts may be nil.
//
// A driver is passed over only for an error that matches
// [errors.ErrUnsupported]; any other, such as a permission, is returned. If
// none works, the error matches errors.ErrUnsupported and has the reason of
// each. If layers of several drivers are in the root and none is named, the
// error names them. A driver that was passed over leaves nothing behind.
func Open(root string, opts *Options) (layerfs.Driver, error) {
	return choose(backends(), root, opts)
}

// Prior returns the names of the drivers that have layers in root, in the
// default order of choice. A root that does not exist has none.
func Prior(root string) ([]string, error) {
	list, err := prior(backends(), root)
	return names(list), wrap(root, err)
}

func choose(all []backend, root string, opts *Options) (layerfs.Driver, error) {
	if opts == nil {
		opts = new(Options)
	}
	d, err := pick(all, root, opts)
	return d, wrap(root, err)
}

// wrap makes the one error of a failed choice; those of a backend are complete.
func wrap(root string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*layerfs.Error](err); ok {
		return err
	}
	return &layerfs.Error{Op: "open", Driver: "auto", Path: root, Err: err}
}

func pick(all []backend, root string, opts *Options) (layerfs.Driver, error) {
	order, err := opts.order(all)
	if err != nil {
		return nil, err
	}
	if opts.Driver != "" {
		b, err := find(all, opts.Driver)
		if err != nil {
			return nil, err
		}
		return b.open(root, opts)
	}
	have, err := prior(all, root)
	if err != nil {
		return nil, err
	}
	switch len(have) {
	case 0:
		return first(order, root, opts)
	case 1:
		d, err := have[0].open(root, opts)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil, fmt.Errorf("the layers in it are of %s, which does not work here: %w", have[0].name, err)
		}
		return d, err
	}
	return nil, fmt.Errorf("it has layers of several drivers (%s): name the one to open", strings.Join(names(have), ", "))
}

// order returns the backends to try.
func (o *Options) order(all []backend) ([]backend, error) {
	if len(o.Priority) > 0 {
		var order []backend
		for _, name := range o.Priority {
			b, err := find(all, name)
			if err != nil {
				return nil, fmt.Errorf("priority: %w", err)
			}
			order = append(order, *b)
		}
		return order, nil
	}
	order := slices.Clone(all)
	if o.LiveBase {
		slices.SortStableFunc(order, func(a, b backend) int {
			switch {
			case a.liveBase == b.liveBase:
				return 0
			case a.liveBase:
				return -1
			}
			return 1
		})
	}
	return order, nil
}

// first opens the first backend that works.
func first(order []backend, root string, opts *Options) (layerfs.Driver, error) {
	reasons := make(skipped, 0, len(order))
	for _, b := range order {
		_, err := os.Lstat(b.home(root))
		fresh := errors.Is(err, fs.ErrNotExist)
		d, err := b.open(root, opts)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return nil, err
		}
		if fresh {
			// Only if it is empty: another process may have made layers.
			_ = os.Remove(b.home(root))
		}
		reasons = append(reasons, err)
		if opts.Logger != nil {
			opts.Logger.Info("driver does not fit", "driver", b.name, "root", root, "reason", err)
		}
	}
	return nil, reasons
}

// skipped are the reasons why no driver fits.
type skipped []error

func (s skipped) Error() string {
	if len(s) == 0 {
		return "no driver works here"
	}
	var b strings.Builder
	b.WriteString("no driver works here")
	for _, err := range s {
		b.WriteString("; " + err.Error())
	}
	return b.String()
}

func (s skipped) Is(target error) bool { return target == errors.ErrUnsupported }

// prior returns the backends that have a record of a layer.
func prior(all []backend, root string) ([]backend, error) {
	var have []backend
	for _, b := range all {
		f, err := os.Open(filepath.Join(b.home(root), ".layerfs", "records"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		entries, err := f.ReadDir(-1)
		f.Close()
		if err != nil {
			return nil, err
		}
		// What is no id is a record that was being written.
		if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return layerfs.CheckID(e.Name()) == nil }) {
			have = append(have, b)
		}
	}
	return have, nil
}

func find(all []backend, name string) (*backend, error) {
	i := slices.IndexFunc(all, func(b backend) bool { return name != "" && (b.name == name || b.dir == name) })
	if i < 0 {
		return nil, fmt.Errorf("driver %q is not one of %s", name, strings.Join(names(all), ", "))
	}
	return &all[i], nil
}

func names(list []backend) []string {
	s := make([]string, len(list))
	for i, b := range list {
		s[i] = b.name
	}
	return s
}
