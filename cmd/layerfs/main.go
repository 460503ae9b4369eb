// Command layerfs works with layers from a shell: it makes, fills, mounts,
// compares, copies and removes them, on any root and with any driver.
//
//	layerfs import base ./rootfs.tar.zst      a base layer of a tree or a tar stream
//	layerfs create c1 base                    a container on it
//	cd "$(layerfs mount c1)"                  its tree, until layerfs umount c1
//	layerfs changes c1                        what was changed
//	layerfs diff -o c1.tar c1                 the same as a layer
//	layerfs send c1 | ssh host layerfs receive c1
//	layerfs migrate --to /other --verify c1   a copy of a layer while it is used
//	layerfs demo                              all of it, measured on this host
//
// The layers are below --root, $LAYERFS_ROOT, or a directory of the user. Which
// driver keeps them is chosen as in package auto.
//
// With --opt overlay.mount_program=/path/to/layerfs the command itself merges
// the layers of overlay, on hosts where the kernel refuses to; it is then called
// as "layerfs mount-overlay -o lowerdir=…,upperdir=…,workdir=… TARGET".
//
// # Output
//
// Results go to standard output and everything else to standard error. With
// --json each result is one JSON object on a line; a list is a line for each
// member. An error is then a line on standard error:
//
//	{"error":{"code":3,"kind":"not_found","message":"…","op":"get","driver":"vfs","id":"c1"}}
//
// The fields of results are those of the types in output.go. They may become
// more, but will not change. Paths that are not UTF-8 come in path_bytes, too,
// in base64. Progress bars are drawn if standard error is a terminal.
//
// # Exit status
//
//	0    done
//	1    failure
//	2    wrong usage
//	3    no such layer or root
//	4    a layer is in use (mounted, or it has children) or not mounted
//	5    this host or driver cannot do it
//	6    a layer of that name exists
//	7    the input is malformed or over a limit
//	8    check found problems, or a layer is incomplete
//	130  interrupted; nothing half-made is left
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/layerfs/layerfs/aufs"
	"github.com/layerfs/layerfs/internal/overlaymount"
)

func main() {
	aufs.Main() // does not return in the process that serves the mounts of aufs
	if status, program := overlaymount.Main(os.Args); program {
		os.Exit(status)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
