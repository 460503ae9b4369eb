package btrfs_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs/btrfs"
)

// Layers on a directory of a btrfs file system: what a container changed is
// known at once, however large its image is.
func Example() {
	ctx := context.Background()
	d, err := btrfs.New("/var/lib/layers", nil)
	if err != nil {
		log.Fatal(err) // says which file system it is, if not btrfs
	}
	defer d.Close()
	if err := d.Create(ctx, "container", "image", nil); err != nil {
		log.Fatal(err)
	}
	path, err := d.Get(ctx, "container", nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "hello"), []byte("world\n"), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := d.Put(ctx, "container"); err != nil {
		log.Fatal(err)
	}
	for c, err := range d.Changes(ctx, "container", "image") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(c) // C / and A /hello
	}
}
