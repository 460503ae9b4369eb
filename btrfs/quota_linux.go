package btrfs

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
)

var errNoInodeQuota = errors.New("btrfs counts bytes and not inodes")

// enableQuotas turns quotas on if the options ask for it, and notes why there
// are none.
func (m *mechanism) enableQuotas() error {
	want := map[string]btrfs.QuotaMode{QuotasFull: btrfs.QuotaFull, QuotasSimple: btrfs.QuotaSimple}[m.opts.Quotas]
	if want != btrfs.QuotaOff {
		if err := btrfs.SetQuotaMode(m.home, want); err != nil {
			return fmt.Errorf("turn quotas on: %w", err)
		}
		return m.consistent(context.Background())
	}
	if m.opts.Quotas == QuotasOff {
		m.quotas = errors.New("they are turned off by an option")
		return nil
	}
	st, err := btrfs.ReadQuotaStatus(m.home)
	switch {
	case err != nil:
		m.quotas = err
	case st.Mode == btrfs.QuotaOff:
		m.quotas = errors.New("quotas are off on this file system; Options.Quotas turns them on")
	}
	if m.quotas != nil && m.opts.Size > 0 {
		return &layerfs.UnsupportedError{Feature: "a size limit of btrfs layers", Reason: m.quotas.Error()}
	}
	return nil
}

// consistent makes sure that limits hold. While qgroups are marked inconsistent
// the kernel does not count what is written, and so nothing is ever too much
// (qgroup_mark_inconsistent, fs/btrfs/qgroup.c); it goes on when they were
// counted anew. That takes time with the size of the file system, and is rarely
// needed: when quotas are turned on, and after somebody removed a large
// subvolume (qgroups/drop_subtree_threshold in sysfs) or a qgroup that was not
// empty.
func (m *mechanism) consistent(ctx context.Context) error {
	if err := btrfs.WaitRescan(ctx, m.home); err != nil {
		return err
	}
	st, err := btrfs.ReadQuotaStatus(m.home)
	if err != nil || st.Mode != btrfs.QuotaFull || !st.Inconsistent {
		return err
	}
	if err := btrfs.Rescan(m.home); err != nil {
		return err
	}
	m.log.Info("qgroups were inconsistent and are counted anew", "driver", name, "path", m.home)
	return btrfs.WaitRescan(ctx, m.home)
}

// checkQuota reports why a layer cannot have a quota.
func (m *mechanism) checkQuota(q layerfs.Quota) error {
	switch {
	case q == (layerfs.Quota{}):
		return nil
	case q.Bytes < 0 || q.Inodes < 0:
		return fmt.Errorf("quota of %d bytes and %d inodes is negative", q.Bytes, q.Inodes)
	case q.Inodes > 0:
		return &layerfs.UnsupportedError{Feature: "an inode quota of btrfs", Reason: errNoInodeQuota.Error()}
	case m.quotas != nil:
		return &layerfs.UnsupportedError{Feature: "a quota of btrfs", Reason: m.quotas.Error()}
	case q.Bytes < m.opts.MinSpace:
		return fmt.Errorf("quota of %d bytes is less than the minimum of %d", q.Bytes, m.opts.MinSpace)
	}
	return nil
}

// limit is setLimit that is durable where the layer has to be: the fsync of a
// record writes a log that has no limits in it.
func (m *mechanism) limit(ctx context.Context, path string, rec *lifecycle.Record, q layerfs.Quota) error {
	if m.quotas != nil || q.Bytes == 0 && rec.Quota.Bytes == 0 {
		return nil
	}
	if err := m.setLimit(ctx, path, rec, q); err != nil || m.opts.Durability == layerfs.DurabilityNone {
		return err
	}
	return btrfs.Commit(path)
}

// setLimit limits what the subvolume at path holds beyond that of the parent. Its
// exclusive bytes are that, but not while a snapshot of it is being read: so
// its referenced bytes are limited too, which may be less than both together if
// files of the parent are gone.
func (m *mechanism) setLimit(ctx context.Context, path string, rec *lifecycle.Record, q layerfs.Quota) error {
	if q.Bytes == 0 {
		return btrfs.LimitQgroup(path, 0, 0, 0)
	}
	if err := m.consistent(ctx); err != nil {
		return err
	}
	referenced := q.Bytes
	if rec.Parent != "" {
		parent, err := qgroupOf(m.Path(rec.Parent))
		if err != nil {
			return err
		}
		referenced += parent.Referenced
	}
	return btrfs.LimitQgroup(path, 0, referenced, q.Bytes)
}

func qgroupOf(path string) (btrfs.Qgroup, error) {
	info, err := btrfs.Info(path)
	if err != nil {
		return btrfs.Qgroup{}, err
	}
	return btrfs.ReadQgroup(path, info.ID)
}

// SetQuota replaces the quota of a layer: the bytes it holds for itself. Inodes
// cannot be limited.
func (d *Driver) SetQuota(ctx context.Context, id string, q layerfs.Quota) error {
	return lifecycle.Update(ctx, d.frame, "set quota", id, func(_ lifecycle.Chain, rec *lifecycle.Record) error {
		if err := d.m.checkQuota(q); err != nil {
			return err
		}
		err := d.m.limit(ctx, d.m.Path(id), rec, q)
		rec.Quota = q
		return err
	})
}

// quotaError tells a full layer from a full disk.
func quotaError(err error) error {
	if errors.Is(err, unix.EDQUOT) && !errors.Is(err, layerfs.ErrQuota) {
		return fmt.Errorf("%w: %w", layerfs.ErrQuota, err)
	}
	return err
}
