package vfs_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs/vfs"
)

func Example() {
	root, err := os.MkdirTemp("", "layers-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	d, err := vfs.New(root, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	ctx := context.Background()

	// An image of one layer, and a container on it.
	for _, layer := range [][2]string{{"image", ""}, {"container", "image"}} {
		id, parent := layer[0], layer[1]
		if err := d.Create(ctx, id, parent, nil); err != nil {
			log.Fatal(err)
		}
		path, err := d.Get(ctx, id, nil)
		if err != nil {
			log.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, "made-in-"+id), []byte("hello"), 0o644); err != nil {
			log.Fatal(err)
		}
		if err := d.Put(ctx, id); err != nil {
			log.Fatal(err)
		}
	}

	for change, err := range d.Changes(ctx, "container", "image") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(change)
	}
	// Output:
	// C /
	// A /made-in-container
}
