package testenv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/mount"
)

// snapshot is what a process holds. The keys say what a thing is, the values
// describe it for people.
type snapshot map[string]string

// settle takes snapshots until nothing is left or two seconds have passed:
// loop devices and traced processes go away a moment after the call that ended
// them, and the runtime's own descriptors come and go.
func settle(before snapshot, dir string) []string {
	var leaks []string
	for range 200 { // ten seconds: daemons of FUSE end in their own time
		leaks = nil
		after, err := takeSnapshot(dir)
		if err != nil {
			return []string{err.Error()}
		}
		for key, what := range after {
			if _, ok := before[key]; !ok {
				leaks = append(leaks, what)
			}
		}
		if len(leaks) == 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	slices.Sort(leaks)
	return leaks
}

// takeSnapshot looks at this process and, if dir is not empty, at the mounts
// and devices below dir.
func takeSnapshot(dir string) (snapshot, error) {
	s := snapshot{}
	if err := s.descriptors(); err != nil {
		return nil, err
	}
	if err := s.children(); err != nil {
		return nil, err
	}
	if dir == "" {
		return s, nil
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	if err := s.mounts(dir); err != nil {
		return nil, err
	}
	return s, s.devices(dir)
}

func (s snapshot) descriptors() error {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range list {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue // the one of ReadDir
		}
		if err != nil {
			return err
		}
		// What the runtime opens once and keeps: its poller, and the pidfd
		// probe; and the cgroup files it watches GOMAXPROCS with.
		if strings.HasPrefix(link, "anon_inode:[event") || strings.Contains(link, "cgroup") || strings.Contains(link, "cpu.max") {
			continue
		}
		s["fd "+e.Name()+" "+link] = fmt.Sprintf("descriptor %s of %s", e.Name(), link)
	}
	return nil
}

func (s snapshot) children() error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range tasks {
		list, err := os.ReadFile("/proc/self/task/" + t.Name() + "/children")
		if err != nil {
			continue // the thread has ended, or CONFIG_PROC_CHILDREN is off
		}
		for pid := range strings.FieldsSeq(string(list)) {
			cmd, err := os.ReadFile("/proc/" + pid + "/cmdline")
			if err != nil {
				continue
			}
			state := strings.ReplaceAll(strings.TrimRight(string(cmd), "\x00"), "\x00", " ")
			if state == "" {
				state = "zombie"
			}
			s["pid "+pid] = fmt.Sprintf("child process %s (%s)", pid, state)
		}
	}
	return nil
}

func (s snapshot) mounts(dir string) error {
	list, err := mount.Under(dir)
	if err != nil {
		return err
	}
	for _, m := range list {
		s["mount "+strconv.Itoa(m.ID)] = fmt.Sprintf("mount of %s (%s) at %s", m.FSType, m.Source, m.Mountpoint)
	}
	return nil
}

// devices finds the loop devices whose file is below dir, and the
// device-mapper devices that use them, directly or not.
func (s snapshot) devices(dir string) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	var names []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // detached since
		}
		backing := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
		if backing != dir && !strings.HasPrefix(backing, dir+"/") {
			continue
		}
		name := filepath.Base(filepath.Dir(filepath.Dir(file)))
		names = append(names, name)
		s["loop "+name] = fmt.Sprintf("loop device /dev/%s of %s", name, backing)
	}
	for len(names) > 0 {
		holders, err := filepath.Glob("/sys/block/" + names[0] + "/holders/dm-*")
		if err != nil {
			return err
		}
		names = names[1:]
		for _, h := range holders {
			dm := filepath.Base(h)
			if _, ok := s["dm "+dm]; ok {
				continue
			}
			name, _ := os.ReadFile("/sys/block/" + dm + "/dm/name")
			s["dm "+dm] = fmt.Sprintf("device-mapper device %s (%s)", strings.TrimSpace(string(name)), dm)
			names = append(names, dm)
		}
	}
	return nil
}

// release removes the mounts below dir, so that the directory can be removed
// without reaching into what is mounted there.
func release(dir string) {
	list, err := mount.Under(dir)
	if err != nil {
		return
	}
	for _, m := range slices.Backward(list) {
		_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
}
