package btrfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

func TestSubvolumes(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	a, b := filepath.Join(mnt, "a"), filepath.Join(mnt, "b")
	check(t, Create(a))
	require.ErrorIs(t, Create(a), fs.ErrExist)
	require.ErrorIs(t, Create(filepath.Join(mnt, "absent", "x")), fs.ErrNotExist)
	require.ErrorIs(t, Create(filepath.Join(mnt, strings.Repeat("x", 256))), unix.ENAMETOOLONG)
	require.ErrorIs(t, Create(mnt+"/.."), unix.EINVAL)
	var unsupported *layerfs.UnsupportedError
	require.ErrorAs(t, Create(filepath.Join(t.TempDir(), "x")), &unsupported)

	is, err := IsSubvolume(a)
	check(t, err)
	require.True(t, is)
	check(t, os.Mkdir(filepath.Join(mnt, "dir"), 0o755))
	is, err = IsSubvolume(filepath.Join(mnt, "dir"))
	check(t, err)
	require.False(t, is)
	require.ErrorIs(t, Destroy(filepath.Join(mnt, "dir")), errNotSubvolume)

	write(t, filepath.Join(a, "f"), "one")
	check(t, Snapshot(b, a, true))
	require.ErrorIs(t, os.WriteFile(filepath.Join(b, "f"), nil, 0o644), unix.EROFS)
	require.ErrorIs(t, Snapshot(b, a, true), fs.ErrExist)
	ia, err := Info(a)
	check(t, err)
	ib, err := Info(filepath.Join(b, "."))
	check(t, err)
	require.Equal(t, "a", ia.Name)
	require.Equal(t, ia.UUID, ib.ParentUUID)
	require.True(t, ib.ReadOnly)
	require.False(t, ia.ReadOnly)
	require.EqualValues(t, topLevelID, ia.ParentID)
	require.NotEqual(t, ia.ID, ib.ID)
	require.WithinDuration(t, time.Now(), ib.CreateTime, time.Minute)
	require.True(t, ib.ReceivedUUID.IsZero())

	check(t, SetReadOnly(b, false))
	check(t, SetReadOnly(b, false))
	ro, err := IsReadOnly(b)
	check(t, err)
	require.False(t, ro)
	write(t, filepath.Join(b, "f"), "two")

	f, err := openDir(mnt)
	check(t, err)
	defer f.Close()
	p, err := PathOf(f, ib.ID)
	check(t, err)
	require.Equal(t, "b", p)
	check(t, Commit(mnt))
	check(t, Sync(mnt))
	check(t, DestroyByID(t.Context(), f, ib.ID))
	require.ErrorIs(t, DestroyByID(t.Context(), f, ib.ID), fs.ErrNotExist)
	require.NoFileExists(t, b)
	check(t, Destroy(a))
	require.ErrorIs(t, Destroy(a), fs.ErrNotExist)
}

// TestDestroyByID removes what is nested too, and only that.
func TestDestroyByID(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	top := filepath.Join(mnt, "top")
	check(t, Create(mnt+"/other"))
	check(t, Create(mnt+"/other/nested"))
	check(t, Create(top))
	for i := range 300 { // more references than one search returns
		check(t, Create(fmt.Sprint(top, "/", i)))
	}
	deepest := top + "/0"
	for range 4 {
		deepest += "/deep"
		check(t, Create(deepest))
	}
	write(t, deepest+"/f", "x")
	info, err := Info(top)
	check(t, err)
	f, err := openDir(mnt)
	check(t, err)
	defer f.Close()

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, DestroyByID(canceled, f, info.ID), context.Canceled)
	require.FileExists(t, deepest+"/f")

	holder := filepath.Dir(deepest)
	check(t, SetReadOnly(holder, true))
	require.ErrorIs(t, DestroyByID(t.Context(), f, info.ID), unix.EROFS)
	require.FileExists(t, deepest+"/f")
	check(t, SetReadOnly(holder, false))
	check(t, DestroyByID(t.Context(), f, info.ID))
	left, err := Nested(mnt)
	check(t, err)
	var paths []string
	for _, n := range left {
		paths = append(paths, n.Path)
	}
	require.Equal(t, []string{"other/nested", "other"}, paths)
	require.NoDirExists(t, top)
}

