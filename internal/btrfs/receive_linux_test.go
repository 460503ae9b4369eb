package btrfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/btrfs/btrfstest"
	"github.com/layerfs/layerfs/internal/tree"
)

// sameTree compares two trees in everything a send stream carries.
func sameTree(tb testing.TB, a, b, what string) {
	tb.Helper()
	diffs, err := tree.Compare(a, b, nil)
	check(tb, err)
	require.Empty(tb, diffs, what)
}

// TestSendReceiveRandom sends random histories, first whole and then step by
// step, and compares what was received with what was sent.
func TestSendReceiveRandom(t *testing.T) {
	src, dst := mountBtrfs(t, 1024, "compress-force=zstd"), mountBtrfs(t, 1024)
	first, end := btrfstest.Seeds(t, 50)
	for s := first; s < end; s++ {
		root := filepath.Join(src, fmt.Sprint("h", s))
		check(t, Create(root))
		h := btrfstest.New(s+1<<32, root)
		var prevSrc, prevDst string
		var made []string
		for round := range 3 {
			for range 40 {
				h.Step()
			}
			snap := fmt.Sprint(root, ".", round)
			check(t, Snapshot(snap, root, true))
			made = append(made, snap)
			opts := &SendOptions{Parent: prevSrc, Version: 1 + h.N(2)}
			opts.Compressed = opts.Version == 2
			var stream bytes.Buffer
			check(t, Send(t.Context(), &stream, snap, opts))
			recv := &ReceiveOptions{Decompress: h.N(2) == 0}
			if prevDst != "" {
				recv.Sources = []string{prevDst}
			}
			got, err := Receive(t.Context(), &stream, dst, recv)
			require.NoError(t, err, "seed %d round %d\n%s", s, round, strings.Join(h.Log, "\n"))
			require.Zero(t, stream.Len(), "all is read")
			sameTree(t, snap, got.Path, fmt.Sprintf("seed %d round %d\n%s", s, round, strings.Join(h.Log, "\n")))
			require.True(t, got.Info.ReadOnly)
			made = append(made, got.Path)
			prevSrc, prevDst = snap, got.Path
		}
		for _, p := range append(made, root) {
			check(t, Destroy(p))
		}
	}
}

func stream(tb testing.TB, version int, commands ...[]any) *bytes.Buffer {
	tb.Helper()
	return bytes.NewBuffer(build(tb, version, commands...))
}

func subvol(name string) []any {
	return []any{OpSubvol, AttrPath, name, AttrUUID, UUID{1}, AttrCtransid, uint64(7)}
}

var end = []any{OpEnd}

