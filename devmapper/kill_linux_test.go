package devmapper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/testenv"
)

// An operation is what a process does when it is killed. Its preparation is
// not counted as steps. Layer kept is there and has a file f; its child one,
// and two, which was received, may be there from an operation that was killed
// or not.
type operation struct {
	name    string
	prepare func(ctx context.Context, d *Driver) error // may be nil
	run     func(ctx context.Context, d *Driver) error
}

func operations() []operation {
	one := func(ctx context.Context, d *Driver) error {
		if _, err := d.Stat(ctx, "one", nil); err == nil {
			return nil
		}
		return d.Create(ctx, "one", "kept", nil)
	}
	get := func(ctx context.Context, d *Driver) error {
		_, err := d.Get(ctx, "one", nil)
		return err
	}
	mounted := func(ctx context.Context, d *Driver) error {
		return errors.Join(one(ctx, d), get(ctx, d))
	}
	grow := func(ctx context.Context, d *Driver) error {
		dev, err := d.m.load("one")
		if err != nil {
			return err
		}
		return d.SetQuota(ctx, "one", layerfs.Quota{Bytes: dev.Size + 1<<20})
	}
	var stream bytes.Buffer
	return []operation{
		{"create", func(ctx context.Context, d *Driver) error {
			return ignore(d.Remove(ctx, "one"), layerfs.ErrNotExist)
		}, func(ctx context.Context, d *Driver) error {
			return d.Create(ctx, "one", "kept", nil)
		}},
		{"get", one, func(ctx context.Context, d *Driver) error {
			return errors.Join(get(ctx, d), d.Put(ctx, "one"))
		}},
		{"copy a mounted layer", mounted, func(ctx context.Context, d *Driver) error {
			r, err := d.Replicate(ctx, "one", "")
			if err != nil {
				return err
			}
			_, err = r.Send(ctx, io.Discard, nil)
			return errors.Join(err, r.Close(), d.Put(ctx, "one"))
		}},
		{"grow while mounted", mounted, func(ctx context.Context, d *Driver) error {
			return errors.Join(grow(ctx, d), d.Put(ctx, "one"))
		}},
		{"grow", one, func(ctx context.Context, d *Driver) error {
			return errors.Join(grow(ctx, d), get(ctx, d), d.Put(ctx, "one"))
		}},
		{"extend", nil, func(ctx context.Context, d *Driver) error {
			d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 0, 1 // 0 has always been reached
			return d.m.extend(ctx)
		}},
		{"extend while written", mounted, func(ctx context.Context, d *Driver) error {
			written := make(chan error, 1)
			go func() { written <- writeSync(d.m.Path("one")+"/written", 4<<20) }()
			d.m.opts.ExtendThreshold, d.m.opts.ExtendPercent = 0, 1
			return errors.Join(d.m.extend(ctx), <-written, d.Put(ctx, "one"))
		}},
		{"apply", one, func(ctx context.Context, d *Driver) error {
			r, err := d.Diff(ctx, "kept", "", nil)
			if err != nil {
				return err
			}
			_, err = d.Apply(ctx, "one", r, nil)
			return errors.Join(err, r.Close())
		}},
		{"changes", one, func(ctx context.Context, d *Driver) error {
			for _, err := range d.Changes(ctx, "one", "kept") {
				if err != nil {
					return err
				}
			}
			return nil
		}},
		{"send", one, func(ctx context.Context, d *Driver) error {
			return d.Send(ctx, "one", "kept", io.Discard, nil)
		}},
		{"receive", func(ctx context.Context, d *Driver) error {
			return errors.Join(ignore(d.Remove(ctx, "two"), layerfs.ErrNotExist), d.Send(ctx, "kept", "", &stream, nil))
		}, func(ctx context.Context, d *Driver) error {
			return errors.Join(d.Receive(ctx, "two", "", &stream, nil), d.Remove(ctx, "two"))
		}},
		{"rollback", one, func(ctx context.Context, d *Driver) error { return d.Rollback(ctx, "one") }},
		{"remove", one, func(ctx context.Context, d *Driver) error { return d.Remove(ctx, "one") }},
		{"close", nil, func(_ context.Context, d *Driver) error { return d.Close() }},
	}
}

// newRootOperation kills New of a root that does not exist yet.
const newRootOperation = "new"

// fewKills is how many kills there are without LAYERFS_KILL_ROUNDS.
const fewKills = 15

