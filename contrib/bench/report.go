package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/fixture"
)

// goPeers are the contestants that ratios refer to.
func goPeers() []string { return []string{containerd, moby, podman} }

// printHost says where and with what the figures were made.
func printHost(w io.Writer, rounds int, layers []fixture.Layer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	tar := "unknown"
	if out, err := exec.Command("tar", "--version").Output(); err == nil {
		tar, _, _ = strings.Cut(string(out), "\n")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s: Linux %s %s, %s, %d processors, %s, %s; median of %d rounds.\n\n",
		time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(u.Release[:]), runtime.GOARCH, cpu(), runtime.NumCPU(), memory(), runtime.Version(), rounds)
	fmt.Fprintf(&b, "Peers: containerd %s with continuity %s, moby/go-archive %s, go.podman.io/storage %s, %s.\n\n",
		version("github.com/containerd/containerd/v2"), version("github.com/containerd/continuity"),
		version("github.com/moby/go-archive"), version("go.podman.io/storage"), tar)
	b.WriteString("| layer | entries | MB | made of |\n|---|---|---|---|\n")
	for _, l := range layers {
		fmt.Fprintf(&b, "| %s | %d | %.0f | %s |\n", l.Name, l.Entries, float64(l.Bytes)/1e6, l.Origin)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printTask writes one table, fastest first.
func printTask(w io.Writer, t task, rows []row) error {
	scale := 1.0
	format := "%.3f"
	if t.unit == "µs" {
		scale, format = 1e6, "%.0f"
	}
	var peer, peerCPU float64
	for _, r := range rows {
		if slices.Contains(goPeers(), r.who) {
			peer, peerCPU = least(peer, r.median), least(peerCPU, r.cpu)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n### %s\n\n", t.name)
	fmt.Fprintf(&b, "| | median %s | fastest %s | CPU %s | speed / fastest Go peer | thrift / thriftiest Go peer | peak MB |\n|---|---|---|---|---|---|---|\n", t.unit, t.unit, t.unit)
	for _, r := range rows {
		ratio, thrift, peak := "", "", ""
		if peer > 0 {
			ratio = fmt.Sprintf("%.2f", peer/r.median)
		}
		if peerCPU > 0 && r.cpu > 0 {
			thrift = fmt.Sprintf("%.2f", peerCPU/r.cpu)
		}
		if r.peak > 0 {
			peak = fmt.Sprintf("%.0f", float64(r.peak)/1e6)
		}
		fmt.Fprintf(&b, "| %s | "+format+" | "+format+" | "+format+" | %s | %s | %s |\n",
			r.who, r.median*scale, r.least*scale, r.cpu*scale, ratio, thrift, peak)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// least returns the smaller of two times, of which 0 is none.
func least(a, b float64) float64 {
	if a == 0 || b < a {
		return b
	}
	return a
}

func cpu() string { return field("/proc/cpuinfo", "model name") }

func memory() string {
	var kb int64
	if _, err := fmt.Sscanf(field("/proc/meminfo", "MemTotal"), "%d kB", &kb); err != nil {
		return "unknown memory"
	}
	return fmt.Sprintf("%d GB", (kb+(1<<19))>>20)
}

// field returns the first value of a "key: value" file.
func field(path, key string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
