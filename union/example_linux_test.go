package union_test

import (
	"context"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs/union"
)

// A writable directory over a base that may change meanwhile.
func ExampleMount() {
	ctx := context.Background()
	h, err := union.Mount(ctx, "/mnt/merged", &union.Config{
		Branches: []union.Branch{
			{Path: "/srv/changes", Perm: union.RW},
			{Path: "/srv/base"},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Unmount(ctx)

	// Another layer below the others, seen at once.
	if err := h.Append(ctx, union.Branch{Path: "/srv/more"}); err != nil {
		log.Fatal(err)
	}
	// A change of the base itself, and certainty that it shows.
	os.WriteFile("/srv/base/motd", []byte("hello"), 0o644)
	if err := h.Sync(ctx); err != nil {
		log.Fatal(err)
	}
}

// Two directories as one file system, without any mount.
func ExampleNewFS() {
	dir, err := os.MkdirTemp("", "union")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for name, text := range map[string]string{"top/a": "A", "base/a": "hidden", "base/b": "B", "base/c": "gone", "top/.wh.c": ""} {
		p := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(p), 0o755)
		os.WriteFile(p, []byte(text), 0o644)
	}
	u, err := union.NewFS(union.Branch{Path: dir + "/top", Perm: union.ROWH}, union.Branch{Path: dir + "/base"})
	if err != nil {
		log.Fatal(err)
	}
	defer u.Close()
	fs.WalkDir(u, ".", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, _ := fs.ReadFile(u, p)
			fmt.Println(p, string(b))
		}
		return err
	})
	// Output:
	// a A
	// b B
}
