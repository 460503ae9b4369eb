package auto

import (
	"log/slog"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/devmapper"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
	"github.com/layerfs/layerfs/zfs"
)

// backend is what has to be known of a driver before it is opened.
type backend struct {
	name string
	// dir is the directory of its layers below a root, and another name by
	// which it can be asked for; empty means the name.
	dir string
	// open opens the layers below a root.
	open func(root string, o *Options) (layerfs.Driver, error)
	// liveBase says that it comes first if a live base is wanted.
	liveBase bool
	// probe are options with which it can be tried without much ado; nil means
	// the defaults.
	probe *Options
	// never has, by field of layerfs.Features, why the mechanism itself lacks
	// an ability. It is used where the driver gives no reason.
	never map[string]string
}

// home is the directory of a backend's layers.
func (b *backend) home(root string) string {
	if b.dir != "" {
		return filepath.Join(root, b.dir)
	}
	return filepath.Join(root, b.name)
}

// backends lists the backends in the default order of choice. The order is
// Docker's, with the unions that share the page cache first.
func backends() []backend {
	return []backend{
		{
			name: "overlay",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.Overlay)
				common(o, &opts.Durability, &opts.Logger)
				return opened(overlay.New(root, opts))
			},
		},
		{
			name: "btrfs",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.Btrfs)
				common(o, &opts.Durability, &opts.Logger)
				return opened(btrfs.New(root, opts))
			},
		},
		{
			name: "zfs",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.ZFS)
				common(o, &opts.Durability, &opts.Logger)
				return opened(zfs.New(root, opts))
			},
		},
		{
			name: "aufs",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.AUFS)
				common(o, &opts.Durability, &opts.Logger)
				opts.LiveBase = opts.LiveBase || o.LiveBase
				return opened(aufs.New(root, opts))
			},
			liveBase: true,
		},
		{
			name: "devmapper",
			dir:  "devicemapper",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.Devmapper)
				common(o, &opts.Durability, &opts.Logger)
				return opened(devmapper.New(root, opts))
			},
			probe: &Options{Devmapper: &devmapper.Options{DataSize: 256 << 20, MetadataSize: 4 << 20, BaseSize: 64 << 20}},
		},
		{
			name: "vfs",
			open: func(root string, o *Options) (layerfs.Driver, error) {
				opts := copied(o.VFS)
				common(o, &opts.Durability, &opts.Logger)
				return opened(vfs.New(root, opts))
			},
			never: map[string]string{
				"ConstantCreate":  "a new layer is a full copy of its parent",
				"SharedPageCache": "each layer has files of its own",
				"NativeChanges":   "there is nothing but two full trees to compare",
				"NativeDiff":      "there is nothing but two full trees to compare",
				"LiveBase":        "a layer is a copy, which does not follow its parent",
			},
		},
	}
}

// copied returns a copy of options that may be nil.
func copied[O any](o *O) *O {
	c := new(O)
	if o != nil {
		*c = *o
	}
	return c
}

// common fills in what the options of the backend leave open.
func common(o *Options, durability *layerfs.Durability, logger **slog.Logger) {
	if *durability == layerfs.DurabilityDefault {
		*durability = o.Durability
	}
	if *logger == nil {
		*logger = o.Logger
	}
}

// opened makes a driver of the result of a New. A nil pointer in an interface
// would not be nil.
func opened[D layerfs.Driver](d D, err error) (layerfs.Driver, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}
