package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// record is an entry as the kernel writes it: with a NUL, and rounded up to
// eight bytes that it leaves as they were (filldir64, fs/readdir.c).
func record(ino uint64, typ byte, name string) []byte {
	size := (19 + len(name) + 1 + 7) / 8 * 8
	b := binary.NativeEndian.AppendUint64(nil, ino)
	b = binary.NativeEndian.AppendUint64(b, ^uint64(0))
	b = binary.NativeEndian.AppendUint16(b, uint16(min(size, 0xffff)))
	b = append(b, typ)
	b = append(append(b, name...), 0)
	for len(b) < min(size, 0xffff) {
		b = append(b, '#')
	}
	return b
}

type direntCase struct {
	name string
	buf  []byte
	want []string // inode, type and name of each
	bad  bool     // ends with an error
}

func direntCases() []direntCase {
	join := func(records ...[]byte) (all []byte) {
		for _, r := range records {
			all = append(all, r...)
		}
		return all
	}
	size := func(r []byte, n uint16) []byte {
		binary.NativeEndian.PutUint16(r[16:], n)
		return r
	}
	a, b := record(7, unix.DT_REG, "a"), record(1<<40, unix.DT_DIR, "bb")
	long := strings.Repeat("n", 255)
	return []direntCase{
		{name: "nothing"},
		{"two", join(a, b), []string{"7 8 a", "1099511627776 4 bb"}, false},
		{"dots", join(record(1, unix.DT_DIR, "."), a, record(2, unix.DT_DIR, "..")), []string{"7 8 a"}, false},
		{"only dots", join(record(1, unix.DT_DIR, "."), record(2, unix.DT_DIR, "..")), nil, false},
		{"like dots", join(record(1, 0, "..."), record(2, 0, ".a"), record(3, 0, "..a")), []string{"1 0 ...", "2 0 .a", "3 0 ..a"}, false},
		{"longest", record(1, unix.DT_LNK, long), []string{"1 10 " + long}, false},
		{"not text", record(1, unix.DT_FIFO, "\xff\n\x01"), []string{"1 1 \xff\n\x01"}, false},
		{"no inode", record(0, unix.DT_REG, "a"), []string{"0 8 a"}, false}, // some FUSE servers
		{"smallest", size(record(1, unix.DT_REG, "a")[:21], 21), []string{"1 8 a"}, false},

		{"short header", join(a, b[:18]), []string{"7 8 a"}, true},
		{"one byte", join(a, []byte{0}), []string{"7 8 a"}, true},
		{"zeroes", make([]byte, 64), nil, true},
		{"no length", join(a, size(record(1, 0, "b"), 0), a), []string{"7 8 a"}, true},
		{"length below the header", size(record(1, 0, "b"), 18), nil, true},
		{"length of the header", join(a, size(record(1, 0, "b"), 19)), []string{"7 8 a"}, true},
		{"length beyond the buffer", join(a, b[:len(b)-1]), []string{"7 8 a"}, true},
		{"greatest length", size(record(1, 0, "b"), 0xffff), nil, true},
		{"no name", record(1, 0, ""), nil, true},
		{"no NUL", size(record(1, 0, "abcde")[:24], 24), nil, true},
		{"NUL behind the record", size(record(1, 0, "abcde"), 23), nil, true},
	}
}

func (c *direntCase) check(t *testing.T) {
	t.Helper()
	var got []string
	list := Dirents(c.buf)
	for {
		d, ok, err := list.Next()
		if !ok {
			for range 2 { // and it stays so
				assert.Zero(t, d)
				if c.bad {
					assert.Equal(t, unix.EIO, err)
				} else {
					assert.NoError(t, err)
				}
				d, ok, err = list.Next()
				assert.False(t, ok)
			}
			break
		}
		require.NoError(t, err)
		got = append(got, fmt.Sprint(d.Ino, " ", d.Type, " ", string(d.Name)))
	}
	assert.Equal(t, c.want, got)
}

func TestDirents(t *testing.T) {
	for _, c := range direntCases() {
		t.Run(c.name, c.check)
	}
	t.Run("every cut", func(t *testing.T) {
		one, two := record(7, unix.DT_REG, "first"), record(8, unix.DT_DIR, "second")
		buf := append(append([]byte(nil), one...), two...)
		for n := range len(buf) + 1 {
			c := direntCase{buf: buf[:n:n], bad: n != 0 && n != len(one) && n != len(buf)}
			if n >= len(one) {
				c.want = append(c.want, "7 8 first")
			}
			if n == len(buf) {
				c.want = append(c.want, "8 4 second")
			}
			c.check(t)
		}
	})
	t.Run("buffers stay on the stack", func(t *testing.T) {
		entry, taken := record(1, 0, "a"), 0
		assert.Zero(t, testing.AllocsPerRun(100, func() {
			buf := make([]byte, 4096)
			list := Dirents(buf[:copy(buf, entry)])
			for d, ok, _ := list.Next(); ok; d, ok, _ = list.Next() {
				taken += len(d.Name)
			}
		}))
		assert.Positive(t, taken)
	})
}

