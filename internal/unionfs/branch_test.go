//go:build linux

package unionfs

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
)

// TestAccessTimes checks that a read-only branch is never asked to note access
// times, and that a writable one does what its mount does.
func TestAccessTimes(t *testing.T) {
	testenv.RequireRoot(t)
	const asked = unix.ST_NOATIME | unix.ST_RELATIME | unix.ST_RDONLY
	for name, flag := range map[string]uintptr{"noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, unix.Mount("atimes", dir, "tmpfs", flag, ""))
			defer func() { assert.NoError(t, unix.Unmount(dir, 0)) }()
			flags := func(fd int) int64 {
				var st unix.Statfs_t
				require.NoError(t, unix.Fstatfs(fd, &st))
				return int64(st.Flags) & asked
			}
			var st unix.Statfs_t
			require.NoError(t, unix.Statfs(dir, &st))
			fs, _, err := Open(&Config{Branches: []BranchSpec{{Path: dir}}})
			require.NoError(t, err)
			defer func() { require.NoError(t, fs.Close()) }()
			require.True(t, fs.stack[0].priv)
			assert.Equal(t, int64(unix.ST_NOATIME|unix.ST_RDONLY), flags(fs.stack[0].root))
			_, err = fs.Modify(dir, RW)
			require.NoError(t, err)
			assert.Equal(t, int64(st.Flags)&asked, flags(fs.stack[0].root))
			_, err = fs.Modify(dir, ROWH)
			require.NoError(t, err)
			assert.Equal(t, int64(unix.ST_NOATIME|unix.ST_RDONLY), flags(fs.stack[0].root))
		})
	}
}

