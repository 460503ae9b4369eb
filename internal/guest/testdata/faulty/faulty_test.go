// Package faulty has tests that end in every way a test can end.
package faulty

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestPass(t *testing.T) {
	if _, err := os.Stat("faulty_test.go"); err != nil {
		t.Error(err)
	}
	if os.Getenv("LAYERFS_GUEST") == "" {
		t.Error("not in a guest")
	}
	out := filepath.Join(os.Getenv("LAYERFS_OUT"), "deep", "result.txt")
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(out, []byte("result\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestSkip(t *testing.T) { t.Skip("because") }

func TestFail(t *testing.T) { t.Run("sub", func(t *testing.T) { t.Error("wrong on purpose") }) }

func TestExit(t *testing.T) { os.Exit(0) }

func TestCrash(t *testing.T) {
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
}

func TestHang(t *testing.T) { select {} }

func TestPoweroff(t *testing.T) {
	if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
}

func TestPanic(t *testing.T) {
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0o200); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
}

func TestRace(t *testing.T) {
	x, done := 0, make(chan bool)
	go func() { x++; close(done) }()
	x++
	<-done
	fmt.Println("raced", x)
}

func BenchmarkNothing(b *testing.B) {
	for b.Loop() {
	}
}
