package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/testenv"
)

// untyped is a directory that lists its names without their types, as zfs-fuse
// and XFS with ftype=0 do (readdir(3), DT_UNKNOWN).
type untyped struct{ fs.Inode }

var _ fs.NodeReaddirer = (*untyped)(nil)

func (d *untyped) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	var list []fuse.DirEntry
	for name, child := range d.Children() {
		list = append(list, fuse.DirEntry{Name: name, Ino: child.StableAttr().Ino})
	}
	return fs.NewListDirStream(list), 0
}

// TestWriteUntyped: what is in directories is not left out.
func TestWriteUntyped(t *testing.T) {
	testenv.RequireFUSE(t)
	root, ctx := new(untyped), context.Background()
	dir := func(parent *fs.Inode, name string) *fs.Inode {
		n := parent.NewPersistentInode(ctx, new(untyped), fs.StableAttr{Mode: syscall.S_IFDIR})
		require.True(t, parent.AddChild(name, n, false))
		return n
	}
	file := func(parent *fs.Inode, name string) {
		n := parent.NewPersistentInode(ctx, &fs.MemRegularFile{Data: []byte(name)}, fs.StableAttr{})
		require.True(t, parent.AddChild(name, n, false))
	}
	path := t.TempDir()
	server, err := fs.Mount(path, root, &fs.Options{
		OnAdd: func(context.Context) {
			a := dir(&root.Inode, "a")
			file(a, "f")
			file(dir(a, "b"), "g")
			dir(&root.Inode, "empty")
			file(&root.Inode, "h")
		},
		MountOptions: fuse.MountOptions{DirectMountStrict: true, DisableReadDirPlus: true, DisableSplice: true},
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Unmount()) })
	var stream bytes.Buffer
	_, err = archive.Write(ctx, &stream, path, nil)
	require.NoError(t, err)
	var names []string
	for r := tar.NewReader(&stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		names = append(names, h.Name)
	}
	assert.Equal(t, []string{"./", "a/", "a/b/", "a/b/g", "a/f", "empty/", "h"}, names)
}
