package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
)

// terminal returns one, and a function that closes it and tells what was
// written to it. Source: ptmx(4), unlockpt(3).
func terminal(t *testing.T) (tty *os.File, written func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	require.NoError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		master.Close()
		t.Skipf("needs pseudo terminals: %v", err)
	}
	var got bytes.Buffer
	var reading sync.WaitGroup
	reading.Go(func() { _, _ = io.Copy(&got, master) }) // ends with EIO
	closed := false
	written = func() string {
		if !closed {
			closed = true
			assert.NoError(t, tty.Close())
			reading.Wait()
			assert.NoError(t, master.Close())
		}
		return got.String()
	}
	t.Cleanup(func() { written() })
	return tty, written
}

func TestTerminal_diffIsRefused(t *testing.T) {
	s := newShell(t, "vfs")
	s.ok("create", "base")
	tty, written := terminal(t)
	var errs bytes.Buffer
	code := run(context.Background(), []string{"layerfs", "--root", s.root, "diff", "base"}, s.in, tty, &errs)
	assert.Equal(t, exitUsage, code)
	assert.Contains(t, errs.String(), "does not belong on a terminal")
	assert.Empty(t, written())
}

func TestTerminal_inputIsRefused(t *testing.T) {
	s := newShell(t, "vfs")
	tty, _ := terminal(t)
	s.in = tty
	assert.Contains(t, s.fails(exitUsage, "import", "l", "-"), "standard input is a terminal")
	s.ok("create", "l")
	assert.Contains(t, s.fails(exitUsage, "apply", "l"), "standard input is a terminal")
}

// A bar is drawn on a terminal, unless it would be in the way, and it is gone
// at the end.
func TestTerminal_progress(t *testing.T) {
	s := newShell(t, "vfs")
	big := file(t, layer(t, "a", strings.Repeat("x", 10<<20)))
	s.ok("create", "c", "") // so that the root exists
	n := 0
	on := func(args ...string) string {
		n++
		tty, written := terminal(t)
		all := append([]string{"layerfs", "--root", s.root, "--durability", "none"}, args...)
		require.Equal(t, exitOK, run(context.Background(), all, s.in, io.Discard, tty))
		return written()
	}
	seen := on("import", "one", big)
	assert.Contains(t, seen, "import one")
	last := seen[strings.LastIndex(seen, "\r")+1:]
	assert.NotContains(t, last, "import", "the bar is removed")
	assert.Contains(t, on("diff", "-o", filepath.Join(t.TempDir(), "x"), "one"), "diff one")
	assert.Contains(t, on("copy", "--to", filepath.Join(t.TempDir(), "x"), "one"), "copy one")
	s.in = bytes.NewReader(layer(t, "a", strings.Repeat("x", 10<<20)))
	assert.Contains(t, on("import", "two", "-"), "import two")
	assert.Empty(t, on("--quiet", "import", "three", big))
	assert.Empty(t, on("--json", "import", "four", big))
	assert.Empty(t, on("ls"))
}

// A bar that was told too small a total goes on, and so does the work.
func TestTerminal_wrongTotal(t *testing.T) {
	tty, _ := terminal(t)
	a := &app{err: tty}
	m := a.meter("x", 10)
	n, err := io.Copy(m.writer(io.Discard), strings.NewReader(strings.Repeat("x", 1000)))
	assert.NoError(t, err)
	assert.Equal(t, int64(1000), n)
	m.set(layerfs.Progress{Bytes: 5000})
	m.set(layerfs.Progress{Bytes: 5000, Total: 9000})
	m.done()
}
