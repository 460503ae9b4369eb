//go:build !linux || layerfs_portable

package copyup

import (
	"context"
	"fmt"
	"os"
)

func copyAttributes(dst, src string, opts *Options) error {
	p, err := newPortable(context.Background(), opts)
	if err != nil {
		return err
	}
	want, err := os.Lstat(src)
	if err != nil {
		return err
	}
	have, err := os.Lstat(dst)
	if err != nil {
		return err
	}
	if !want.IsDir() || !have.IsDir() {
		return fmt.Errorf("types %v and %v, not directories", have.Mode().Type(), want.Mode().Type())
	}
	return p.attributes(dst, want)
}
