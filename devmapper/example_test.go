//go:build linux

package devmapper_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/devmapper"
)

// A container of its own size on an image, in a pool of two sparse files.
func Example() {
	ctx := context.Background()
	d, err := devmapper.New("/var/lib/example", &devmapper.Options{
		FS:              "xfs",
		BaseSize:        10 << 30,
		ExtendThreshold: 80,
		OnEvent:         func(e devmapper.Event) { log.Printf("pool: %v: %d of %d bytes", e.Kind, e.Used, e.Total) },
	})
	if errors.Is(err, errors.ErrUnsupported) {
		log.Fatal("this kernel has no thin pools: ", err)
	}
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	layer, err := os.Open("image.tar.gz")
	if err != nil {
		log.Fatal(err)
	}
	if err := d.Create(ctx, "image", "", nil); err != nil {
		log.Fatal(err)
	}
	if _, err := d.Apply(ctx, "image", layer, nil); err != nil {
		log.Fatal(err)
	}
	large := &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 50 << 30}}
	if err := d.Create(ctx, "container", "image", large); err != nil {
		log.Fatal(err)
	}
	path, err := d.Get(ctx, "container", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer d.Put(ctx, "container")
	fmt.Println(path) // /var/lib/example/devicemapper/mnt/container
}
