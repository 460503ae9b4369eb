package layerdir_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/layerdir"
	"github.com/layerfs/layerfs/internal/testenv"
)

// TestPowerFailure cuts the power while records are saved and dropped: the
// image of the file system is cloned in one moment, and what the clone has is
// what a disk would have. Every record whose Save or Add returned before must be
// there and whole, every one whose Drop returned gone, and none may be damaged
// that nobody was told of.
//
// The clone has every write that the device was given by then, so this is
// about their order and not about a disk that loses what it has acknowledged.
func TestPowerFailure(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			host := testenv.Btrfs(t, 2048)
			testenv.RequireTool(t, "mkfs."+fstype, fstype)
			p := &power{T: t, fstype: fstype, dir: host, image: filepath.Join(host, "image")}
			p.makeImage()
			p.run(12)
		})
	}
}

type power struct {
	*testing.T
	fstype, dir, image string
	saved, dropped     atomic.Int64 // how many have returned
}

func (p *power) command(name string, args ...string) {
	p.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(p, err, "%s %s: %s", name, strings.Join(args, " "), out)
}

func (p *power) makeImage() {
	require.NoError(p, os.WriteFile(p.image, nil, 0o600))
	require.NoError(p, os.Truncate(p.image, 320<<20))
	p.command("mkfs."+p.fstype, "-q", p.image)
}

func (p *power) mount(image string) (home string, unmount func()) {
	p.Helper()
	dir, err := os.MkdirTemp(p.dir, "mnt")
	require.NoError(p, err)
	p.command("mount", "-o", "loop", image, dir)
	done := false
	unmount = func() {
		if !done {
			done = true
			p.command("umount", dir)
		}
	}
	p.Cleanup(unmount)
	return filepath.Join(dir, "home"), unmount
}

// every third record is dropped soon after it was saved.
const (
	third = 3
	lag   = 5
	every = 3 // records at least between two cuts
)

func id(n int64) string { return fmt.Sprintf("layer-%06d", n) }

func (p *power) run(cuts int) {
	home, unmount := p.mount(p.image)
	require.NoError(p, os.Mkdir(home, 0o755))
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- p.write(home, stop) }()
	others := make(chan error, 1)
	go func() { others <- commit(filepath.Dir(home), stop) }()
	type cut struct {
		image          string
		saved, dropped int64
	}
	var all []cut
	for i := range cuts {
		for p.saved.Load() < int64(every*i) && len(ended) == 0 {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(i) * 700 * time.Microsecond) // anywhere in a Save
		c := cut{fmt.Sprint(p.image, i), p.saved.Load(), p.dropped.Load()}
		require.NoError(p, clone(c.image, p.image))
		all = append(all, c)
	}
	close(stop)
	require.NoError(p, errors.Join(<-ended, <-others))
	unmount()
	for _, c := range all {
		p.check(c.image, c.saved, c.dropped)
	}
	p.Log(all[len(all)-1].saved, "records saved,", all[len(all)-1].dropped, "dropped")
}

func (p *power) write(home string, stop chan struct{}) error {
	d, err := layerdir.Open(home, layerfs.DurabilityMetadata)
	if err != nil {
		return err
	}
	defer d.Close()
	if want := p.fstype != "btrfs"; d.Ordered() != want {
		return fmt.Errorf("Ordered = %v on %s", !want, p.fstype)
	}
	for n := int64(1); ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		save := d.Add
		if n%2 == 0 {
			save = d.Save
		}
		if err := save(record(n)); err != nil {
			return err
		}
		p.saved.Store(n)
		if n > lag && (n-lag)%third == 0 {
			if err := d.Drop(record(n-lag), n%2 == 0); err != nil {
				return err
			}
			p.dropped.Store(n - lag)
		}
	}
}

// commit makes the file system commit what others are in the middle of.
func commit(dir string, stop chan struct{}) error {
	f, err := os.Create(filepath.Join(dir, "other"))
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := errors.Join(f.Chmod(0o600), f.Chmod(0o644), f.Sync()); err != nil {
			return err
		}
	}
}

func record(n int64) *layerdir.Record {
	return &layerdir.Record{ID: id(n), Labels: map[string]string{"n": strings.Repeat(fmt.Sprint(n, " "), 200)}}
}

func clone(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	return errors.Join(unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())), dst.Close())
}

func (p *power) check(image string, saved, dropped int64) {
	p.Helper()
	home, unmount := p.mount(image)
	defer unmount()
	d, err := layerdir.Open(home, layerfs.DurabilityMetadata)
	if saved == 0 && errors.Is(err, os.ErrNotExist) {
		return // cut before there was anything
	}
	require.NoError(p, err)
	defer d.Close()
	require.NoError(p, d.ClearTemporary()) // as New: what Add has not finished is none
	ids, err := d.IDs()
	require.NoError(p, err)
	there := make(map[string]bool)
	for _, id := range ids {
		rec, err := d.Load(id)
		require.NoError(p, err, "after %d saved, %d dropped", saved, dropped)
		there[rec.ID] = true
	}
	for n := int64(1); n <= saved; n++ {
		switch gone := n%third == 0; {
		case gone && n <= dropped:
			require.False(p, there[id(n)], "%s came back, %d saved, %d dropped", id(n), saved, dropped)
		case !gone:
			require.True(p, there[id(n)], "%s is lost, %d saved, %d dropped", id(n), saved, dropped)
		}
	}
}
