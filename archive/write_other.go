//go:build !linux

package archive

import "context"

func pack(ctx context.Context, s *sink, dir string, opts *WriteOptions, pl plan, sh *shaper) (WriteResult, error) {
	return packPortable(ctx, s, dir, opts, pl, sh)
}