// hostile returns what a stream tries to reach outside of its subvolume: the
// directory outside, by links, and another subvolume.
func hostile(outside string, foreign Subvolume) map[string][][]any {
	link := []any{OpSymlink, AttrPath, "l", AttrPathLink, outside}
	flink := []any{OpSymlink, AttrPath, "f", AttrPathLink, outside + "/secret"}
	up := []any{OpSymlink, AttrPath, "up", AttrPathLink, "../outside"}
	now := time.Unix(1, 2)
	const noDriver = uint64(4000)<<8 | 1 // the number of a device
	return map[string][][]any{
		"mkfile":     {link, {OpMkfile, AttrPath, "l/new"}},
		"mkdir":      {link, {OpMkdir, AttrPath, "l/new"}},
		"dotdot":     {up, {OpMkdir, AttrPath, "up/new"}},
		"mkfile-at":  {{OpSymlink, AttrPath, "x", AttrPathLink, outside + "/new"}, {OpMkfile, AttrPath, "x"}},
		"write":      {flink, {OpWrite, AttrPath, "f", AttrFileOffset, uint64(0), AttrData, "pwned"}},
		"truncate":   {flink, {OpTruncate, AttrPath, "f", AttrSize, uint64(0)}},
		"chmod":      {flink, {OpChmod, AttrPath, "f", AttrMode, uint64(0o4777)}},
		"chmod-dir":  {link, {OpChmod, AttrPath, "l/secret", AttrMode, uint64(0o4777)}},
		"chown":      {link, {OpChown, AttrPath, "l/secret", AttrUID, uint64(5), AttrGID, uint64(5)}},
		"utimes":     {link, {OpUtimes, AttrPath, "l/secret", AttrAtime, now, AttrMtime, now, AttrCtime, now}},
		"xattr":      {link, {OpSetXattr, AttrPath, "l/secret", AttrXattrName, "user.x", AttrXattrData, "x"}},
		"unlink":     {link, {OpUnlink, AttrPath, "l/secret"}},
		"rmdir":      {link, {OpRmdir, AttrPath, "l"}},
		"rename-out": {link, {OpMkfile, AttrPath, "a"}, {OpRename, AttrPath, "a", AttrPathTo, "l/a"}},
		"rename-in":  {link, {OpRename, AttrPath, "l/secret", AttrPathTo, "a"}},
		"link-in":    {link, {OpLink, AttrPath, "a", AttrPathLink, "l/secret"}},
		"clone":      {flink, {OpMkfile, AttrPath, "a"}, {OpClone, AttrPath, "a", AttrFileOffset, uint64(0), AttrCloneLen, uint64(0), AttrCloneUUID, UUID{1}, AttrCloneCtransid, uint64(7), AttrClonePath, "f", AttrCloneOffset, uint64(0)}},
		"clone-foreign": {{OpMkfile, AttrPath, "a"}, {
			OpClone, AttrPath, "a", AttrFileOffset, uint64(0), AttrCloneLen, uint64(4096), AttrCloneUUID, foreign.UUID,
			AttrCloneCtransid, foreign.CTransID, AttrClonePath, "secret", AttrCloneOffset, uint64(0),
		}},
		"root-unlink":  {{OpUnlink, AttrPath, ""}},
		"root-rename":  {{OpRename, AttrPath, "", AttrPathTo, "x"}},
		"fifo-write":   {{OpMkfifo, AttrPath, "p"}, {OpWrite, AttrPath, "p", AttrFileOffset, uint64(0), AttrData, "x"}},
		"mknod-file":   {{OpMknod, AttrPath, "p", AttrMode, uint64(0o100644), AttrRdev, uint64(0)}},
		"owner":        {{OpChown, AttrPath, "", AttrUID, uint64(1<<32 - 1), AttrGID, uint64(0)}},
		"no-data":      {{OpMkfile, AttrPath, "a"}, {OpUpdateExtent, AttrPath, "a", AttrFileOffset, uint64(0), AttrSize, uint64(1)}},
		"second-start": {subvol("again")},
		"device":       {{OpMknod, AttrPath, "p", AttrMode, uint64(unix.S_IFCHR | 0o600), AttrRdev, noDriver}, {OpWrite, AttrPath, "p", AttrFileOffset, uint64(0), AttrData, "x"}},
		"device-clone": {{OpMknod, AttrPath, "p", AttrMode, uint64(unix.S_IFBLK | 0o600), AttrRdev, noDriver}, {OpMkfile, AttrPath, "a"}, {OpClone, AttrPath, "a", AttrFileOffset, uint64(0), AttrCloneLen, uint64(0), AttrCloneUUID, UUID{1}, AttrCloneCtransid, uint64(7), AttrClonePath, "p", AttrCloneOffset, uint64(0)}},
	}
}

func TestReceiveHostile(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	outside := filepath.Join(mnt, "outside")
	check(t, os.Mkdir(outside, 0o700))
	write(t, outside+"/secret", "secret")
	check(t, os.Chmod(outside+"/secret", 0o600))
	foreign := filepath.Join(mnt, "foreign")
	check(t, Create(foreign))
	write(t, foreign+"/secret", strings.Repeat("s", 4096))
	fi, err := Info(foreign)
	check(t, err)
	for name, cmds := range hostile(outside, fi) {
		t.Run(name, func(t *testing.T) {
			_, err := Receive(t.Context(), stream(t, 1, append(append([][]any{subvol("evil")}, cmds...), end)...), mnt, nil)
			require.ErrorIs(t, err, layerfs.ErrMalformed)
			require.NotErrorIs(t, err, unix.ENXIO, "a device was opened")
			require.NoDirExists(t, filepath.Join(mnt, "evil"), "the subvolume is removed")
		})
	}
	for _, name := range []string{"", "a/b"} {
		_, err := Receive(t.Context(), stream(t, 1, subvol(name), end), mnt, nil)
		require.ErrorIs(t, err, layerfs.ErrMalformed)
	}
	_, err = Receive(t.Context(), stream(t, 1, []any{
		OpSnapshot, AttrPath, "evil", AttrUUID, UUID{1}, AttrCtransid, uint64(7),
		AttrCloneUUID, fi.UUID, AttrCloneCtransid, fi.CTransID,
	}, end), mnt, nil)
	require.ErrorContains(t, err, "none of the sources")
	_, err = Receive(t.Context(), stream(t, 1, subvol("cut"), []any{OpMkdir, AttrPath, "d"}), mnt, nil)
	require.ErrorIs(t, err, layerfs.ErrMalformed, "no end command")
	require.NoDirExists(t, filepath.Join(mnt, "cut"))

	entries, err := os.ReadDir(outside)
	check(t, err)
	require.Len(t, entries, 1)
	info, err := os.Stat(outside + "/secret")
	check(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode())
	require.WithinDuration(t, time.Now(), info.ModTime(), time.Hour)
	b, err := os.ReadFile(outside + "/secret")
	check(t, err)
	require.Equal(t, "secret", string(b))
}

