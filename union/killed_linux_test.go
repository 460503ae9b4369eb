package union_test

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/union"
)

// serverEnv makes this test binary serve the stage in that directory until it
// is killed.
const serverEnv = "LAYERFS_TEST_SERVER"

func serve(dir string) {
	_, err := union.Mount(bg, dir+"/mnt", &union.Config{Branches: []union.Branch{{Path: dir + "/rw", Perm: union.RW}, {Path: dir + "/l0"}}})
	fmt.Println(err)
	if err != nil {
		os.Exit(1)
	}
	select {}
}

// TestKilled kills the server under load. What was fsynced is there after the
// next mount, what was removed before stays removed, nothing hangs, and the
// union is consistent: every listed name can be looked up.
func TestKilled(t *testing.T) {
	rounds := 15
	if testing.Short() {
		rounds = 3
	}
	s := prepare(t, 1)
	for i := range 400 {
		build(t, s.dir, fmt.Sprintf("l0/d%d/f%d low", i%10, i))
	}
	self, err := os.Executable()
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(1, 5))
	synced := map[string]string{}
	repaired := 0
	for round := range rounds {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), serverEnv+"="+s.dir)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "<nil>\n", line)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for w := range 3 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				for n := 0; ; n++ {
					// Each worker has directories of its own.
					name := fmt.Sprintf("d%d/f%d", w*3+r.IntN(3), r.IntN(40)*10+w*3+r.IntN(3))
					p := s.path(name)
					mu.Lock()
					delete(synced, name) // not known while it changes
					mu.Unlock()
					switch r.IntN(4) {
					case 0:
						err := os.Remove(p)
						if err != nil && !os.IsNotExist(err) {
							return // the server is gone
						}
					case 1:
						if err := os.Mkdir(p+"dir", 0o755); err != nil && !os.IsExist(err) {
							return
						}
						if err := os.Remove(p + "dir"); err != nil && !os.IsNotExist(err) {
							return
						}
					default:
						text := fmt.Sprint(round, n)
						f, err := os.OpenFile(p, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
						if err != nil {
							return
						}
						f.WriteString(text)
						err = f.Sync()
						f.Close()
						if err != nil {
							return
						}
						mu.Lock()
						synced[name] = text
						mu.Unlock()
					}
				}
			})
		}
		time.Sleep(time.Duration(20+r.IntN(60)) * time.Millisecond)
		require.NoError(t, cmd.Process.Kill())
		cmd.Wait()
		wg.Wait()
		assert.ErrorIs(t, os.WriteFile(s.path("after"), nil, 0o600), unix.ENOTCONN)
		require.NoError(t, unix.Unmount(s.mnt, unix.MNT_DETACH))

		h, err := union.Mount(bg, s.mnt, &union.Config{Branches: []union.Branch{{Path: s.rw(""), Perm: union.RW}, {Path: s.lower(0, "")}}})
		require.NoError(t, err)
		repaired += len(h.Repaired())
		for name, text := range synced {
			assert.Equal(t, text, s.readFile(name), "round %d: %s", round, name)
		}
		shot(t, s.mnt)
		require.NoError(t, h.Unmount(bg))
	}
	t.Logf("%d files checked last, %d leftovers mended in %d rounds", len(synced), repaired, rounds)
}

func (s *stage) readFile(p string) string {
	b, err := os.ReadFile(s.path(p))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// TestManyWhiteouts checks rule 5 F5: when the base of whiteouts has as many
// links as the file system allows, a new base takes its place.
func TestManyWhiteouts(t *testing.T) {
	needMount(t)
	dir := testenv.Ext4(t, 64)
	build(t, dir, "l0/a x", "l0/b x", "rw/", "mnt/", "links/")
	h, err := union.Mount(bg, dir+"/mnt", &union.Config{Branches: []union.Branch{{Path: dir + "/rw", Perm: union.RW}, {Path: dir + "/l0"}}})
	require.NoError(t, err)
	defer func() { require.NoError(t, h.Unmount(bg)) }()
	require.NoError(t, os.Remove(dir+"/mnt/a"))
	for i := 0; err == nil && i < 70000; i++ {
		err = unix.Link(dir+"/rw/.wh..wh.aufs", fmt.Sprintf("%s/links/%d", dir, i))
	}
	require.ErrorIs(t, err, unix.EMLINK)
	require.NoError(t, os.Remove(dir+"/mnt/b"))
	assert.Empty(t, names(t, dir+"/mnt"))
	base, a, b := lstat(t, dir+"/rw/.wh..wh.aufs"), lstat(t, dir+"/rw/.wh.a"), lstat(t, dir+"/rw/.wh.b")
	assert.Equal(t, base.Ino, b.Ino)
	assert.NotEqual(t, a.Ino, b.Ino)
}
