package archive_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/archive"
	"github.com/layerfs/layerfs/internal/testenv"
)

// TestGolden unpacks what other programs wrote; testdata/golden/README.md says
// what is in it. The oracle is that text, and for ACLs what setfacl had set.
func TestGolden(t *testing.T) {
	testenv.RequireRoot(t)
	names, err := filepath.Glob("testdata/golden/*.tar.gz")
	require.NoError(t, err)
	require.Len(t, names, 13)
	for _, name := range names {
		kind := strings.TrimSuffix(filepath.Base(name), ".tar.gz")
		t.Run(kind, func(t *testing.T) {
			dir := scratch(t)
			f, err := os.Open(name)
			require.NoError(t, err)
			defer f.Close()
			_, err = archive.Apply(context.Background(), dir, f, nil)
			require.NoError(t, err)
			if strings.HasPrefix(kind, "go-") {
				checkGolden(t, dir, kind, "dir/link", "dir/symlink", "file", 0o4751, kind == "go-pax")
				return
			}
			mode := uint32(0o644)
			pax := strings.Contains(kind, "posix") || kind == "bsd-pax"
			checkGolden(t, dir, kind, "dir/sub/link", "dir/sub/symlink", "../file", mode, pax)

			var st unix.Stat_t
			require.NoError(t, unix.Lstat(filepath.Join(dir, "dir/ümlaut"), &st))
			assert.Equal(t, uint32(unix.S_IFREG|0o4751), st.Mode)
			want := make([]byte, 1<<20)
			copy(want[1<<19:], "data")
			got, err := os.ReadFile(filepath.Join(dir, "sparse"))
			require.NoError(t, err)
			assert.True(t, bytes.Equal(want, got), "sparse file of %d bytes", len(got))
			require.NoError(t, unix.Lstat(filepath.Join(dir, "sparse"), &st))
			if strings.Contains(kind, "sparse") || kind == "bsd-pax" {
				assert.Less(t, st.Blocks*512, int64(1<<19), "holes")
			}
			if !strings.HasSuffix(kind, "v7") && !strings.HasSuffix(kind, "ustar") {
				b, err := os.ReadFile(filepath.Join(dir, "dir", strings.Repeat("n", 120)))
				require.NoError(t, err)
				assert.Equal(t, "long", string(b))
			}
			if strings.Contains(kind, "acl") || kind == "bsd-pax" {
				assert.Equal(t, aclOfFile, hexXattr(t, filepath.Join(dir, "dir/file"), "system.posix_acl_access"))
				assert.Equal(t, aclOfSub, hexXattr(t, filepath.Join(dir, "dir/sub"), "system.posix_acl_default"))
				assert.Equal(t, "", hexXattr(t, filepath.Join(dir, "dir/ümlaut"), "system.posix_acl_access"))
			}
		})
	}
}

// What getfattr -e hex said of the tree.
const (
	aclOfFile = "0200000001000600ffffffff02000400d204000004000400ffffffff10000400ffffffff20000400ffffffff"
	aclOfSub  = "0200000001000700ffffffff04000500ffffffff080005004d00000010000500ffffffff20000500ffffffff"
)

func hexXattr(tb testing.TB, path, name string) string {
	tb.Helper()
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, name, buf)
	if err == unix.ENODATA {
		return ""
	}
	require.NoError(tb, err, path)
	return hex.EncodeToString(buf[:n])
}

func checkGolden(t *testing.T, dir, kind, link, symlink, target string, mode uint32, pax bool) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "dir/file"))
	require.NoError(t, err)
	assert.Equal(t, "hello\n", string(b))
	var a, l unix.Stat_t
	require.NoError(t, unix.Lstat(filepath.Join(dir, "dir/file"), &a))
	require.NoError(t, unix.Lstat(filepath.Join(dir, link), &l))
	assert.Equal(t, a.Ino, l.Ino, "hard link")
	assert.Equal(t, unix.S_IFREG|mode, a.Mode)
	assert.Equal(t, [2]uint32{1000, 1001}, [2]uint32{a.Uid, a.Gid})
	assert.EqualValues(t, 981173106, a.Mtim.Sec)
	nsec := 0
	if pax {
		nsec = 123456789
	}
	assert.EqualValues(t, nsec, a.Mtim.Nsec)
	if strings.Contains(kind, "acl") || kind == "bsd-pax" || kind == "go-pax" {
		assert.Equal(t, hex.EncodeToString([]byte("v")), hexXattr(t, filepath.Join(dir, "dir/file"), "user.k"))
	}
	got, err := os.Readlink(filepath.Join(dir, symlink))
	require.NoError(t, err)
	assert.Equal(t, target, got)
	if strings.HasSuffix(kind, "v7") {
		return
	}
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(filepath.Join(dir, "fifo"), &st))
	assert.EqualValues(t, unix.S_IFIFO, st.Mode&unix.S_IFMT)
	require.NoError(t, unix.Lstat(filepath.Join(dir, "dev"), &st))
	assert.EqualValues(t, unix.S_IFCHR, st.Mode&unix.S_IFMT)
	assert.Equal(t, unix.Mkdev(1, 3), st.Rdev)
}

func TestTextACL(t *testing.T) {
	testenv.RequireRoot(t)
	for _, tt := range []struct{ name, text, want string }{
		{"numbers", "user::rw-\nuser:1234:r--\ngroup::r--\nmask::r--\nother::r--\n", aclOfFile},
		{"order", "other::r--,mask::r--,group::r--,user:1234:r--,user::rw-", aclOfFile},
		{"star", "user::rw-,user:lisa:r--:1234,group::r--,mask::r--,other::r--", aclOfFile},
		{"comments", "user::rw-\nuser:1234:r--\t#effective:r--\ngroup::r--\nmask::r--\nother::r--", aclOfFile},
		{"solaris", "user::rw-,user:1234:r--,group::r--,mask:r--,other:r--", aclOfFile},
		{"name-only", "user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--", ""},
		{"as-mode", "user::rw-,group::r--,other::r--", ""},
		{"no-mask", "user::rw-,user:1:r--,group::r--,other::r--", "malformed"},
		{"twice", "user::rw-,user:1:r--,user:1:r--,group::r--,mask::r--,other::r--", "malformed"},
		{"no-other", "user::rw-,group::r--", "malformed"},
		{"type", "users::rw-,group::r--,other::r--", "malformed"},
		{"permission", "user::rwz,group::r--,other::r--", "malformed"},
		{"mask-name", "user::rw-,group::r--,mask:1:r--,other::r--", "malformed"},
		{"id", "user::rw-,user:4294967295:r--,group::r--,mask::r--,other::r--", "malformed"},
		{"empty", ",", "malformed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := fileEntry("f", "x")
			e.hdr.PAXRecords = map[string]string{"SCHILY.acl.access": tt.text}
			dir := scratch(t)
			err := applyBytes(t, dir, makeTar(t, e), nil)
			if tt.want == "malformed" {
				require.ErrorIs(t, err, layerfs.ErrMalformed)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tt.want, hexXattr(t, filepath.Join(dir, "f"), "system.posix_acl_access"))
		})
	}
}
