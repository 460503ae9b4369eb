package devmapper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/sys"
)

// pattern is what test files hold: no two blocks are alike.
func pattern(size int) []byte {
	b := make([]byte, size)
	for at := 0; at+8 <= size; at += 512 {
		copy(b[at:], strconv.Itoa(at)+" of the pattern ")
	}
	return b
}

// writeSync writes a file through the page cache.
func writeSync(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(pattern(size))
	return errors.Join(err, f.Sync(), f.Close())
}

// writeDirect writes a file past the page cache.
func writeDirect(path string, size int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_DIRECT, 0o644)
	if err != nil {
		return err
	}
	const piece = 1 << 20
	b, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return errors.Join(err, f.Close())
	}
	all := pattern(size)
	for at := 0; at < size && err == nil; at += piece {
		copy(b, all[at:])
		_, err = f.WriteAt(b, int64(at))
	}
	return errors.Join(err, unix.Munmap(b), f.Sync(), f.Close())
}

// holds makes sure that a file is what the writers wrote.
func holds(path string, size int) error {
	got, err := os.ReadFile(path)
	if err == nil && !bytes.Equal(got, pattern(size)) {
		err = fmt.Errorf("%s has %d bytes, not the %d that were written", path, len(got), size)
	}
	return err
}

// way is how a layer is written.
type way struct {
	fs, how string
	write   func(path string, size int) error
}

func ways() []way {
	return []way{{"ext4", "buffered", writeSync}, {"ext4", "direct", writeDirect}, {"xfs", "buffered", writeSync}, {"xfs", "direct", writeDirect}}
}

// skipMost leaves out what -short has no time for: each file system is written
// in one way then.
func (w way) skipMost(t *testing.T) {
	t.Helper()
	if testing.Short() && (w.fs == "ext4") != (w.how == "buffered") {
		t.Skip("-short: one way for each file system")
	}
}

// stops writes metadata until the file system does no more. ext4 becomes
// read-only as soon as a block of its journal cannot be written, which the layer
// shares with the base device until it first writes it; the log of xfs had
// such blocks cleared when it was mounted.
func (w way) stops(t *testing.T, path string) {
	t.Helper()
	for i := range 60 {
		err := os.Mkdir(fmt.Sprintf("%s/d%d", path, i), 0o755)
		if w.fs == "ext4" && errors.Is(err, unix.EROFS) {
			return
		}
		require.NoError(t, err)
		_ = sys.Syncfs(path) // of ext4, once with the reason
		if w.fs == "xfs" && i == 9 {
			return
		}
	}
	t.Fatalf("%s never became read-only", w.fs)
}

// goesOn makes sure that a layer can be written after the pool has grown: xfs
// at once, ext4 when it was mounted again.
func (w way) goesOn(t *testing.T, d *Driver, path string) {
	t.Helper()
	err := w.write(path+"/after", 1<<20)
	if w.fs == "ext4" {
		require.ErrorIs(t, err, unix.EROFS)
	} else {
		require.NoError(t, err)
	}
	require.NoError(t, d.Put(t.Context(), "a"))
}

// only makes sure that of the errors that a lack of space can be, it is one.
func only(t *testing.T, err, want error) {
	t.Helper()
	require.ErrorIs(t, err, want)
	for _, other := range []error{unix.ENOSPC, unix.EIO, unix.EROFS} {
		if other != want {
			require.NotErrorIs(t, err, other)
		}
	}
}

// fullOptions are those of a pool that one layer can fill.
func (w way) fullOptions() Options {
	if w.fs == "ext4" {
		o := small()
		o.DataSize, o.BaseSize = 40<<20, 128<<20
		return *o
	}
	o := smallXFS()
	o.DataSize = 112 << 20 // mkfs writes a log of 64 MiB
	none := 0
	o.XFSNoSpaceRetries = &none
	return *o
}

// tooMuch is more than there is room for in the pool, and not in a layer.
const tooMuch = 48 << 20

