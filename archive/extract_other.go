//go:build !linux

package archive

import (
	"context"

	"github.com/layerfs/layerfs"
)

func extract(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (layerfs.ApplyResult, error) {
	return extractPortable(ctx, p, dir, opts)
}