// Commands that the kernel of this host does not send.
func TestReceiveVersions(t *testing.T) {
	mnt := mountBtrfs(t, 256)
	_, err := Receive(t.Context(), stream(t, 2, subvol("v2"),
		[]any{OpMkfile, AttrPath, "f"},
		[]any{OpWrite, AttrPath, "f", AttrFileOffset, uint64(0), AttrData, strings.Repeat("a", 100<<10)},
		[]any{OpFallocate, AttrPath, "f", AttrFallocateMode, uint64(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE), AttrFileOffset, uint64(4096), AttrSize, uint64(4096)},
		[]any{OpFileattr, AttrPath, "f", AttrFileattr, uint64(1)},
		[]any{OpSetXattr, AttrPath, "", AttrXattrName, "user.root", AttrXattrData, "r"},
		[]any{OpChmod, AttrPath, "", AttrMode, uint64(0o751)},
		end,
	), mnt, nil)
	check(t, err)
	b, err := os.ReadFile(mnt + "/v2/f")
	check(t, err)
	require.Equal(t, strings.Repeat("a", 4096)+strings.Repeat("\x00", 4096)+strings.Repeat("a", 92<<10), string(b))
	st, err := os.Stat(mnt + "/v2")
	check(t, err)
	require.Equal(t, fs.FileMode(0o751), st.Mode().Perm())

	_, err = Receive(t.Context(), stream(t, 2, subvol("bad"), []any{OpMkfile, AttrPath, "f"},
		[]any{OpFallocate, AttrPath, "f", AttrFallocateMode, uint64(unix.FALLOC_FL_COLLAPSE_RANGE), AttrFileOffset, uint64(0), AttrSize, uint64(4096)}, end), mnt, nil)
	require.ErrorIs(t, err, layerfs.ErrMalformed)
	for name, args := range map[string][]any{
		"lzo":       {AttrUnencodedFileLen, uint64(4096), AttrUnencodedLen, uint64(4096), AttrUnencodedOffset, uint64(0), AttrCompression, uint64(3), AttrData, "x"},
		"encrypted": {AttrUnencodedFileLen, uint64(4096), AttrUnencodedLen, uint64(4096), AttrUnencodedOffset, uint64(0), AttrEncryption, uint64(1), AttrData, "x"},
	} {
		c := append([]any{OpEncodedWrite, AttrPath, "f", AttrFileOffset, uint64(0)}, args...)
		_, err = Receive(t.Context(), stream(t, 2, subvol(name), []any{OpMkfile, AttrPath, "f"}, c, end), mnt, &ReceiveOptions{Decompress: true})
		require.ErrorIs(t, err, errors.ErrUnsupported, name)
	}
	// A bomb: more than an extent can hold.
	_, err = Receive(t.Context(), stream(t, 2, subvol("bomb"), []any{OpMkfile, AttrPath, "f"}, []any{
		OpEncodedWrite, AttrPath, "f", AttrFileOffset, uint64(0),
		AttrUnencodedFileLen, uint64(1 << 40), AttrUnencodedLen, uint64(1 << 40), AttrUnencodedOffset, uint64(0), AttrCompression, uint64(1), AttrData, "x",
	}, end), mnt, nil)
	require.ErrorIs(t, err, layerfs.ErrMalformed)

	_, err = Receive(t.Context(), stream(t, 3, subvol("v3"),
		[]any{OpMkfile, AttrPath, "f"},
		[]any{OpWrite, AttrPath, "f", AttrFileOffset, uint64(0), AttrData, "measured"},
		[]any{OpEnableVerity, AttrPath, "f", AttrVerityAlgorithm, uint64(1), AttrVerityBlockSize, uint64(4096), AttrVeritySalt, "salt", AttrVeritySig, ""},
		end,
	), mnt, nil)
	if !errors.Is(err, errors.ErrUnsupported) { // without CONFIG_FS_VERITY
		check(t, err)
		require.ErrorIs(t, os.WriteFile(mnt+"/v3/f", nil, 0o644), unix.EROFS)
	} else {
		require.NoDirExists(t, mnt+"/v3")
	}
}

