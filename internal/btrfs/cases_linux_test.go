package btrfs

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/tree"
)

// layer makes a subvolume, its state before and its state after the steps, and
// compares Changes with the double walk.
func layer(t *testing.T, mnt string, before, after func(root string)) (string, string) {
	t.Helper()
	a, o, n := mnt+"/a", mnt+"/o", mnt+"/n"
	check(t, Create(a))
	before(a)
	check(t, Snapshot(o, a, true))
	after(a)
	check(t, Snapshot(n, a, true))
	want, err := tree.Changes(o, n)
	check(t, err)
	got := tree.FormatChanges(collect(t, o, n))
	require.Equal(t, tree.FormatChanges(want), got)
	return tree.FormatChanges(want), mnt
}

// The stream writes to one name of an inode; all others differ too. Their
// references need extended items and more than 4 KiB.
func TestChangesManyLinks(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	const n = 600
	name := func(root string, i int) string {
		return fmt.Sprintf("%s/d%d/%s%d", root, i%3, strings.Repeat("x", 150), i)
	}
	got, _ := layer(t, mnt, func(root string) {
		for i := range 3 {
			check(t, os.Mkdir(fmt.Sprintf("%s/d%d", root, i), 0o755))
		}
		write(t, name(root, 0), "content")
		for i := range n - 1 {
			check(t, os.Link(name(root, 0), name(root, i+1)))
		}
	}, func(root string) {
		write(t, name(root, 7), "changed")
		check(t, os.Rename(root+"/d1", root+"/e1"))
	})
	// A third of the names moved with their directory.
	require.Equal(t, 2*n/3, strings.Count(got, "C /d"), got)
	require.Equal(t, n/3+1, strings.Count(got, "A /e1"), got)
}

// After a remount the numbers of removed inodes are given out again.
func TestChangesReusedInode(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	epoch := time.Unix(1e9, 0)
	set := func(p string) { check(t, os.Chtimes(p, epoch, epoch)) }
	var before, after unix.Stat_t
	got, _ := layer(t, mnt, func(root string) {
		write(t, root+"/keep", "x")
		check(t, os.Mkdir(root+"/d", 0o755))
		write(t, root+"/d/same", "same")
		write(t, root+"/d/other", "1234")
		write(t, root+"/d/gone", "gone")
		for _, p := range []string{"/d/same", "/d/other", "/d/gone", "/d"} {
			set(root + p)
		}
		check(t, unix.Lstat(root+"/d", &before))
	}, func(root string) {
		check(t, os.RemoveAll(root+"/d"))
		remount(t, mnt)
		check(t, os.Mkdir(root+"/d", 0o755))
		check(t, unix.Lstat(root+"/d", &after))
		write(t, root+"/d/same", "same")
		write(t, root+"/d/other", "5678")
		write(t, root+"/d/new", "new")
		for _, p := range []string{"/d/same", "/d/other", "/d/new", "/d"} {
			set(root + p)
		}
		set(root)
	})
	require.Equal(t, before.Ino, after.Ino, "the test is about a reused number")
	require.Equal(t, "C /\nD /d/gone\nA /d/new\nC /d/other\n", got)
}

// remount unmounts and mounts a file system from its device.
func remount(t *testing.T, mnt string) {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	check(t, err)
	defer f.Close()
	device := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); w[4] == mnt {
			device = w[len(w)-2]
		}
	}
	require.NotEmpty(t, device)
	for range 100 {
		if err = unix.Unmount(mnt, 0); err != unix.EBUSY {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	check(t, err)
	check(t, unix.Mount(device, mnt, "btrfs", 0, ""))
}

// Paths longer than a page: the kernel cannot name them in a stream.
func TestChangesDeep(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	a, o, n := mnt+"/a", mnt+"/o", mnt+"/n"
	check(t, Create(a))
	dir, err := unix.Open(a, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(t, err)
	name := strings.Repeat("d", 200)
	for range 30 {
		check(t, unix.Mkdirat(dir, name, 0o755))
		next, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, err)
		check(t, unix.Close(dir))
		dir = next
	}
	// Two changes in one tick of the clock leave the same time.
	check(t, os.Chtimes(a, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	check(t, Snapshot(o, a, true))
	check(t, unix.Mkdirat(dir, "new", 0o755))
	check(t, unix.Close(dir))
	check(t, Snapshot(n, a, true))
	for _, err = range Changes(t.Context(), o, n) {
		if err != nil {
			break
		}
	}
	require.ErrorIs(t, err, ErrTooDeep)
	require.ErrorIs(t, err, unix.ENAMETOOLONG)

	// A deep tree that moved as a whole is one command and is walked.
	check(t, Snapshot(mnt+"/w", n, false))
	check(t, os.Rename(mnt+"/w/"+name, mnt+"/w/moved"))
	check(t, Snapshot(mnt+"/w2", mnt+"/w", true))
	require.Equal(t, 33, len(collect(t, n, mnt+"/w2"))) // the root, one deletion, 31 additions
}

// Changes of mode and back, of content and back: the stream tells of them, but
// the trees are equal.
func TestChangesNoDifference(t *testing.T) {
	got, _ := layer(t, mountBtrfs(t, 256), func(root string) {
		write(t, root+"/f", "content")
		check(t, os.Mkdir(root+"/d", 0o755))
		write(t, root+"/d/g", "content")
		for _, p := range []string{"/f", "/d/g", "/d", ""} {
			check(t, os.Chtimes(root+p, time.Unix(5, 5), time.Unix(5, 5)))
		}
	}, func(root string) {
		check(t, os.Chmod(root+"/f", 0o600))
		check(t, os.Chmod(root+"/f", 0o644))
		check(t, os.RemoveAll(root+"/d"))
		check(t, os.Mkdir(root+"/d", 0o755))
		write(t, root+"/d/g", "content")
		write(t, root+"/f", "CONTENT")
		write(t, root+"/f", "content")
		for _, p := range []string{"/f", "/d/g", "/d", ""} {
			check(t, os.Chtimes(root+p, time.Unix(5, 5), time.Unix(5, 5)))
		}
	})
	require.Empty(t, got)
}

// Receive and Changes name what they were about.
func TestReceiveName(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	check(t, os.Mkdir(mnt+"/there", 0o755))
	got, err := Receive(t.Context(), stream(t, 1, subvol("x"), end), mnt, &ReceiveOptions{Name: "y", KeepWritable: true})
	check(t, err)
	require.Equal(t, filepath.Join(mnt, "y"), got.Path)
	require.False(t, got.Info.ReadOnly)
	require.True(t, got.Info.ReceivedUUID.IsZero())
	_, err = Receive(t.Context(), stream(t, 1, subvol("there"), end), mnt, nil)
	require.ErrorIs(t, err, os.ErrExist)
	require.DirExists(t, mnt+"/there")
}
