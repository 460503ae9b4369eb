package devmapper

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/dm"
	"github.com/layerfs/layerfs/internal/loop"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/internal/tree"
)

// small are options of a small pool, which tests change.
func small() *Options {
	return &Options{
		Durability: layerfs.DurabilityNone, DataSize: 256 << 20, MetadataSize: 4 << 20, BaseSize: 64 << 20, MinFreeSpace: -1,
	}
}

func smallXFS() *Options {
	o := small()
	o.FS, o.BaseSize, o.DataSize = "xfs", 320<<20, 512<<20
	return o
}

// newRoot is a directory in memory, where flushing is quick.
func newRoot(t testing.TB) string {
	t.Helper()
	return testenv.Tmpfs(t)
}

func mustNew(t testing.TB, root string, opts *Options) *Driver {
	t.Helper()
	d, err := New(root, opts)
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

// with runs fn on the tree of a layer.
func with(t testing.TB, d *Driver, id string, fn func(path string)) {
	t.Helper()
	path, err := d.Get(context.Background(), id, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Put(context.Background(), id)) }()
	fn(path)
}

func create(t testing.TB, d *Driver, id, parent string) {
	t.Helper()
	require.NoError(t, d.Create(t.Context(), id, parent, nil))
}

func write(t testing.TB, path string, size int, seed uint64) {
	t.Helper()
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	r.Read(data)
	require.NoError(t, os.WriteFile(path, data, 0o644))
}

func status(t testing.TB, d *Driver) map[string]string {
	t.Helper()
	items, err := d.Status(t.Context())
	require.NoError(t, err)
	out := make(map[string]string)
	for _, i := range items {
		require.NotContains(t, out, i.Key)
		out[i.Key] = i.Value
	}
	return out
}

func TestStatus(t *testing.T) {
	d := mustNew(t, newRoot(t), small())
	s := status(t, d)
	for _, key := range []string{
		"Pool Name", "Pool Blocksize", "Base Device Size", "Backing Filesystem", "Udev Sync Supported", "Data file", "Metadata file",
		"Data loop file", "Metadata loop file", "Data Space Used", "Data Space Total", "Data Space Available", "Metadata Space Used",
		"Metadata Space Total", "Metadata Space Available", "Thin Pool Minimum Free Space", "Deferred Removal Enabled",
		"Deferred Deletion Enabled", "Deferred Deleted Device Count", "Library Version",
	} {
		require.NotEmpty(t, s[key], key)
	}
	require.Equal(t, "65.54kB", s["Pool Blocksize"])
	require.Equal(t, "67.11MB", s["Base Device Size"])
	require.Equal(t, "268.4MB", s["Data Space Total"])
	require.Equal(t, "0", s["Deferred Deleted Device Count"])
	var st unix.Stat_t
	require.NoError(t, unix.Stat(d.m.home, &st))
	require.Equal(t, fmt.Sprintf("layerfs-%d:%d-%d-pool", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino), s["Pool Name"])
}

// TestOpenFiles: what is open goes on after Put and even after Remove, and
// nothing is left when it is closed.
func TestOpenFiles(t *testing.T) {
	d := mustNew(t, newRoot(t), small())
	create(t, d, "a", "")
	path, err := d.Get(t.Context(), "a", nil)
	require.NoError(t, err)
	f, err := os.Create(path + "/f")
	require.NoError(t, err)
	require.NoError(t, d.Put(t.Context(), "a"))
	_, err = f.WriteString("still")
	require.NoError(t, err)
	// Mounted again it is the same file system.
	with(t, d, "a", func(path string) {
		b, err := os.ReadFile(path + "/f")
		require.NoError(t, err)
		require.Equal(t, "still", string(b))
	})
	require.NoError(t, d.Remove(t.Context(), "a"))
	_, err = f.WriteString(" here")
	require.NoError(t, err)
	require.Equal(t, "1", status(t, d)["Deferred Deleted Device Count"])
	create(t, d, "a", "") // the name is free
	with(t, d, "a", func(path string) {
		_, err := os.Stat(path + "/f")
		require.ErrorIs(t, err, os.ErrNotExist)
	})
	require.NoError(t, f.Close())
	require.Eventually(t, func() bool {
		require.NoError(t, d.Remove(t.Context(), "a"))
		create(t, d, "a", "")
		return status(t, d)["Deferred Deleted Device Count"] == "0"
	}, 10*time.Second, 50*time.Millisecond)
}