func TestReceiveFull(t *testing.T) {
	src, small := mountBtrfs(t, 512), mountBtrfs(t, 128)
	a, s := src+"/a", src+"/s"
	check(t, Create(a))
	rng := rand.New(rand.NewPCG(1, 1))
	big := make([]byte, 160<<20)
	for i := range big {
		big[i] = byte(rng.Uint32())
	}
	check(t, os.WriteFile(a+"/big", big, 0o644))
	check(t, Snapshot(s, a, true))
	var b bytes.Buffer
	check(t, Send(t.Context(), &b, s, nil))
	_, err := Receive(t.Context(), &b, small, nil)
	require.ErrorIs(t, err, unix.ENOSPC)
	require.NotErrorIs(t, err, layerfs.ErrMalformed)
	require.NoDirExists(t, small+"/s")
}

// TestChangedExtents rebuilds every new tree's files from the old ones and the
// ranges alone.
func TestChangedExtents(t *testing.T) {
	mnt := mountBtrfs(t, 1024)
	first, end := btrfstest.Seeds(t, 200)
	for s := first; s < end; s++ {
		root := filepath.Join(mnt, fmt.Sprint("h", s))
		o, n := root+".old", root+".new"
		check(t, Create(root))
		h := btrfstest.New(s+2<<32, root)
		for range 40 {
			h.Step()
		}
		check(t, Snapshot(o, root, true))
		h.Log = nil
		for range 12 {
			h.Step()
		}
		check(t, Snapshot(n, root, true))
		ranges := map[string][]layerfs.BlockRange{}
		last := ""
		for r, err := range ChangedExtents(t.Context(), o, n) {
			check(t, err)
			require.Positive(t, r.Length)
			if rs := ranges[r.Path]; len(rs) > 0 {
				require.Equal(t, last, r.Path)
				require.GreaterOrEqual(t, r.Offset, rs[len(rs)-1].Offset+rs[len(rs)-1].Length)
			} else {
				require.True(t, last == "" || layerfs.ComparePaths(last, r.Path) < 0)
			}
			last = r.Path
			ranges[r.Path] = append(ranges[r.Path], r)
		}
		check(t, filepath.WalkDir(n, func(p string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel := strings.TrimPrefix(p, n)
			want, err := os.ReadFile(p)
			check(t, err)
			var got []byte
			if st, err := os.Lstat(o + rel); err == nil && st.Mode().IsRegular() {
				got, err = os.ReadFile(o + rel)
				check(t, err)
			}
			size := max(len(got), len(want))
			got = append(got, make([]byte, size-len(got))...)
			data := append([]byte(nil), want...)
			data = append(data, make([]byte, size-len(data))...)
			for _, r := range ranges[rel] {
				require.LessOrEqual(t, r.Offset+r.Length, int64(size))
				part := data[r.Offset : r.Offset+r.Length]
				if r.Unmapped {
					require.Equal(t, make([]byte, r.Length), part)
				}
				copy(got[r.Offset:], part)
			}
			require.True(t, bytes.Equal(data, got), "seed %d %s %v\n%s", s, rel, ranges[rel], strings.Join(h.Log, "\n"))
			return nil
		}))
		for _, p := range []string{root, o, n} {
			check(t, Destroy(p))
		}
	}
}

// The point of it all: one block of a large file is one small range.
func TestChangedExtentsSmall(t *testing.T) {
	mnt := mountBtrfs(t, 512)
	a := mnt + "/a"
	check(t, Create(a))
	check(t, fill(a+"/big", 64<<20))
	check(t, Snapshot(mnt+"/o", a, true))
	f, err := os.OpenFile(a+"/big", os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt([]byte("x"), 10<<20+5)
	check(t, err)
	check(t, f.Close())
	check(t, unix.Truncate(a+"/big", 60<<20))
	check(t, Snapshot(mnt+"/n", a, true))
	var got []layerfs.BlockRange
	for r, err := range ChangedExtents(t.Context(), mnt+"/o", mnt+"/n") {
		check(t, err)
		got = append(got, r)
	}
	require.Equal(t, []layerfs.BlockRange{
		{Path: "/big", Offset: 10 << 20, Length: 4096},
		{Path: "/big", Offset: 60 << 20, Length: 4 << 20, Unmapped: true},
	}, got)
}
