// Command build makes image layers as a build tool does: each step runs a
// shell command in a tree, and what it changes becomes a layer file.
//
//	build BASE.tar OUTPUT-DIRECTORY STEP...
//
// A step is a command for /bin/sh that runs in the directory of the tree. Steps
// that are the same as in an earlier run, on the same base, are not run again.
// The layer files are reproducible: the same changes give the same bytes.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/auto"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: build BASE.tar OUTPUT-DIRECTORY STEP...")
		os.Exit(2)
	}
	root := filepath.Join(os.TempDir(), "layerfs-build")
	if err := build(ctx, root, os.Args[1], os.Args[2], os.Args[3:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, root, baseFile, output string, steps []string, out io.Writer) (err error) {
	d, err := auto.Open(root, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	parent, err := base(ctx, d, baseFile)
	if err != nil {
		return err
	}
	for n, step := range steps {
		// The id of a step says all that it depends on, so that a layer of
		// that id is what the step would make.
		id := key(parent, step)
		_, err := d.Stat(ctx, id, nil)
		switch {
		case err == nil:
			fmt.Fprintf(out, "step %d: cached\n", n+1)
		case errors.Is(err, layerfs.ErrNotExist):
			if err := makeLayer(ctx, d, id, parent, step); err != nil {
				return fmt.Errorf("step %d: %w", n+1, err)
			}
			fmt.Fprintf(out, "step %d: done\n", n+1)
		default:
			return err
		}
		if err := export(ctx, d, id, parent, filepath.Join(output, fmt.Sprintf("layer-%d.tar.gz", n+1))); err != nil {
			return err
		}
		parent = id
	}
	return nil
}

func key(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// base makes a layer of a file, under the digest of its content.
func base(ctx context.Context, d layerfs.Driver, name string) (id string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	id = hex.EncodeToString(h.Sum(nil))
	if _, err := d.Stat(ctx, id, nil); err == nil {
		return id, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	if err := d.Create(ctx, id, "", nil); err != nil {
		return "", err
	}
	if _, err := d.Apply(ctx, id, f, &layerfs.ApplyOptions{IgnoreOwners: os.Geteuid() > 0}); err != nil {
		return "", errors.Join(err, d.Remove(context.WithoutCancel(ctx), id))
	}
	return id, nil
}

// makeLayer runs a step in a layer that is removed if the step fails. It works
// under a name of its own until it is whole: a layer under the final id is one
// whose step has run.
func makeLayer(ctx context.Context, d layerfs.Driver, id, parent, step string) (err error) {
	clean := context.WithoutCancel(ctx)
	temp := fmt.Sprint("running-", os.Getpid())
	if err := d.Create(ctx, temp, parent, nil); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Remove(clean, temp)) }()
	tree, err := d.Get(ctx, temp, nil)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", "-euc", step)
	cmd.Dir = tree
	cmd.Stderr = os.Stderr
	if err := errors.Join(cmd.Run(), d.Put(clean, temp)); err != nil {
		return err
	}
	return layerfs.Clone(ctx, d, id, temp, nil)
}

// export writes the changes of a layer to a file.
func export(ctx context.Context, d layerfs.Driver, id, parent, name string) error {
	r, err := d.Diff(ctx, id, parent, &layerfs.DiffOptions{Profile: layerfs.ProfileReproducible, Compression: layerfs.Gzip})
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
