//go:build linux || freebsd

package zfs

import (
	"context"
	"fmt"
)

// diff asks zfs what differs between a snapshot and a dataset, which must be
// mounted at one of places.
func (m *mechanism) diff(ctx context.Context, snapshot, dataset string, places []string) ([]change, error) {
	out, err := m.tool.run(ctx, "diff", "-F", "-H", snapshot, dataset)
	if err != nil {
		return nil, fmt.Errorf("zfs diff: %w", err)
	}
	return parseDiff(out, places)
}
