package mount_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/mount"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// requireMethod skips what a kernel has not got.
func requireMethod(t testing.TB, m mount.Method) {
	t.Helper()
	if m == mount.NewAPI {
		testenv.RequireKernel(t, "6.8", "overlay lowerdir+")
	}
}

var overlayMethods = []mount.Method{mount.Auto, mount.NewAPI, mount.Classic, mount.Descriptors}

// layers makes n directories with a file each, named by their position.
func layers(t testing.TB, base string, n int, name func(int) string) []string {
	t.Helper()
	var out []string
	for i := range n {
		dir := filepath.Join(base, name(i))
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), []byte(dir), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "same"), fmt.Append(nil, i), 0o644))
		out = append(out, dir)
	}
	return out
}

func dirs(t testing.TB, base string, names ...string) []string {
	t.Helper()
	var out []string
	for _, n := range names {
		p := filepath.Join(base, n)
		require.NoError(t, os.MkdirAll(p, 0o755))
		out = append(out, p)
	}
	return out
}

func mustUnmount(t testing.TB, target string) {
	t.Helper()
	require.NoError(t, mount.Unmount(target))
}

func TestOverlayMount(t *testing.T) {
	testenv.RequireRoot(t)
	long := strings.Repeat("x", 250)
	for _, tt := range []struct {
		name    string
		lowers  int
		layer   func(int) string
		upper   string
		classic error // what Classic gives
	}{
		{"plain", 2, func(i int) string { return fmt.Sprint("l", i) }, "u", nil},
		{"one-lower", 1, func(i int) string { return fmt.Sprint("l", i) }, "u", nil},
		{"no-upper", 2, func(i int) string { return fmt.Sprint("l", i) }, "", nil},
		{"bytes", 5, func(i int) string { return []string{"a:b", "c,d", `e\f`, "g h\ni", "\\:,\"'\xff"}[i] }, `u:,\`, nil},
		{"backslash-last", 2, func(i int) string { return fmt.Sprint(i, `\`) }, `u\`, nil},
		{"long-paths", 20, func(i int) string { return fmt.Sprint(long, "/", long, "/", i) }, "u" + long, unix.E2BIG},
		{"long-special", 20, func(i int) string { return fmt.Sprint(long, `:\,/`, i) }, `u\:,` + long[:200], unix.E2BIG},
		{"500", 500, func(i int) string { return fmt.Sprint("layer-", i) }, "u", unix.E2BIG},
		{"500-no-upper", 500, func(i int) string { return fmt.Sprint("layer-", i) }, "", unix.E2BIG},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base := testenv.Tmpfs(t)
			target := dirs(t, base, "m:t,\\")[0]
			plan := mount.Overlay{Lowers: layers(t, base, tt.lowers, tt.layer)}
			if tt.upper != "" {
				plan.Upper, plan.Work = dirs(t, base, tt.upper)[0], dirs(t, base, tt.upper+`w\`)[0]
			}
			for _, method := range overlayMethods {
				t.Run(method.String(), func(t *testing.T) {
					requireMethod(t, method)
					plan.Method = method
					err := plan.Mount(target)
					if method == mount.Classic && tt.classic != nil {
						require.ErrorIs(t, err, tt.classic)
						return
					}
					require.NoError(t, err)
					defer mustUnmount(t, target)
					got, err := os.ReadFile(filepath.Join(target, "same"))
					require.NoError(t, err)
					assert.Equal(t, "0", string(got), "the first lower is on top")
					for i := range tt.lowers {
						got, err := os.ReadFile(filepath.Join(target, fmt.Sprint("f", i)))
						require.NoError(t, err)
						assert.Equal(t, plan.Lowers[i], string(got))
					}
					st, err := mount.Query(target)
					require.NoError(t, err)
					assert.True(t, st.MountPoint)
					assert.Equal(t, uint32(unix.OVERLAYFS_SUPER_MAGIC), st.Magic)
					err = os.WriteFile(filepath.Join(target, "new"), nil, 0o644)
					if tt.upper == "" {
						require.ErrorIs(t, err, unix.EROFS)
						assert.True(t, st.ReadOnly)
						return
					}
					require.NoError(t, err)
					assert.FileExists(t, filepath.Join(plan.Upper, "new"))
					require.NoError(t, os.Remove(filepath.Join(target, "new")))
					list, err := mount.Under(target)
					require.NoError(t, err)
					require.Len(t, list, 1)
					assert.Equal(t, target, list[0].Mountpoint)
					assert.Equal(t, "overlay", list[0].Source)
				})
			}
		})
	}
}

func TestOverlayReadOnly(t *testing.T) {
	testenv.RequireRoot(t)
	for _, method := range overlayMethods {
		t.Run(method.String(), func(t *testing.T) {
			requireMethod(t, method)
			base := testenv.Tmpfs(t)
			d := dirs(t, base, "l", "u", "w", "m")
			plan := mount.Overlay{Lowers: d[:1], Upper: d[1], Work: d[2], Flags: mount.ReadOnly | mount.NoSuid | mount.NoDev, Source: "here", Method: method}
			require.NoError(t, plan.Mount(d[3]))
			defer mustUnmount(t, d[3])
			st, err := mount.Query(d[3])
			require.NoError(t, err)
			assert.True(t, st.ReadOnly)
			require.ErrorIs(t, os.Mkdir(filepath.Join(d[3], "x"), 0o755), unix.EROFS)
			list, err := mount.Under(d[3])
			require.NoError(t, err)
			require.Len(t, list, 1)
			assert.Equal(t, "here", list[0].Source)
			for _, opt := range []string{"ro", "nosuid", "nodev"} {
				assert.Contains(t, strings.Split(list[0].Options, ","), opt)
			}
			assert.Contains(t, strings.Split(list[0].VFSOptions, ","), "ro", "the superblock is read-only too")
		})
	}
}

func TestOverlayOptions(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.RequireKernel(t, "5.11", "userxattr")
	for _, method := range overlayMethods {
		t.Run(method.String(), func(t *testing.T) {
			requireMethod(t, method)
			base := testenv.Tmpfs(t)
			d := dirs(t, base, "l", "u", "w", "m")
			plan := mount.Overlay{
				Lowers: d[:1], Upper: d[1], Work: d[2], Method: method,
				Volatile: true, Metacopy: "on", RedirectDir: "on", Index: "off", NFSExport: "off", XIno: "on",
				Options: []string{"default_permissions"},
			}
			require.NoError(t, plan.Mount(d[3]))
			list, err := mount.Under(d[3])
			require.NoError(t, err)
			require.Len(t, list, 1)
			for _, opt := range []string{"metacopy=on", "redirect_dir=on", "default_permissions"} {
				assert.Contains(t, strings.Split(list[0].VFSOptions, ","), opt)
			}
			assert.Contains(t, list[0].VFSOptions, "volatile") // newer kernels show fsync=volatile
			assert.DirExists(t, filepath.Join(d[2], "work/incompat/volatile"))
			mustUnmount(t, d[3])

			d = dirs(t, base, "l", "u2", "w2", "m")
			plan = mount.Overlay{Lowers: d[:1], Upper: d[1], Work: d[2], Method: method, UserXattr: true}
			require.NoError(t, plan.Mount(d[3]))
			defer mustUnmount(t, d[3])
			list, err = mount.Under(d[3])
			require.NoError(t, err)
			assert.Contains(t, strings.Split(list[0].VFSOptions, ","), "userxattr")
		})
	}
}

func TestOverlayErrors(t *testing.T) {
	testenv.RequireRoot(t)
	base := testenv.Tmpfs(t)
	d := dirs(t, base, "l", "u", "w", "m")
	require.NoError(t, os.Symlink(d[3], filepath.Join(base, "link")))
	explains := sys.KernelAtLeast(6, 8)
	for _, method := range overlayMethods {
		t.Run(method.String(), func(t *testing.T) {
			requireMethod(t, method)
			for _, tt := range []struct {
				name   string
				change func(p *mount.Overlay)
				target string
				want   error
				text   string // with the new API
			}{
				{"lower-missing", func(p *mount.Overlay) { p.Lowers = []string{base + "/none"} }, d[3], unix.ENOENT, "lowerdir+"},
				{"upper-missing", func(p *mount.Overlay) { p.Upper = base + "/none" }, d[3], unix.ENOENT, "upperdir"},
				{"target-missing", func(*mount.Overlay) {}, base + "/none", unix.ENOENT, "move_mount"},
				{"target-symlink", func(*mount.Overlay) {}, base + "/link", nil, ""},
				{"option-unknown", func(p *mount.Overlay) { p.Options = []string{"nonsense=1"} }, d[3], unix.EINVAL, "nonsense"},
				{"option-bad", func(p *mount.Overlay) { p.Metacopy = "maybe" }, d[3], unix.EINVAL, "metacopy"},
				{"conflict", func(p *mount.Overlay) { p.UserXattr, p.Metacopy = true, "on" }, d[3], unix.EINVAL, ""},
			} {
				t.Run(tt.name, func(t *testing.T) {
					p := mount.Overlay{Lowers: d[:1], Upper: d[1], Work: d[2], Method: method}
					tt.change(&p)
					err := p.Mount(tt.target)
					require.Error(t, err)
					if tt.want != nil {
						require.ErrorIs(t, err, tt.want)
					}
					var pe *os.PathError
					require.ErrorAs(t, err, &pe)
					if explains && (method == mount.Auto || method == mount.NewAPI) {
						assert.ErrorContains(t, err, tt.text)
					}
					list, err := mount.Under(base)
					require.NoError(t, err)
					assert.Len(t, list, 1, "nothing but the tmpfs is mounted")
				})
			}
		})
	}
}

func TestMount(t *testing.T) {
	testenv.RequireRoot(t)
	for _, method := range []mount.Method{mount.Auto, mount.NewAPI, mount.Classic} {
		t.Run(method.String(), func(t *testing.T) {
			target := t.TempDir()
			p := mount.FS{Type: "tmpfs", Source: "test", Flags: mount.NoExec | mount.NoAtime, Options: []string{"size=64k", "mode=0700"}, Method: method}
			require.NoError(t, p.Mount(target))
			list, err := mount.Under(target)
			require.NoError(t, err)
			require.Len(t, list, 1)
			assert.Equal(t, "test", list[0].Source)
			assert.Contains(t, list[0].VFSOptions, "size=64k")
			assert.Contains(t, list[0].Options, "noexec")
			assert.Contains(t, list[0].Options, "noatime")
			require.NoError(t, mount.UnmountNow(target))

			p.Options = []string{"size=lots"}
			require.ErrorIs(t, p.Mount(target), unix.EINVAL)
			p = mount.FS{Type: "nosuchfs", Method: method}
			require.ErrorIs(t, p.Mount(target), errors.ErrUnsupported)
			p = mount.FS{Type: "tmpfs", Options: []string{"sync", "dirsync"}, Flags: mount.ReadOnly, Method: method}
			require.NoError(t, p.Mount(target))
			list, err = mount.Under(target)
			require.NoError(t, err)
			for _, opt := range []string{"ro", "sync", "dirsync"} {
				assert.Contains(t, strings.Split(list[0].VFSOptions, ","), opt)
			}
			mustUnmount(t, target)
		})
	}
}

func TestBind(t *testing.T) {
	testenv.RequireRoot(t)
	for _, method := range []mount.Method{mount.Auto, mount.NewAPI, mount.Classic} {
		for _, flags := range []mount.Flags{0, mount.ReadOnly, mount.ReadOnly | mount.Recursive, mount.NoExec | mount.NoSuid | mount.NoDev | mount.NoAtime, mount.Recursive} {
			t.Run(fmt.Sprintf("%v/%b", method, flags), func(t *testing.T) {
				base := testenv.Tmpfs(t)
				d := dirs(t, base, "src/sub", "dst")
				src := filepath.Dir(d[0])
				require.NoError(t, mount.Mount("tmpfs", "sub", d[0], 0, nil))
				require.NoError(t, os.WriteFile(filepath.Join(d[0], "inner"), nil, 0o644))
				p := mount.BindMount{Source: src, Flags: flags, Method: method}
				require.NoError(t, p.Mount(d[1]))
				list, err := mount.Under(d[1])
				require.NoError(t, err)
				if flags&mount.Recursive == 0 {
					require.Len(t, list, 1)
				} else {
					require.Len(t, list, 2)
				}
				for _, m := range list {
					have := strings.Split(m.Options, ",")
					for flag, opt := range map[mount.Flags]string{
						mount.ReadOnly: "ro", mount.NoExec: "noexec", mount.NoSuid: "nosuid", mount.NoDev: "nodev", mount.NoAtime: "noatime",
					} {
						if flags&flag != 0 {
							assert.Contains(t, have, opt, m.Mountpoint)
						} else {
							assert.NotContains(t, have, opt, m.Mountpoint)
						}
					}
				}
				_, err = os.Stat(filepath.Join(d[1], "sub/inner"))
				assert.Equal(t, flags&mount.Recursive != 0, err == nil)
				require.NoError(t, os.WriteFile(filepath.Join(src, "still-writable"), nil, 0o644))
			})
		}
	}
	t.Run("file", func(t *testing.T) {
		for _, method := range []mount.Method{mount.NewAPI, mount.Classic} {
			dir := t.TempDir()
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			require.NoError(t, os.WriteFile(a, []byte("a"), 0o644))
			require.NoError(t, os.WriteFile(b, []byte("b"), 0o644))
			p := mount.BindMount{Source: a, Flags: mount.ReadOnly, Method: method}
			require.NoError(t, p.Mount(b))
			got, err := os.ReadFile(b)
			require.NoError(t, err)
			assert.Equal(t, "a", string(got))
			mustUnmount(t, b)
		}
	})
}

func TestUnmount(t *testing.T) {
	testenv.RequireRoot(t)
	base := testenv.Tmpfs(t)
	d := dirs(t, base, "plain", "target")
	err := mount.Unmount(d[0])
	require.ErrorIs(t, err, mount.ErrNotMounted)
	require.ErrorIs(t, err, unix.EINVAL)
	require.NoError(t, mount.IgnoreNotMounted(err))
	require.ErrorIs(t, mount.IgnoreNotMounted(mount.Unmount(base+"/none")), os.ErrNotExist)
	require.NotErrorIs(t, mount.Unmount(base+"/none"), mount.ErrNotMounted)
	require.ErrorIs(t, mount.Unmount(base+"/none"), os.ErrNotExist)

	require.NoError(t, mount.Mount("tmpfs", "", d[1], 0, nil))
	link := filepath.Join(base, "link")
	require.NoError(t, os.Symlink(d[1], link))
	require.ErrorIs(t, mount.Unmount(link), mount.ErrNotMounted)
	f, err := os.Create(filepath.Join(d[1], "busy"))
	require.NoError(t, err)
	defer f.Close()
	require.ErrorIs(t, mount.UnmountNow(d[1]), unix.EBUSY)
	require.NoError(t, mount.Unmount(d[1]))
	is, err := mount.IsMountPoint(d[1])
	require.NoError(t, err)
	assert.False(t, is)
}

func TestQuery(t *testing.T) {
	testenv.RequireRoot(t)
	base := testenv.Tmpfs(t)
	d := dirs(t, base, "a b\nc\\", "plain")
	require.NoError(t, mount.Mount("tmpfs", "", d[0], mount.ReadOnly, nil))
	link := filepath.Join(base, "link")
	require.NoError(t, os.Symlink(d[0], link))
	for path, want := range map[string]bool{base: true, d[0]: true, d[1]: false, link: false, base + "/none": false} {
		got, err := mount.IsMountPoint(path)
		require.NoError(t, err)
		assert.Equal(t, want, got, path)
	}
	s, err := mount.Query(d[0])
	require.NoError(t, err)
	assert.True(t, s.ReadOnly)
	assert.Equal(t, uint32(unix.TMPFS_MAGIC), s.Magic)
	list, err := mount.Under(base)
	require.NoError(t, err)
	require.Len(t, list, 2)
	assert.Equal(t, d[0], list[1].Mountpoint)
	assert.Equal(t, uint64(list[1].ID), s.ID)
	_, err = mount.Query(base + "/none")
	require.ErrorIs(t, err, os.ErrNotExist)
}

// What a crashed FUSE server leaves must be found and unmounted.
func TestIsMountPointWithoutServer(t *testing.T) {
	testenv.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "m")
	require.NoError(t, os.Mkdir(dir, 0o755))
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	options := []string{fmt.Sprint("fd=", fuse.Fd()), "rootmode=40000", "user_id=0", "group_id=0"}
	err = mount.Mount("fuse", "gone", dir, 0, options)
	require.NoError(t, fuse.Close())
	testenv.SkipUnsupported(t, err)
	require.NoError(t, err)
	_, err = os.ReadDir(dir)
	require.ErrorIs(t, err, unix.ENOTCONN)
	is, err := mount.IsMountPoint(dir)
	require.NoError(t, err)
	assert.True(t, is)
	mustUnmount(t, dir)
}

func TestMakePrivate(t *testing.T) {
	testenv.RequireRoot(t)
	base := testenv.Tmpfs(t)
	require.NoError(t, unix.Mount("", base, "", unix.MS_SHARED, ""))
	d := dirs(t, base, "home", "peer", "home2")
	require.NoError(t, mount.Bind(base, d[1], 0)) // a peer of base

	shared, err := mount.Shared(d[0])
	require.NoError(t, err)
	require.True(t, shared)
	leak := func(home string) bool {
		t.Helper()
		m := dirs(t, home, "m")[0]
		require.NoError(t, mount.Mount("tmpfs", "", m, 0, nil))
		defer mustUnmount(t, m)
		list, err := mount.Under(filepath.Join(d[1], filepath.Base(home), "m"))
		require.NoError(t, err)
		return len(list) > 0
	}
	require.True(t, leak(d[2]), "the peer sees mounts of a shared directory")
	made, err := mount.MakePrivate(d[0])
	require.NoError(t, err)
	require.True(t, made)
	shared, err = mount.Shared(d[0])
	require.NoError(t, err)
	require.False(t, shared)
	require.False(t, leak(d[0]))
	made, err = mount.MakePrivate(d[0])
	require.NoError(t, err)
	require.False(t, made)
}

func TestOpenTreeMapped(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.RequireKernel(t, "6.3", "idmapped mount of tmpfs")
	base := testenv.Tmpfs(t)
	d := dirs(t, base, "src", "dst")
	require.NoError(t, os.WriteFile(filepath.Join(d[0], "f"), nil, 0o644))
	require.NoError(t, os.Chown(filepath.Join(d[0], "f"), 7, 9))
	m := &layerfs.IDMap{
		UIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GIDs: []layerfs.IDRange{{ContainerID: 0, HostID: 200000, Size: 65536}},
	}
	tree, err := mount.OpenTreeMapped(d[0], m)
	require.NoError(t, err)
	defer tree.Close()
	owner := func(path string) (uint32, uint32) {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		return st.Uid, st.Gid
	}
	t.Run("overlay", func(t *testing.T) {
		testenv.RequireKernel(t, "6.15", "detached overlay layers")
		for _, method := range []mount.Method{mount.Auto, mount.NewAPI, mount.Descriptors} {
			u := dirs(t, base, method.String()+"-u", method.String()+"-w", "m")
			p := mount.Overlay{Lowers: d[:1], Upper: u[0], Work: u[1], Files: map[string]*os.File{d[0]: tree}, Method: method}
			require.NoError(t, p.Mount(u[2]), method)
			uid, gid := owner(filepath.Join(u[2], "f"))
			assert.Equal(t, [2]uint32{100007, 200009}, [2]uint32{uid, gid}, method)
			mustUnmount(t, u[2])
			p.Method = mount.Classic
			require.Error(t, p.Mount(u[2]))
		}
	})
	require.NoError(t, mount.Attach(tree, d[1]))
	uid, gid := owner(filepath.Join(d[1], "f"))
	assert.Equal(t, [2]uint32{100007, 200009}, [2]uint32{uid, gid})
	uid, gid = owner(filepath.Join(d[0], "f"))
	assert.Equal(t, [2]uint32{7, 9}, [2]uint32{uid, gid})

	t.Run("no-mapping", func(t *testing.T) {
		_, err := mount.OpenTreeMapped(d[0], &layerfs.IDMap{})
		require.Error(t, err)
	})
	t.Run("bad-mapping", func(t *testing.T) {
		bad := &layerfs.IDMap{UIDs: []layerfs.IDRange{{Size: 5}, {Size: 5}}, GIDs: m.GIDs}
		_, err := mount.OpenTreeMapped(d[0], bad)
		require.Error(t, err)
	})
	t.Run("file-system-without", func(t *testing.T) {
		_, err := mount.OpenTreeMapped("/proc", m)
		require.ErrorIs(t, err, errors.ErrUnsupported)
	})
}

func BenchmarkOverlayMount(b *testing.B) {
	testenv.RequireRoot(b)
	for _, n := range []int{1, 20, 100} {
		for _, method := range overlayMethods {
			b.Run(fmt.Sprintf("method=%v/layers=%d", method, n), func(b *testing.B) {
				base := testenv.Tmpfs(b)
				d := dirs(b, base, "u", "w", "m")
				p := mount.Overlay{Lowers: layers(b, base, n, func(i int) string { return fmt.Sprint("l", i) }), Upper: d[0], Work: d[1], Method: method}
				for b.Loop() {
					if err := p.Mount(d[2]); err != nil {
						b.Skip(err)
					}
					if err := mount.Unmount(d[2]); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		b.Run(fmt.Sprintf("method=bare/layers=%d", n), func(b *testing.B) {
			base := testenv.Tmpfs(b)
			d := dirs(b, base, "u", "w", "m")
			p := mount.Overlay{Lowers: layers(b, base, n, func(i int) string { return fmt.Sprint("l", i) }), Upper: d[0], Work: d[1]}
			data := p.Data()
			if len(data) > mount.PageLimit {
				b.Skip("more than a page")
			}
			for b.Loop() {
				if err := unix.Mount("overlay", d[2], "overlay", 0, data); err != nil {
					b.Fatal(err)
				}
				if err := unix.Unmount(d[2], unix.MNT_DETACH); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkUserNamespace(b *testing.B) {
	testenv.RequireRoot(b)
	m := &layerfs.IDMap{UIDs: []layerfs.IDRange{{Size: 65536}}, GIDs: []layerfs.IDRange{{Size: 65536}}}
	for b.Loop() {
		f, err := mount.UserNamespace(m)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}

// TestAskStopped asks a file system whose server has said nothing yet.
func TestAskStopped(t *testing.T) {
	testenv.RequireFUSE(t, "overlay-union")
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0) // not by package os: it must not be polled
	require.NoError(t, err)
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	defer dev.Close()
	target := t.TempDir()
	options := []string{fmt.Sprint("fd=", fd), "rootmode=40000", "user_id=0", "group_id=0"}
	require.NoError(t, mount.Mount("fuse", "stopped", target, 0, options))
	defer func() { require.NoError(t, mount.Unmount(target)) }()
	began := time.Now()
	_, err = mount.Ask(target, 50*time.Millisecond)
	require.ErrorIs(t, err, unix.ETIMEDOUT)
	require.ErrorContains(t, err, target)
	require.Less(t, time.Since(began), 5*time.Second)
	require.NoError(t, dev.Close())
	_, err = mount.Ask(target, time.Minute)
	require.ErrorIs(t, err, unix.ENOTCONN)
	st, err := mount.Ask("/proc", time.Minute)
	require.NoError(t, err)
	require.True(t, st.MountPoint)
}
