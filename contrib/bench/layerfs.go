package main

import (
	"context"
	"fmt"
	"io"
	"path"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/contrib/bench/internal/timing"
	"github.com/layerfs/layerfs/overlay"
	"github.com/layerfs/layerfs/vfs"
)

// Names of this project's rows. The first is what the peers do, too; the
// others do more.
const (
	ours       = "layerfs"
	oursDigest = "layerfs, with the digest"
	oursSince  = "layerfs, time of the copy known"
	oursExact  = "layerfs, contents compared"
)

// addOurs adds this project's rows.
func addOurs(all map[string]map[string]contestant) {
	for _, kind := range []string{"apply", "apply.gz", "apply.zst"} {
		all[kind][ours] = apply(&archive.ApplyOptions{NoDigest: true})
		all[kind][oursDigest] = apply(nil)
	}
	all["write"][ours] = write(nil)
	all["write"][oursDigest] = write(&archive.WriteOptions{Digest: true})
	all["changes"][ours] = compare(func(*job) *archive.CompareOptions {
		return &archive.CompareOptions{Content: archive.ContentTrustTimes}
	})
	all["changes"][oursSince] = compare(func(j *job) *archive.CompareOptions {
		return &archive.CompareOptions{Since: j.Since}
	})
	all["changes"][oursExact] = compare(func(*job) *archive.CompareOptions { return nil })
	all["lifecycle"][ours] = lifecycle
	all["copy"][ours] = fullCopy
}

func apply(opts *archive.ApplyOptions) contestant {
	return func(ctx context.Context, j *job) (timing.Cost, error) {
		return fromFile(j.Tar, func(r io.Reader) error {
			_, err := archive.Apply(ctx, j.Dir, r, opts)
			return err
		})
	}
}

func write(opts *archive.WriteOptions) contestant {
	return func(ctx context.Context, j *job) (timing.Cost, error) {
		return timing.Of(func() error {
			_, err := archive.Write(ctx, io.Discard, j.Tree, opts)
			return err
		})
	}
}

func compare(opts func(*job) *archive.CompareOptions) contestant {
	return func(ctx context.Context, j *job) (timing.Cost, error) {
		n, found := 0, false
		spent, err := timing.Of(func() error {
			for c, err := range archive.Compare(ctx, j.Old, j.Tree, opts(j)) {
				if err != nil {
					return err
				}
				n++
				found = found || path.Base(c.Path) == changedFile
			}
			return nil
		})
		if err != nil {
			return timing.Cost{}, err
		}
		return spent, wantChanges(found, n)
	}
}

// lifecycle takes what the table's name says: no syncs on tmpfs, the records
// synced on ext4.
func lifecycle(ctx context.Context, j *job) (timing.Cost, error) {
	root, err := workRoot(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	durability := layerfs.DurabilityNone
	if j.FS != "" {
		durability = layerfs.DurabilityMetadata
	}
	d, err := overlay.New(root, &overlay.Options{Durability: durability})
	if err != nil {
		return timing.Cost{}, err
	}
	defer d.Close()
	if err := d.Create(ctx, "base", "", nil); err != nil {
		return timing.Cost{}, err
	}
	dir, err := d.Get(ctx, "base", nil)
	if err != nil {
		return timing.Cost{}, err
	}
	if err := fillBase(dir); err != nil {
		return timing.Cost{}, err
	}
	if err := d.Put(ctx, "base"); err != nil {
		return timing.Cost{}, err
	}
	return perContainer(j.N, func(id string) error {
		if err := d.Create(ctx, id, "base", nil); err != nil {
			return err
		}
		dir, err := d.Get(ctx, id, nil)
		if err != nil {
			return err
		}
		if err := checkMerged(dir); err != nil {
			return err
		}
		if err := d.Put(ctx, id); err != nil {
			return err
		}
		return d.Remove(ctx, id)
	})
}

// fullCopy is a vfs layer on a parent that has the tree.
func fullCopy(ctx context.Context, j *job) (spent timing.Cost, err error) {
	root, err := workRoot(ctx, j)
	if err != nil {
		return timing.Cost{}, err
	}
	d, err := vfs.New(filepath.Join(root, "root"), &vfs.Options{Durability: layerfs.DurabilityNone})
	if err != nil {
		return timing.Cost{}, err
	}
	defer d.Close()
	if err := d.Create(ctx, "base", "", nil); err != nil {
		return timing.Cost{}, err
	}
	_, err = fromFile(j.Tar, func(r io.Reader) error {
		_, err := d.Apply(ctx, "base", r, nil)
		return err
	})
	if err != nil {
		return timing.Cost{}, fmt.Errorf("fill the parent: %w", err)
	}
	return timing.Of(func() error { return d.Create(ctx, "copy", "base", nil) })
}

// writeTo writes a tree with everything it has.
func writeTo(ctx context.Context, w io.Writer, tree string) error {
	_, err := archive.Write(ctx, w, tree, nil)
	return err
}