func TestDestroyNested(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	top := filepath.Join(mnt, "top")
	for _, p := range []string{"", "/d", "/d/n1", "/d/n1/deep", "/n2"} {
		if p == "/d" {
			check(t, os.Mkdir(top+p, 0o755))
			continue
		}
		check(t, Create(top+p))
	}
	check(t, SetReadOnly(top+"/d/n1/deep", true))
	check(t, SetReadOnly(top+"/d/n1", true))
	nested, err := Nested(top)
	check(t, err)
	var paths []string
	for _, n := range nested {
		paths = append(paths, n.Path)
	}
	require.ElementsMatch(t, []string{"d/n1/deep", "d/n1", "n2"}, paths)
	require.ErrorIs(t, Destroy(top), unix.ENOTEMPTY)

	open, err := os.Create(top + "/n2/open")
	check(t, err)
	info, err := Info(top + "/n2")
	check(t, err)
	ids, err := DestroyAll(t.Context(), top, nil)
	check(t, err)
	require.Len(t, ids, 4)
	require.NoDirExists(t, top)
	_, err = open.WriteString("still works")
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, WaitCleaned(ctx, mnt, info.ID), context.DeadlineExceeded, "a file in it is open")
	check(t, open.Close())
	check(t, Sync(mnt))
	ctx, cancel = context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, id := range ids {
		check(t, WaitCleaned(ctx, mnt, id))
	}
	check(t, Create(top))
	info, err = Info(top)
	check(t, err)
	require.ErrorIs(t, WaitCleaned(ctx, mnt, info.ID), fs.ErrExist)
	f, err := openDir(mnt)
	check(t, err)
	defer f.Close()
	err = syncWait(f, info.ID)
	testenv.SkipUnsupported(t, err)
	require.ErrorIs(t, err, fs.ErrExist)
	check(t, syncWait(f, ids[0]))
}

func TestNestedMany(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	top := filepath.Join(mnt, "top")
	check(t, Create(top))
	const n = 300 // one call returns 255
	for i := range n {
		check(t, Create(filepath.Join(top, "n"+string(rune('a'+i%26))+strings.Repeat("x", i/26))))
	}
	nested, err := Nested(top)
	check(t, err)
	require.Len(t, nested, n)
	ids, err := DestroyAll(t.Context(), top, nil)
	check(t, err)
	require.Len(t, ids, n+1)
}

// A user without privileges can remove a subvolume only where the mount
// allows it, and is told what is missing.
func TestDestroyUnprivileged(t *testing.T) {
	testenv.RequireRoot(t)
	for _, allowed := range []bool{true, false} {
		var opts []string
		if allowed {
			opts = append(opts, "user_subvol_rm_allowed")
		}
		t.Run(map[bool]string{true: "allowed", false: "refused"}[allowed], func(t *testing.T) {
			mnt := mountBtrfs(t, 256, opts...)
			check(t, os.Chmod(mnt, 0o777))
			for dir := mnt; dir != "/" && dir != "/tmp" && dir != "/dev/shm"; dir = filepath.Dir(dir) {
				check(t, os.Chmod(dir, 0o777))
			}
			asNobody(t, func() {
				empty, full := filepath.Join(mnt, "empty"), filepath.Join(mnt, "full")
				check(t, Create(empty))
				check(t, Create(full))
				write(t, filepath.Join(full, "f"), "x")
				nested, err := Nested(full)
				check(t, err)
				require.Empty(t, nested)
				check(t, Destroy(empty))
				err = Destroy(full)
				if allowed {
					check(t, err)
					return
				}
				require.ErrorIs(t, err, errors.ErrUnsupported)
				require.ErrorContains(t, err, "user_subvol_rm_allowed")
				require.NotErrorIs(t, err, fs.ErrPermission)
			})
		})
	}
}

// asNobody runs fn on a thread of its own with the file system identity of a
// user who owns nothing, and without capabilities, which go with it.
func asNobody(t *testing.T, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		lockForever()
		// Setresuid of package unix is for this thread only, unlike that of syscall.
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), testenv.Nobody, ^uintptr(0)); e != 0 {
			t.Error(e)
			return
		}
		fn()
	}()
	<-done
}