func TestNoDeferredRemoval(t *testing.T) {
	o := small()
	o.NoDeferredRemoval, o.NoDeferredDeletion = true, true
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	path, err := d.Get(t.Context(), "a", nil)
	require.NoError(t, err)
	f, err := os.Create(path + "/f")
	require.NoError(t, err)
	require.ErrorIs(t, d.Put(t.Context(), "a"), layerfs.ErrInUse)
	require.NoError(t, f.Close())
	require.NoError(t, d.Put(t.Context(), "a"))
	_, err = d.m.ctl.Info(d.m.deviceName("a", false))
	require.ErrorIs(t, err, unix.ENXIO)
	require.NoError(t, d.Remove(t.Context(), "a"))
}

// TestGrow: the file system grows with the quota, at creation, while it is
// mounted, and at the next mount.
func TestGrow(t *testing.T) {
	for _, o := range []*Options{small(), smallXFS()} {
		fs := o.FS
		if fs == "" {
			fs = "ext4"
		}
		t.Run(fs, func(t *testing.T) {
			d := mustNew(t, newRoot(t), o)
			size := func(id string) (total int64) {
				with(t, d, id, func(path string) {
					var st unix.Statfs_t
					require.NoError(t, unix.Statfs(path, &st))
					total = int64(st.Blocks) * int64(st.Bsize)
				})
				return total
			}
			near := func(id string, want int64) {
				t.Helper()
				got := size(id)
				require.Greater(t, got, want*7/10, "%s", id) // xfs keeps 64 MiB for its log
				require.LessOrEqual(t, got, want, "%s", id)
			}
			base := o.BaseSize
			ctx := t.Context()
			create(t, d, "a", "")
			with(t, d, "a", func(path string) { write(t, path+"/f", 1<<20, 1) })
			require.NoError(t, d.Create(ctx, "b", "a", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 2 * base}}))
			near("a", base)
			near("b", 2*base)
			create(t, d, "c", "b") // a child has the size of its parent
			near("c", 2*base)
			path, err := d.Get(ctx, "c", nil)
			require.NoError(t, err)
			require.NoError(t, d.SetQuota(ctx, "c", layerfs.Quota{Bytes: 4 * base}))
			near("c", 4*base)
			require.FileExists(t, path+"/f")
			require.NoError(t, d.Put(ctx, "c"))
			require.NoError(t, d.SetQuota(ctx, "c", layerfs.Quota{Bytes: 5*base + 1}))
			near("c", 5*base+4096)
			require.ErrorContains(t, d.SetQuota(ctx, "c", layerfs.Quota{Bytes: base}), "cannot shrink")
			require.ErrorIs(t, d.SetQuota(ctx, "a", layerfs.Quota{Bytes: 4 * base}), layerfs.ErrReadOnly)
			require.ErrorContains(t, d.Create(ctx, "x", "a", &layerfs.CreateOptions{Quota: layerfs.Quota{Bytes: 4096}}), "cannot shrink")
			oracle(t, d, "c", "b")
			oracle(t, d, "c", "a")
		})
	}
}

