package devmapper

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

func TestOptions(t *testing.T) {
	three := 3
	for name, tc := range map[string]struct {
		opts Options
		want []string // parts of the error, one for each problem
	}{
		"zero":           {},
		"files":          {opts: Options{DataSize: 1 << 30, MetadataSize: 16 << 20, BlockSize: 128 << 10, FS: "xfs", BaseSize: 1 << 30, XFSNoSpaceRetries: &three, ExtendThreshold: 80}},
		"devices":        {opts: Options{DataDevice: "/dev/a", MetadataDevice: "/dev/b", BlkDiscard: "off", MountOptions: []string{"noatime,discard"}}},
		"pool":           {opts: Options{ThinPoolDevice: "vg-pool", NoDeferredRemoval: true, NoDeferredDeletion: true, MinFreeSpace: -1}},
		"durability":     {opts: Options{Durability: 9}, want: []string{"Durability(9)"}},
		"prefix":         {opts: Options{Prefix: "a/b"}, want: []string{"Prefix"}},
		"sizes":          {opts: Options{DataSize: 5, MetadataSize: -1, BlockSize: 1000, BaseSize: 4096}, want: []string{"DataSize", "MetadataSize", "BlockSize", "BaseSize"}},
		"xfs-size":       {opts: Options{FS: "xfs", BaseSize: 64 << 20}, want: []string{"BaseSize"}},
		"fs":             {opts: Options{FS: "btrfs"}, want: []string{"FS"}},
		"one-device":     {opts: Options{DataDevice: "/dev/a"}, want: []string{"need each other"}},
		"same-device":    {opts: Options{DataDevice: "/dev/a", MetadataDevice: "/dev/a"}, want: []string{"the same"}},
		"device-path":    {opts: Options{DataDevice: "a", MetadataDevice: "/dev/b c"}, want: []string{"DataDevice", "MetadataDevice"}},
		"pool-and-more":  {opts: Options{ThinPoolDevice: "a/b", DataDevice: "/dev/a", MetadataDevice: "/dev/b", BlockSize: 64 << 10, DataSize: 1 << 30, ExtendThreshold: 80}, want: []string{"not the name", "excludes DataDevice", "excludes BlockSize", "DataSize and MetadataSize", "ExtendThreshold is for"}},
		"discard":        {opts: Options{BlkDiscard: "maybe", IgnoreDiscard: true, NoDiscardPassdown: true}, want: []string{"BlkDiscard", "IgnoreDiscard"}},
		"deferred":       {opts: Options{NoDeferredRemoval: true}, want: []string{"NoDeferredDeletion"}},
		"percent":        {opts: Options{MinFreeSpace: 100, ExtendThreshold: 10, ExtendPercent: -1}, want: []string{"MinFreeSpace", "ExtendThreshold", "ExtendPercent"}},
		"extend-alone":   {opts: Options{ExtendPercent: 10}, want: []string{"needs ExtendThreshold"}},
		"mount-options":  {opts: Options{MountOptions: []string{"ro,noatime", "nouuid", "x\x00"}}, want: []string{`"ro"`, `"nouuid"`, "NUL"}},
		"mkfs":           {opts: Options{MkfsArgs: []string{""}}, want: []string{"mkfs"}},
		"retries-ext4":   {opts: Options{XFSNoSpaceRetries: &three}, want: []string{"needs FS xfs"}},
		"retries-number": {opts: Options{FS: "xfs", XFSNoSpaceRetries: ptr(-2)}, want: []string{"below -1"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.opts.validate()
			if len(tc.want) == 0 {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			require.Len(t, strings.Split(err.Error(), "\n"), len(tc.want), "%v", err)
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
			_, err = New(t.TempDir(), &tc.opts)
			var le *layerfs.Error
			require.ErrorAs(t, err, &le)
		})
	}
}

func ptr[T any](v T) *T { return &v }

func TestDeviceName(t *testing.T) {
	const prefix = "layerfs-8:1-12345"
	require.Equal(t, prefix+"-a", deviceName(prefix, "a"))
	long := strings.Repeat("x", 127)
	seen := map[string]bool{prefix + "-pool": true}
	for _, id := range []string{"a", "pool", long, long + "1", long + "2"} {
		name := deviceName(prefix, id)
		require.LessOrEqual(t, len(name), maxName)
		require.False(t, seen[name], name)
		require.True(t, strings.HasPrefix(name, prefix+"-"))
		seen[name] = true
	}
}

func TestEventKind(t *testing.T) {
	require.Equal(t, "low-space", LowSpace.String())
	require.Equal(t, "EventKind(99)", EventKind(99).String())
}
