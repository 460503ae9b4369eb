package copyup_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs/copyup"
)

func ExampleTree() {
	dir, err := os.MkdirTemp("", "copyup")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	src := filepath.Join(dir, "src")
	if err := os.MkdirAll(src, 0o755); err != nil {
		fmt.Println(err)
		return
	}
	if err := os.WriteFile(filepath.Join(src, "motd"), []byte("hello\n"), 0o644); err != nil {
		fmt.Println(err)
		return
	}
	stats, err := copyup.Tree(context.Background(), filepath.Join(dir, "dst"), src, nil)
	fmt.Println(stats.Entries, "entries,", stats.Bytes, "bytes,", err)
	// Output: 2 entries, 6 bytes, <nil>
}
