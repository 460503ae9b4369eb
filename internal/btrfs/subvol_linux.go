package btrfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

const (
	rootInode        = 256 // BTRFS_FIRST_FREE_OBJECTID, of every subvolume's root
	placeholderInode = 2   // BTRFS_EMPTY_SUBVOL_DIR_OBJECTID
	topLevelID       = 5   // BTRFS_FS_TREE_OBJECTID
	lastFreeID       = ^uint64(0) - 255
	maxName          = 255       // BTRFS_VOL_NAME_MAX
	flagReadOnly     = 1 << 1    // BTRFS_SUBVOL_RDONLY
	flagSpecByID     = 1 << 4    // BTRFS_SUBVOL_SPEC_BY_ID
	waitForOne       = uint32(0) // BTRFS_SUBVOL_SYNC_WAIT_FOR_ONE

	// A cleaner that has nothing else to do takes a few milliseconds for a small
	// subvolume, and minutes for a large one.
	minPoll = 5 * time.Millisecond
	maxPoll = 250 * time.Millisecond

	// How long to wait for the cleaner before it is woken: that syncs the file
	// system, which others may be writing to.
	wakeCleaner = 500 * time.Millisecond
)

// IsBtrfs reports whether a path is on a btrfs file system.
func IsBtrfs(path string) (bool, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(path, &st) }); err != nil {
		return false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return uint32(st.Type) == unix.BTRFS_SUPER_MAGIC, nil
}

// IsSubvolume reports whether a path is the root of a subvolume. A symbolic
// link is not followed. A nested subvolume's place in a snapshot is none.
func IsSubvolume(path string) (bool, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Lstat(path, &st) }); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Ino != rootInode {
		return false, nil
	}
	return IsBtrfs(path)
}

