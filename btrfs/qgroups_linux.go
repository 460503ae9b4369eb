package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/btrfs"
)

// The qgroup of a removed subvolume stays until the subvolume is cleaned up, and
// on kernels before 6.12, as with simple quotas where others share the bytes,
// nobody removes it then. It is often needless only after the process that
// removed the layer has ended. So the ids of subvolumes are noted in a file
// before they are removed, and whoever opens or uses the root later removes the
// qgroups that can go.
//
// No qgroup of a subvolume that is there is ever touched: an id is noted by who
// removes its subvolume, with the file system it is on. btrfs gives the id of the
// youngest subvolume again if that was removed before a mount, so what is
// collected can have been somebody else's: empty, and without its subvolume.

const (
	// fewQgroups is how often, in removals, earlier ones are looked at, and half
	// of how many then.
	fewQgroups = 64
	// manyQgroups bounds what is noted. What is forgotten takes some hundred
	// bytes of metadata.
	manyQgroups = 4096
)

func (m *mechanism) qgroupsPath() string { return filepath.Join(m.home, ".layerfs", "qgroups") }

// noteQgroups appends the ids of subvolumes that are about to be removed.
func (m *mechanism) noteQgroups(ctx context.Context, ids []uint64) error {
	unlock, err := m.dir.Lock(ctx, ".qgroups")
	if err != nil {
		return err
	}
	defer unlock()
	f, err := os.OpenFile(m.qgroupsPath(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(m.lines(ids))
	return errors.Join(err, f.Close())
}

func (m *mechanism) lines(ids []uint64) string {
	var text strings.Builder
	for _, id := range ids {
		// What a full disk left of the last line does not spoil this one.
		fmt.Fprintf(&text, "\n%s %d\n", m.fsid, id)
	}
	return text.String()
}

// notedQgroups returns the ids in the file, the oldest first.
func (m *mechanism) notedQgroups() ([]uint64, error) {
	b, err := os.ReadFile(m.qgroupsPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []uint64
	seen := make(map[uint64]bool)
	for line := range strings.Lines(string(b)) {
		var id uint64
		rest, ok := strings.CutPrefix(line, m.fsid.String()+" ") // else from a root that was copied here
		if !ok || !strings.HasSuffix(line, "\n") {
			continue
		}
		if _, err := fmt.Sscanf(rest, "%d\n", &id); err == nil && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// removedOne collects now and then.
func (m *mechanism) removedOne() {
	if m.removed.Add(1)%fewQgroups == 0 {
		m.collectQgroups(2 * fewQgroups)
	}
}

// collectQgroups removes noted qgroups that are not needed any more, looking at
// the oldest ones only, at most as many as most. What stays is noted again
// behind the others. Errors are logged: a qgroup that stays does no harm. While
// somebody else does the same it does nothing.
func (m *mechanism) collectQgroups(most int) {
	unlock, ok, err := m.dir.TryLock(".qgroups")
	if err != nil || !ok {
		return
	}
	defer unlock()
	if err := m.collect(most); err != nil {
		m.log.Warn("qgroups of removed layers are not cleaned up", "driver", name, "path", m.home, "error", err)
	}
}

func (m *mechanism) collect(most int) error {
	ids, err := m.notedQgroups()
	if err != nil || len(ids) == 0 {
		return err
	}
	look := ids[:min(most, len(ids))]
	keep := slices.Clone(ids[len(look):])
	for _, id := range look {
		gone, err := m.collectOne(id)
		if err != nil {
			return err
		}
		if !gone {
			keep = append(keep, id)
		}
	}
	if len(keep) == 0 {
		return os.Remove(m.qgroupsPath())
	}
	temp := m.qgroupsPath() + ".new"
	if err := os.WriteFile(temp, []byte(m.lines(keep[max(0, len(keep)-manyQgroups):])), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, m.qgroupsPath())
}

// collectOne removes the qgroup of a subvolume, and reports whether it needs no
// further look. One whose subvolume is there, or is not wholly cleaned up in the
// last commit, must stay: to remove it makes all qgroups inconsistent, and lifts
// every limit (btrfs_remove_qgroup, fs/btrfs/qgroup.c).
func (m *mechanism) collectOne(id uint64) (gone bool, err error) {
	g, err := btrfs.ReadQgroup(m.home, id)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil || g.Referenced != 0 || g.Exclusive != 0 {
		return false, err
	}
	if is, err := btrfs.Exists(m.home, id); is || err != nil {
		return false, err
	}
	err = btrfs.DestroyQgroup(m.home, id)
	if errors.Is(err, unix.EBUSY) { // the kernel knows of something that is not committed
		return false, nil
	}
	return err == nil || errors.Is(err, fs.ErrNotExist), err
}
