package devmapper

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// TestDiscard: what each option about discards gives back, to the pool and to
// the file that it is on, when files are removed, at Trim, and when a layer is
// removed.
func TestDiscard(t *testing.T) {
	type back struct{ pool, file bool }
	ext4, xfs := &Template{Options: *small()}, &Template{Options: *smallXFS()}
	for _, tc := range []struct {
		name               string
		set                func(*Options)
		unlink, trim, gone back
		noTrim             bool
	}{
		{name: "default", set: func(*Options) {}, trim: back{true, true}, gone: back{true, true}},
		{name: "removal-off", set: func(o *Options) { o.BlkDiscard = "off" }, trim: back{true, true}, gone: back{true, false}},
		{name: "no-passdown", set: func(o *Options) { o.NoDiscardPassdown = true }, trim: back{true, false}, gone: back{true, false}},
		{
			name: "no-passdown-removal-on", set: func(o *Options) { o.NoDiscardPassdown, o.BlkDiscard = true, "on" },
			trim: back{true, false}, gone: back{true, false},
		},
		{name: "ignore", set: func(o *Options) { o.IgnoreDiscard = true }, noTrim: true, gone: back{true, false}},
		{
			name: "mount-ext4", set: func(o *Options) { o.MountOptions = []string{"discard"} },
			unlink: back{true, true}, trim: back{true, true}, gone: back{true, true},
		},
		{
			name: "mount-xfs", set: func(o *Options) { *o = *smallXFS(); o.MountOptions = []string{"discard"} },
			unlink: back{true, true}, trim: back{true, true}, gone: back{true, true},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o, template := small(), ext4
			if tc.set(o); o.FS == "xfs" {
				template = xfs
			}
			d := mustNew(t, template.Root(t), o)
			const size = 8 << 20
			used := func() (pool, file int64) {
				st, err := d.m.poolStatus(false)
				require.NoError(t, err)
				var fi unix.Stat_t
				require.NoError(t, unix.Stat(d.m.dataFile(), &fi))
				return int64(st.UsedData) * d.m.opts.BlockSize, int64(fi.Blocks) * 512
			}
			// frees looks at what do gives back.
			frees := func(what string, want back, mounted string, do func()) {
				t.Helper()
				pool, file := used()
				do()
				var nowPool, nowFile int64
				done := func() bool {
					// xfs frees a file some time after its removal, and
					// discards its blocks when its log is written next.
					if mounted != "" {
						require.NoError(t, sys.Syncfs(mounted))
					}
					// The kernel removes a device a moment after Put. Until
					// then its deletion waits for the next call that reaps.
					require.NoError(t, d.m.reapDeferred(t.Context()))
					nowPool, nowFile = used()
					return (pool-nowPool > size*3/4) == want.pool && (file-nowFile > size*3/4) == want.file
				}
				require.Eventually(t, done, 10*time.Second, 50*time.Millisecond, "%s", what)
				if !want.pool {
					require.Less(t, pool-nowPool, int64(size/4), "%s", what)
				}
				if !want.file {
					require.Less(t, file-nowFile, int64(size/4), "%s", what)
				}
			}
			create(t, d, "a", "")
			with(t, d, "a", func(path string) { require.NoError(t, writeSync(path+"/parent", size)) })
			create(t, d, "b", "a")
			with(t, d, "b", func(path string) {
				require.NoError(t, writeSync(path+"/f", size))
				frees("unlink", tc.unlink, path, func() {
					require.NoError(t, os.Remove(path+"/f"))
				})
				if tc.noTrim {
					_, err := d.Trim(t.Context(), "b")
					require.ErrorIs(t, err, errors.ErrUnsupported)
					require.ErrorContains(t, err, "IgnoreDiscard is set")
					return
				}
				require.NoError(t, writeSync(path+"/g", size))
				if tc.unlink == (back{}) {
					require.NoError(t, os.Remove(path+"/g"))
					require.NoError(t, sys.Syncfs(path))
				}
				frees("trim", tc.trim, path, func() {
					if tc.unlink != (back{}) {
						require.NoError(t, os.Remove(path+"/g"))
					}
					_, err := d.Trim(t.Context(), "b")
					require.NoError(t, err)
				})
			})
			with(t, d, "b", func(path string) { require.NoError(t, writeSync(path+"/h", size)) })
			frees("removal", tc.gone, "", func() { require.NoError(t, d.Remove(t.Context(), "b")) })
			// What the layer shared with its parent is still there.
			with(t, d, "a", func(path string) {
				require.NoError(t, holds(path+"/parent", size))
			})
		})
	}
}
