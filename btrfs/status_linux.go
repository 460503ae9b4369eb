package btrfs

import (
	"context"
	"fmt"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/btrfs"
)

// Status gives Docker's keys and how the file system is filled: df does not
// show that all space is in chunks of the wrong type.
func (m *mechanism) Status(context.Context) ([]layerfs.StatusItem, error) {
	info, err := btrfs.ReadFSInfo(m.home)
	if err != nil {
		return nil, err
	}
	// The number of chunks is an extra read that only root may make.
	u, err := btrfs.ReadUsage(m.home, m.native == nil)
	if err != nil {
		return nil, err
	}
	items := []layerfs.StatusItem{
		{Key: "Btrfs", Value: info.UUID.String()},
		{Key: "Root Dir", Value: m.home},
		{Key: "Backing Filesystem", Value: "btrfs"},
		{Key: "Library Version", Value: "none (ioctls)"},
		{Key: "Quotas", Value: m.quotaStatus()},
		{Key: "Subvolume Removal", Value: m.removalStatus()},
	}
	for _, s := range u.Spaces {
		text := fmt.Sprintf("%s allocated, %s used", size(s.Allocated), size(s.Used))
		if s.Chunks > 0 {
			text += fmt.Sprintf(", %d chunks of %s on devices", s.Chunks, size(s.OnDevices))
		}
		items = append(items, layerfs.StatusItem{Key: s.Type.String(), Value: text})
	}
	items = append(items, layerfs.StatusItem{Key: "Unallocated", Value: size(u.Unallocated())})
	for _, d := range u.Devices {
		items = append(items, layerfs.StatusItem{
			Key:   fmt.Sprintf("Device %d", d.ID),
			Value: fmt.Sprintf("%s: %s, %s allocated, %s unallocated", d.Path, size(d.Size), size(d.Allocated), size(d.Unallocated())),
		})
	}
	if e, soon := u.Exhaustion(); soon {
		items = append(items, layerfs.StatusItem{Key: "Warning", Value: e.Text})
	}
	return items, nil
}

func (m *mechanism) quotaStatus() string {
	st, err := btrfs.ReadQuotaStatus(m.home)
	if err != nil {
		return "unknown: " + err.Error()
	}
	text := map[btrfs.QuotaMode]string{btrfs.QuotaOff: "off", btrfs.QuotaFull: QuotasFull, btrfs.QuotaSimple: QuotasSimple}[st.Mode]
	if st.Rescanning {
		text += ", being counted"
	}
	if st.Inconsistent {
		text += ", inconsistent: run btrfs quota rescan"
	}
	if m.opts.Quotas == QuotasOff && st.Mode != btrfs.QuotaOff {
		text += ", not used"
	}
	return text
}

func (m *mechanism) removalStatus() string {
	if m.removal == nil {
		return "in one step"
	}
	return "file by file: " + m.removal.Error()
}

// size writes bytes as Docker does.
func size(n int64) string {
	f := float64(n)
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	i := 0
	for ; f >= 1000 && i < len(units)-1; i++ {
		f /= 1000
	}
	return fmt.Sprintf("%.4g%s", f, units[i])
}
