// Package union lets a program be its own mount program of package overlay, for
// hosts where the kernel refuses overlayfs: the engine of package
// github.com/layerfs/layerfs/union merges the layers, and processes of the same
// program serve the mounts over FUSE.
//
//	func main() {
//		program := union.Main() // first of all
//		d, err := overlay.New(root, &overlay.Options{MountProgram: program})
//		…
//	}
//
// It is apart from package overlay so that only programs that want it have the
// engine in them.
package union

import (
	"os"

	"github.com/layerfs/layerfs/internal/overlaymount"
	"github.com/layerfs/layerfs/internal/overlaymount/ask"
)

// Main returns what makes this program the MountProgram in the options of
// package overlay, and must be called first in its main function, before that
// does anything else. In a process that was started as a mount program it does
// not return. On systems other than Linux it does nothing, and such a program is
// refused.
//
// A mount goes on with the file that runs now, also if that is replaced or
// removed.
func Main() string {
	if status, program := overlaymount.Main(os.Args); program {
		os.Exit(status)
	}
	return ask.Self
}