// TestTrim: what files free goes back to the pool and to its file.
func TestTrim(t *testing.T) {
	root := newRoot(t)
	d := mustNew(t, root, small())
	create(t, d, "a", "")
	allocated := func() int64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(d.m.dataFile(), &st))
		return st.Blocks * 512
	}
	with(t, d, "a", func(path string) {
		write(t, path+"/big", 20<<20, 1)
		require.NoError(t, sys.Syncfs(path))
		before := allocated()
		require.NoError(t, os.Remove(path+"/big"))
		n, err := d.Trim(t.Context(), "a")
		require.NoError(t, err)
		require.Greater(t, n, int64(20<<20))
		require.Less(t, allocated(), before-16<<20)
	})
	_, err := d.Trim(t.Context(), "a")
	require.ErrorIs(t, err, layerfs.ErrNotHeld)
	// So does what a removed layer had.
	create(t, d, "b", "a")
	with(t, d, "b", func(path string) { write(t, path+"/big", 20<<20, 2) })
	before := allocated()
	require.NoError(t, d.Remove(t.Context(), "b"))
	require.Less(t, allocated(), before-16<<20)
}

// oracle compares native changes with a plain double walk.
func oracle(t testing.TB, d *Driver, id, base string) {
	t.Helper()
	chain, at, err := d.m.lineage(id, base)
	require.NoError(t, err)
	newer, err := d.m.View(t.Context(), chain)
	require.NoError(t, err)
	older, err := d.m.View(t.Context(), chain[at:])
	require.NoError(t, err)
	want, err := tree.Changes(older.Path, newer.Path)
	require.NoError(t, err)
	require.NoError(t, newer.Release())
	require.NoError(t, older.Release())
	var got []layerfs.Change
	for c, err := range d.m.NativeChanges(t.Context(), chain, at) {
		require.NoError(t, err)
		got = append(got, c)
	}
	require.Equal(t, tree.FormatChanges(want), tree.FormatChanges(got), "%s against %q", id, base)
}

// TestNativeChanges makes random histories and compares with the oracle, for
// layers that are mounted and not.
func TestNativeChanges(t *testing.T) {
	for _, o := range []*Options{small(), smallXFS()} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("fs=%s/seed=%d", o.FS, seed), func(t *testing.T) {
				d := mustNew(t, newRoot(t), o)
				r := rand.New(rand.NewPCG(seed, 1))
				parent := ""
				var ids []string
				for i := range 4 {
					id := "l" + strconv.Itoa(i)
					create(t, d, id, parent)
					with(t, d, id, func(path string) {
						if i == 0 {
							for n := range 300 {
								dir := fmt.Sprintf("%s/d%d/e%d", path, n%7, n%3)
								require.NoError(t, os.MkdirAll(dir, 0o755))
								write(t, fmt.Sprintf("%s/f%d", dir, n), r.IntN(9000), uint64(n))
							}
						} else {
							mess(t, r, path, 25)
						}
						if parent != "" {
							oracle(t, d, id, parent)
						}
					})
					for _, base := range ids {
						oracle(t, d, id, base)
					}
					ids = append(ids, id)
					parent = id
				}
			})
		}
	}
}

