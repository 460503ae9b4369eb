package btrfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	"github.com/layerfs/layerfs/internal/testenv"
)

const userEnv = "LAYERFS_BTRFS_USER"

// userChild is the process of TestUser without privileges.
func userChild() {
	root := os.Getenv(userEnv)
	if root == "" {
		return
	}
	if err := unprivileged(root); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	os.Exit(0)
}

// unprivileged makes, fills, compares and removes layers, and prints how
// Status says they are removed.
func unprivileged(root string) error {
	ctx := context.Background()
	d, err := btrfs.New(root, nil)
	if err != nil {
		return err
	}
	if f := d.Features(); f.NativeChanges || f.Reasons["NativeChanges"] == "" {
		return fmt.Errorf("features %+v", f)
	}
	if err := d.Create(ctx, "base", "", nil); err != nil {
		return err
	}
	base, err := d.Get(ctx, "base", nil)
	if err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(base+"/d/e", 0o755), os.WriteFile(base+"/d/f", make([]byte, 3<<20), 0o600), d.Put(ctx, "base")); err != nil {
		return err
	}
	if err := d.Create(ctx, "top", "base", nil); err != nil {
		return err
	}
	if err := os.WriteFile(base+"/d/g", nil, 0o600); !errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("write to a frozen layer: %v", err)
	}
	top, err := d.Get(ctx, "top", nil)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(top+"/d/g", make([]byte, 1<<20), 0o600), d.Put(ctx, "top")); err != nil {
		return err
	}
	info, err := d.Stat(ctx, "top", &layerfs.StatOptions{Usage: true})
	if err != nil {
		return err
	}
	// The directory and the file; without the parent's three megabytes.
	if want := (layerfs.Usage{Bytes: 1 << 20, Inodes: 2}); *info.Usage != want {
		return fmt.Errorf("usage %+v, want %+v", *info.Usage, want)
	}
	if err := os.Chmod(top+"/d/e", 0); err != nil {
		return err
	}
	r, err := d.Diff(ctx, "base", "", nil)
	if err != nil {
		return err
	}
	if err := d.Create(ctx, "copy", "base", nil); err != nil {
		return err
	}
	_, err = d.Apply(ctx, "copy", r, &layerfs.ApplyOptions{IgnoreOwners: true})
	if err := errors.Join(err, r.Close(), d.Rollback(ctx, "copy")); err != nil {
		return err
	}
	if err := d.Send(ctx, os.Stdout, "top", "base", nil); !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("Send: %v", err)
	}
	for _, id := range []string{"copy", "top", "base"} {
		if err := d.Remove(ctx, id); err != nil {
			return err
		}
	}
	items, err := d.Status(ctx)
	for _, i := range items {
		if i.Key == "Subvolume Removal" {
			fmt.Print(i.Value)
		}
	}
	return err
}

// TestUser: without privileges all of it works, in one step where the mount
// allows that, and the reason is given where it does not.
func TestUser(t *testing.T) {
	for _, c := range []struct{ option, want string }{
		{"user_subvol_rm_allowed", "in one step"},
		{"noatime", "user_subvol_rm_allowed"},
	} {
		t.Run(c.option, func(t *testing.T) {
			root := newRoot(t, 256, c.option)
			require.NoError(t, os.Chown(root, testenv.Nobody, testenv.Nobody))
			// Every directory above belongs to this test.
			for dir := root; strings.HasPrefix(dir, os.TempDir()); dir = filepath.Dir(dir) {
				require.NoError(t, os.Chmod(dir, 0o755))
			}
			program, err := os.Open("/proc/self/exe")
			require.NoError(t, err)
			defer program.Close()
			cmd := exec.Command("/proc/self/fd/3")
			cmd.ExtraFiles = []*os.File{program}
			cmd.Env = append(os.Environ(), userEnv+"="+root)
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testenv.Nobody, Gid: testenv.Nobody}}
			var out, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &stderr
			require.NoError(t, cmd.Run(), "%s", &stderr)
			require.Contains(t, out.String(), c.want)
			require.Empty(t, subvolumes(t, root))
		})
	}
}
