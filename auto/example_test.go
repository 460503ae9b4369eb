package auto_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/layerfs/layerfs/auto"
)

func Example() {
	root, err := os.MkdirTemp("", "layerfs-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)

	d, err := auto.Open(root, nil) // the best driver for this directory
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	if err := d.Create(context.Background(), "base", "", nil); err != nil {
		log.Fatal(err)
	}
	layers, err := d.List(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	for _, l := range layers {
		fmt.Println(l.ID)
	}
	// Output: base
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