// mess makes random changes to a tree.
func mess(t testing.TB, r *rand.Rand, root string, n int) {
	t.Helper()
	for i := range n {
		var files, dirs []string
		require.NoError(t, filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
			if err != nil || p == root {
				return err
			}
			if e.IsDir() {
				dirs = append(dirs, p)
			} else {
				files = append(files, p)
			}
			return nil
		}))
		if len(files) == 0 || len(dirs) == 0 {
			return
		}
		f, dir := files[r.IntN(len(files))], dirs[r.IntN(len(dirs))]
		switch r.IntN(12) {
		case 0: // same size, same time
			fi, err := os.Lstat(f)
			require.NoError(t, err)
			if fi.Mode().IsRegular() && fi.Size() > 0 {
				write(t, f, int(fi.Size()), r.Uint64())
				require.NoError(t, os.Chtimes(f, fi.ModTime(), fi.ModTime()))
			}
		case 1:
			require.NoError(t, os.Remove(f))
		case 2:
			require.NoError(t, os.RemoveAll(dir))
		case 3: // touched, but the same
			fi, err := os.Lstat(f)
			require.NoError(t, err)
			if fi.Mode().IsRegular() {
				require.NoError(t, os.Chmod(f, 0o600))
				require.NoError(t, os.Chmod(f, fi.Mode().Perm()))
			}
		case 4:
			_ = os.Rename(dir, filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("moved%d", i)))
		case 5:
			_ = os.Rename(f, filepath.Join(dir, fmt.Sprintf("moved%d", i)))
		case 6:
			_ = os.Link(f, filepath.Join(dir, fmt.Sprintf("link%d", i)))
		case 7:
			require.NoError(t, os.Symlink("target", filepath.Join(dir, fmt.Sprintf("sym%d", i))))
		case 8:
			_ = unix.Lsetxattr(f, "user.x", []byte(strconv.Itoa(i)), 0)
		case 9: // another type under the name
			require.NoError(t, os.Remove(f))
			require.NoError(t, os.Mkdir(f, 0o755))
			write(t, f+"/in", 10, 1)
		case 10:
			require.NoError(t, os.Mkdir(filepath.Join(dir, fmt.Sprintf("new%d", i)), 0o755))
		default:
			write(t, filepath.Join(dir, fmt.Sprintf("new%d", i)), r.IntN(20000), r.Uint64())
		}
	}
}

// TestBlockDiff compares both devices byte by byte: whatever differs is told.
func TestBlockDiff(t *testing.T) {
	d := mustNew(t, newRoot(t), small())
	create(t, d, "a", "")
	with(t, d, "a", func(path string) { write(t, path+"/f", 3<<20, 1); write(t, path+"/g", 3<<20, 2) })
	create(t, d, "b", "a")
	with(t, d, "b", func(path string) {
		f, err := os.OpenFile(path+"/f", os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("changed"), 1<<20)
		require.NoError(t, errors.Join(err, f.Close()))
		require.NoError(t, os.Remove(path+"/g"))
		_, err = d.Trim(t.Context(), "b")
		require.NoError(t, err)
	})
	one, other := image(t, d, "a"), image(t, d, "b")
	covered := make([]bool, len(one)/512)
	holes := 0
	for r, err := range d.BlockDiff(t.Context(), "b", "a") {
		require.NoError(t, err)
		for at := r.Offset; at < r.Offset+r.Length; at += 512 {
			covered[at/512] = true
		}
		if r.Unmapped {
			holes++
			require.True(t, allZero(other[r.Offset:r.Offset+r.Length]))
		}
	}
	require.Positive(t, holes)
	different, told := 0, 0
	for i, c := range covered {
		same := bytes.Equal(one[i*512:][:512], other[i*512:][:512])
		require.True(t, same || c, "sector %d", i)
		if !same {
			different++
		}
		if c {
			told++
		}
	}
	require.Positive(t, different)
	require.Less(t, told, len(covered)/2, "a report of everything is none")
	for _, err := range d.BlockDiff(t.Context(), "a", "b") {
		require.ErrorIs(t, err, layerfs.ErrNotAncestor)
	}
}

func allZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// image reads the device of a layer that is not mounted.
func image(t testing.TB, d *Driver, id string) []byte {
	t.Helper()
	dev, err := d.m.load(id)
	require.NoError(t, err)
	name := d.m.deviceName("+image", false)
	info, err := d.m.activateThin(name, "", dev.ID, dev.Size, true)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.m.removeDevice(t.Context(), name)) }()
	f, err := openDirect(info.Device)
	require.NoError(t, err)
	b := make([]byte, dev.Size)
	require.NoError(t, readFull(f, b, 0))
	require.NoError(t, f.Close())
	return b
}

