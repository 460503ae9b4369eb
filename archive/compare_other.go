//go:build !linux

package archive

import (
	"context"

	"github.com/layerfs/layerfs"
)

func compareTrees(ctx context.Context, oldDir, newDir string, opts *CompareOptions, yield func(layerfs.Change) bool) error {
	return comparePortable(ctx, oldDir, newDir, opts, yield)
}
