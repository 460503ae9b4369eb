// Command vminit is process 1 of a test guest: it mounts, loads modules, runs
// the commands of the job and sends what they print to the host. See package
// guest.
package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/guest"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "run" {
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, "vminit:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "vminit: not process 1 of a guest")
		os.Exit(1)
	}
	if err := reap(); err != nil {
		fmt.Fprintln(os.Stderr, "vminit:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // nothing is left that could report an error
}

// reap prepares the root, starts the runner and waits for it. The work is in a
// child because process 1 inherits orphans and must wait for any process,
// which os/exec cannot share.
func reap() error {
	if err := mountAll(); err != nil {
		return err
	}
	p, err := os.StartProcess("/init", []string{"/init", "run"}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Env:   []string{"PATH=" + path, "HOME=/root"},
	})
	if err != nil {
		return err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait4: %w", err)
		case pid == p.Pid && (ws.Exited() || ws.Signaled()):
			return nil
		}
	}
}

const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// mountAll gives the guest the mounts of an ordinary system. The root is bound
// over itself first: the initramfs cannot be pivoted away, a mount on it can.
func mountAll() error {
	steps := []struct {
		what string
		call func() error
	}{
		{"bind /", func() error { return unix.Mount("/", "/mnt", "", unix.MS_BIND, "") }},
		{"chdir /mnt", func() error { return unix.Chdir("/mnt") }},
		{"move /", func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") }},
		{"chroot", func() error { return unix.Chroot(".") }},
		{"chdir /", func() error { return unix.Chdir("/") }},
	}
	for _, s := range steps {
		if err := s.call(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	for _, m := range []struct{ typ, dir, opts string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", "mode=0755"},
		{"devpts", "/dev/pts", ""},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/tmp", "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"securityfs", "/sys/kernel/security", ""},
		{"debugfs", "/sys/kernel/debug", ""},
		{"tracefs", "/sys/kernel/tracing", ""},
	} {
		// sysfs has its own directories, the rest is made here.
		_ = os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.typ, m.dir, m.typ, 0, m.opts); err != nil && m.typ != "tracefs" && m.typ != "debugfs" && m.typ != "securityfs" {
			return fmt.Errorf("mount %s: %w", m.typ, err)
		}
	}
	for from, to := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(to, from); err != nil {
			return err
		}
	}
	return errors.Join(
		unix.Sethostname([]byte("guest")),
		os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0o644),
	)
}

// run does the job.
func run() error {
	raw, err := os.ReadFile(guest.JobPath)
	if err != nil {
		return err
	}
	var job guest.Job
	if err := json.Unmarshal(raw, &job); err != nil {
		return err
	}
	// Modules first: the port is one of them.
	for _, m := range job.Modules {
		if err := load(m); err != nil {
			return err
		}
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	out := guest.NewFrameWriter(port)
	if err := work(&job, out); err != nil {
		return errors.Join(err, out.Send(guest.Fatal, []byte(err.Error())))
	}
	return out.Send(guest.Done, nil)
}

func work(job *guest.Job, out *guest.FrameWriter) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	if err := out.Send(guest.Hello, []byte(unix.ByteSliceToString(uts.Release[:]))); err != nil {
		return err
	}
	for _, m := range job.Optional {
		if err := load(m); err != nil {
			if err := out.Send(guest.Note, []byte(err.Error())); err != nil {
				return err
			}
		}
	}
	env := append(os.Environ(), job.Env...)
	if err := loopback(); err != nil {
		return err
	}
	if job.Scratch {
		if err := scratch(); err != nil {
			return err
		}
		env = append(env, "TMPDIR=/scratch/tmp")
	}
	if err := os.MkdirAll(guest.OutDir, 0o755); err != nil {
		return err
	}
	env = append(env, "LAYERFS_OUT="+guest.OutDir)
	for i, c := range job.Commands {
		if err := out.Send(guest.Begin, []byte(strconv.Itoa(i))); err != nil {
			return err
		}
		end := runCommand(c, env, out)
		end.Index = i
		if err := out.SendJSON(guest.End, end); err != nil {
			return err
		}
	}
	if job.Out {
		return sendOut(out)
	}
	return nil
}

// load gives a module to the kernel; one that is there already is fine.
func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", filepath.Base(file), err)
	}
	return nil
}

// openPort finds the virtio port by its name. The driver makes it some time
// after its module is loaded.
func openPort() (*os.File, error) {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(b)) == guest.PortName {
				return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(n))), os.O_RDWR, 0)
			}
		}
		if time.Now().After(deadline) {
			return nil, errors.New("no virtio port " + guest.PortName)
		}
	}
}

// scratch makes and mounts the file system on the first disk.
func scratch() error {
	const disk = "/dev/vda"
	mkfs := exec.Command("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
		"-O", "project,quota,^resize_inode", "-J", "size=32", disk)
	if b, err := mkfs.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, b)
	}
	if err := os.MkdirAll("/scratch", 0o755); err != nil {
		return err
	}
	if err := unix.Mount(disk, "/scratch", "ext4", 0, "prjquota,discard"); err != nil {
		return fmt.Errorf("mount /scratch: %w", err)
	}
	if err := os.MkdirAll("/scratch/tmp", 0o777); err != nil {
		return err
	}
	return os.Chmod("/scratch/tmp", 0o777|fs.ModeSticky)
}

// loopback brings the interface lo up, for tests that listen on it.
func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("lo up: %w", err)
	}
	return nil
}

// runCommand runs one command in a session of its own and kills all of it when
// its time is over: first SIGQUIT, which makes a Go program print its
// goroutines, and the kernel prints its blocked tasks.
func runCommand(c guest.Command, env []string, out *guest.FrameWriter) guest.Ended {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(c.Timeout)*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Dir, cmd.Env = c.Dir, env
	w := out.Stream(guest.Output)
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error {
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0) // for the kernel log only
		time.AfterFunc(5*time.Second, func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
		return unix.Kill(-cmd.Process.Pid, unix.SIGQUIT)
	}
	cmd.WaitDelay = 10 * time.Second
	start := time.Now()
	err := cmd.Run()
	end := guest.Ended{Seconds: time.Since(start).Seconds()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		end.Code, end.Error = -1, fmt.Sprintf("killed after %d s", c.Timeout)
	case errors.As(err, &exit):
		end.Code = exit.ExitCode()
		if end.Code < 0 {
			end.Error = err.Error()
		}
	case err != nil:
		end.Code, end.Error = -1, err.Error()
	}
	return end
}

// sendOut sends the regular files of OutDir as a tar stream.
func sendOut(out *guest.FrameWriter) error {
	tw := tar.NewWriter(out.Stream(guest.File))
	if err := tw.AddFS(os.DirFS(guest.OutDir)); err != nil {
		return fmt.Errorf("send results: %w", err)
	}
	return tw.Close()
}
