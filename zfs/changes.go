//go:build linux || freebsd

package zfs

import (
	"context"
	"fmt"
)

// diff asks zfs what differs between a snapshot and a later one or the dataset
// itself, which must be mounted at one of places.
func (m *mechanism) diff(ctx context.Context, from, to string, places []string) ([]change, error) {
	out, err := m.tool.run(ctx, "diff", "-F", "-H", from, to)
	if err != nil {
		return nil, fmt.Errorf("zfs diff: %w", err)
	}
	return parseDiff(out, places)
}
