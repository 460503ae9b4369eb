package fusesrv

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/unionfs"
)

// stuckEnv makes this test binary mount that directory, take the first request
// of its own refusePoll, and never answer.
const stuckEnv = "LAYERFS_TEST_STUCK"

func TestMain(m *testing.M) {
	if dir := os.Getenv(stuckEnv); dir != "" {
		fmt.Println(stuck(dir))
		select {}
	}
	os.Exit(m.Run())
}

func stuck(dir string) error {
	fs, _, err := unionfs.Open(&unionfs.Config{Branches: []unionfs.BranchSpec{{Path: dir + "/branch"}}})
	if err != nil {
		return err
	}
	s := newServer(Config{FS: fs, Target: dir + "/mnt"})
	if err := s.attach(); err != nil {
		return err
	}
	if err := s.handshake(); err != nil {
		return err
	}
	go s.refusePoll()
	_, err = s.read(newBuffers(s.maxWrite).in)
	return err
}

// lacks skips the test, or fails it if LAYERFS_REQUIRE lists one of names,
// "union", or "aufs", whose server this is.
func lacks(t testing.TB, feature, reason string, names ...string) {
	t.Helper()
	testenv.SkipUnsupported(t, &layerfs.UnsupportedError{Feature: feature, Reason: reason}, append(names, "union", "aufs")...)
}

// TestKilledWhileAsking kills a server that waits for an answer of its own
// mount: it must end, and with it the connection.
func TestKilledWhileAsking(t *testing.T) {
	if os.Geteuid() != 0 {
		lacks(t, "mounting", "needs root", "root")
	}
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(dir+"/branch", 0o755))
	require.NoError(t, os.Mkdir(dir+"/mnt", 0o755))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), stuckEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "<nil>\n", line)
	defer unix.Unmount(dir+"/mnt", unix.MNT_DETACH)
	require.NoError(t, cmd.Process.Kill())
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		// Ends the waiting, or the process would stay for ever.
		require.NoError(t, unix.Unmount(dir+"/mnt", unix.MNT_FORCE|unix.MNT_DETACH))
		<-ended
		t.Fatal("the killed server hung in its own mount")
	}
	_, err = os.Stat(dir + "/mnt")
	assert.ErrorIs(t, err, unix.ENOTCONN)
}

// TestDropConnections checks that the thread loses every connection and
// nothing else, and that the rest of the process keeps its own. The collector
// runs on such threads, too.
func TestDropConnections(t *testing.T) {
	var dev [3]*os.File
	for i := range dev {
		fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			lacks(t, "FUSE", err.Error())
		}
		dev[i] = os.NewFile(uintptr(fd), "/dev/fuse")
		defer dev[i].Close()
	}
	null, err := os.Open("/dev/null")
	require.NoError(t, err)
	defer null.Close()
	has := func(f *os.File) error {
		_, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		return err
	}
	for range 50 {
		errs := make(chan error, 5)
		go onOwnThread(func() {
			errs <- dropConnections(int(dev[1].Fd()))
			for _, f := range dev {
				errs <- has(f)
			}
			errs <- has(null)
			runtime.GC()
			close(errs)
		})
		require.NoError(t, <-errs)
		for range dev {
			assert.ErrorIs(t, <-errs, unix.EBADF)
		}
		require.NoError(t, <-errs)
		<-errs
	}
	for _, f := range dev {
		require.NoError(t, has(f))
	}
}
