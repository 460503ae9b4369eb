package btrfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// fuzzEnv names the file system of FuzzReceive for the processes that -fuzz
// starts: they are ended without notice, so the first one makes and removes it.
const fuzzEnv = "LAYERFS_BTRFS_FUZZ"

// What stands in streams for the two subvolumes that are there, so that what was
// found in one run means the same in the next.
var (
	fuzzBase    = UUID{0xba, 0x5e, 0xba, 0x5e, 0xba, 0x5e, 0xba, 0x5e}
	fuzzForeign = UUID{0xf0, 0xe1, 0xf0, 0xe1, 0xf0, 0xe1, 0xf0, 0xe1}
)

const (
	fuzzBaseTransid    = 0xba5e_0000_0000_ba5e
	fuzzForeignTransid = 0xf0e1_0000_0000_f0e1
	fuzzSecret         = "this must not be seen"
)

// FuzzReceive receives streams of enemies, and insists that they reach nothing
// but the new subvolume: a directory beside it, a subvolume that is none of the
// sources and the one that is stay as they are; a failure leaves no subvolume,
// and nothing leaves a descriptor.
func FuzzReceive(f *testing.F) {
	mnt := os.Getenv(fuzzEnv)
	if mnt == "" {
		mnt = mountBtrfs(f, 512, "nodev", "nosuid")
		fuzzTrees(f, mnt)
		f.Setenv(fuzzEnv, mnt)
	}
	base, err := Info(mnt + "/base")
	check(f, err)
	foreign, err := Info(mnt + "/foreign")
	check(f, err)
	fuzzSeeds(f, mnt, base)
	dest := filepath.Join(mnt, fmt.Sprint("p", os.Getpid()))
	check(f, os.Mkdir(dest, 0o755))
	before, err := fuzzState(mnt)
	check(f, err)
	u64 := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	real := strings.NewReplacer(
		string(fuzzBase[:]), string(base.UUID[:]), string(u64(fuzzBaseTransid)), string(u64(base.CTransID)),
		string(fuzzForeign[:]), string(foreign.UUID[:]), string(u64(fuzzForeignTransid)), string(u64(foreign.CTransID)),
	)
	f.Fuzz(func(t *testing.T, in []byte, named, decompress bool) {
		opts := &ReceiveOptions{Sources: []string{mnt + "/base"}, Decompress: decompress}
		if named {
			opts.Name = "name"
		}
		got, err := Receive(t.Context(), bytes.NewReader(sealed([]byte(real.Replace(string(in))))), dest, opts)
		want := []error{layerfs.ErrMalformed, errors.ErrUnsupported, unix.ENOSPC}
		if err != nil && !slices.ContainsFunc(want, func(target error) bool { return errors.Is(err, target) }) {
			t.Errorf("Receive = %v", err)
		}
		entries, rerr := os.ReadDir(dest)
		check(t, rerr)
		if err == nil {
			if len(entries) != 1 || filepath.Join(dest, entries[0].Name()) != got.Path {
				t.Errorf("%s holds %v, want %s", dest, entries, got.Path)
			}
			if is, err := IsSubvolume(got.Path); err != nil || !is || !got.Info.ReadOnly {
				t.Errorf("IsSubvolume(%s) = %v, %v; %+v", got.Path, is, err, got.Info)
			}
			if err := noSecret(got.Path); err != nil {
				t.Error(err)
			}
		} else if len(entries) > 0 {
			t.Errorf("%s holds %v after %v", dest, entries, err)
		}
		for _, e := range entries {
			_, err := DestroyAll(context.Background(), filepath.Join(dest, e.Name()), nil)
			check(t, err)
		}
		after, err := fuzzState(mnt)
		check(t, err)
		if after != before {
			t.Errorf("changed outside:\n%s\nwas\n%s", after, before)
		}
	})
}

