package archive

import (
	"context"
	"errors"

	"github.com/layerfs/layerfs"
)

func extractPortable(ctx context.Context, p *parser, dir string, opts *ApplyOptions) (layerfs.ApplyResult, error) {
	return layerfs.ApplyResult{}, errors.ErrUnsupported
}

func packPortable(ctx context.Context, s *sink, dir string, opts *WriteOptions, pl plan, sh *shaper) (WriteResult, error) {
	return WriteResult{}, errors.ErrUnsupported
}
