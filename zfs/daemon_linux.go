package zfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
)

// What the zfs-fuse daemon needs that the kernel's file system does not is in
// this file. It has three faults that it can be kept from (fuse_listener.c and
// cmd_listener.c of zfs-fuse 0.7):
//
//   - It learns of an unmount by the end of its connection. It then tries to
//     give the file system up until no file of it is open, and serves nobody
//     meanwhile. The kernel tells of the close of a file in a request of its
//     own, which is dropped if the unmount comes first; then that never ends.
//     So an unmount waits until all requests have been answered, and a file
//     system with open files is not detached but moved out of sight, because
//     its end would follow the last close at once.
//   - It closes the descriptor of a connection twice. What was opened in
//     between, a connection of another file system or of a zfs command, is gone.
//     So nothing is asked of it until it has dealt with an unmount.
//   - It mixes up commands that come at the same time.
//
// A fourth, that it waits for a request that was withdrawn when its process was
// interrupted, is its users' business: any later request to that file system
// wakes it.

// daemonDir is where the zfs-fuse daemon has its socket.
const daemonDir = "/var/run/zfs"

// connections has a directory for each FUSE connection
// (Documentation/filesystems/fuse/fuse.rst, control filesystem).
const connections = "/sys/fs/fuse/connections"

const (
	// settle is how long the daemon may take to answer what was asked of it
	// before an unmount, and to notice that. It calls sync(2) and so waits for
	// all disks of the host.
	settle = 20 * time.Second

	// turnLimit is how long a call waits for the others that have their turn.
	// Behind an unmount or two of a daemon that does not answer it still gets its
	// own.
	turnLimit = 3 * settle

	// brief is how long a mount may be busy before its files count as open.
	brief = 50 * time.Millisecond
	// look is the time between two looks at what the daemon does.
	look = 2 * time.Millisecond
)

// turnLock is the lock of a turn, beside the daemon's socket. Whoever can open a
// file can lock it, so this one is for nobody but its owner.
const turnLock = ".layerfs.lock"

// turns returns what keeps calls apart here: nothing with the kernel's file
// system.
func turns() func(context.Context) (*os.File, error) {
	if kernelMounts() {
		return nil
	}
	return daemonTurn
}

// daemonTurn keeps all processes from asking the daemon for two things at once.
func daemonTurn(ctx context.Context) (*os.File, error) { return turnIn(ctx, daemonDir, turnLimit) }

