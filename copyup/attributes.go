package copyup

import "fmt"

// Attributes gives the directory dst the owner, mode, xattrs and times of the
// directory src; neither may be a symlink. Xattrs that dst has and src lacks
// stay, except ACLs. It is what makes an empty directory the root of a layer
// on another one.
func Attributes(dst, src string, opts *Options) error {
	if opts == nil {
		opts = &Options{}
	}
	if err := copyAttributes(dst, src, opts); err != nil {
		return fmt.Errorf("copy attributes of %s to %s: %w", src, dst, err)
	}
	return nil
}
