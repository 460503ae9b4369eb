package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Machine says what to boot.
type Machine struct {
	Kernel string // path of the kernel image
	Initrd string // path of the initramfs
	Dir    string // directory of this run, for the disks and the kernel log
	Memory int    // MiB
	CPUs   int
	Accel  string  // "kvm" or "tcg"
	Disks  []int64 // bytes of each sparse disk
	Append string  // more words for the kernel's command line
}

// ConsoleLog returns the path of the kernel log.
func (m *Machine) ConsoleLog() string { return filepath.Join(m.Dir, "console.log") }

// args returns the arguments of QEMU.
func (m *Machine) args() []string {
	accel := m.Accel
	if accel == "tcg" {
		accel = "tcg,thread=multi"
	}
	a := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "pc", "-accel", accel, "-cpu", "max",
		"-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.Memory),
		"-kernel", m.Kernel, "-initrd", m.Initrd,
		// The boot is the larger part of a short run. No console is on the
		// screen, the probing of timers takes long when time is emulated, and
		// the guest protects nothing from its own tests.
		"-append", strings.TrimSpace("console=ttyS0 loglevel=6 panic=-1 oops=panic mitigations=off nokaslr " +
			m.clock() + " no_timer_check random.trust_cpu=on audit=0 selinux=0 apparmor=0 " + m.Append),
		"-serial", "file:" + m.ConsoleLog(),
		"-device", "virtio-serial-pci",
		"-chardev", "stdio,id=results,signal=off",
		"-device", "virtserialport,chardev=results,name=" + PortName,
	}
	for i := range m.Disks {
		a = append(a,
			// The disk does not outlive the run, so nothing is synced.
			"-drive", fmt.Sprintf("file=%s,if=none,id=disk%d,format=raw,cache=unsafe,discard=unmap,detect-zeroes=unmap", m.disk(i), i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=layerfs%d", i, i))
	}
	return a
}

// clock returns the words for the clock. By emulation the counter of the
// processor ticks at the host's rate, which the kernel measures while it boots:
// on a busy host it finds a fifth of it ("PIT calibration deviates from HPET"),
// and the guest's time runs five times too fast, so that time limits end tests.
// The emulated HPET is slower to read, but right.
func (m *Machine) clock() string {
	if m.Accel == "tcg" {
		return "tsc=unstable clocksource=hpet"
	}
	return "tsc=reliable"
}

func (m *Machine) disk(i int) string { return filepath.Join(m.Dir, fmt.Sprintf("disk%d", i)) }

// Run boots the machine and hands each frame to handle, until the guest said
// Done and switched off. The error tells of a guest that ended early, of a
// Fatal frame, of an error of handle and of ctx; the machine is gone then.
func (m *Machine) Run(ctx context.Context, handle func(Kind, []byte) error) (err error) {
	for i, size := range m.Disks {
		if err := sparse(m.disk(i), size); err != nil {
			return err
		}
		defer os.Remove(m.disk(i)) // of no use to anybody after the run
	}
	parent := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", m.args()...)
	cmd.WaitDelay = 5 * time.Second
	defer dieWithUs(cmd)()
	var stderr tail
	cmd.Stderr = &stderr
	// An open pipe that says nothing: QEMU would read from ours otherwise.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	done, readErr := frames(stdout, handle)
	// Switching off takes a moment; a machine that cannot is killed. After an
	// error it may run on for ever.
	grace := 5 * time.Second
	if !done && !errors.Is(readErr, io.EOF) {
		grace = 0
	}
	t := time.AfterFunc(grace, cancel)
	defer t.Stop()
	_, _ = io.Copy(io.Discard, stdout)
	stopped := parent.Err()
	waitErr := cmd.Wait()
	switch {
	case done:
		return nil
	case stopped != nil:
		return context.Cause(parent)
	case readErr != nil && !errors.Is(readErr, io.EOF):
		return readErr
	}
	return fmt.Errorf("the guest ended early (qemu: %v%s)", waitErr, stderr.text())
}

// frames handles frames until Done. It reports whether it came to that.
func frames(r io.Reader, handle func(Kind, []byte) error) (bool, error) {
	for {
		k, data, err := ReadFrame(r)
		if err != nil {
			return false, err
		}
		switch k {
		case Done:
			return true, nil
		case Fatal:
			return false, fmt.Errorf("init: %s", data)
		}
		if err := handle(k, data); err != nil {
			return false, err
		}
	}
}

// tail keeps the first bytes that a program said.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[:min(len(p), max(0, 2000-len(t.b)))]...)
	return len(p), nil
}

func (t *tail) text() string {
	if s := strings.TrimSpace(string(t.b)); s != "" {
		return ": " + s
	}
	return ""
}

func sparse(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// probeLimit is how long a probe boot with KVM may take. Where KVM works it
// is over in two seconds; on some hosts the guest never executes anything.
const probeLimit = 8 * time.Second

// Accel returns "kvm" if a probe boot with it works, else "tcg". The answer
// holds until the host boots again, for the same QEMU and kernel.
func (c *Cache) Accel(ctx context.Context, k *Kernel, init string) (string, error) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return "tcg", nil
	} else if err := f.Close(); err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	version, err := command(ctx, "", "qemu-system-x86_64", "--version")
	if err != nil {
		return "", err
	}
	key := digest([]string{string(boot), string(version), k.Release})
	file := filepath.Join(c.dir, "accel-"+key)
	if b, err := os.ReadFile(file); err == nil && (string(b) == "kvm" || string(b) == "tcg") {
		return string(b), nil
	}
	modules, err := probeModules(k)
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(c.dir, "tmp-probe-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	empty := filepath.Join(dir, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return "", err
	}
	var extra []Extra
	for _, d := range []string{"mnt", "proc", "sys", "dev", "run", "tmp", "out"} {
		extra = append(extra, Extra{empty, d})
	}
	for i, g := range guestModules(modules) {
		extra = append(extra, Extra{modules[i], g})
	}
	m := &Machine{
		Kernel: k.Image, Initrd: filepath.Join(dir, "initrd"), Dir: dir,
		Memory: 256, CPUs: 1, Accel: "kvm",
	}
	if err := WriteImage(m.Initrd, "", init, &Job{Modules: guestModules(modules)}, extra); err != nil {
		return "", err
	}
	pctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	start := time.Now()
	accel := "kvm"
	if err := m.Run(pctx, func(Kind, []byte) error { return nil }); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		c.logf("no KVM: a probe boot failed: %v", err)
		accel = "tcg"
	} else {
		c.logf("KVM works: a probe boot took %s", time.Since(start).Round(time.Millisecond))
	}
	return accel, replaceFile(file, []byte(accel))
}

// probeModules returns the modules that a probe boot needs.
func probeModules(k *Kernel) ([]string, error) {
	builtin, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	tree, err := OpenModules(builtin, filepath.Join(k.Modules, "kernel"))
	if err != nil {
		return nil, err
	}
	return tree.Order(bootModules...)
}
