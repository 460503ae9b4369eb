package overlay

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/lifecycle"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// layerfsProgram gives this test program the name that makes it the mount
// program layerfs: TestMain plays its part.
func layerfsProgram(t *testing.T) string {
	t.Helper()
	testenv.RequireFUSE(t, "overlay-union")
	exe, err := os.Executable()
	require.NoError(t, err)
	link := t.TempDir() + "/layerfs"
	require.NoError(t, os.Symlink(exe, link))
	return link
}

// servers returns the processes that serve a mount below a directory.
func servers(t *testing.T, dir string) []int {
	t.Helper()
	return testenv.Processes(t, "\x00mount-overlay-serve\x00"+dir)
}

// oneServer returns the only server, once those of mounts that are gone have
// ended.
func oneServer(t *testing.T, dir string) int {
	t.Helper()
	var list []int
	require.Eventually(t, func() bool {
		list = servers(t, dir)
		return len(list) == 1
	}, 10*time.Second, time.Millisecond)
	return list[0]
}

// killServer kills the only server of a mount below a directory, and waits for
// its end.
func killServer(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, unix.Kill(oneServer(t, dir), unix.SIGKILL))
	require.Eventually(t, func() bool { return len(servers(t, dir)) == 0 }, 10*time.Second, time.Millisecond)
}

// TestServerKilled: a Get mounts again what has lost its server, whoever holds
// it.
func TestServerKilled(t *testing.T) {
	root := t.TempDir()
	opts := &Options{MountProgram: layerfsProgram(t)}
	first, second := mustNew(t, root, opts), mustNew(t, root, opts)
	stack(t, first)
	ctx := t.Context()
	usable := func(t *testing.T, path string) {
		t.Helper()
		_, err := os.ReadDir(path)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path+"/new", nil, 0o644))
		oneServer(t, first.m.home)
		infos, err := mount.Under(path)
		require.NoError(t, err)
		require.Len(t, infos, 1)
	}
	path := mustGet(t, first, "top")
	require.FileExists(t, first.m.home+"/.layerfs/mount-program.log")
	for name, d := range map[string]*Driver{"held by another": second, "held by this one": first} {
		t.Run(name, func(t *testing.T) {
			killServer(t, first.m.home)
			_, err := os.ReadDir(path)
			require.Error(t, err)
			usable(t, mustGet(t, d, "top"))
		})
	}
	t.Run("held by nobody", func(t *testing.T) {
		require.NoError(t, first.Put(ctx, "top"))
		chain, _, _, err := pinned(first, "top", "base")
		require.NoError(t, err)
		require.NoError(t, first.m.Mount(ctx, chain, lifecycle.Mode{})) // and its caller is killed
		killServer(t, first.m.home)
		usable(t, mustGet(t, second, "top"))
	})
	t.Run("put", func(t *testing.T) {
		mustGet(t, first, "top")
		killServer(t, first.m.home)
		require.NoError(t, first.Put(ctx, "top"))
		mounted, err := mount.IsMountPoint(path)
		require.NoError(t, err)
		require.False(t, mounted)
	})
}

// TestServerStopped: a Get of what its server does not answer for is an error
// in time, and not the end of all work on the layer.
func TestServerStopped(t *testing.T) {
	d := mustNew(t, t.TempDir(), &Options{MountProgram: layerfsProgram(t)})
	d.m.answerWithin = 200 * time.Millisecond
	stack(t, d)
	ctx := t.Context()
	path := mustGet(t, d, "top")
	resume := testenv.Stop(t, oneServer(t, d.m.home))
	began := time.Now()
	for range 2 {
		_, err := d.Get(ctx, "top", nil)
		require.ErrorIs(t, err, unix.ETIMEDOUT)
		require.ErrorContains(t, err, "does not answer")
	}
	require.Less(t, time.Since(began), 10*time.Second)
	resume()
	d.m.answerWithin = mount.AnswerWithin
	require.Equal(t, path, mustGet(t, d, "top"))
	require.NoError(t, os.WriteFile(path+"/new", nil, 0o644))
}

// TestReleased: a layer that was unmounted stays in use while a file is open in
// its tree, and nobody takes it for still.
func TestReleased(t *testing.T) {
	ctx := t.Context()
	var log bytes.Buffer
	d := mustNew(t, t.TempDir(), &Options{MountProgram: layerfsProgram(t), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	stack(t, d)
	free := func() bool {
		f, err := os.Open(d.m.upper("top"))
		require.NoError(t, err)
		defer f.Close()
		return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	}
	t.Run("put", func(t *testing.T) {
		f, err := os.Create(mustGet(t, d, "top") + "/open")
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, d.Put(ctx, "top"))
		require.Contains(t, log.String(), "layer=top")
		_, err = f.WriteString("x")
		require.NoError(t, err)
		for op, do := range map[string]func() error{
			"changes": func() error {
				for _, err := range d.Changes(ctx, "top", "base") {
					return err
				}
				return nil
			},
			"diff": func() error {
				r, err := d.Diff(ctx, "top", "base", nil)
				if err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, r)
				return errors.Join(err, r.Close())
			},
			"apply":    func() error { _, err := d.Apply(ctx, "top", new(bytes.Buffer), nil); return err },
			"rollback": func() error { return d.Rollback(ctx, "top") },
		} {
			require.ErrorIs(t, do(), layerfs.ErrInUse, op)
		}
		require.NoError(t, f.Close())
		require.Equal(t, "C /\nA /open\n", tree.FormatChanges(changes(t, d, "top", "base")))
	})
	t.Run("put after one that was killed", func(t *testing.T) {
		path := mustGet(t, d, "top")
		f, err := os.Create(path + "/open")
		require.NoError(t, err)
		require.NoError(t, mount.Unmount(path))
		time.AfterFunc(50*time.Millisecond, func() { f.Close() })
		require.False(t, free())
		require.NoError(t, d.Put(ctx, "top"))
		require.True(t, free())
	})
	t.Run("remove", func(t *testing.T) {
		f, err := os.Create(mustGet(t, d, "top") + "/open")
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, d.Put(ctx, "top"))
		require.ErrorIs(t, d.Remove(ctx, "top"), layerfs.ErrInUse)
		_, err = d.Stat(ctx, "top", nil)
		require.NoError(t, err, "not begun")
		require.NoError(t, f.Close())
		require.NoError(t, d.Remove(ctx, "top"))
		require.NoDirExists(t, d.m.layer("top"))
	})
}

