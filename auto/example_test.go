package auto_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs/auto"
)

// The lines between the marks are those of the README.
func Example() {
	root, err := os.MkdirTemp("", "layerfs-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	ctx, rootfs := context.Background(), stream()
	check := func(err error) {
		if err != nil {
			log.Panic(err)
		}
	}

	// README begin
	d, err := auto.Open(root, nil) // the best driver for this directory
	check(err)
	defer d.Close()
	check(d.Create(ctx, "base", "", nil))      // a base layer,
	_, err = d.Apply(ctx, "base", rootfs, nil) // filled from a tar stream
	check(err)
	check(d.Create(ctx, "container", "base", nil)) // a writable layer on top of it
	tree, err := d.Get(ctx, "container", nil)      // both as one directory
	check(err)
	check(os.Remove(filepath.Join(tree, "etc/motd")))
	check(os.WriteFile(filepath.Join(tree, "etc/hostname"), []byte("c1\n"), 0o644))
	check(d.Put(ctx, "container"))
	for change, err := range d.Changes(ctx, "container", "base") {
		check(err)
		fmt.Println(change)
	}
	// README end

	// Output:
	// C /etc
	// A /etc/hostname
	// D /etc/motd
}

// stream is a tar stream of a tiny root file system that belongs to the caller.
func stream() io.Reader {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "etc/motd", Mode: 0o644},
	} {
		h.Uid, h.Gid = os.Geteuid(), os.Getegid()
		if err := w.WriteHeader(h); err != nil {
			log.Panic(err)
		}
	}
	if err := w.Close(); err != nil {
		log.Panic(err)
	}
	return &b
}

func ExampleProbe() {
	reports, err := auto.Probe(context.Background(), os.TempDir())
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range reports {
		if r.Driver == "vfs" {
			fmt.Println("vfs works:", r.Err == nil)
			for _, a := range r.Abilities() {
				if a.Name == "ConstantCreate" {
					fmt.Println("constant create:", a.Have, "because", a.Reason)
				}
			}
		}
	}
	// Output:
	// vfs works: true
	// constant create: false because a new layer is a full copy of its parent
}