// TestSend copies layers to another root, and proves that the devices are the
// same byte by byte.
func TestSend(t *testing.T) {
	for _, o := range []*Options{small(), smallXFS()} {
		t.Run("fs="+o.FS, func(t *testing.T) {
			ctx := t.Context()
			src, dst := mustNew(t, newRoot(t), o), mustNew(t, newRoot(t), o)
			create(t, src, "a", "")
			with(t, src, "a", func(path string) { write(t, path+"/f", 2<<20, 1) })
			create(t, src, "b", "a")
			with(t, src, "b", func(path string) { write(t, path+"/g", 1<<20, 2); require.NoError(t, os.Remove(path+"/f")) })
			create(t, src, "c", "b") // freezes b
			send := func(id, base string) []byte {
				var buf bytes.Buffer
				var last layerfs.Progress
				require.NoError(t, src.Send(ctx, id, base, &buf, &SendOptions{Progress: func(p layerfs.Progress) { last = p }}))
				require.Equal(t, last.Total, last.Bytes)
				return buf.Bytes()
			}
			full := send("a", "")
			delta := send("b", "a")
			require.Less(t, len(delta), len(full))
			require.ErrorContains(t, dst.Receive(ctx, "b", "", bytes.NewReader(delta), nil), "needs a parent")
			require.NoError(t, dst.Receive(ctx, "a", "", bytes.NewReader(full), nil))
			require.NoError(t, dst.Receive(ctx, "b", "a", bytes.NewReader(delta), nil))
			require.True(t, bytes.Equal(image(t, src, "a"), image(t, dst, "a")))
			require.True(t, bytes.Equal(image(t, src, "b"), image(t, dst, "b")))
			oracle(t, dst, "b", "a")
			require.ErrorContains(t, dst.Receive(ctx, "x", "b", bytes.NewReader(delta), nil), "relative to the state")
			// A damaged or cut stream makes no layer.
			for _, n := range []int{0, 5, 20, len(delta) / 2, len(delta) - 1} {
				require.ErrorIs(t, dst.Receive(ctx, "x", "a", bytes.NewReader(delta[:n]), nil), layerfs.ErrMalformed, "%d", n)
			}
			bad := bytes.Clone(delta)
			bad[len(bad)/2] ^= 1
			require.ErrorIs(t, dst.Receive(ctx, "x", "a", bytes.NewReader(bad), nil), layerfs.ErrMalformed)
			_, err := dst.Stat(ctx, "x", nil)
			require.ErrorIs(t, err, layerfs.ErrNotExist)

			// A layer that is written meanwhile, in rounds.
			path, err := src.Get(ctx, "c", nil)
			require.NoError(t, err)
			write(t, path+"/h", 4<<20, 3)
			r, err := src.Replicate(ctx, "c", "b")
			require.NoError(t, err)
			var sizes []int64
			for round := range 3 {
				var buf bytes.Buffer
				n, err := r.Send(ctx, &buf, nil)
				require.NoError(t, err)
				sizes = append(sizes, n)
				if round == 0 {
					err = dst.Receive(ctx, "c", "b", &buf, nil)
				} else {
					err = dst.ReceiveUpdate(ctx, "c", &buf, nil)
				}
				require.NoError(t, err)
				if round == 0 {
					write(t, path+"/i", 100<<10, 4)
				}
				if round == 1 {
					require.NoError(t, src.Put(ctx, "c"))
				}
			}
			require.Less(t, sizes[1], sizes[0])
			require.True(t, bytes.Equal(image(t, src, "c"), image(t, dst, "c")))
			require.NoError(t, r.Close())
			// Once it was written here, no more rounds fit.
			with(t, dst, "c", func(path string) { write(t, path+"/own", 10, 1) })
			var buf bytes.Buffer
			require.NoError(t, src.Send(ctx, "c", "b", &buf, nil))
			require.ErrorContains(t, dst.ReceiveUpdate(ctx, "c", &buf, nil), "relative to the state")
			found, err := dst.Check(ctx)
			require.NoError(t, err)
			require.Empty(t, found)
			snaps, err := filepath.Glob(src.m.devicePath("") + "/.*")
			require.NoError(t, err)
			require.Empty(t, snaps)
		})
	}
}

