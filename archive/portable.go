package archive

import (
	"context"
	"errors"

	"github.com/layerfs/layerfs"
)

func extractPortable(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (layerfs.ApplyResult, error) {
	return layerfs.ApplyResult{}, errors.ErrUnsupported
}
