package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

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

// qgroups are those of subvolumes that were removed, for the kernels that leave
// them behind.
type qgroups struct {
	mu  sync.Mutex
	ids []uint64 // guarded by mu
}

const (
	// fewQgroups bounds what a removal does for earlier ones.
	fewQgroups = 8
	// manyQgroups bounds what is remembered. What is forgotten takes some
	// hundred bytes of metadata.
	manyQgroups = 4096
)

// clean removes qgroups that are not needed any more. One whose subvolume is not
// wholly cleaned up yet, in the last commit, must stay: to remove it makes all
// qgroups inconsistent, and lifts every limit (btrfs_remove_qgroup). So this is
// about earlier removals. Since Linux 6.12 the kernel does it itself, and there
// is nothing left to do here.
func (q *qgroups) clean(home string, gone []uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var keep []uint64
	for i, id := range q.ids {
		if i >= fewQgroups {
			keep = append(keep, q.ids[i:]...)
			break
		}
		switch g, err := btrfs.ReadQgroup(home, id); {
		case errors.Is(err, fs.ErrNotExist):
		case err == nil && g.Referenced == 0 && g.Exclusive == 0:
			_ = btrfs.DestroyQgroup(home, id) // one that stays does no harm
		default:
			// It is looked at again after the others.
			gone = append(gone, id)
		}
	}
	keep = append(keep, gone...)
	q.ids = keep[max(0, len(keep)-manyQgroups):]
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

// limit limits what the subvolume at path holds beyond that of the parent. Its
// exclusive bytes are that, but not while a snapshot of it is being read: so
// its referenced bytes are limited too, which may be less than both together if
// files of the parent are gone.
func (m *mechanism) limit(ctx context.Context, path string, rec *lifecycle.Record, q layerfs.Quota) error {
	if m.quotas != nil || q.Bytes == 0 && rec.Quota.Bytes == 0 {
		return nil
	}
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
