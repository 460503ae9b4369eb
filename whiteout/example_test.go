package whiteout_test

import (
	"fmt"

	"github.com/layerfs/layerfs/whiteout"
)

func ExampleTarget() {
	for _, name := range []string{"passwd", ".wh.passwd", ".wh..wh..opq", ".wh..."} {
		base, ok, err := whiteout.Target(name)
		fmt.Printf("%s: %q %v %v\n", name, base, ok, err)
	}
	// Output:
	// passwd: "" false <nil>
	// .wh.passwd: "passwd" true <nil>
	// .wh..wh..opq: "" false <nil>
	// .wh...: "" false whiteout name ".wh...": names the parent directory
}
