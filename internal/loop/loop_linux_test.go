package loop

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, size))
	return path
}

func mustAttach(t testing.TB, path string, opts *Options) *Device {
	t.Helper()
	testenv.RequireRoot(t)
	d, err := Attach(t.Context(), path, opts)
	testenv.SkipUnsupported(t, err, "loop")
	require.NoError(t, err)
	return d
}

func backingFile(t *testing.T, device string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
	if err != nil {
		return ""
	}
	return string(b[:len(b)-1])
}

func TestAttach(t *testing.T) {
	for _, steps := range []bool{false, true} {
		t.Run("steps="+strconv.FormatBool(steps), func(t *testing.T) {
			path := image(t, 4<<20)
			d := mustAttach(t, path, &Options{NoConfigure: steps})
			assert.Equal(t, path, backingFile(t, d.Path()))
			size, err := d.Size()
			require.NoError(t, err)
			assert.EqualValues(t, 4<<20, size)
			_, err = d.File().WriteAt([]byte("hello"), 4096)
			require.NoError(t, err)
			require.NoError(t, d.File().Sync())
			got, err := os.ReadFile(path)
			require.NoError(t, err)
			assert.Equal(t, "hello", string(got[4096:4101]))

			found, err := Find(path)
			require.NoError(t, err)
			assert.Equal(t, []string{d.Path()}, found)
			link := path + "-link"
			require.NoError(t, os.Link(path, link))
			found, err = Find(link)
			require.NoError(t, err)
			assert.Equal(t, []string{d.Path()}, found, "by file, not by name")

			require.NoError(t, os.Truncate(path, 8<<20))
			require.NoError(t, d.Resize())
			size, err = d.Size()
			require.NoError(t, err)
			assert.EqualValues(t, 8<<20, size)
			require.NoError(t, d.Detach())
			found, err = Find(path)
			require.NoError(t, err)
			assert.Empty(t, found)
			require.Error(t, d.Detach(), "closed")
		})
	}
}

func TestAttachOptions(t *testing.T) {
	for _, steps := range []bool{false, true} {
		t.Run("steps="+strconv.FormatBool(steps), func(t *testing.T) {
			t.Run("read-only", func(t *testing.T) {
				path := image(t, 1<<20)
				require.NoError(t, os.Chmod(path, 0o400))
				d := mustAttach(t, path, &Options{ReadOnly: true, NoConfigure: steps})
				_, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
				if err == nil {
					ro, rerr := unix.IoctlGetInt(int(d.File().Fd()), unix.BLKROGET)
					require.NoError(t, rerr)
					assert.Equal(t, 1, ro)
				}
				require.NoError(t, d.Detach())
			})
			t.Run("autoclear", func(t *testing.T) {
				path := image(t, 1<<20)
				d := mustAttach(t, path, &Options{AutoClear: true, NoConfigure: steps})
				device := d.Path()
				require.NoError(t, d.Close())
				require.Eventually(t, func() bool { return backingFile(t, device) != path }, 5*time.Second, 10*time.Millisecond)
			})
			t.Run("sector-size", func(t *testing.T) {
				d := mustAttach(t, image(t, 1<<20), &Options{SectorSize: 4096, NoConfigure: steps})
				size, err := unix.IoctlGetInt(int(d.File().Fd()), unix.BLKSSZGET)
				require.NoError(t, err)
				assert.Equal(t, 4096, size)
				require.NoError(t, d.Detach())
			})
			t.Run("part", func(t *testing.T) {
				path := image(t, 1<<20)
				f, err := os.OpenFile(path, os.O_WRONLY, 0)
				require.NoError(t, err)
				_, err = f.WriteAt([]byte("here"), 8192)
				require.NoError(t, err)
				require.NoError(t, f.Close())
				d := mustAttach(t, path, &Options{Offset: 8192, Size: 65536, NoConfigure: steps})
				size, err := d.Size()
				require.NoError(t, err)
				assert.EqualValues(t, 65536, size)
				buf := make([]byte, 4)
				_, err = d.File().ReadAt(buf, 0)
				require.NoError(t, err)
				assert.Equal(t, "here", string(buf))
				require.NoError(t, d.Detach())
			})
			t.Run("direct-io", func(t *testing.T) {
				dir := testenv.Ext4(t, 16)
				path := filepath.Join(dir, "image")
				require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
				// The sectors of a device must be no smaller than those below.
				d := mustAttach(t, path, &Options{DirectIO: true, SectorSize: 4096, NoConfigure: steps})
				on, err := d.DirectIO()
				require.NoError(t, err)
				assert.True(t, on)
				require.NoError(t, d.Detach())
			})
			t.Run("direct-io-if-possible", func(t *testing.T) {
				path := filepath.Join(testenv.Tmpfs(t), "image")
				require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
				d := mustAttach(t, path, &Options{DirectIOIfPossible: true, NoConfigure: steps})
				require.NoError(t, d.Detach())
			})
		})
	}
}

func TestDiscard(t *testing.T) {
	path := image(t, 4<<20)
	d := mustAttach(t, path, nil)
	_, err := d.File().Write(make([]byte, 2<<20))
	require.NoError(t, err)
	_, err = d.File().WriteAt([]byte{1}, 3<<20)
	require.NoError(t, err)
	require.NoError(t, d.File().Sync())
	blocks := func() int64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(path, &st))
		return st.Blocks
	}
	before := blocks()
	require.NoError(t, unix.Fallocate(int(d.File().Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 2<<20))
	assert.Less(t, blocks(), before, "the discard made a hole")
	require.NoError(t, d.Detach())
}

func TestAttachErrors(t *testing.T) {
	testenv.RequireRoot(t)
	path := image(t, 1<<20)
	_, err := Attach(t.Context(), path+"-none", nil)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Attach(t.Context(), filepath.Dir(path), &Options{ReadOnly: true})
	require.ErrorContains(t, err, "regular file")
	_, err = Attach(t.Context(), "/dev/null", nil)
	require.ErrorContains(t, err, "regular file")
	_, err = Attach(t.Context(), path, &Options{SectorSize: 1000, Offset: -1})
	require.ErrorContains(t, err, "sector size")
	require.ErrorContains(t, err, "negative offset")
	_, err = Find(path + "-none")
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Open("/dev/null", true)
	require.Error(t, err)
	found, err := Find(path)
	require.NoError(t, err)
	assert.Empty(t, found, "nothing is attached after an error")
}

// Many at once want the same free device.
func TestAttachRace(t *testing.T) {
	testenv.RequireRoot(t)
	const n = 12
	paths := make([]string, n)
	for i := range paths {
		paths[i] = image(t, 1<<20)
	}
	devices := make([]*Device, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { devices[i], errs[i] = Attach(context.Background(), paths[i], &Options{AutoClear: true}) })
	}
	wg.Wait()
	seen := map[string]bool{}
	for i, d := range devices {
		require.NoError(t, errs[i])
		assert.False(t, seen[d.Path()], "two files on %s", d.Path())
		seen[d.Path()] = true
		assert.Equal(t, paths[i], backingFile(t, d.Path()))
		require.NoError(t, d.Detach())
	}
}

func TestAttachWithoutPrivileges(t *testing.T) {
	testenv.Unprivileged(t, func(t *testing.T) {
		_, err := Attach(t.Context(), image(t, 1<<20), nil)
		require.Error(t, err)
		require.True(t, errors.Is(err, os.ErrPermission) || errors.Is(err, errors.ErrUnsupported), err)
	})
}