// fuzzTrees makes what streams may build on and what they must not reach.
func fuzzTrees(tb testing.TB, mnt string) {
	check(tb, os.Mkdir(mnt+"/outside", 0o700))
	write(tb, mnt+"/outside/secret", fuzzSecret)
	for _, name := range []string{"foreign", "work"} {
		check(tb, Create(mnt+"/"+name))
	}
	write(tb, mnt+"/foreign/secret", strings.Repeat(fuzzSecret, 1000))
	work := mnt + "/work"
	check(tb, os.Mkdir(work+"/d", 0o755))
	write(tb, work+"/d/f", strings.Repeat("content ", 2000))
	write(tb, work+"/small", "s")
	check(tb, os.Symlink("../outside", work+"/l"))
	check(tb, Snapshot(mnt+"/base", work, true))
	check(tb, os.Rename(work+"/d/f", work+"/moved"))
	check(tb, os.Link(work+"/moved", work+"/d/again"))
	check(tb, os.Remove(work+"/small"))
	write(tb, work+"/new", strings.Repeat("more", 5000))
	check(tb, unix.Setxattr(work+"/new", "user.x", []byte("y"), 0))
	check(tb, os.Chmod(work+"/d", 0o700))
	check(tb, Snapshot(mnt+"/top", work, true))
	check(tb, Sync(mnt))
}

// fuzzSeeds adds real streams, those with every command, and those of
// TestReceiveHostile.
func fuzzSeeds(f *testing.F, mnt string, base Subvolume) {
	transid := binary.LittleEndian.AppendUint64(nil, base.CTransID)
	for _, o := range []SendOptions{{}, {Version: 2, Compressed: true}, {Parent: mnt + "/base"}, {Parent: mnt + "/base", Version: 2}} {
		var b bytes.Buffer
		check(f, Send(f.Context(), &b, mnt+"/top", &o))
		s := bytes.ReplaceAll(b.Bytes(), base.UUID[:], fuzzBase[:])
		s = bytes.ReplaceAll(s, transid, binary.LittleEndian.AppendUint64(nil, fuzzBaseTransid))
		f.Add(s, true, false)
	}
	for v := 1; v <= MaxStreamVersion; v++ {
		f.Add(every(f, v), false, true)
	}
	parent := []any{
		OpSnapshot, AttrPath, "s", AttrUUID, UUID{1}, AttrCtransid, uint64(7),
		AttrCloneUUID, fuzzBase, AttrCloneCtransid, uint64(fuzzBaseTransid),
	}
	cases := hostile("../../outside", Subvolume{UUID: fuzzForeign, CTransID: fuzzForeignTransid})
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		cmds := cases[name]
		f.Add(build(f, 1, append(append([][]any{subvol("evil")}, cmds...), end)...), false, false)
		f.Add(build(f, 1, append(append([][]any{parent}, cmds...), end)...), true, false)
	}
	f.Add(build(f, 1, []any{
		OpSnapshot, AttrPath, "s", AttrUUID, UUID{1}, AttrCtransid, uint64(7),
		AttrCloneUUID, fuzzForeign, AttrCloneCtransid, uint64(fuzzForeignTransid),
	}, end), false, false)
	for _, name := range []string{"", "a/b"} {
		f.Add(build(f, 1, subvol(name), end), false, false)
	}
}

// fuzzState describes what no stream may change, and the open descriptors below
// mnt. A change of a file, of its attributes or names, changes its ctime.
func fuzzState(mnt string) (string, error) {
	var b strings.Builder
	for _, p := range []string{
		"outside", "outside/secret", "foreign", "foreign/secret",
		"base", "base/d", "base/d/f", "base/small", "base/l", "top", "work",
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mnt, p), &st); err != nil {
			return "", fmt.Errorf("%s: %w", p, err)
		}
		fmt.Fprintln(&b, p, st.Ino, st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev, st.Size, st.Mtim, st.Ctim)
	}
	for _, p := range []string{"outside", "foreign", "."} {
		entries, err := os.ReadDir(filepath.Join(mnt, p))
		if err != nil {
			return "", err
		}
		for _, e := range entries {
			if p != "." || !strings.HasPrefix(e.Name(), "p") { // of the processes
				fmt.Fprintln(&b, p, e.Name())
			}
		}
	}
	for _, p := range []string{"base", "foreign"} {
		info, err := Info(filepath.Join(mnt, p))
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&b, p, info.CTransID, info.ReadOnly, info.ReceivedUUID)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return "", err
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, mnt+"/") {
			fmt.Fprintln(&b, "open:", target)
		}
	}
	return b.String(), nil
}

// noSecret looks for what a stream must not read. What is sparse is not read.
func noSecret(root string) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		b := make([]byte, 64<<10)
		n, _ := f.Read(b)
		if bytes.Contains(b[:n], []byte(fuzzSecret)) {
			return fmt.Errorf("%s holds what is outside", path)
		}
		return nil
	})
}
