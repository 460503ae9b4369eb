package union_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// clientEnv makes this test binary do one workload and print its seconds: the
// clients of a mount must not share a process with its server.
const clientEnv = "LAYERFS_BENCH_CLIENT"

func TestMain(m *testing.M) {
	if c := os.Getenv(clientEnv); c != "" {
		name, dir, _ := strings.Cut(c, " ")
		runtime.GOMAXPROCS(1)
		start := time.Now()
		if err := workloads[name](dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(time.Since(start).Seconds())
		os.Exit(0)
	}
	if arg := os.Getenv(historyEnv); arg != "" {
		if err := historyClient(arg); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if d := os.Getenv(serverEnv); d != "" {
		serve(d)
	}
	os.Exit(m.Run())
}

// openRaw spares the runtime's poller, which os.Open would try.
func openRaw(p string, flags int) (int, error) { return unix.Open(p, flags|unix.O_CLOEXEC, 0o644) }

func walk(dir string, each func(path string, d fs.DirEntry) error) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return each(p, d)
	})
}

var workloads = map[string]func(dir string) error{
	"walk": func(dir string) error {
		return walk(dir+"/tree", func(p string, d fs.DirEntry) error {
			var st unix.Stat_t
			return unix.Lstat(p, &st)
		})
	},
	"statone": func(dir string) error {
		var st unix.Stat_t
		for range 100000 {
			if err := unix.Stat(dir+"/tree/d1/d2/f3", &st); err != nil {
				return err
			}
		}
		return nil
	},
	"openclose": func(dir string) error {
		for i := range 20000 {
			fd, err := openRaw(fmt.Sprintf("%s/tree/d%d/d%d/f%d", dir, i%20, i/20%10, i/200%20), unix.O_RDONLY)
			if err != nil {
				return err
			}
			unix.Close(fd)
		}
		return nil
	},
	"readsmall": func(dir string) error {
		buf := make([]byte, 4096)
		return walk(dir+"/tree", func(p string, d fs.DirEntry) error {
			if d.IsDir() {
				return nil
			}
			fd, err := openRaw(p, unix.O_RDONLY)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_, err = unix.Read(fd, buf)
			return err
		})
	},
	"create": func(dir string) error {
		data := make([]byte, 1024)
		for i := range 5000 {
			if i%100 == 0 {
				if err := os.MkdirAll(fmt.Sprintf("%s/new/%d", dir, i/100), 0o755); err != nil {
					return err
				}
			}
			fd, err := openRaw(fmt.Sprintf("%s/new/%d/%d", dir, i/100, i), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
			if err != nil {
				return err
			}
			if _, err := unix.Write(fd, data); err != nil {
				return err
			}
			unix.Close(fd)
		}
		return nil
	},
	"rm":      func(dir string) error { return os.RemoveAll(dir + "/new") },
	"rmlower": func(dir string) error { return os.RemoveAll(dir + "/gone") },
	"untar": func(dir string) error {
		if err := os.MkdirAll(dir+"/tar", 0o755); err != nil {
			return err
		}
		return exec.Command("tar", "-xf", filepath.Dir(dir)+"/t.tar", "-C", dir+"/tar").Run()
	},
	"read": func(dir string) error { return stream(dir+"/big", unix.O_RDONLY, 1<<20, bigSize>>20) },
	"rand": func(dir string) error {
		fd, err := openRaw(dir+"/big", unix.O_RDONLY)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		r, buf := rand.New(rand.NewPCG(1, 2)), make([]byte, 4096)
		for range 100000 {
			if _, err := unix.Pread(fd, buf, int64(r.IntN(bigSize/4096))*4096); err != nil {
				return err
			}
		}
		return nil
	},
	"write": func(dir string) error {
		return stream(dir+"/w", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 1<<20, bigSize>>20)
	},
	"write4":   func(dir string) error { return stream(dir+"/w4", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 4096, 32768) },
	"readback": func(dir string) error { return stream(dir+"/w", unix.O_RDONLY, 1<<20, bigSize>>20) },
	"copyup": func(dir string) error {
		fd, err := openRaw(dir+"/big", unix.O_WRONLY)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	},
}

const bigSize = 256 << 20

func stream(p string, flags, block, n int) error {
	fd, err := openRaw(p, flags)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, block)
	for range n {
		if flags&unix.O_ACCMODE == unix.O_RDONLY {
			_, err = unix.Read(fd, buf)
		} else {
			_, err = unix.Write(fd, buf)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// A peer mounts dir/lower and dir/rw on dir/mnt.
type peer struct {
	name  string
	mount func(t *testing.T, dir string) (unmount func())
}

func must(t *testing.T, cmd string, args ...string) {
	t.Helper()
	out, err := exec.Command(cmd, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", cmd, args, out)
}

func umount(t *testing.T, dir string) func() {
	return func() { must(t, "umount", dir+"/mnt") }
}

func unionPeer(name string, noXattr bool) peer {
	return peer{name, func(t *testing.T, dir string) func() {
		h, err := union.Mount(bg, dir+"/mnt", &union.Config{NoXattr: noXattr, Branches: []union.Branch{{Path: dir + "/rw", Perm: union.RW}, {Path: dir + "/lower"}}})
		require.NoError(t, err)
		return func() { require.NoError(t, h.Unmount(bg)) }
	}}
}

var peers = []peer{
	{"raw", func(t *testing.T, dir string) func() {
		must(t, "cp", "-a", dir+"/lower/.", dir+"/mnt/")
		return func() {
			must(t, "rm", "-rf", dir+"/mnt")
			must(t, "mkdir", dir+"/mnt")
		}
	}},
	{"overlay", func(t *testing.T, dir string) func() {
		must(t, "mount", "-t", "overlay", "overlay", "-o", "lowerdir="+dir+"/lower,upperdir="+dir+"/rw,workdir="+dir+"/work", dir+"/mnt")
		return umount(t, dir)
	}},
	unionPeer("union", false),
	unionPeer("union-noxattr", true),
	{"fuse-overlayfs", func(t *testing.T, dir string) func() {
		// Without pipes, which the daemon would keep open.
		require.NoError(t, exec.Command("fuse-overlayfs", "-o", "lowerdir="+dir+"/lower,upperdir="+dir+"/rw,workdir="+dir+"/work", dir+"/mnt").Run())
		return umount(t, dir)
	}},
}

// TestPeers measures the union beside kernel overlayfs and fuse-overlayfs, all
// systems in each round, on ext4 in memory. It runs if LAYERFS_BENCH has
// a number of rounds.
func TestPeers(t *testing.T) {
	rounds, _ := strconv.Atoi(os.Getenv("LAYERFS_BENCH"))
	if rounds == 0 {
		t.Skip("LAYERFS_BENCH is not set")
	}
	needMount(t)
	base, err := os.MkdirTemp("/dev/shm", "peers")
	require.NoError(t, err)
	defer os.RemoveAll(base)
	must(t, "sh", "-c", `truncate -s 3G "$1/img" && mkfs.ext4 -q -O ^has_journal "$1/img" && mkdir "$1/fs" && mount -o loop "$1/img" "$1/fs"`, "sh", base)
	defer must(t, "umount", base+"/fs")
	dir := base + "/fs"
	must(t, "mkdir", dir+"/lower", dir+"/rw", dir+"/work", dir+"/mnt")
	must(t, "sh", "-c", `cd "$1/lower"; head -c `+fmt.Sprint(bigSize)+` /dev/urandom >big; mkdir tree gone
for i in $(seq 0 19); do for j in $(seq 0 9); do mkdir -p tree/d$i/d$j; for k in $(seq 0 19); do echo $k >tree/d$i/d$j/f$k; done; done; done
for i in $(seq 0 999); do echo $i >gone/$i; done
mkdir "$1/src"; for i in $(seq 0 1999); do mkdir -p "$1/src/d$((i/50))"; head -c 8192 big >"$1/src/d$((i/50))/$i"; done; tar -cf "$1/t.tar" -C "$1/src" .`, "sh", dir)
	self, err := os.Executable()
	require.NoError(t, err)
	want := os.Getenv("LAYERFS_BENCH_ONLY")
	rows := []string{"walk cold", "walk 2nd", "walk 3rd", "statone", "openclose", "readsmall", "read 1st", "read", "rand", "create", "rm", "untar", "rmlower", "write", "readback", "write4", "copyup"}
	if only := os.Getenv("LAYERFS_BENCH_ROWS"); only != "" {
		rows = strings.Split(only, ",")
	}
	got := map[string]map[string][]float64{}
	for range rounds {
		for _, p := range peers {
			if want != "" && !strings.Contains(want, p.name) {
				continue
			}
			un := p.mount(t, dir)
			for _, row := range rows {
				op, _, _ := strings.Cut(row, " ")
				cmd := exec.Command(self)
				cmd.Env = append(os.Environ(), clientEnv+"="+op+" "+dir+"/mnt")
				out, err := cmd.CombinedOutput()
				require.NoError(t, err, "%s %s: %s", p.name, row, out)
				sec, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
				require.NoError(t, err)
				if got[row] == nil {
					got[row] = map[string][]float64{}
				}
				got[row][p.name] = append(got[row][p.name], sec)
			}
			un()
			must(t, "sh", "-c", `rm -rf "$1/rw" "$1/work"; mkdir "$1/rw" "$1/work"`, "sh", dir)
		}
	}
	median := func(row, p string) float64 {
		v := slices.Clone(got[row][p])
		if len(v) == 0 {
			return 0
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s", "")
	for _, p := range peers {
		fmt.Fprintf(&b, "%22s", p.name)
	}
	for _, row := range rows {
		fmt.Fprintf(&b, "\n%-10s", row)
		for _, p := range peers {
			fmt.Fprintf(&b, "%14.4f (%4.2fx)", median(row, p.name), median(row, p.name)/median(row, "overlay"))
		}
	}
	t.Log("\n" + b.String())
}
