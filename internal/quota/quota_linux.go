package quota

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
)

// Options of [Open].
type Options struct {
	// First is the smallest project id [Projects.Allocate] gives out; zero
	// means [DefaultFirst].
	First uint32
	// BlockDevice makes it use quotactl(2) with the block device, which is
	// otherwise done before Linux 5.14 only.
	BlockDevice bool
}

// Projects are the projects of one file system. It is safe for concurrent use,
// but [Projects.Allocate] followed by [Projects.Assign] is one step only under
// a lock of the caller, across processes.
type Projects struct {
	root   *os.File
	first  uint32
	device string // for quotactl(2); empty to use quotactl_fd(2)
}

// Supported returns nil if the file system of dir limits projects, and an
// *layerfs.UnsupportedError with the reason if it does not.
func Supported(dir string) error {
	p, err := Open(dir, nil)
	if err != nil {
		return err
	}
	return p.Close()
}

// Open finds out whether the file system of root limits projects. The error
// matches [errors.ErrUnsupported] if it cannot, and says what is missing.
func Open(root string, opts *Options) (*Projects, error) {
	if opts == nil {
		opts = &Options{}
	}
	f, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	p := &Projects{root: f, first: opts.First}
	if p.first == 0 {
		p.first = DefaultFirst
	}
	if err := p.probe(opts.BlockDevice); err != nil {
		f.Close()
		return nil, err
	}
	return p, nil
}

func (p *Projects) probe(byDevice bool) error {
	if _, err := sys.GetFSXattr(p.root); err != nil {
		return refused(err, "the file system has no project ids")
	}
	if !byDevice {
		err := p.enabled()
		if !errors.Is(err, unix.ENOSYS) {
			return err
		}
	}
	device, err := blockDevice(p.root)
	if err != nil {
		return no("no block device for quotactl(2): " + err.Error())
	}
	p.device = device
	return p.enabled()
}

// lacksCall tells ENOSYS of the kernel from ENOSYS of the file system: an
// impossible descriptor is EBADF if quotactl_fd is there.
func lacksCall() bool {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, ^uintptr(0), sys.QuotaGetState, 0, 0, 0, 0)
	return errno == unix.ENOSYS
}

// enabled asks for the state of project quotas. The error is a bare ENOSYS if
// the kernel has no quotactl_fd.
func (p *Projects) enabled() error {
	state := sys.QuotaState{Version: sys.QuotaStateVersion}
	err := call(p, sys.QuotaGetState, 0, &state)
	switch {
	case errors.Is(err, unix.ENOSYS) && (p.device != "" || !lacksCall()):
		return no("the kernel or this file system has no quotas (quotactl: " + unix.ENOSYS.Error() + ")")
	case errors.Is(err, unix.ENOSYS):
		return err
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTBLK), errors.Is(err, unix.ENODEV):
		return refused(err, "no quota is turned on")
	case errors.Is(err, unix.EPERM):
		return refused(err, "quotactl needs CAP_SYS_ADMIN")
	case err != nil:
		return err
	case state.Flags&sys.ProjectQuotaCounted == 0:
		return no("project quota is off: mount with prjquota (ext4 also needs the features quota and project, tune2fs -O project -Q prjquota)")
	case state.Flags&sys.ProjectQuotaLimited == 0:
		return no("project quota is counted but not enforced: mount with prjquota")
	}
	return nil
}

func no(reason string) error {
	return &layerfs.UnsupportedError{Feature: "project quota", Reason: reason}
}

// refused says no if err is how a file system says that it does not know the
// call, and passes other errors on.
func refused(err error, why string) error {
	for _, errno := range []unix.Errno{unix.ENOTTY, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS, unix.ESRCH, unix.EPERM, unix.ENOTBLK, unix.ENODEV} {
		if errors.Is(err, errno) {
			return no(why + " (" + err.Error() + ")")
		}
	}
	return err
}

func call[T any](p *Projects, cmd int, id uint32, arg *T) error {
	if p.device != "" {
		return sys.Quotactl(p.device, cmd, id, arg)
	}
	return sys.QuotactlFd(p.root, cmd, id, arg)
}

// blockDevice finds a name of the device f is on: the source of its mount,
// unless that is a name such as /dev/root which does not exist, and otherwise
// what the kernel calls it.
func blockDevice(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	major, minor := unix.Major(st.Dev), unix.Minor(st.Dev)
	var names []string
	if list, err := mount.Under("/"); err == nil {
		for _, m := range list {
			if uint32(m.Major) == major && uint32(m.Minor) == minor && strings.HasPrefix(m.Source, "/") {
				names = append(names, m.Source)
			}
		}
	}
	number := strconv.Itoa(int(major)) + ":" + strconv.Itoa(int(minor))
	names = append(names, "/dev/block/"+number)
	if b, err := os.ReadFile("/sys/dev/block/" + number + "/uevent"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
				names = append(names, "/dev/"+name)
			}
		}
	}
	for _, name := range names {
		var dev unix.Stat_t
		if unix.Stat(name, &dev) == nil && dev.Mode&unix.S_IFMT == unix.S_IFBLK && dev.Rdev == st.Dev {
			return name, nil
		}
	}
	return "", fmt.Errorf("device %s of %s has no node in /dev", number, f.Name())
}