// TestKilled ends a process at steps of all it does and opens the root again:
// no layer is lost, nothing is left. LAYERFS_KILL_ROUNDS is the number of
// kills; with 100 or more every step has one.
func TestKilled(t *testing.T) {
	testenv.RequireRoot(t)
	root := newRoot(t)
	d, err := New(root, small())
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	create(t, d, "kept", "")
	with(t, d, "kept", func(path string) { write(t, path+"/f", 1000, 1) })
	require.NoError(t, d.Close())

	rounds, err := strconv.Atoi(os.Getenv("LAYERFS_KILL_ROUNDS"))
	if err != nil {
		rounds = fewKills
	}
	stride, seed := 1, rand.Uint64()
	if rounds < 100 {
		stride = 6
	}
	r := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	names := []string{newRootOperation}
	for _, o := range operations() {
		names = append(names, o.name)
	}
	steps := make(map[string]int)
	kills := 0
	for kills < rounds {
		r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			for n := r.IntN(stride); kills < rounds; n += stride {
				at, out := killChild(t, root, name, n)
				if at == "" {
					break
				}
				kills++
				steps[name+" / "+at]++
				what := fmt.Sprintf("round %d: %s killed at step %d, %s:\n%s", kills, name, n, at, out)
				if name == newRootOperation {
					survivesNew(t, root+"/fresh", what)
				} else {
					survives(t, root, what)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(steps)) {
		t.Logf("%3d × %s", steps[name], name)
	}
	t.Logf("%d kills at %d different steps", kills, len(steps))
}

// killChild runs an operation in a process that ends at its step n, and returns
// that step's name, or nothing if the operation has no more than n steps.
func killChild(t *testing.T, root, name string, n int) (at, out string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledChild$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("LAYERFS_KILL=%d:%s:%s", n, name, root))
	b, err := cmd.CombinedOutput()
	if err == nil {
		require.Contains(t, string(b), "came to its end")
		return "", ""
	}
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, "%s", b)
	status, ok := exit.Sys().(interface{ Signal() unix.Signal })
	require.True(t, ok)
	require.Equal(t, unix.SIGKILL, status.Signal(), "%s: %s", name, b)
	i := bytes.LastIndex(b, []byte("step: "))
	require.GreaterOrEqual(t, i, 0, "%s", b)
	return strings.TrimSpace(string(b[i+6:])), string(b)
}

// TestKilledChild is the process that is killed.
func TestKilledChild(t *testing.T) {
	words := strings.SplitN(os.Getenv("LAYERFS_KILL"), ":", 3)
	if len(words) != 3 {
		t.Skip("for TestKilled")
	}
	left, err := strconv.Atoi(words[0])
	require.NoError(t, err)
	name, root := words[1], words[2]
	armed := name == newRootOperation
	fault := func(step string) {
		if !armed {
			return
		}
		fmt.Println("step: " + step)
		if left--; left < 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	if armed {
		root += "/fresh"
		require.NoError(t, os.MkdirAll(root, 0o755))
	}
	d, err := open(root, small(), fault)
	require.NoError(t, err)
	ctx := context.Background()
	for _, o := range operations() {
		if o.name != name {
			continue
		}
		if o.prepare != nil {
			require.NoError(t, o.prepare(ctx, d))
		}
		armed = true
		require.NoError(t, o.run(ctx, d))
		armed = false
	}
	require.NoError(t, d.Close())
	fmt.Println(name, "came to its end")
}

// survives opens a root after a crash and looks at everything.
func survives(t *testing.T, root, what string) {
	t.Helper()
	d, err := New(root, small())
	require.NoError(t, err, what)
	ctx := context.Background()
	found, err := d.Check(ctx)
	require.NoError(t, err, what)
	if len(found) == 1 && found[0].Reason == "rollback did not finish" {
		require.NoError(t, d.Rollback(ctx, found[0].ID), what)
		found, err = d.Check(ctx)
		require.NoError(t, err, what)
	}
	require.Empty(t, found, what)
	infos, err := d.List(ctx)
	require.NoError(t, err)
	kept := false
	for _, i := range infos {
		require.Empty(t, i.Incomplete, what)
		with(t, d, i.ID, func(path string) { require.FileExists(t, path+"/f", what) })
		kept = kept || i.ID == "kept"
	}
	require.True(t, kept, what)
	files, err := os.ReadDir(d.m.devicePath(""))
	require.NoError(t, err)
	require.Len(t, files, len(infos), what)
	// Each device that is left in the pool has a file.
	claims, err := d.m.claims()
	require.NoError(t, err)
	require.Len(t, claims, len(infos)+1, what)
	require.NoError(t, d.Close(), what)
	cleanAfter(t, d, what)
}

// survivesNew opens a root whose making was cut off.
func survivesNew(t *testing.T, root, what string) {
	t.Helper()
	d, err := New(root, small())
	require.NoError(t, err, what)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
	require.NoError(t, d.Close(), what)
	cleanAfter(t, d, what)
	require.NoError(t, os.RemoveAll(root))
}

// cleanAfter looks for devices, loop devices and mounts of a root that nobody
// has open.
func cleanAfter(t *testing.T, d *Driver, what string) {
	t.Helper()
	c, err := dm.Open()
	require.NoError(t, err)
	list, err := c.List()
	require.NoError(t, errors.Join(err, c.Close()))
	for _, e := range list {
		require.False(t, strings.HasPrefix(e.Name, d.m.prefix+"-"), "device %s is left after %s", e.Name, what)
	}
	require.NoError(t, d.m.detached(context.Background(), d.m.dataFile()), what)
	require.NoError(t, d.m.detached(context.Background(), d.m.metadataFile()), what)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), filepath.Join(d.m.home, "mnt"), what)
}
