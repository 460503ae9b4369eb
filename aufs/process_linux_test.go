package aufs_test

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/aufs"
)

// server is another process that gets layers: drivertest.Child with a line of
// commands.
type server struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func newServer(t *testing.T, root string) *server { return newServerOf(t, "aufs-inprocess", root) }

func newServerOf(t *testing.T, harness, root string) *server {
	t.Helper()
	s := &server{cmd: exec.Command(os.Args[0], "-test.run=^$")}
	s.cmd.Env = append(os.Environ(), "LAYERFS_DRIVERTEST_CHILD="+harness+":"+root)
	s.cmd.Stderr = os.Stderr
	var err error
	s.in, err = s.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := s.cmd.StdoutPipe()
	require.NoError(t, err)
	s.out = bufio.NewScanner(out)
	require.NoError(t, s.cmd.Start())
	t.Cleanup(s.kill)
	require.True(t, s.out.Scan())
	require.Equal(t, "ready", s.out.Text())
	return s
}

func (s *server) do(t *testing.T, command string) {
	t.Helper()
	_, err := io.WriteString(s.in, command+"\n")
	require.NoError(t, err)
	require.True(t, s.out.Scan())
	require.True(t, strings.HasPrefix(s.out.Text(), "ok"), s.out.Text())
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// shared makes a layer that another process serves and this one holds, too.
func shared(t *testing.T) (root string, d *aufs.Driver, s *server, path string) {
	requireEngine(t, harness())
	root = t.TempDir()
	d, err := aufs.New(root, &aufs.Options{Engine: aufs.FUSE, InProcess: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	require.NoError(t, d.Create(t.Context(), "base", "", nil))
	require.NoError(t, d.Create(t.Context(), "top", "base", nil))
	s = newServer(t, root)
	s.do(t, "get top")
	path, err = d.Get(t.Context(), "top", nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path+"/f", []byte("one"), 0o644))
	return root, d, s, path
}

// TestServerPutsFirst: the mount stays as long as somebody holds it and its
// server lives.
func TestServerPutsFirst(t *testing.T) {
	_, d, s, path := shared(t)
	ctx := t.Context()
	s.do(t, "put top")
	b, err := os.ReadFile(path + "/f")
	require.NoError(t, err)
	require.Equal(t, "one", string(b))
	require.NoError(t, s.in.Close())
	require.NoError(t, s.cmd.Wait())
	_, err = os.ReadFile(path + "/f")
	require.ErrorIs(t, err, unix.ENOTCONN)
	require.NoError(t, d.Put(ctx, "top"))
	path, err = d.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.FileExists(t, path+"/f")
	require.NoError(t, d.Put(ctx, "top"))
}

// TestHolderPutsLast: the last Put unmounts what another process serves, and the
// branch is whole when it returns.
func TestHolderPutsLast(t *testing.T) {
	_, d, s, path := shared(t)
	ctx := t.Context()
	s.do(t, "put top")
	require.NoError(t, os.Link(path+"/f", path+"/g"))
	require.NoError(t, d.Put(ctx, "top"))
	require.NoFileExists(t, path+"/f")
	path, err := d.Get(ctx, "top", nil) // served here now
	require.NoError(t, err)
	require.FileExists(t, path+"/g")
	_, err = d.Branches(ctx, "top")
	require.NoError(t, err)
	require.NoError(t, d.Put(ctx, "top"))
}

// TestServerKilled: the next Get by a driver that does not hold the layer puts
// a new mount in the place of the dead one, for all holders.
func TestServerKilled(t *testing.T) {
	root, d, s, path := shared(t)
	ctx := t.Context()
	s.kill()
	_, err := os.ReadFile(path + "/f")
	require.ErrorIs(t, err, unix.ENOTCONN)
	other, err := aufs.New(root, &aufs.Options{Engine: aufs.FUSE, InProcess: true})
	require.NoError(t, err)
	defer other.Close()
	info, err := other.Stat(ctx, "top", nil)
	require.NoError(t, err)
	require.True(t, info.Mounted, "it is still held")
	again, err := other.Get(ctx, "top", nil)
	require.NoError(t, err)
	require.Equal(t, path, again)
	b, err := os.ReadFile(path + "/f")
	require.NoError(t, err)
	require.Equal(t, "one", string(b))
	require.NoError(t, d.Put(ctx, "top"))
	require.FileExists(t, path+"/f")
	require.NoError(t, other.Put(ctx, "top"))
	require.ErrorIs(t, other.Put(ctx, "top"), layerfs.ErrNotHeld)
}