// TestGuard: new layers are refused while there is still room for the old.
func TestGuard(t *testing.T) {
	o := small()
	o.MinFreeSpace = 50
	o.DataSize = 64 << 20
	d := mustNew(t, newRoot(t), o)
	create(t, d, "a", "")
	with(t, d, "a", func(path string) {
		write(t, path+"/f", 40<<20, 1)
		require.NoError(t, sys.Syncfs(path))
		err := d.Create(t.Context(), "b", "", nil)
		require.ErrorIs(t, err, layerfs.ErrQuota)
		require.ErrorContains(t, err, "less than 50 percent")
		_, err = d.Stat(t.Context(), "b", nil)
		require.ErrorIs(t, err, layerfs.ErrNotExist)
		require.NoError(t, os.Remove(path+"/f"))
		_, err = d.Trim(t.Context(), "a")
		require.NoError(t, err)
	})
	create(t, d, "b", "")
}

// TestRefused: what New must not open, and what it says.
func TestRefused(t *testing.T) {
	setup := func(t *testing.T) (root string) {
		root = newRoot(t)
		d, err := New(root, small())
		testenv.SkipUnsupported(t, err, "devmapper")
		require.NoError(t, err)
		create(t, d, "a", "")
		with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
		require.NoError(t, d.Close())
		return root
	}
	// works makes sure that nothing was lost.
	works := func(t *testing.T, root string) {
		t.Helper()
		d := mustNew(t, root, small())
		with(t, d, "a", func(path string) { require.FileExists(t, path+"/f") })
	}
	edit := func(t *testing.T, root string, change func(map[string]any)) {
		path := filepath.Join(root, homeDir, "pool.json")
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		var s map[string]any
		require.NoError(t, json.Unmarshal(b, &s))
		change(s)
		b, err = json.Marshal(s)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, b, 0o600))
	}
	refused := func(t *testing.T, root string, o *Options, text string) {
		t.Helper()
		_, err := New(root, o)
		require.ErrorContains(t, err, text)
	}
	t.Run("transaction", func(t *testing.T) {
		root := setup(t)
		edit(t, root, func(s map[string]any) { s["transaction_id"] = s["transaction_id"].(float64) + 7 })
		refused(t, root, small(), "not of the same time")
		edit(t, root, func(s map[string]any) { s["transaction_id"] = s["transaction_id"].(float64) - 7 })
		works(t, root)
	})
	t.Run("transaction-behind", func(t *testing.T) {
		root := setup(t)
		edit(t, root, func(s map[string]any) { s["transaction_id"] = s["transaction_id"].(float64) + 1 })
		works(t, root)
	})
	t.Run("base", func(t *testing.T) {
		root := setup(t)
		var was any
		edit(t, root, func(s map[string]any) { was, s["base_uuid"] = s["base_uuid"], uuid() })
		refused(t, root, small(), "is not this root's")
		edit(t, root, func(s map[string]any) { s["base_uuid"] = was })
		works(t, root)
	})
	t.Run("data-missing", func(t *testing.T) {
		root := setup(t)
		data := filepath.Join(root, homeDir, "devicemapper", "data")
		require.NoError(t, os.Rename(data, data+".away"))
		refused(t, root, small(), "a file of the pool is missing")
		require.NoError(t, os.Rename(data+".away", data))
		works(t, root)
	})
	t.Run("data-truncated", func(t *testing.T) {
		root := setup(t)
		data := filepath.Join(root, homeDir, "devicemapper", "data")
		require.NoError(t, os.Truncate(data, 4<<20))
		_, err := New(root, small())
		require.Error(t, err) // the kernel refuses a pool that has shrunk
		require.NoError(t, os.Truncate(data, small().DataSize))
		d := mustNew(t, root, small()) // what was cut off is lost, but not the pool
		_, err = d.Stat(t.Context(), "a", nil)
		require.NoError(t, err)
	})
	t.Run("attached", func(t *testing.T) {
		root := setup(t)
		l, err := loop.Attach(t.Context(), filepath.Join(root, homeDir, "devicemapper", "data"), nil)
		require.NoError(t, err)
		refused(t, root, small(), "but the pool is not active")
		require.NoError(t, l.Detach())
		works(t, root)
	})
	t.Run("foreign-pool", func(t *testing.T) {
		root := setup(t)
		d, err := New(root, small())
		require.NoError(t, err)
		pool := d.m.pool
		require.NoError(t, d.Close())
		c, err := dm.Open()
		require.NoError(t, err)
		defer c.Close()
		_, err = c.Activate(pool, "", []dm.Target{dm.ErrorTarget(0, 8)}, false)
		require.NoError(t, err)
		refused(t, root, small(), "is not the pool of this root")
		require.NoError(t, c.Remove(pool))
		works(t, root)
	})
	t.Run("foreign-device", func(t *testing.T) {
		root := setup(t)
		d := mustNew(t, root, small())
		device := d.m.deviceName("a", false)
		_, err := d.m.ctl.Activate(device, "", []dm.Target{dm.ErrorTarget(0, 8)}, false)
		require.NoError(t, err)
		_, err = d.Get(t.Context(), "a", nil)
		require.ErrorContains(t, err, "is not of this root")
		require.NoError(t, d.m.ctl.Remove(device))
		works(t, root)
	})
	t.Run("lost-device", func(t *testing.T) {
		root := setup(t)
		d := mustNew(t, root, small())
		create(t, d, "b", "")
		dev, err := d.m.load("b")
		require.NoError(t, err)
		require.NoError(t, d.m.deleteThin(dev.ID))
		_, err = d.Get(t.Context(), "b", nil)
		require.ErrorContains(t, err, "is not in the pool")
		found, err := d.Check(t.Context())
		require.NoError(t, err)
		require.Len(t, found, 1)
		require.Equal(t, "b", found[0].ID)
		require.NoError(t, d.Remove(t.Context(), "b"))
		works(t, root)
	})
	t.Run("needs-check", func(t *testing.T) {
		testenv.RequireTool(t, "thin_check", "devmapper")
		root := setup(t)
		setNeedsCheck(t, filepath.Join(root, homeDir, "devicemapper", "metadata"))
		works(t, root)
	})
	t.Run("damaged", func(t *testing.T) {
		root := setup(t)
		meta := filepath.Join(root, homeDir, "devicemapper", "metadata")
		f, err := os.OpenFile(meta, os.O_RDWR, 0)
		require.NoError(t, err)
		was := make([]byte, 4096)
		_, err = f.ReadAt(was, 0)
		require.NoError(t, err)
		_, err = f.WriteAt([]byte("nonsense"), 100)
		require.NoError(t, err)
		_, err = New(root, small())
		require.ErrorContains(t, err, "activate the pool")
		_, err = f.WriteAt(was, 0)
		require.NoError(t, errors.Join(err, f.Close()))
		works(t, root)
	})
	t.Run("options", func(t *testing.T) {
		root := setup(t)
		o := small()
		o.FS, o.BlockSize, o.BaseSize = "xfs", 128<<10, 300<<20
		_, err := New(root, o)
		require.ErrorContains(t, err, "FS is xfs")
		require.ErrorContains(t, err, "BlockSize is 131072")
		o = small()
		o.BaseSize = 32 << 20
		refused(t, root, o, "cannot shrink")
		works(t, root)
	})
}