// TestModifyRefused checks that a branch that cannot become read-only is not
// given up for a moment, and does not lose anything.
func TestModifyRefused(t *testing.T) {
	var st unix.Stat_t
	setup := func(t *testing.T) (fs *FS, b *Branch) {
		rw := t.TempDir()
		if unix.Mount("refused", rw, "tmpfs", 0, "nr_inodes=40") == nil {
			t.Cleanup(func() { assert.NoError(t, unix.Unmount(rw, unix.MNT_DETACH)) })
		}
		fs = mustOpen(t, &Config{Branches: []BranchSpec{{rw, RW}, {t.TempDir(), RO}}})
		return fs, fs.stack[0]
	}
	refused := func(t *testing.T, fs *FS, b *Branch) {
		t.Helper()
		lock, plnk := b.lock, b.plnk
		_, err := fs.Modify(b.path, ROWH)
		require.ErrorIs(t, err, unix.EBUSY)
		assert.Same(t, lock, b.lock, "the lock was given up in between")
		assert.Equal(t, plnk, b.plnk)
		_, _, err = Open(&Config{Branches: []BranchSpec{{b.path, RW}}})
		assert.ErrorIs(t, err, unix.EBUSY)
	}
	mounted := func(b *Branch) bool {
		ok, _ := exists(b.root, whMounted, &st)
		return ok
	}
	for name, open := range map[string]func(t *testing.T, fs *FS) *File{
		"lent-for-reading": func(t *testing.T, fs *FS) *File {
			n, w, err := fs.Create(fs.root, "f", unix.O_RDWR, 0o644, Cred{}, &st)
			require.NoError(t, err)
			r := w.Share()
			fs.Forget(n, 1)
			w.Close()
			return r
		},
		"copied-up-without-a-name": func(t *testing.T, fs *FS) *File {
			require.NoError(t, unix.Mknod(fs.stack[1].path+"/f", unix.S_IFREG|0o644, 0))
			n, err := fs.Lookup(fs.root, "f", &st)
			require.NoError(t, err)
			r, err := fs.OpenFile(n, unix.O_RDONLY, false)
			require.NoError(t, err)
			require.NoError(t, fs.Unlink(fs.root, "f"))
			w, err := fs.OpenFile(n, unix.O_WRONLY, false)
			require.NoError(t, err)
			w.Close()
			r.Close()
			t.Cleanup(func() { assert.Zero(t, fs.stack[0].wopen.Load()) })
			return &File{fs: fs, node: n, fd: -1, br: fs.stack[1], of: n.orphan}
		},
	} {
		t.Run(name, func(t *testing.T) {
			fs, b := setup(t)
			f := open(t, fs)
			refused(t, fs, b)
			assert.True(t, mounted(b))
			if f.fd < 0 {
				fs.Forget(f.node, 1)
			} else {
				f.Close()
			}
			_, err := fs.Modify(b.path, ROWH)
			require.NoError(t, err)
			assert.False(t, mounted(b))
			assert.Nil(t, b.lock)
			assert.Equal(t, -1, b.plnk)
		})
	}
	// A descriptor that the engine does not know of.
	foreign := func(t *testing.T, b *Branch) int {
		if !b.priv {
			t.Skip("the branch is no mount of its own")
		}
		fd, err := unix.Openat(b.root, "direct", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		require.NoError(t, err)
		return fd
	}
	t.Run("by-the-kernel", func(t *testing.T) {
		fs, b := setup(t)
		fd := foreign(t, b)
		refused(t, fs, b)
		assert.True(t, mounted(b))
		assert.Equal(t, RW, b.perm)
		unix.Close(fd)
		_, err := fs.Modify(b.path, ROWH)
		require.NoError(t, err)
	})
	// stuck is a branch that is neither given up nor what it was.
	stuck := func(t *testing.T) (fs *FS, b *Branch, fd, keep int) {
		testenv.RequireRoot(t)
		fs, b = setup(t)
		fd = foreign(t, b)
		keep, err := unix.Openat(b.root, whMounted, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		for i := 0; ; i++ {
			if err = unix.Mknodat(b.root, fmt.Sprint("full", i), unix.S_IFREG|0o644, 0); err != nil {
				break
			}
		}
		require.ErrorIs(t, err, unix.ENOSPC)
		refused(t, fs, b)
		assert.False(t, mounted(b))
		assert.Equal(t, ROWH, b.perm)
		_, err = fs.Mkdir(fs.root, "d", 0o755, Cred{}, &st)
		assert.ErrorIs(t, err, unix.EROFS)
		return fs, b, fd, keep
	}
	t.Run("without-room-to-go-back", func(t *testing.T) {
		fs, b, fd, keep := stuck(t)
		// It can be taken back when there is room.
		unix.Close(keep)
		unix.Close(fd)
		_, err := fs.Modify(b.path, RW)
		require.NoError(t, err)
		assert.True(t, mounted(b))
		require.NoError(t, fs.Unlink(fs.root, "full0"))
		_, err = fs.Modify(b.path, RO)
		require.NoError(t, err)
		assert.Nil(t, b.lock)
	})
	for _, perm := range []Perm{ROWH, RO, RR} {
		t.Run("given-up-later/"+perm.String(), func(t *testing.T) {
			fs, b, fd, keep := stuck(t)
			lock, plnk := b.lock, b.plnk
			_, err := fs.Modify(b.path, perm)
			require.ErrorIs(t, err, unix.EBUSY, "it cannot be given up yet")
			assert.Equal(t, ROWH, b.perm)
			assert.Same(t, lock, b.lock)
			assert.Equal(t, plnk, b.plnk)
			unix.Close(keep)
			unix.Close(fd)
			_, err = fs.Modify(b.path, perm)
			require.NoError(t, err)
			assert.Equal(t, perm, b.perm)
			assert.Nil(t, b.lock)
			assert.Equal(t, -1, b.plnk)
			assert.ErrorIs(t, unix.Mknodat(b.root, "late", unix.S_IFREG|0o644, 0), unix.EROFS)
			other, _, err := Open(&Config{Branches: []BranchSpec{{b.path, RW}}})
			require.NoError(t, err, "another union can have it")
			require.NoError(t, other.Close())
		})
	}
}