// turnIn locks the file of turns in a directory, which is there if a daemon is.
func turnIn(ctx context.Context, dir string, limit time.Duration) (*os.File, error) {
	path := filepath.Join(dir, turnLock)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.Open(os.DevNull) // the command will say what is missing
	case errors.Is(err, fs.ErrPermission):
		return nil, &layerfs.UnsupportedError{Feature: name, Reason: "the calls of the zfs-fuse daemon cannot be kept apart: " + err.Error()}
	case err != nil:
		return nil, err
	}
	if err := waitTurn(ctx, f, limit); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func waitTurn(ctx context.Context, f *os.File, limit time.Duration) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s: not a file of this user alone (mode %#o, owner %d)", f.Name(), st.Mode, st.Uid)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		fmt.Errorf("another call of zfs, mount or unmount with zfs-fuse has not ended in %v (who has locked %s)", limit, f.Name()))
	defer cancel()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		err := flock(f)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// mountByDaemon has the daemon mount a dataset at its stage. That is its
// mountpoint from then on; before it is legacy, because zfs clone of zfs-fuse
// mounts what has another one, whatever canmount says.
func (m *mechanism) mountByDaemon(ctx context.Context, id string) error {
	ds, stage := m.dataset(id), m.stage(id)
	if _, err := m.tool.run(ctx, "set", "mountpoint="+stage, ds); err != nil {
		return err
	}
	return m.patiently(ctx, func() error {
		_, err := m.tool.run(ctx, "mount", ds)
		return err
	})
}

// asidePrefix is what the names of the directories begin with, among the private
// mounts, where file systems are whose files are still open.
const asidePrefix = "aside"

// hideFromDaemon unmounts what is mounted at path, and what was moved aside of the
// same layer and is not busy any more. If files of it are open it is moved out of
// sight instead, which works if the mount around it is not shared (mount(2),
// EINVAL); else the error matches layerfs.ErrInUse.
func (m *mechanism) hideFromDaemon(path string) error {
	turn, err := daemonTurn(context.Background()) // nobody cancels an unmount
	if err != nil {
		return err
	}
	defer turn.Close()
	// First, while there is another mount of the file system: its end is what
	// costs time.
	if err := m.clearAsidesInTurn(m.layerAt(path)); err != nil {
		return err
	}
	shown, err := mountsLike(path)
	if err != nil || len(shown) == 0 {
		return err
	}
	err = m.leave(path, shown)
	if errors.Is(err, unix.EBUSY) {
		return m.putAside(path, err)
	}
	return err
}

// asideIn returns the layer whose file system was moved aside to a path, if it is
// such a place of a driver whose private mounts are in a directory of views. A
// layer itself may have a name like one.
func asideIn(views, path string) (id string, ok bool) {
	if filepath.Dir(filepath.Dir(path)) != views {
		return "", false
	}
	return asideOf(filepath.Base(path))
}

// asideOf returns the layer in the name of a directory among the private mounts:
// asidePrefix, digits, ".", the id, which may hold dots. All other names there
// begin with a digit.
func asideOf(name string) (id string, ok bool) {
	rest, ok := strings.CutPrefix(name, asidePrefix)
	number, id, dot := strings.Cut(rest, ".")
	if !ok || !dot || number == "" || id == "" || strings.Trim(number, "0123456789") != "" {
		return "", false
	}
	return id, true
}

// layerAt returns the layer that is mounted at a path of this package.
func (m *mechanism) layerAt(path string) string {
	name := filepath.Base(path)
	if filepath.Dir(filepath.Dir(path)) == m.state("views") {
		_, name, _ = strings.Cut(name, ".") // of this driver or of one that is gone
	}
	return name
}

// clearAside unmounts a file system that was moved aside, if its files have been
// closed since. The caller has the turn.
func (m *mechanism) clearAside(path string) error {
	shown, err := mountsLike(path)
	if err != nil {
		return err
	}
	if len(shown) > 0 {
		if err = m.leave(path, shown); errors.Is(err, unix.EBUSY) {
			return nil
		}
	}
	return errors.Join(err, removeDir(path))
}

// clearAsides does so for all that are of a layer, whose lock is held.
func (m *mechanism) clearAsides(id string) error {
	if m.facts.Kernel {
		return nil
	}
	paths, err := m.asides(id)
	if err != nil || len(paths) == 0 {
		return err
	}
	turn, err := daemonTurn(context.Background()) // nobody cancels an unmount
	if err != nil {
		return err
	}
	defer turn.Close()
	return m.clearAsidesInTurn(id)
}

// clearAsidesInTurn is clearAsides for a caller that has the turn.
func (m *mechanism) clearAsidesInTurn(id string) error {
	paths, err := m.asides(id)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := m.clearAside(path); err != nil {
			return err
		}
	}
	return nil
}

// asides lists where file systems of a layer were moved aside, by whatever driver.
func (m *mechanism) asides(id string) ([]string, error) {
	paths, err := filepath.Glob(globQuote(m.state("views")) + "/*/" + asidePrefix + "*")
	return slices.DeleteFunc(paths, func(path string) bool {
		of, ok := asideIn(m.state("views"), path)
		return !ok || of != id
	}), err
}

// mountsLike returns all mounts of the file system that is mounted at path, that
// one first.
func mountsLike(path string) ([]mountinfo.Info, error) {
	list, err := mount.Under("/")
	if err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	path = filepath.Join(dir, filepath.Base(path))
	at := -1
	for i, info := range list {
		if info.Mountpoint == path {
			at = i // the last one is on top
		}
	}
	if at < 0 {
		return nil, nil
	}
	shown := []mountinfo.Info{list[at]}
	for i, info := range list {
		if i != at && info.Major == list[at].Major && info.Minor == list[at].Minor {
			shown = append(shown, info)
		}
	}
	return shown, nil
}