// setNeedsCheck sets THIN_METADATA_NEEDS_CHECK_FLAG of a superblock.
func setNeedsCheck(t *testing.T, path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	b := make([]byte, 4096)
	_, err = f.ReadAt(b, 0)
	require.NoError(t, err)
	binary.LittleEndian.PutUint32(b[4:], binary.LittleEndian.Uint32(b[4:])|1)
	const superblockXOR = 160774
	binary.LittleEndian.PutUint32(b, ^crc32.Checksum(b[4:], castagnoli())^superblockXOR)
	_, err = f.WriteAt(b, 0)
	require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
}

// TestPowerFailure: a device whose file was lost goes away.
func TestPowerFailure(t *testing.T) {
	root := newRoot(t)
	d, err := New(root, small())
	testenv.SkipUnsupported(t, err, "devmapper")
	require.NoError(t, err)
	create(t, d, "a", "")
	create(t, d, "b", "a")
	dev, err := d.m.load("b")
	require.NoError(t, err)
	require.NoError(t, os.Remove(d.m.devicePath("b")))
	require.NoError(t, os.Remove(filepath.Join(d.m.home, ".layerfs", "records", "b")))
	require.NoError(t, d.Close())
	d = mustNew(t, root, small())
	require.NoError(t, d.m.deleteThin(dev.ID), "no such device")
	_, err = d.m.activateThin(d.m.deviceName("+x", false), "", dev.ID, 1<<20, true)
	require.ErrorIs(t, err, unix.ENODATA)
	create(t, d, "b", "a")
}

