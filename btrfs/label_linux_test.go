package btrfs_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/btrfs"
	ioctl "github.com/layerfs/layerfs/internal/btrfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

const (
	xLabel = "system_u:object_r:x_t:s0"
	yLabel = "system_u:object_r:y_t:s0:c1,c2"
)

// labels returns the SELinux labels in a layer and how many files have each.
func labels(tb testing.TB, d *btrfs.Driver, id string) map[string]int {
	tb.Helper()
	info, err := d.Stat(tb.Context(), id, nil)
	require.NoError(tb, err)
	return testenv.Labels(tb, info.Path)
}

// labelled returns a stream with a file that has a label and one that has none.
func labelled(tb testing.TB) *bytes.Reader {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "applied", Mode: 0o644, Typeflag: tar.TypeReg},
		{Name: "foreign", Mode: 0o644, Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.selinux": "system_u:object_r:foreign_t:s0"}},
		{Name: "link", Linkname: "nowhere", Typeflag: tar.TypeSymlink},
	} {
		require.NoError(tb, w.WriteHeader(h))
	}
	require.NoError(tb, w.Close())
	return bytes.NewReader(b.Bytes())
}

// TestMountLabel: the whole tree of a layer has its label, whoever wrote it.
func TestMountLabel(t *testing.T) {
	for _, byOption := range []bool{false, true} {
		t.Run(map[bool]string{false: "layer", true: "driver"}[byOption], func(t *testing.T) {
			opts, create := new(btrfs.Options), &layerfs.CreateOptions{MountLabel: xLabel}
			if byOption {
				opts.MountLabel, create = xLabel, nil
			}
			d := mustNew(t, newRoot(t, 256), opts)
			require.Equal(t, !byOption, d.Features().ConstantCreate)
			ctx := t.Context()
			has := func(id string, want map[string]int) {
				t.Helper()
				require.Equal(t, want, labels(t, d, id))
			}
			require.NoError(t, d.Create(ctx, "base", "", create))
			has("base", map[string]int{xLabel: 1})
			edit(t, d, "base", "dir d 0755", "file d/f 1", "symlink d/s f", "fifo p")
			has("base", map[string]int{xLabel: 1, "": 4})

			require.NoError(t, d.Create(ctx, "child", "base", create))
			has("child", map[string]int{xLabel: 5})
			has("base", map[string]int{xLabel: 1, "": 4})
			require.NoError(t, d.Create(ctx, "other", "base", &layerfs.CreateOptions{MountLabel: yLabel}))
			has("other", map[string]int{yLabel: 5})

			_, err := d.Apply(ctx, "child", labelled(t), nil)
			require.NoError(t, err)
			has("child", map[string]int{xLabel: 8})
			require.NoError(t, d.Create(ctx, "sealed", "base", &layerfs.CreateOptions{MountLabel: yLabel, ReadOnly: true}))
			_, err = d.Apply(ctx, "sealed", labelled(t), nil)
			require.NoError(t, err)
			has("sealed", map[string]int{yLabel: 8})

			// A clone has the label of what it is made of, unless it is given another.
			edit(t, d, "child", "file later 1")
			require.NoError(t, d.Clone(ctx, "clone", "child", nil))
			has("clone", map[string]int{xLabel: 9})
			require.NoError(t, d.Clone(ctx, "relabelled", "child", &layerfs.CreateOptions{MountLabel: yLabel}))
			has("relabelled", map[string]int{yLabel: 9})
			has("child", map[string]int{xLabel: 8, "": 1})

			// Rollback keeps the label, also where it came from Clone or an option.
			for id, label := range map[string]string{"child": xLabel, "clone": xLabel, "relabelled": yLabel} {
				require.NoError(t, d.Rollback(ctx, id))
				has(id, map[string]int{label: 5})
			}
			require.NoError(t, d.Create(ctx, "alone", "", create))
			require.NoError(t, d.Rollback(ctx, "alone"))
			has("alone", map[string]int{xLabel: 1})

			// Whose own label is empty has that of the files it gets.
			if !byOption {
				require.NoError(t, d.Create(ctx, "none", "child", nil))
				has("none", map[string]int{xLabel: 5})
				require.NoError(t, d.Create(ctx, "plain", "", nil))
				has("plain", map[string]int{"": 1})
			}
			require.ErrorIs(t, d.Receive(ctx, bytes.NewReader(nil), "received", "", &layerfs.CreateOptions{MountLabel: xLabel}), errors.ErrUnsupported)
		})
	}
}

// TestMountLabelNested: so has what is in its subvolumes, also in those that
// were made read-only, which they still are.
func TestMountLabelNested(t *testing.T) {
	d := mustNew(t, newRoot(t, 256), nil)
	ctx := t.Context()
	base := fill(t, d, "base", "", "file f 1")
	require.NoError(t, ioctl.Create(base+"/vol"))
	require.NoError(t, ioctl.Create(base+"/vol/deep"))
	tree.Build(t, base, "file vol/deep/g 2")
	require.NoError(t, ioctl.SetReadOnly(base+"/vol/deep", true))
	require.NoError(t, ioctl.SetReadOnly(base+"/vol", true))
	require.NoError(t, d.Create(ctx, "top", "base", &layerfs.CreateOptions{MountLabel: xLabel}))
	check := func(id string, files int) {
		t.Helper()
		require.Equal(t, map[string]int{xLabel: files}, labels(t, d, id))
		info, err := d.Stat(ctx, id, nil)
		require.NoError(t, err)
		for _, at := range []string{"/vol", "/vol/deep"} {
			ro, err := ioctl.IsReadOnly(info.Path + at)
			require.NoError(t, err)
			require.True(t, ro, id+at)
		}
	}
	check("top", 5)
	_, err := d.Apply(ctx, "top", labelled(t), nil)
	require.NoError(t, err)
	check("top", 8)
	require.NoError(t, d.Clone(ctx, "clone", "top", nil))
	check("clone", 8)
	require.NoError(t, d.Rollback(ctx, "top"))
	check("top", 5)
}