func TestSearchPages(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	// Long xattrs make items that do not fit in a small buffer; many files make
	// more items than one call returns.
	for i := range 200 {
		p := filepath.Join(mnt, strings.Repeat("n", 1+i))
		write(t, p, "")
		check(t, unix.Setxattr(p, "user.x", bytes.Repeat([]byte("v"), 3000), 0))
	}
	check(t, Sync(mnt))
	f, err := openDir(mnt)
	check(t, err)
	defer f.Close()
	counts := map[int]int{}
	for _, size := range []int{1 << 10, 16 << 10} {
		var last Key
		for item, err := range search(f, 0, Range{Max: Key{^uint64(0), 255, ^uint64(0)}}, size) {
			check(t, err)
			require.True(t, counts[size] == 0 || less(last, item.Key), "%v after %v", item.Key, last)
			last = item.Key
			counts[size]++
		}
	}
	require.Greater(t, counts[1<<10], 800)
	require.Equal(t, counts[1<<10], counts[16<<10])
}

func less(a, b Key) bool {
	if a.Objectid != b.Objectid {
		return a.Objectid < b.Objectid
	}
	if a.Type != b.Type {
		return a.Type < b.Type
	}
	return a.Offset < b.Offset
}

func TestQuota(t *testing.T) {
	for _, mode := range []QuotaMode{QuotaFull, QuotaSimple} {
		t.Run(mode.String(), func(t *testing.T) {
			mnt := mountBtrfs(t, 512)
			sub := filepath.Join(mnt, "sub")
			check(t, Create(sub))
			st, err := ReadQuotaStatus(mnt)
			check(t, err)
			require.Equal(t, QuotaOff, st.Mode)
			require.ErrorIs(t, LimitQgroup(sub, 0, 1<<20, 0), errors.ErrUnsupported)
			err = SetQuotaMode(mnt, mode)
			testenv.SkipUnsupported(t, err)
			check(t, err)
			check(t, SetQuotaMode(mnt, mode))
			check(t, WaitRescan(t.Context(), mnt))
			st, err = ReadQuotaStatus(mnt)
			check(t, err)
			require.Equal(t, mode, st.Mode)
			require.False(t, st.Rescanning)
			require.False(t, st.Inconsistent)

			limited := filepath.Join(mnt, "limited")
			check(t, Create(limited))
			check(t, LimitQgroup(limited, 0, 8<<20, 0))
			info, err := Info(limited)
			check(t, err)
			q, err := ReadQgroup(mnt, info.ID)
			check(t, err)
			require.EqualValues(t, 8<<20, q.MaxReferenced)
			require.Zero(t, q.MaxExclusive)
			err = fill(filepath.Join(limited, "big"), 64<<20)
			require.ErrorIs(t, err, unix.EDQUOT)
			check(t, Sync(mnt))
			q, err = ReadQgroup(mnt, info.ID)
			check(t, err)
			require.LessOrEqual(t, q.Referenced, int64(8<<20))
			require.Greater(t, q.Referenced, int64(1<<20))
			check(t, LimitQgroup(limited, info.ID, 0, 0))
			check(t, fill(filepath.Join(limited, "more"), 16<<20))
			check(t, Sync(mnt))
			q, err = ReadQgroup(mnt, info.ID)
			check(t, err)
			require.Zero(t, q.MaxReferenced)
			require.Greater(t, q.Referenced, int64(16<<20))

			group := QgroupID(1, 7)
			check(t, CreateQgroup(mnt, group))
			require.ErrorIs(t, CreateQgroup(mnt, group), fs.ErrExist)
			if mode == QuotaFull {
				check(t, AssignQgroup(mnt, info.ID, group, true))
				check(t, WaitRescan(t.Context(), mnt))
				check(t, Sync(mnt))
				g, err := ReadQgroup(mnt, group)
				check(t, err)
				require.GreaterOrEqual(t, g.Referenced, q.Exclusive)
				check(t, AssignQgroup(mnt, info.ID, group, false))
			}
			check(t, DestroyQgroup(mnt, group))
			_, err = ReadQgroup(mnt, group)
			require.ErrorIs(t, err, fs.ErrNotExist)
			check(t, SetQuotaMode(mnt, QuotaOff))
			st, err = ReadQuotaStatus(mnt)
			check(t, err)
			require.Equal(t, QuotaOff, st.Mode)
		})
	}
}