// TestUnionProgram has layers that package union wrote read by the driver, and
// by the kernel where it can.
func TestUnionProgram(t *testing.T) {
	program := layerfsProgram(t)
	for _, userXattr := range []string{"off", "on"} {
		t.Run("userxattr="+userXattr, func(t *testing.T) {
			// Bytes that lists of options and of directories are made of.
			root := t.TempDir() + "/r:o,o\\t\n\xff"
			d := mustNew(t, root, &Options{MountProgram: program, UserXattr: userXattr})
			require.False(t, d.m.conf.AUFS)
			ctx := t.Context()
			stack(t, d)
			top := mustGet(t, d, "top")
			st, err := mount.Query(top)
			require.NoError(t, err)
			require.EqualValues(t, unix.FUSE_SUPER_MAGIC, st.Magic)
			require.Len(t, servers(t, d.m.home), 1)
			require.NoError(t, os.Remove(top+"/g"))
			require.NoError(t, os.RemoveAll(top+"/d"))
			require.NoError(t, os.Mkdir(top+"/d", 0o755))
			require.NoError(t, os.WriteFile(top+"/d/new", []byte("n"), 0o644))
			var white unix.Stat_t
			require.NoError(t, unix.Lstat(d.m.upper("top")+"/g", &white))
			require.EqualValues(t, unix.S_IFCHR, white.Mode&unix.S_IFMT)
			want := "C /\nC /d\nD /d/f\nA /d/new\nD /g\n"
			require.Equal(t, want, tree.FormatChanges(changes(t, d, "top", "base")), "while mounted")
			require.NoError(t, d.Put(ctx, "top"))
			require.Equal(t, want, tree.FormatChanges(changes(t, d, "top", "base")))
			oracle(t, d, "top", "base")
			apply(t, d, "top", "base")
			// Names of AUFS are names like others, but for its own.
			require.NoError(t, d.Create(ctx, "names", "base", nil))
			names := mustGet(t, d, "names")
			require.NoError(t, os.WriteFile(names+"/.wh.g", nil, 0o644))
			require.Error(t, os.WriteFile(names+"/.wh..wh.g", nil, 0o644))
			require.FileExists(t, names+"/g")
			require.NoError(t, d.Put(ctx, "names"))
			require.Equal(t, "C /\nA /.wh.g\n", tree.FormatChanges(changes(t, d, "names", "base")))
			require.Eventually(t, func() bool { return len(servers(t, d.m.home)) == 0 }, 10*time.Second, 5*time.Millisecond)

			kernel, err := New(root, &Options{UserXattr: userXattr})
			testenv.SkipUnsupported(t, err, "overlay")
			require.NoError(t, err)
			defer kernel.Close()
			for _, id := range []string{"top", "top-copy", "names"} {
				ours, theirs := mustShot(t, d, id), mustShot(t, kernel, id)
				require.Equal(t, theirs, ours, id)
			}
		})
	}
}

// mustShot lists the tree of a layer.
func mustShot(t *testing.T, d *Driver, id string) []string {
	t.Helper()
	path, err := d.Get(t.Context(), id, nil)
	require.NoError(t, err)
	var list []string
	require.NoError(t, filepath.Walk(path, func(p string, fi os.FileInfo, err error) error {
		if err == nil {
			list = append(list, strings.TrimPrefix(p, path)+" "+fi.Mode().String())
		}
		return err
	}))
	require.NoError(t, d.Put(t.Context(), id))
	return list
}

func TestUnionProgramErrors(t *testing.T) {
	program := layerfsProgram(t)
	ctx := t.Context()
	get := func(t *testing.T, opts *Options) (*Driver, error) {
		d := mustNew(t, t.TempDir(), opts)
		stack(t, d)
		_, err := d.Get(ctx, "top", nil)
		return d, err
	}
	t.Run("usage", func(t *testing.T) {
		_, err := get(t, &Options{MountProgram: program, MountOptions: []string{"squash_to_root"}})
		require.ErrorContains(t, err, `/layerfs: option "squash_to_root" is not known`)
	})
	t.Run("mount", func(t *testing.T) {
		d, err := get(t, &Options{MountProgram: program})
		require.NoError(t, err)
		require.NoError(t, d.Put(ctx, "top"))
		lock, err := os.Open(d.m.upper("top"))
		require.NoError(t, err)
		defer lock.Close()
		require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX)) // as another union has
		_, err = d.Get(ctx, "top", nil)
		require.ErrorContains(t, err, "mount program "+program+": ")
		require.ErrorContains(t, err, "writable in another union")
		require.ErrorIs(t, err, layerfs.ErrInUse)
		require.ErrorIs(t, err, unix.EBUSY)
		require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
		_, err = d.Get(ctx, "top", nil)
		require.NoError(t, err)
		require.NoError(t, d.Put(ctx, "top"))
	})
}