// Create makes an empty subvolume at path, whose directory must exist on
// btrfs. It belongs to the caller, with mode 0777 less the umask. Constant
// cost. The error matches fs.ErrExist if something is there.
//
// Kernel: BTRFS_IOC_SUBVOL_CREATE_V2.
func Create(path string) error {
	dir, args, err := volArgs(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return atPath(path, sys.Ioctl(dir, "ioctl BTRFS_IOC_SUBVOL_CREATE_V2", sys.BtrfsIocSubvolCreateV2, args))
}

// Snapshot makes path a snapshot of the subvolume src on the same file system.
// Constant cost, but it commits a transaction unless others do so anyway.
// Without privileges src must belong to the caller.
//
// Kernel: BTRFS_IOC_SNAP_CREATE_V2.
func Snapshot(path, src string, readOnly bool) error {
	from, err := openDir(src)
	if err != nil {
		return err
	}
	defer from.Close()
	return snapshot(path, from, readOnly)
}

// Dir is a directory of subvolumes that its owner keeps open, so that the kernel
// looks up one name and not a whole path for each of them.
type Dir struct{ F *os.File }

// FreezeAndSnapshot is [SetReadOnly] of the subvolume src and a writable
// [Snapshot] of it under a name, both in the directory, in fewer calls. If other
// subvolumes are nested in src, which a snapshot would lack, it makes none and
// returns true.
func (d Dir) FreezeAndSnapshot(name, src string) (nested bool, err error) {
	args, err := argsV2("snapshot", d.path(name), name)
	if err != nil {
		return false, err
	}
	path := d.path(src)
	from, err := sys.Openat(int(d.F.Fd()), src, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	defer unix.Close(from)
	// Before the snapshot, so that there is none of what can be written.
	if err := setFlag(from, path, true); err != nil {
		return false, err
	}
	refs := &sys.BtrfsRootRefs{}
	err = sys.IoctlFD(from, path, "ioctl BTRFS_IOC_GET_SUBVOL_ROOTREF", sys.BtrfsIocSubvolRootRef, refs)
	if errors.Is(err, unix.EOVERFLOW) || err == nil && refs.Num > 0 {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	args.FD = int64(from)
	return false, atPath(d.path(name), sys.Ioctl(d.F, "ioctl BTRFS_IOC_SNAP_CREATE_V2", sys.BtrfsIocSnapCreateV2, args))
}

// Destroy is [Destroy] of a subvolume in the directory.
func (d Dir) Destroy(name string) error { return destroy(d.F, d.path(name)) }

func (d Dir) path(name string) string { return d.F.Name() + "/" + name }

func snapshot(path string, from *os.File, readOnly bool) error {
	dir, args, err := volArgs(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	args.FD = int64(from.Fd())
	if readOnly {
		args.Flags = flagReadOnly
	}
	err = sys.Ioctl(dir, "ioctl BTRFS_IOC_SNAP_CREATE_V2", sys.BtrfsIocSnapCreateV2, args)
	if errors.Is(err, unix.EXDEV) {
		return atPath(path, fmt.Errorf("%s is on another file system: %w", from.Name(), err))
	}
	return atPath(path, err)
}

// Destroy removes the subvolume at path, with everything in it, but not one
// that holds other subvolumes ([unix.ENOTEMPTY]; see [DestroyAll]). Open files
// in it go on working, but its space is only freed when they are closed.
//
// Removal is constant work; the space is freed in the background, see
// [WaitCleaned]. It is durable with the next commit, see [Sync].
//
// Without CAP_SYS_ADMIN the caller must own the subvolume and its directory,
// and the mount needs the option user_subvol_rm_allowed; if that is missing
// only an empty subvolume can be removed. The error is then an
// [*layerfs.UnsupportedError] that says so and that wraps nothing else.
//
// Kernel: BTRFS_IOC_SNAP_DESTROY; rmdir(2) for empty ones since 4.18.
func Destroy(path string) error {
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return destroy(dir, path)
}

func destroy(dir *os.File, path string) error {
	name := filepath.Base(path)
	args := &sys.BtrfsVolArgs{}
	if len(name) >= len(args.Name) {
		return &os.PathError{Op: "destroy", Path: path, Err: unix.ENAMETOOLONG}
	}
	copy(args.Name[:], name)
	err := sys.Ioctl(dir, "ioctl BTRFS_IOC_SNAP_DESTROY", sys.BtrfsIocSnapDestroy, args)
	if err == nil {
		return nil
	}
	// The kernel says EINVAL, ENOTDIR or EPERM of what is none.
	if is, serr := IsSubvolume(path); serr == nil && !is {
		return &os.PathError{Op: "destroy", Path: path, Err: errNotSubvolume}
	}
	if errors.Is(err, unix.EPERM) {
		// Either the caller may not remove anything here, or only the mount option
		// is missing. An empty subvolume goes by rmdir in the second case.
		rerr := retry(func() error { return unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR) })
		switch rerr {
		case nil:
			return nil
		case unix.ENOTEMPTY, unix.EACCES, unix.EPERM:
			return atPath(path, &layerfs.UnsupportedError{
				Feature: "removal of btrfs subvolumes without CAP_SYS_ADMIN",
				Reason:  "the caller must own the subvolume, and the file system must be mounted with user_subvol_rm_allowed: " + err.Error(),
			})
		}
	}
	if errors.Is(err, unix.ENOTEMPTY) {
		return atPath(path, fmt.Errorf("it holds other subvolumes: %w", err))
	}
	return atPath(path, err)
}

var errNotSubvolume = errors.New("not a btrfs subvolume")

// DestroyByID removes a subvolume by its id, wherever it is in the file system
// that fs is on, also below a path that cannot be reached, and all that are
// nested in it, the deepest first. Like [DestroyAll] it is not atomic. It needs
// CAP_SYS_ADMIN. The error matches fs.ErrNotExist if there is none, and
// [unix.EROFS] if one that holds others is read-only, where DestroyAll, which has
// a path, clears the flag.
//
// Kernel: BTRFS_IOC_SNAP_DESTROY_V2 with BTRFS_SUBVOL_SPEC_BY_ID, Linux 5.7; the
// items that refer to nested ones are in the root tree.
func DestroyByID(ctx context.Context, fs *os.File, id uint64) error {
	var nested []uint64
	refs := Range{Min: Key{id, itemRootRef, 0}, Max: Key{id, itemRootRef, ^uint64(0)}}
	for item, err := range search(fs, treeRoot, refs, 4<<10) {
		if err != nil {
			return err
		}
		nested = append(nested, item.Offset)
	}
	for _, n := range nested {
		if err := DestroyByID(ctx, fs, n); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	args := &sys.BtrfsVolArgsV2{Flags: flagSpecByID}
	args.SetID(id)
	err := sys.Ioctl(fs, "ioctl BTRFS_IOC_SNAP_DESTROY_V2", sys.BtrfsIocSnapDestroyV2, args)
	if errors.Is(err, unix.ENOTTY) {
		return &layerfs.UnsupportedError{Feature: "removal of btrfs subvolumes by id", Since: "Linux 5.7", Reason: err.Error()}
	}
	if err != nil {
		return fmt.Errorf("subvolume %d: %w", id, err)
	}
	return nil
}

// DestroyAll removes the subvolume at path and all that are nested in it, the
// deepest first. It is not atomic: if it fails, nested ones may be gone, which
// a second call completes. The ids of what was removed are returned, also with
// an error, for [WaitCleaned]. before, if it is not nil, gets the ids of all
// before the first is removed, and may refuse.
func DestroyAll(ctx context.Context, path string, before func(ids []uint64) error) ([]uint64, error) {
	info, err := Info(path)
	if err != nil {
		return nil, err
	}
	nested, err := Nested(path)
	if err != nil {
		return nil, err
	}
	if before != nil {
		ids := []uint64{info.ID}
		for _, n := range nested {
			ids = append(ids, n.ID)
		}
		if err := before(ids); err != nil {
			return nil, err
		}
	}
	var gone []uint64
	for _, n := range nested {
		if err := ctx.Err(); err != nil {
			return gone, err
		}
		full := filepath.Join(path, n.Path)
		err := Destroy(full)
		if errors.Is(err, unix.EROFS) {
			// The one that holds it was made read-only after it was nested there.
			// It goes later, so the flag has served its time.
			if err = SetReadOnly(holder(path, nested, n.Path), false); err == nil {
				err = Destroy(full)
			}
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return gone, err
		}
		gone = append(gone, n.ID)
	}
	if err := Destroy(path); err != nil {
		return gone, err
	}
	return append(gone, info.ID), nil
}

// holder returns the subvolume below path that a nested one is directly in.
func holder(path string, nested []NestedSubvolume, rel string) string {
	best := ""
	for _, n := range nested {
		if len(n.Path) > len(best) && strings.HasPrefix(rel, n.Path+"/") {
			best = n.Path
		}
	}
	return filepath.Join(path, best)
}

// NestedSubvolume is a subvolume below another one.
type NestedSubvolume struct {
	ID   uint64
	Path string // relative to the subvolume that was asked about
}

// Nested lists the subvolumes below the one at path, each before the one that
// holds it. Cost grows with their number. Without privileges, directories that
// the caller cannot read give an error.
//
// Kernel: BTRFS_IOC_GET_SUBVOL_ROOTREF and BTRFS_IOC_INO_LOOKUP_USER, 4.18.
func Nested(path string) ([]NestedSubvolume, error) {
	f, err := openDir(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []NestedSubvolume
	args := &sys.BtrfsRootRefs{}
	for {
		err := sys.Ioctl(f, "ioctl BTRFS_IOC_GET_SUBVOL_ROOTREF", sys.BtrfsIocSubvolRootRef, args)
		// EOVERFLOW says that there are more than one call can return.
		if err != nil && !errors.Is(err, unix.EOVERFLOW) {
			return nil, err
		}
		for _, ref := range args.Refs[:args.Num] {
			look := &sys.BtrfsInoLookupUser{Dirid: ref.Dirid, Treeid: ref.Treeid}
			if lerr := sys.Ioctl(f, "ioctl BTRFS_IOC_INO_LOOKUP_USER", sys.BtrfsIocInoLookupUser, look); lerr != nil {
				if errors.Is(lerr, unix.ENOENT) {
					continue // removed since
				}
				return nil, lerr
			}
			rel := filepath.Join(cstring(look.Path[:]), cstring(look.Name[:]))
			below, nerr := Nested(filepath.Join(path, rel))
			if nerr != nil {
				return nil, nerr
			}
			for _, b := range below {
				out = append(out, NestedSubvolume{b.ID, filepath.Join(rel, b.Path)})
			}
			out = append(out, NestedSubvolume{ref.Treeid, rel})
		}
		if err == nil {
			return out, nil
		}
	}
}

// Subvolume describes a subvolume.
type Subvolume struct {
	ID           uint64
	Name         string // of its entry in the parent; empty for the top level
	ParentID     uint64 // subvolume it is nested in; 0 for the top level
	ReadOnly     bool
	UUID         UUID
	ParentUUID   UUID // what it is a snapshot of, if anything
	ReceivedUUID UUID // what it was received from, if anything

	Generation  uint64 // transaction of the last change
	CTransID    uint64 // transaction of the last change of an inode
	OTransID    uint64 // transaction it was created in
	STransID    uint64 // CTransID at the sender, of a received one
	ChangeTime  time.Time
	CreateTime  time.Time
	ReceiveTime time.Time // zero if it was not received
}

// Info describes the subvolume that path is in. It needs no privileges.
//
// Kernel: BTRFS_IOC_GET_SUBVOL_INFO, Linux 4.18.
func Info(path string) (Subvolume, error) {
	f, err := openDir(path)
	if err != nil {
		return Subvolume{}, err
	}
	defer f.Close()
	return infoOf(f)
}

func infoOf(f *os.File) (Subvolume, error) {
	a := &sys.BtrfsSubvolInfo{}
	if err := sys.Ioctl(f, "ioctl BTRFS_IOC_GET_SUBVOL_INFO", sys.BtrfsIocSubvolInfo, a); err != nil {
		return Subvolume{}, notBtrfs(err)
	}
	s := Subvolume{
		ID: a.Treeid, Name: cstring(a.Name[:]), ParentID: a.ParentID,
		// The flags are those of the root item, in which read-only is bit 0.
		ReadOnly: a.Flags&1 != 0,
		UUID:     a.UUID, ParentUUID: a.ParentUUID, ReceivedUUID: a.ReceivedUUID,
		Generation: a.Generation, CTransID: a.Ctransid, OTransID: a.Otransid, STransID: a.Stransid,
		ChangeTime: timeOf(a.Ctime), CreateTime: timeOf(a.Otime), ReceiveTime: timeOf(a.Rtime),
	}
	return s, nil
}

func timeOf(t sys.BtrfsTimespec) time.Time {
	if t.Sec == 0 && t.Nsec == 0 {
		return time.Time{}
	}
	return time.Unix(int64(t.Sec), int64(t.Nsec))
}

// SetReadOnly sets or clears the read-only flag of the subvolume at path. It
// needs ownership. Setting it while files are open for writing there gives
// EBUSY or lets those writes pass, depending on the kernel.
//
// A received subvolume that can be written no longer is what it was received
// from, so its received UUID is dropped with the flag, also if only that is left
// of an earlier call. The kernel leaves that to its callers.
//
// Kernel: BTRFS_IOC_SUBVOL_GETFLAGS, BTRFS_IOC_SUBVOL_SETFLAGS and
// BTRFS_IOC_SET_RECEIVED_SUBVOL. A change of the flag is a commit.
func SetReadOnly(path string, readOnly bool) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return setReadOnly(f, readOnly)
}

func setReadOnly(f *os.File, readOnly bool) error {
	if err := setFlag(int(f.Fd()), f.Name(), readOnly); err != nil || readOnly {
		return err
	}
	info, err := infoOf(f)
	if err != nil || info.ReceivedUUID.IsZero() {
		return err
	}
	return sys.Ioctl(f, "ioctl BTRFS_IOC_SET_RECEIVED_SUBVOL", sys.BtrfsIocSetReceived, &sys.BtrfsReceivedArgs{})
}

// setFlag sets or clears the read-only flag of the subvolume that fd is, which
// path names in errors.
func setFlag(fd int, path string, readOnly bool) error {
	var flags uint64
	if err := sys.IoctlFD(fd, path, "ioctl BTRFS_IOC_SUBVOL_GETFLAGS", sys.BtrfsIocSubvolGetFlags, &flags); err != nil {
		return notBtrfs(err)
	}
	want := flags &^ flagReadOnly
	if readOnly {
		want |= flagReadOnly
	}
	if want == flags { // a change is a commit
		return nil
	}
	return sys.IoctlFD(fd, path, "ioctl BTRFS_IOC_SUBVOL_SETFLAGS", sys.BtrfsIocSubvolSetFlags, &want)
}

// IsReadOnly reports whether the subvolume at path has the read-only flag.
func IsReadOnly(path string) (bool, error) {
	f, err := openDir(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var flags uint64
	if err := sys.Ioctl(f, "ioctl BTRFS_IOC_SUBVOL_GETFLAGS", sys.BtrfsIocSubvolGetFlags, &flags); err != nil {
		return false, notBtrfs(err)
	}
	return flags&flagReadOnly != 0, nil
}

// Sync writes everything to stable storage and waits for it.
//
// Kernel: BTRFS_IOC_SYNC, which also wakes the cleaner of deleted subvolumes.
func Sync(path string) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return notBtrfs(sys.IoctlInt(f, "ioctl BTRFS_IOC_SYNC", sys.BtrfsIocSync, 0))
}

// Commit makes what was done to metadata so far durable: subvolumes made or
// removed, renames. It starts a commit and waits for it; file data that was
// not written back is not covered.
//
// Kernel: BTRFS_IOC_START_SYNC and BTRFS_IOC_WAIT_SYNC. Neither needs
// privileges.
func Commit(path string) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return commit(f)
}

func commit(f *os.File) error {
	var id uint64
	if err := sys.Ioctl(f, "ioctl BTRFS_IOC_START_SYNC", sys.BtrfsIocStartSync, &id); err != nil {
		return notBtrfs(err)
	}
	return sys.Ioctl(f, "ioctl BTRFS_IOC_WAIT_SYNC", sys.BtrfsIocWaitSync, &id)
}

// WaitCleaned waits until a removed subvolume's space is free. The error
// matches fs.ErrExist if the subvolume was not removed. It waits for as long
// as a file in the subvolume is open.
//
// With CAP_SYS_ADMIN it looks for the item of the subvolume in the root tree,
// with growing pauses, which sees everything and ends with ctx. Without, it
// needs BTRFS_IOC_SUBVOL_SYNC_WAIT (Linux 6.13), which looks once a second
// and knows only subvolumes loaded since the file system was mounted; if ctx
// ends before, the call goes on in the background until the space is free.
func WaitCleaned(ctx context.Context, path string, id uint64) error {
	f, err := openDir(path)
	if err != nil {
		return err
	}
	err = pollCleaned(ctx, f, id)
	if !errors.Is(err, unix.EPERM) {
		return errors.Join(err, f.Close())
	}
	done := make(chan error, 1)
	go func() {
		defer f.Close()
		done <- syncWait(f, id)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func pollCleaned(ctx context.Context, f *os.File, id uint64) error {
	committed := false
	wake := time.Now().Add(wakeCleaner)
	for pause := minPoll; ; pause = min(2*pause, maxPoll) {
		item, err := searchOne(f, treeRoot, id, itemRoot)
		if err != nil {
			return err
		}
		if item == nil {
			return nil
		}
		if len(item.Data) >= rootItemRefs+4 && le32(item.Data[rootItemRefs:]) != 0 {
			if committed {
				return fmt.Errorf("subvolume %d was not removed: %w", id, os.ErrExist)
			}
			// The tree learns of the removal with the next commit.
			committed = true
			if err := commit(f); err != nil {
				return err
			}
			continue
		}
		if time.Now().After(wake) {
			// A file that was written back when the subvolume was removed has kept it
			// from the cleaner, which then sleeps until the next regular commit.
			if err := sys.IoctlInt(f, "ioctl BTRFS_IOC_SYNC", sys.BtrfsIocSync, 0); err != nil && !errors.Is(err, unix.ENOSPC) {
				return err
			}
			wake = time.Now().Add(wakeCleaner)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("subvolume %d is still being cleaned: %w", id, ctx.Err())
		case <-time.After(pause):
		}
	}
}

func syncWait(f *os.File, id uint64) error {
	args := &sys.BtrfsSubvolWait{ID: id, Mode: waitForOne}
	err := sys.Ioctl(f, "ioctl BTRFS_IOC_SUBVOL_SYNC_WAIT", sys.BtrfsIocSubvolSyncWait, args)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil // no such subvolume any more
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("subvolume %d was not removed: %w", id, err)
	case errors.Is(err, unix.ENOTTY):
		return &layerfs.UnsupportedError{
			Feature: "waiting for removed btrfs subvolumes without CAP_SYS_ADMIN",
			Since:   "Linux 6.13", Reason: err.Error(),
		}
	}
	return err
}

// Exists reports whether there is a subvolume of an id on the file system that
// path is on, also one that was removed and is not wholly cleaned up. The next
// mount may give the id of the youngest again if that was removed. It needs
// CAP_SYS_ADMIN.
func Exists(path string, id uint64) (bool, error) {
	f, err := openDir(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	item, err := searchOne(f, treeRoot, id, itemRoot)
	return item != nil, err
}

// PathOf returns the path of a subvolume below the top level of the file
// system that f is on. It needs CAP_SYS_ADMIN.
func PathOf(f *os.File, id uint64) (string, error) {
	var path string
	for id != topLevelID {
		item, err := searchOne(f, treeRoot, id, itemRootBackref)
		if err != nil {
			return "", err
		}
		if item == nil {
			return "", fmt.Errorf("subvolume %d: %w", id, os.ErrNotExist)
		}
		// struct btrfs_root_ref: dirid, sequence, name_len, name.
		d := item.Data
		if len(d) < 18 || len(d) < 18+int(le16(d[16:])) {
			return "", fmt.Errorf("subvolume %d: reference of %d bytes", id, len(d))
		}
		name := string(d[18 : 18+le16(d[16:])])
		look := &sys.BtrfsInoLookup{Treeid: item.Offset, Objectid: le64(d)}
		if err := sys.Ioctl(f, "ioctl BTRFS_IOC_INO_LOOKUP", sys.BtrfsIocInoLookup, look); err != nil {
			return "", err
		}
		path = filepath.Join(cstring(look.Name[:]), name, path)
		id = item.Offset
	}
	return path, nil
}

// volArgs opens the directory of path and puts its last component into args.
func volArgs(path string) (*os.File, *sys.BtrfsVolArgsV2, error) {
	name := filepath.Base(path)
	if name == "." || name == ".." || name == string(filepath.Separator) {
		return nil, nil, &os.PathError{Op: "open", Path: path, Err: unix.EINVAL}
	}
	args, err := argsV2("open", path, name)
	if err != nil {
		return nil, nil, err
	}
	dir, err := openDir(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	return dir, args, nil
}

// argsV2 returns arguments with a name; op and path are those of the error if it
// is too long.
func argsV2(op, path, name string) (*sys.BtrfsVolArgsV2, error) {
	if len(name) > maxName {
		return nil, &os.PathError{Op: op, Path: path, Err: unix.ENAMETOOLONG}
	}
	args := &sys.BtrfsVolArgsV2{}
	copy(args.Name[:], name)
	return args, nil
}

// openDir is os.OpenFile without a look at what kind of file it is.
func openDir(path string) (*os.File, error) {
	fd, err := sys.Openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// notBtrfs turns the ENOTTY of another file system into words.
func notBtrfs(err error) error {
	if errors.Is(err, unix.ENOTTY) {
		return &layerfs.UnsupportedError{Feature: "btrfs", Reason: err.Error()}
	}
	return err
}

// atPath names what the call was about: the descriptor in the error of an
// ioctl is only the directory.
func atPath(path string, err error) error {
	if err = notBtrfs(err); err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", path, err)
}

func isErrno(err error, want unix.Errno) bool { return errors.Is(err, want) }

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// cstring returns the bytes before the first zero.
func cstring(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