// fill writes and syncs a file of random-looking bytes.
func fill(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	b := bytes.Repeat([]byte("0123456789abcdef"), 1<<12)
	for ; size > 0 && err == nil; size -= len(b) {
		if _, err = f.Write(b); err == nil && size%(1<<20) == 0 {
			err = f.Sync()
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func TestUsage(t *testing.T) {
	mnt := mountBtrfs(t, 512)
	u, err := ReadUsage(mnt, true)
	check(t, err)
	require.Len(t, u.Devices, 1)
	require.EqualValues(t, 512<<20, u.Devices[0].Size)
	require.NotEmpty(t, u.Devices[0].Path)
	var onDevices int64
	kinds := map[string]bool{}
	for _, s := range u.Spaces {
		kinds[s.Type.Kind()] = true
		onDevices += s.OnDevices
		require.LessOrEqual(t, s.Used, s.Allocated)
	}
	require.Equal(t, u.Devices[0].Allocated, onDevices, "chunk tree against device tree")
	for _, k := range []string{"Data", "Metadata", "System", "GlobalReserve"} {
		require.True(t, kinds[k], k)
	}
	info, err := ReadFSInfo(mnt)
	check(t, err)
	require.Equal(t, 1, info.Devices)
	require.False(t, info.UUID.IsZero())
	_, near := u.Exhaustion()
	require.False(t, near)

	// All data chunks taken: no space for further metadata chunks.
	err = fill(filepath.Join(mnt, "big"), 1<<30)
	require.ErrorIs(t, err, unix.ENOSPC)
	u, err = ReadUsage(mnt, false)
	check(t, err)
	e, near := u.Exhaustion()
	require.True(t, near, "%+v", u)
	require.Equal(t, ChunkData, e.Type)
	require.ErrorIs(t, Snapshot(filepath.Join(mnt, "absent", "s"), mnt, true), fs.ErrNotExist)
}

// What the chunk tree and the devices tell is of one moment, whatever is written.
func TestUsageWhileWritten(t *testing.T) {
	mnt := mountBtrfs(t, 512)
	done := make(chan error, 1)
	go func() { done <- fill(filepath.Join(mnt, "f"), 70<<20) }()
	for len(done) == 0 {
		u, err := ReadUsage(mnt, true)
		check(t, err)
		require.True(t, u.agrees(), "%+v", u)
	}
	check(t, <-done)
}

// Nested subvolumes and their places do not exist for Changes.
func TestChangesNested(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	l, o, n := filepath.Join(mnt, "l"), filepath.Join(mnt, "o"), filepath.Join(mnt, "n")
	check(t, Create(l))
	check(t, Create(l+"/gone"))
	check(t, Create(l+"/stays"))
	// Two changes in one tick of the clock leave the same time.
	check(t, os.Chtimes(l, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	check(t, Snapshot(o, l, true))
	check(t, Destroy(l+"/gone"))
	check(t, Create(l+"/new"))
	write(t, l+"/new/inside", "x")
	check(t, os.Mkdir(l+"/d", 0o755))
	check(t, Create(l+"/d/new"))
	check(t, Snapshot(n, l, true))
	// The place can be seen, so leaving it out is a choice.
	require.DirExists(t, n+"/d/new")
	require.Equal(t, "C /\nA /d\n", tree.FormatChanges(collect(t, o, n)))
}

func TestChangesErrors(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	a, ro := filepath.Join(mnt, "a"), filepath.Join(mnt, "ro")
	check(t, Create(a))
	check(t, Snapshot(ro, a, true))
	first := func(ctx context.Context, o, n string) (err error) {
		for _, err = range Changes(ctx, o, n) {
			return err
		}
		return nil
	}
	require.ErrorContains(t, first(t.Context(), ro, a), "not read-only")
	require.ErrorContains(t, first(t.Context(), a, ro), "not read-only")
	require.ErrorIs(t, first(t.Context(), ro, filepath.Join(mnt, "absent")), fs.ErrNotExist)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	write(t, filepath.Join(a, "f"), "x")
	check(t, Snapshot(filepath.Join(mnt, "n"), a, true))
	require.ErrorIs(t, first(ctx, ro, filepath.Join(mnt, "n")), context.Canceled)
	// The loop may stop at any time.
	check(t, first(t.Context(), ro, filepath.Join(mnt, "n")))
}

// A stream that is not read to its end must not keep the kernel busy, and the
// version is found by trying.
func TestSend(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	a, s := filepath.Join(mnt, "a"), filepath.Join(mnt, "s")
	check(t, Create(a))
	check(t, fill(filepath.Join(a, "big"), 64<<20))
	check(t, Snapshot(s, a, true))
	st, err := OpenSend(t.Context(), s, nil)
	check(t, err)
	_, err = io.ReadFull(st, make([]byte, 17))
	check(t, err)
	check(t, st.Close())

	ctx, cancel := context.WithCancel(t.Context())
	st, err = OpenSend(ctx, s, nil)
	check(t, err)
	_, err = io.ReadFull(st, make([]byte, 17))
	check(t, err)
	cancel()
	_, err = io.Copy(io.Discard, st)
	require.ErrorIs(t, err, context.Canceled)
	check(t, st.Close())

	for v := 1; v <= MaxStreamVersion; v++ {
		var b bytes.Buffer
		err := Send(t.Context(), &b, s, &SendOptions{Version: v, NoFileData: true})
		if v == 3 && errors.Is(err, errors.ErrUnsupported) {
			continue // needs a kernel built for experiments
		}
		check(t, err)
		dec, err := NewDecoder(bytes.NewReader(b.Bytes()))
		check(t, err)
		require.Equal(t, v, dec.Version())
	}
	_, err = OpenSend(t.Context(), s, &SendOptions{Version: 4})
	require.Error(t, err)
	_, err = OpenSend(t.Context(), a, nil)
	require.ErrorContains(t, err, "not read-only")
}

// A file system without room: what cannot be made is not there afterwards, and
// removal still works.
func TestFull(t *testing.T) {
	mnt := mountBtrfs(t, 128)
	a := mnt + "/a"
	check(t, Create(a))
	require.ErrorIs(t, fill(a+"/big", 256<<20), unix.ENOSPC)
	var made []string
	var err error
	for i := 0; err == nil && i < 5000; i++ {
		p := filepath.Join(mnt, "s"+strings.Repeat("x", i%200)+string(rune('a'+i/200)))
		if err = Snapshot(p, a, i%2 == 0); err == nil {
			made = append(made, p)
		} else {
			require.NoDirExists(t, p)
		}
	}
	if err != nil {
		require.ErrorIs(t, err, unix.ENOSPC)
	}
	t.Logf("%d snapshots in a full file system, then %v", len(made), err)
	for _, p := range made {
		check(t, Destroy(p))
	}
	check(t, Destroy(a))
	check(t, Sync(mnt))
}

func TestFreezeAndSnapshot(t *testing.T) {
	mnt := testenv.Btrfs(t, 256)
	src, dst := filepath.Join(mnt, "src"), filepath.Join(mnt, "dst")
	check(t, Create(src))
	check(t, os.WriteFile(filepath.Join(src, "f"), []byte("1"), 0o600))
	f, err := os.Open(mnt)
	check(t, err)
	defer f.Close()
	d := Dir{f}
	nested, err := d.FreezeAndSnapshot("dst", "src")
	check(t, err)
	require.False(t, nested)
	ro, err := IsReadOnly(src)
	check(t, err)
	require.True(t, ro)
	check(t, os.WriteFile(filepath.Join(dst, "f"), []byte("2"), 0o600)) // it can be written
	b, err := os.ReadFile(filepath.Join(src, "f"))
	check(t, err)
	require.Equal(t, "1", string(b))
	_, err = d.FreezeAndSnapshot("dst2", "absent")
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = d.FreezeAndSnapshot("dst", "src")
	require.ErrorIs(t, err, fs.ErrExist)

	check(t, SetReadOnly(src, false))
	check(t, Create(filepath.Join(src, "inner")))
	nested, err = d.FreezeAndSnapshot("other", "src")
	check(t, err)
	require.True(t, nested)
	require.NoDirExists(t, filepath.Join(mnt, "other"))
	check(t, d.Destroy("dst"))
	require.NoDirExists(t, dst)
	require.ErrorIs(t, d.Destroy("dst"), fs.ErrNotExist)
}
