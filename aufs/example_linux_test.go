package aufs_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/layerfs/layerfs/aufs"
)

// A change of a base layer shows in the containers that run on it.
func Example() {
	if os.Geteuid() != 0 {
		fmt.Println("1.0\n1.1") // mounting needs root
		return
	}
	root, err := os.MkdirTemp("", "layers-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	d, err := aufs.New(root, &aufs.Options{LiveBase: true, Helper: helper})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()

	ctx := context.Background()
	must := func(err error) {
		if err != nil {
			log.Fatal(err)
		}
	}
	must(d.Create(ctx, "base", "", nil))
	base, err := d.Get(ctx, "base", nil)
	must(err)
	must(os.WriteFile(base+"/version", []byte("1.0"), 0o644))

	must(d.Create(ctx, "container", "base", nil))
	tree, err := d.Get(ctx, "container", nil)
	must(err)
	show := func() {
		b, err := os.ReadFile(tree + "/version")
		must(err)
		fmt.Println(string(b))
	}
	show()
	must(os.WriteFile(base+"/version", []byte("1.1"), 0o644))
	must(d.SyncBranches(ctx, "container"))
	show()
	must(d.Put(ctx, "container"))
	must(d.Put(ctx, "base"))
	// Output:
	// 1.0
	// 1.1
}