// templates has one template for each file system.
func templates(change func(*Options)) map[string]*Template {
	all := make(map[string]*Template)
	for _, w := range ways() {
		o := w.fullOptions()
		if change != nil {
			change(&o)
		}
		all[w.fs] = &Template{Options: o}
	}
	return all
}

// full has a driver with two layers, "other" with a file and "a", which is
// mounted and has one too.
func (x *Template) full(t *testing.T, set func(*Options)) (d *Driver, path string) {
	t.Helper()
	o := x.Options
	if set != nil {
		set(&o)
	}
	d = mustNew(t, x.Root(t), &o)
	create(t, d, "other", "")
	with(t, d, "other", func(path string) { require.NoError(t, writeSync(path+"/kept", 1<<20)) })
	create(t, d, "a", "")
	path, err := d.Get(t.Context(), "a", nil)
	require.NoError(t, err)
	require.NoError(t, writeSync(path+"/kept", 1<<20))
	return d, path
}

// grown makes the pool larger as ExtendThreshold does.
func grown(t *testing.T, d *Driver) {
	t.Helper()
	d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 50, 300
	require.NoError(t, d.m.extend(t.Context()))
	require.Equal(t, "rw", status(t, d)["Pool Mode"])
}

// unharmed makes sure that no layer lost what it had, and that all can be
// written.
func unharmed(t *testing.T, d *Driver) {
	t.Helper()
	for _, id := range []string{"other", "a"} {
		with(t, d, id, func(path string) {
			require.NoError(t, holds(path+"/kept", 1<<20), id)
			require.NoError(t, writeSync(path+"/more", 1<<20), id)
		})
		with(t, d, id, func(path string) { require.NoError(t, holds(path+"/more", 1<<20), id) })
	}
	create(t, d, "new", "a")
	found, err := d.Check(t.Context())
	require.NoError(t, err)
	require.Empty(t, found)
}

// TestFull: with ErrorIfNoSpace, and without it once the kernel has waited long
// enough, a writer is told that a pool is full; nobody else is harmed, and all
// goes on after the pool has grown.
func TestFull(t *testing.T) {
	all := templates(nil)
	for _, w := range ways() {
		for _, waits := range []bool{false, true} {
			t.Run(fmt.Sprintf("fs=%s/write=%s/waits=%t", w.fs, w.how, waits), func(t *testing.T) {
				if waits {
					w.skipMost(t)
				}
				d, path := all[w.fs].full(t, func(o *Options) { o.ErrorIfNoSpace = !waits })
				if waits {
					noSpaceTimeout(t, 1)
				}
				start := time.Now()
				// The pool answers ENOSPC. ext4 makes EIO of whatever kept it
				// from writing back a page: ext4_finish_bio, fs/ext4/page-io.c,
				// Linux 6.1.
				want := unix.ENOSPC
				if w.fs == "ext4" && w.how == "buffered" {
					want = unix.EIO
				}
				only(t, w.write(path+"/f", tooMuch), want)
				if waits {
					require.GreaterOrEqual(t, time.Since(start), time.Second)
				}
				s := status(t, d)
				require.Equal(t, "out_of_data_space", s["Pool Mode"])
				require.Equal(t, s["Data Space Total"], s["Data Space Used"])
				require.Equal(t, "0B", s["Data Space Available"])
				require.NoError(t, holds(path+"/kept", 1<<20))
				w.stops(t, path)
				grown(t, d)
				w.goesOn(t, d, path)
				unharmed(t, d)
			})
		}
	}
}

// noSpaceTimeout sets how many seconds pools wait for space.
func noSpaceTimeout(t *testing.T, seconds int) {
	t.Helper()
	const path = "/sys/module/dm_thin_pool/parameters/no_space_timeout"
	was, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, []byte(strconv.Itoa(seconds)), 0))
	t.Cleanup(func() { require.NoError(t, os.WriteFile(path, bytes.TrimSpace(was), 0)) })
}