// leave unmounts what is mounted at path. If that was the last mount of the file
// system, the daemon has done with it afterwards.
func (m *mechanism) leave(path string, shown []mountinfo.Info) error {
	if len(shown) > 1 {
		return mount.UnmountNow(path)
	}
	if err := answered(path, shown[0].Minor); err != nil {
		return err
	}
	all := daemons()
	before := all.files()
	err := mount.UnmountNow(path)
	// A look at all mounts, as df does, holds one for a moment; of the mounts that
	// New tries nobody has files open.
	patience := brief
	if m.views == nil {
		patience = settle
	}
	for end := time.Now().Add(patience); errors.Is(err, unix.EBUSY) && time.Now().Before(end); time.Sleep(look) {
		err = mount.UnmountNow(path)
	}
	if err != nil {
		return err
	}
	_, err = os.Stat(connection(shown[0].Minor))
	if before == 0 || err == nil {
		return nil // the daemon is in another process namespace, or the file system in another one of mounts
	}
	for end := time.Now().Add(settle); time.Now().Before(end); time.Sleep(look) {
		if all.files() < before && !all.work() {
			return nil
		}
	}
	m.log.Warn("zfs-fuse does not notice an unmount", "path", path, "after", settle)
	return nil
}

// connection is the directory of the connection of a FUSE file system.
func connection(minor int) string { return filepath.Join(connections, strconv.Itoa(minor)) }

// waiting returns how many requests to a FUSE file system have not been answered.
func waiting(minor int) (string, error) {
	b, err := os.ReadFile(filepath.Join(connection(minor), "waiting"))
	return strings.TrimSpace(string(b)), err
}

// answered waits until the daemon has answered all that was asked of the file
// system at path.
func answered(path string, minor int) error {
	for end := time.Now().Add(settle); time.Now().Before(end); time.Sleep(look) {
		n, err := waiting(minor)
		if err != nil {
			// The control file system is not mounted. What is asked now comes
			// after what was asked before.
			var st unix.Statfs_t
			err := unix.Statfs(path, &st)
			if errors.Is(err, unix.ENOTCONN) {
				return nil
			}
			return err
		}
		if n == "0" {
			return nil
		}
	}
	return fmt.Errorf("zfs-fuse does not answer for %s in %v", path, settle)
}

// putAside moves the file system mounted at path, which is busy, to where nobody
// looks for it.
func (m *mechanism) putAside(path string, busy error) error {
	if m.views == nil {
		return busy // New tries what works here; nobody else knows of this mount
	}
	aside := filepath.Join(m.views.dir, fmt.Sprintf("%s%d.%s", asidePrefix, m.serial.Add(1), m.layerAt(path)))
	if err := os.Mkdir(aside, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(path, aside, "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("%w: %w; move it aside: %w", layerfs.ErrInUse, busy, errors.Join(os.NewSyscallError("mount", err), removeDir(aside)))
	}
	return nil
}

// processes are directories in /proc.
type processes []string

// daemons returns the zfs-fuse daemons.
func daemons() processes {
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil
	}
	var all processes
	for _, comm := range comms {
		if name, err := os.ReadFile(comm); err == nil && string(name) == "zfs-fuse\n" {
			all = append(all, filepath.Dir(comm))
		}
	}
	return all
}

// files counts the file systems that daemons serve, each by an open file.
func (all processes) files() (n int) {
	for _, dir := range all {
		files, err := filepath.Glob(dir + "/fd/*")
		if err != nil {
			continue
		}
		for _, f := range files {
			if to, err := os.Readlink(f); err == nil && to == "/dev/fuse" {
				n++
			}
		}
	}
	return n
}

// work reports whether a thread of a daemon runs or waits for a disk: between
// closing a descriptor and closing it again it does.
func (all processes) work() bool {
	for _, dir := range all {
		stats, err := filepath.Glob(dir + "/task/*/stat")
		if err != nil {
			continue
		}
		for _, stat := range stats {
			b, err := os.ReadFile(stat)
			if err != nil {
				continue // it has ended
			}
			// "PID (NAME) STATE …", proc_pid_stat(5); the name may hold anything.
			_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
			if ok && rest != "" && (rest[0] == 'R' || rest[0] == 'D') {
				return true
			}
		}
	}
	return false
}
