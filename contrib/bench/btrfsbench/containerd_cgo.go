//go:build cgo

package main

import (
	"context"
	"os"
	"path/filepath"

	cdbtrfs "github.com/containerd/containerd/v2/plugins/snapshots/btrfs"
)

// snapshotter returns what makes and removes a layer with containerd's btrfs
// snapshotter.
func snapshotter(ctx context.Context, root string) (life func(context.Context, string) error, end func() error, err error) {
	if err := os.Mkdir(root, 0o700); err != nil {
		return nil, nil, err
	}
	sn, err := cdbtrfs.NewSnapshotter(root)
	if err != nil {
		return nil, nil, err
	}
	mounts, err := sn.Prepare(ctx, "base-active", "")
	if err != nil {
		return nil, sn.Close, err
	}
	// The mount is of a subvolume by its path, active/NUMBER below the root.
	dirs, err := filepath.Glob(filepath.Join(root, "active", "*"))
	if err != nil || len(dirs) != 1 || len(mounts) != 1 {
		return nil, sn.Close, err
	}
	if err := fill(dirs[0], 10); err != nil {
		return nil, sn.Close, err
	}
	if err := sn.Commit(ctx, "base", "base-active"); err != nil {
		return nil, sn.Close, err
	}
	return func(ctx context.Context, id string) error {
		if _, err := sn.Prepare(ctx, id, "base"); err != nil {
			return err
		}
		return sn.Remove(ctx, id)
	}, sn.Close, nil
}