// TestQueue: without ErrorIfNoSpace a writer waits until the pool has grown,
// and knows nothing of it.
func TestQueue(t *testing.T) {
	all := templates(nil)
	for _, w := range ways() {
		t.Run(fmt.Sprintf("fs=%s/write=%s", w.fs, w.how), func(t *testing.T) {
			w.skipMost(t)
			d, path := all[w.fs].full(t, nil)
			done := make(chan error, 1)
			go func() { done <- w.write(path+"/f", tooMuch) }()
			require.Eventually(t, func() bool {
				st, err := d.m.poolStatus(true)
				return err == nil && st.Mode == dm.PoolOutOfSpace
			}, 30*time.Second, 20*time.Millisecond)
			select {
			case err := <-done:
				t.Fatalf("the writer did not wait: %v", err)
			case <-time.After(200 * time.Millisecond):
			}
			grown(t, d)
			require.NoError(t, <-done)
			require.NoError(t, holds(path+"/f", tooMuch))
			require.NoError(t, d.Put(t.Context(), "a"))
			unharmed(t, d)
		})
	}
}

// TestMetadataFullWriter: when the metadata is full a writer gets EIO whatever
// is configured, since the kernel has no mode in which it waits for metadata
// (PM_OUT_OF_METADATA_SPACE, drivers/md/dm-thin.c, Linux 6.1). Nothing that was
// there is harmed, and all goes on after the metadata has grown.
func TestMetadataFullWriter(t *testing.T) {
	all := templates(func(o *Options) { o.DataSize, o.MetadataSize = 512<<20, 2<<20 })
	for _, w := range ways() {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("fs=%s/write=%s/error=%t", w.fs, w.how, fails), func(t *testing.T) {
				if w.skipMost(t); testing.Short() && fails != (w.fs == "xfs") {
					t.Skip("-short: one of both for each file system")
				}
				d, path := all[w.fs].full(t, func(o *Options) { o.ErrorIfNoSpace = fails })
				other, err := d.Get(t.Context(), "other", nil)
				require.NoError(t, err)
				useMetadata(t, d)
				for i := 0; err == nil && i < 200; i++ {
					if err = w.write(fmt.Sprintf("%s/f%d", path, i), 256<<10); err == nil {
						_ = takeBlock(d, 1000+i) // may be refused already
					}
				}
				only(t, err, unix.EIO)
				s := status(t, d)
				require.Equal(t, "ro", s["Pool Mode"])
				require.Equal(t, s["Metadata Space Total"], s["Metadata Space Used"])
				require.Equal(t, "0B", s["Metadata Space Available"])
				require.NotEqual(t, "0B", s["Data Space Available"])
				require.ErrorIs(t, d.Create(t.Context(), "x", "", nil), unix.ENOSPC)
				require.NoError(t, holds(path+"/kept", 1<<20))
				require.NoError(t, holds(other+"/kept", 1<<20))
				w.stops(t, path)
				grown(t, d)
				// A layer that nobody wrote meanwhile has not noticed.
				require.NoError(t, w.write(other+"/after", 1<<20))
				require.NoError(t, d.Put(t.Context(), "other"))
				w.goesOn(t, d, path)
				unharmed(t, d)
			})
		}
	}
}

// useMetadata uses all but some blocks of the pool's metadata: each device has
// one for the root of its tree.
func useMetadata(t *testing.T, d *Driver) {
	t.Helper()
	for n := 0; ; n++ {
		require.NoError(t, takeBlock(d, n))
		st, err := d.m.poolStatus(true)
		require.NoError(t, err)
		if st.TotalMeta-st.UsedMeta < 16 {
			return
		}
	}
}

// takeBlock uses one or two blocks of metadata more.
func takeBlock(d *Driver, n int) error { return d.m.message(dm.CreateThin(uint32(firstMade + n))) }