// TestGetdents compares a directory with what lstat says of its entries.
func TestGetdents(t *testing.T) {
	dir := t.TempDir()
	want := map[string]string{}
	add := func(name string, typ byte) {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
		want[name] = fmt.Sprint(st.Ino, " ", typ)
	}
	for i := range 300 { // more than a buffer
		name := fmt.Sprint("file ", i, strings.Repeat("x", i%200))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		add(name, unix.DT_REG)
	}
	require.NoError(t, os.Mkdir(filepath.Join(dir, ".d"), 0o700))
	add(".d", unix.DT_DIR)
	require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "l")))
	add("l", unix.DT_LNK)
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "p"), 0o600))
	add("p", unix.DT_FIFO)

	fd, err := Openat(unix.AT_FDCWD, dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	got := map[string]string{}
	buf := make([]byte, 4096)
	for {
		n, err := Getdents(fd, buf)
		require.NoError(t, err)
		if n == 0 {
			break
		}
		for list := Dirents(buf[:n]); ; {
			d, ok, err := list.Next()
			require.NoError(t, err)
			if !ok {
				break
			}
			typ, err := EntryType(fd, string(d.Name), d.Type)
			require.NoError(t, err)
			require.NotContains(t, got, string(d.Name))
			got[string(d.Name)] = fmt.Sprint(d.Ino, " ", typ)
		}
	}
	assert.Equal(t, want, got)
	for _, small := range [][]byte{nil, make([]byte, 20)} {
		_, err = unix.Seek(fd, 0, 0)
		require.NoError(t, err)
		_, err = Getdents(fd, small)
		assert.Equal(t, unix.EINVAL, err)
	}
	_, err = Getdents(-1, buf)
	assert.Equal(t, unix.EBADF, err)

	for name, what := range want {
		typ, err := EntryType(fd, name, unix.DT_UNKNOWN)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(" ", typ), what[strings.IndexByte(what, ' '):], name)
	}
	typ, err := EntryType(-1, "no call", unix.DT_SOCK)
	require.NoError(t, err)
	assert.EqualValues(t, unix.DT_SOCK, typ)
	_, err = EntryType(fd, "gone", unix.DT_UNKNOWN)
	var pe *os.PathError
	require.ErrorAs(t, err, &pe)
	assert.Equal(t, os.PathError{Op: "fstatat", Path: "gone", Err: unix.ENOENT}, *pe)
}

// FuzzDirents compares a buffer without damage with what [unix.ParseDirent]
// reads, which has no check of its own and leaves out entries without an inode.
// What was taken of any buffer is taken again when it is written anew.
func FuzzDirents(f *testing.F) {
	for _, c := range direntCases() {
		f.Add(c.buf)
	}
	f.Fuzz(func(t *testing.T, buf []byte) {
		var taken, again, names []string
		var anew []byte
		list := Dirents(buf)
		d, ok, end := list.Next()
		for ; ok; d, ok, end = list.Next() {
			name := string(d.Name)
			if name == "" || name == "." || name == ".." || strings.Contains(name, "\x00") {
				t.Fatalf("name %q", name)
			}
			taken = append(taken, fmt.Sprint(d.Ino, d.Type, name))
			if d.Ino != 0 {
				names = append(names, name)
			}
			anew = append(anew, record(d.Ino, d.Type, name)...)
		}
		if end == nil {
			if _, _, want := unix.ParseDirent(buf, -1, nil); !slices.Equal(names, want) {
				t.Fatalf("names %q, want %q", names, want)
			}
		} else if !errors.Is(end, unix.EIO) {
			t.Fatal(end)
		}
		list = Dirents(anew)
		for d, ok, end = list.Next(); ok; d, ok, end = list.Next() {
			again = append(again, fmt.Sprint(d.Ino, d.Type, string(d.Name)))
		}
		if end != nil || !slices.Equal(taken, again) {
			t.Fatalf("took %q, and then %q: %v", taken, again, end)
		}
	})
}