// TestDevices: a pool on two devices, and one that somebody else has made.
func TestDevices(t *testing.T) {
	dir := newRoot(t)
	testenv.RequireRoot(t)
	disk := func(name string, size int64) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, nil, 0o600))
		require.NoError(t, os.Truncate(path, size))
		l, err := loop.Attach(t.Context(), path, nil)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, l.Detach()) })
		return l.Path()
	}
	data, metadata := disk("data", 128<<20), disk("metadata", 4<<20)
	use := func(t *testing.T, root string, o *Options) {
		for range 2 {
			d, err := New(root, o)
			testenv.SkipUnsupported(t, err, "devmapper")
			require.NoError(t, err)
			if _, err := d.Stat(t.Context(), "a", nil); err != nil {
				create(t, d, "a", "")
				with(t, d, "a", func(path string) { write(t, path+"/f", 1000, 1) })
			}
			create(t, d, "b", "a")
			with(t, d, "b", func(path string) { require.FileExists(t, path+"/f") })
			oracle(t, d, "b", "a")
			require.NoError(t, d.Remove(t.Context(), "b"))
			require.NoError(t, d.Close())
		}
	}
	t.Run("devices", func(t *testing.T) {
		use(t, newRoot(t), &Options{DataDevice: data, MetadataDevice: metadata, BaseSize: 64 << 20})
	})
	t.Run("pool", func(t *testing.T) {
		require.NoError(t, wipe(metadata))
		c, err := dm.Open()
		testenv.SkipUnsupported(t, err, "devmapper")
		require.NoError(t, err)
		defer c.Close()
		target, err := dm.ThinPool{Length: 128 << 11, Data: data, Metadata: metadata, BlockSectors: 256}.Target()
		require.NoError(t, err)
		pool := "layerfs-test-pool-" + strconv.Itoa(os.Getpid())
		_, err = c.Activate(pool, "", []dm.Target{target}, false)
		require.NoError(t, err)
		defer func() { require.NoError(t, c.Remove(pool)) }()
		root := newRoot(t)
		use(t, root, &Options{ThinPoolDevice: pool, BaseSize: 64 << 20})
		_, err = New(newRoot(t), &Options{ThinPoolDevice: pool, BaseSize: 64 << 20})
		require.ErrorContains(t, err, "is in use")
		_, err = New(root, small())
		require.ErrorContains(t, err, "was made with")
	})
}

// TestLongID: ids that differ at the end only, of full length.
func TestLongID(t *testing.T) {
	d := mustNew(t, newRoot(t), small())
	long := strings.Repeat("x", 127)
	for _, id := range []string{long + "1", long + "2", "pool"} {
		create(t, d, id, "")
		with(t, d, id, func(path string) { write(t, path+"/"+id[len(id)-4:], 1, 1) })
	}
	for _, id := range []string{long + "1", long + "2", "pool"} {
		with(t, d, id, func(path string) { require.FileExists(t, path+"/"+id[len(id)-4:]) })
	}
}
