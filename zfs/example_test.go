package zfs_test

import (
	"context"
	"fmt"

	"github.com/layerfs/layerfs/zfs"
)

func Example() {
	ctx := context.Background()
	d, err := zfs.New("/var/lib/layers", &zfs.Options{Dataset: "tank/layers"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Close()
	if err := d.Create(ctx, "base", "", nil); err != nil {
		fmt.Println(err)
		return
	}
	path, err := d.Get(ctx, "base", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(path) // /var/lib/layers/zfs/graph/base
	if err := d.Put(ctx, "base"); err != nil {
		fmt.Println(err)
	}
}