// Close releases the file system.
func (p *Projects) Close() error { return p.root.Close() }

// ID returns the project id of a directory or file; zero means none.
func (p *Projects) ID(path string) (uint32, error) {
	f, err := open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	a, err := sys.GetFSXattr(f)
	return a.ProjectID, err
}

// Assign gives directories a project id that everything made in them
// afterwards inherits. What is in them already keeps its own; see
// [Projects.AssignTree]. A file cannot be renamed or linked into a directory of
// another project (EXDEV), so the work and upper directories of an overlay need
// the same.
func (p *Projects) Assign(id uint32, dirs ...string) error {
	for _, dir := range dirs {
		f, err := open(dir)
		if err != nil {
			return err
		}
		err = assign(f, id, true)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func assign(f *os.File, id uint32, dir bool) error {
	a, err := sys.GetFSXattr(f)
	if err != nil {
		return err
	}
	a.ProjectID = id
	if dir {
		a.XFlags |= sys.FSXFlagProjInherit
		if id == 0 {
			a.XFlags &^= sys.FSXFlagProjInherit
		}
	}
	return sys.SetFSXattr(f, a)
}

// AssignTree is [Projects.Assign] for a directory with everything in it.
// Symbolic links, devices and the like keep their id: the kernel could not
// change it before Linux 6.17. Nobody may write to the tree meanwhile. The
// cost grows with the number of files.
func (p *Projects) AssignTree(id uint32, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !e.IsDir() && !e.Type().IsRegular() {
			return nil
		}
		f, err := root.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return assign(f, id, e.IsDir())
	})
}

// Allocate returns a project id that no entry of the directories parents has,
// nor parents themselves, and that holds and limits nothing on the file system
// as far as the kernel knows. It is free until it is assigned; the caller holds
// a lock over both. The cost grows with the number of entries.
func (p *Projects) Allocate(parents ...string) (uint32, error) {
	var used []uint32
	for _, parent := range parents {
		id, err := p.ID(parent)
		if err != nil {
			return 0, err
		}
		used = append(used, id)
		entries, err := os.ReadDir(parent)
		if err != nil {
			return 0, err
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			id, err := p.ID(filepath.Join(parent, e.Name()))
			if errors.Is(err, os.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				return 0, err
			}
			used = append(used, id)
		}
	}
	return unused(p.first, used, func(id uint32) (bool, error) {
		r, err := p.Report(id)
		return r != Report{}, err
	})
}

// SetLimits replaces the limits of a project; zero means none. Bytes are
// rounded up to 512, and by the file system to its blocks. What the project
// holds already stays, and writing fails with EDQUOT (ext4) or ENOSPC (xfs).
//
// ext4 does not limit a process with CAP_SYS_RESOURCE, which root has and a
// container should not; overlayfs writes without it (commit 51f8f3c4e225, Linux
// 4.10).
func (p *Projects) SetLimits(id uint32, q layerfs.Quota) error {
	if err := check(q); err != nil {
		return err
	}
	if id == 0 {
		return errors.New("project 0 is everything without a project and is not limited")
	}
	return call(p, sys.QuotaSet, id, &sys.DiskQuota{
		Version:   sys.DiskQuotaVersion,
		Flags:     sys.ProjectQuotaFlag,
		ID:        id,
		FieldMask: sys.FieldBlockHard | sys.FieldBlockSoft | sys.FieldInodeHard | sys.FieldInodeSoft,
		BlockHard: sectors(q.Bytes),
		InodeHard: uint64(q.Inodes),
	})
}

// Clear lifts the limits of a project.
func (p *Projects) Clear(id uint32) error { return p.SetLimits(id, layerfs.Quota{}) }

// Report returns what a project holds and its limits. What was written but not
// allocated yet may not be in it.
func (p *Projects) Report(id uint32) (Report, error) {
	var q sys.DiskQuota
	err := call(p, sys.QuotaGet, id, &q)
	if errors.Is(err, unix.ENOENT) {
		return Report{}, nil // xfs has no record of a project that never was
	}
	if err != nil {
		return Report{}, err
	}
	return Report{
		Bytes:  int64(q.Blocks) * sector,
		Inodes: int64(q.Inodes),
		Limit:  layerfs.Quota{Bytes: int64(q.BlockHard) * sector, Inodes: int64(q.InodeHard)},
	}, nil
}

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}
