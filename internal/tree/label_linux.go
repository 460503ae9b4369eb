package tree

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// Relabel gives everything in a tree an SELinux label. The error matches
// [errors.ErrUnsupported] where files have none; a failure leaves part of the
// tree labelled.
func Relabel(ctx context.Context, root, label string) error {
	const name = "security.selinux"
	return Walk(ctx, root, func(e *Entry) error {
		var err error
		if e.IsDir() {
			err = unix.Fsetxattr(e.Self, name, []byte(label), 0)
		} else {
			err = sys.SetxattrAt(e.Dir, e.Name, name, []byte(label), 0)
		}
		var errno unix.Errno
		errors.As(err, &errno)
		switch {
		case errno == unix.EOPNOTSUPP:
			return &layerfs.UnsupportedError{Feature: "an SELinux label", Reason: errno.Error()}
		case err != nil:
			return &os.PathError{Op: "setxattr " + name, Path: filepath.Join(root, e.Path), Err: errno}
		}
		return nil
	})
}
