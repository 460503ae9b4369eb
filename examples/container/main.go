// Command container runs a program in a tree made of layers and tells what it
// changed:
//
//	container ROOTFS.tar PROGRAM [ARGUMENT...]
//
// ROOTFS.tar is a root file system, compressed or not, such as
// "docker export" or "debootstrap" with tar make it. It is unpacked once; the
// program gets a container of its own on top of it. Needs root, for chroot(2).
package main

import (
	"context"
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
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: container ROOTFS.tar PROGRAM [ARGUMENT...]")
		os.Exit(2)
	}
	root := filepath.Join(os.TempDir(), "layerfs-containers")
	if err := run(ctx, root, os.Args[1], os.Args[2:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "container:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, root, rootfs string, command []string, out io.Writer) (err error) {
	d, err := auto.Open(root, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := base(ctx, d, rootfs); err != nil {
		return err
	}
	id := fmt.Sprint("container-", os.Getpid())
	if err := d.Create(ctx, id, "base", nil); err != nil {
		return err
	}
	// What was interrupted is cleaned up all the same.
	clean := context.WithoutCancel(ctx)
	defer func() { err = errors.Join(err, d.Remove(clean, id)) }()
	tree, err := d.Get(ctx, id, nil)
	if err != nil {
		return err
	}
	err = chroot(ctx, tree, command, out)
	if err = errors.Join(err, d.Put(clean, id)); err != nil {
		return err
	}
	for change, err := range d.Changes(ctx, id, "base") {
		if err != nil {
			return err
		}
		fmt.Fprintln(out, change)
	}
	return nil
}

// base makes the base layer, unless an earlier run did.
func base(ctx context.Context, d layerfs.Driver, rootfs string) error {
	err := d.Create(ctx, "base", "", &layerfs.CreateOptions{ReadOnly: true})
	if errors.Is(err, layerfs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := os.Open(rootfs)
	if err == nil {
		defer f.Close()
		_, err = d.Apply(ctx, "base", f, nil)
	}
	if err != nil {
		return errors.Join(err, d.Remove(context.WithoutCancel(ctx), "base"))
	}
	return nil
}

func chroot(ctx context.Context, tree string, command []string, out io.Writer) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.SysProcAttr = inTree(tree)
	cmd.Dir = "/" // of the new root
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, out, os.Stderr
	// Without a separator the name would be looked up outside of the tree.
	if !filepath.IsAbs(command[0]) {
		return fmt.Errorf("%s: name the program by its path in the tree, such as /bin/sh", command[0])
	}
	return cmd.Run()
}
