package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/sys"
)

// Status gives the keys of Docker's devicemapper.
func (m *mechanism) Status(context.Context) ([]layerfs.StatusItem, error) {
	st, err := m.poolStatus(false)
	if err != nil {
		return nil, err
	}
	ts, err := m.ctl.Table(m.pool, false)
	if err != nil {
		return nil, err
	}
	if len(ts) != 1 {
		return nil, fmt.Errorf("device %s is not a thin pool", m.pool)
	}
	p, err := dm.ParseThinPool(ts[0])
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	base := m.state.BaseSize
	m.mu.Unlock()
	waiting, err := filepath.Glob(globEscape(m.devicePath("")) + "/.delete-*")
	if err != nil {
		return nil, err
	}
	var items []layerfs.StatusItem
	add := func(key, value string) { items = append(items, layerfs.StatusItem{Key: key, Value: value}) }
	yes := strconv.FormatBool
	add("Pool Name", m.pool)
	add("Pool Blocksize", size(m.opts.BlockSize))
	add("Base Device Size", size(base))
	add("Backing Filesystem", m.opts.FS)
	// Nodes are made by the kernel or here, so there is nothing to wait for.
	add("Udev Sync Supported", yes(false))
	add("Data file", devicePath(p.Data))
	add("Metadata file", devicePath(p.Metadata))
	if m.opts.files() {
		add("Data loop file", m.dataFile())
		add("Metadata loop file", m.metadataFile())
	}
	block := m.opts.BlockSize
	used, total := int64(st.UsedData)*block, int64(st.TotalData)*block
	add("Data Space Used", size(used))
	add("Data Space Total", size(total))
	available := total - used
	if m.opts.files() {
		var vfs unix.Statfs_t
		if err := unix.Statfs(m.dataFile(), &vfs); err != nil {
			return nil, &os.PathError{Op: "statfs", Path: m.dataFile(), Err: err}
		}
		available = min(available, int64(vfs.Bavail)*int64(vfs.Bsize))
	}
	add("Data Space Available", size(available))
	used, total = int64(st.UsedMeta)*dm.MetadataBlockSize, int64(st.TotalMeta)*dm.MetadataBlockSize
	add("Metadata Space Used", size(used))
	add("Metadata Space Total", size(total))
	add("Metadata Space Available", size(total-used))
	add("Thin Pool Minimum Free Space", size(int64(st.TotalData)*block*int64(max(m.opts.MinFreeSpace, 0))/100))
	add("Deferred Removal Enabled", yes(!m.opts.NoDeferredRemoval))
	add("Deferred Deletion Enabled", yes(!m.opts.NoDeferredDeletion))
	add("Deferred Deleted Device Count", strconv.Itoa(len(waiting)))
	v := m.ctl.Version()
	add("Library Version", "ioctl "+v.String())
	add("Pool Mode", string(st.Mode))
	add("Pool Transaction ID", strconv.FormatUint(st.TransactionID, 10))
	return items, nil
}

// size prints a size as docker info does, with decimal units.
func size(n int64) string {
	v, unit := float64(n), "B"
	for _, u := range []string{"kB", "MB", "GB", "TB", "PB"} {
		if v < 1000 {
			break
		}
		v, unit = v/1000, u
	}
	return strconv.FormatFloat(v, 'g', 4, 64) + unit
}

// devicePath gives the path of a device of a table.
func devicePath(dev string) string {
	d, err := dm.ParseDevice(dev)
	if err != nil {
		return dev
	}
	link, err := os.Readlink("/sys/dev/block/" + d.String())
	if err != nil {
		return dev
	}
	return "/dev/" + filepath.Base(link)
}

// Usage tells the blocks that the layer has mapped other than its parent has,
// and how many inodes it has more.
func (m *mechanism) Usage(ctx context.Context, chain lifecycle.Chain) (layerfs.Usage, error) {
	inodes, err := m.inodes(ctx, chain)
	if err != nil {
		return layerfs.Usage{}, err
	}
	below := m.state.BaseInodes
	if len(chain) > 1 {
		if below, err = m.inodes(ctx, chain[1:]); err != nil {
			return layerfs.Usage{}, err
		}
	}
	u := layerfs.Usage{Inodes: max(inodes-below, 0)}
	ranges, err := m.ranges(ctx, chain, 1, true)
	if err != nil {
		return layerfs.Usage{}, err
	}
	for _, r := range ranges {
		if !r.Unmapped {
			u.Bytes += r.Length
		}
	}
	return u, nil
}

// inodes returns how many inodes the file system of a layer uses.
func (m *mechanism) inodes(ctx context.Context, chain lifecycle.Chain) (int64, error) {
	v, err := m.View(ctx, chain)
	if err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.Path, &st); err != nil {
		err = &os.PathError{Op: "statfs", Path: m.Path(chain.Layer().ID), Err: err}
		return 0, errors.Join(err, v.Release())
	}
	return int64(st.Files - st.Ffree), v.Release()
}

// trimRange is struct fstrim_range, linux/fs.h.
type trimRange struct{ Start, Length, Least uint64 }

// Trim discards the unused blocks of a held layer and returns the bytes that
// were discarded. Where the pool passes discards down, the holes are made in
// the pool's file.
func (d *Driver) Trim(ctx context.Context, id string) (n int64, err error) {
	fail := func(err error) (int64, error) {
		return 0, &layerfs.Error{Op: "trim", Driver: name, ID: id, Err: err}
	}
	info, err := d.Stat(ctx, id, nil)
	if err != nil {
		var e *layerfs.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return fail(err)
	}
	if !info.Mounted {
		return fail(layerfs.ErrNotHeld)
	}
	if d.m.opts.IgnoreDiscard {
		return fail(&layerfs.UnsupportedError{Feature: "trimming", Reason: "IgnoreDiscard is set"})
	}
	f, err := os.Open(info.Path)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	// What was freed is only unused once the journal has it.
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fail(&os.PathError{Op: "syncfs", Path: info.Path, Err: err})
	}
	r := trimRange{Length: 1<<64 - 1}
	// FITRIM, linux/fs.h: _IOWR('X', 121, struct fstrim_range).
	if err := sys.Ioctl(f, "FITRIM", sys.IOWR[trimRange]('X', 121), &r); err != nil {
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EBADF) {
			err = fmt.Errorf("%w: %w", err, layerfs.ErrReadOnly)
		}
		return fail(err)
	}
	return int64(r.Length), nil
}

// loopOf opens the loop device of a file of the pool.
func loopOf(path string) (*loop.Device, error) {
	found, err := loop.Find(path)
	if err != nil {
		return nil, err
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%s has loop devices %s, not one", path, strings.Join(found, ", "))
	}
	return loop.Open(found[0], false)
}
