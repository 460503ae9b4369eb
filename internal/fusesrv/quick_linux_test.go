package fusesrv

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/unionfs"
)

// TestQuick compares quick's answers with ProtocolServer's, byte for byte.
func TestQuick(t *testing.T) {
	dir := t.TempDir()
	fs, _, err := unionfs.Open(&unionfs.Config{Branches: []unionfs.BranchSpec{{Path: dir}}})
	require.NoError(t, err)
	defer fs.Close()
	require.NoError(t, unix.Mknod(dir+"/f", unix.S_IFREG|0o644, 0))
	require.NoError(t, unix.Setxattr(dir+"/f", "user.x", []byte("value"), 0))
	request := func(op uint32, node uint64, body ...uint64) []byte {
		b := make([]byte, 40, 80)
		for _, x := range body {
			b = binary.NativeEndian.AppendUint64(b, x)
		}
		binary.NativeEndian.PutUint32(b, uint32(len(b)))
		binary.NativeEndian.PutUint32(b[4:], op)
		binary.NativeEndian.PutUint64(b[8:], 0x1122334455667788)
		binary.NativeEndian.PutUint64(b[16:], node)
		return b
	}
	// A file that is open, by handle and node id, on a server of its own.
	open := func(t *testing.T) (*Server, uint64) {
		s := newServer(Config{FS: fs, NoPassthrough: true})
		var st unix.Stat_t
		name := "f"
		n, err := fs.Lookup(fs.Root(), name, &st)
		require.NoError(t, err)
		return s, s.enter(n, fuse.FUSE_ROOT_ID, name).id
	}
	withName := func(req []byte, name string) []byte {
		req = append(append(req, name...), 0)
		binary.NativeEndian.PutUint32(req, uint32(len(req)))
		return req
	}
	const root = fuse.FUSE_ROOT_ID
	u32s := func(lo, hi uint32) uint64 { return uint64(lo) | uint64(hi)<<32 } // on a little endian machine
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		u32s = func(lo, hi uint32) uint64 { return uint64(hi) | uint64(lo)<<32 }
	}
	const stale = -int32(unix.ESTALE)
	for _, tt := range []struct {
		name string
		req  func(node uint64) []byte
		code int32
	}{
		{"open", func(n uint64) []byte { return request(opOpen, n, unix.O_RDONLY) }, 0},
		{"open-of-unknown", func(uint64) []byte { return request(opOpen, 77, unix.O_RDONLY) }, stale},
		{"open-for-writing-read-only", func(n uint64) []byte { return request(opOpen, n, unix.O_WRONLY) }, -int32(unix.EROFS)},
		{"release", func(n uint64) []byte { return request(opRelease, n, 1, 0, 0) }, 0},
		{"lookup", func(uint64) []byte { return withName(request(opLookup, root), "f") }, 0},
		{"lookup-of-nothing", func(uint64) []byte { return withName(request(opLookup, root), "none") }, 0},
		{"lookup-in-a-file", func(n uint64) []byte { return withName(request(opLookup, n), "x") }, 0},
		{"lookup-of-a-whiteout", func(uint64) []byte { return withName(request(opLookup, root), ".wh.f") }, -int32(unix.EPERM)},
		{"getattr", func(n uint64) []byte { return request(opGetattr, n, 0, 0) }, 0},
		{"getattr-of-unknown", func(uint64) []byte { return request(opGetattr, 77, 0, 0) }, stale},
		{"setattr-read-only", func(n uint64) []byte { return request(opSetattr, n, make([]uint64, 11)...) }, -int32(unix.EROFS)},
		{"mkdir-read-only", func(uint64) []byte { return withName(request(opMkdir, root, u32s(0o755, 0o22)), "d") }, -int32(unix.EROFS)},
		{"unlink-read-only", func(uint64) []byte { return withName(request(opUnlink, root), "f") }, -int32(unix.EROFS)},
		{"rmdir-read-only", func(uint64) []byte { return withName(request(opRmdir, root), "f") }, -int32(unix.EROFS)},
		{"create-read-only", func(uint64) []byte { return withName(request(opCreate, root, 0, 0), "g") }, -int32(unix.EROFS)},
		{"getxattr", func(n uint64) []byte { return withName(request(opGetxattr, n, 64), "user.x") }, 0},
		{"getxattr-size", func(n uint64) []byte { return withName(request(opGetxattr, n, 0), "user.x") }, 0},
		{"getxattr-too-small", func(n uint64) []byte { return withName(request(opGetxattr, n, 1), "user.x") }, -int32(unix.ERANGE)},
		{"getxattr-of-none", func(n uint64) []byte { return withName(request(opGetxattr, n, 64), "user.y") }, -int32(unix.ENODATA)},
		{"readdirplus", func(uint64) []byte { return request(opReaddirplus, root, 0, 0, 2048, 0, 0) }, 0},
		{"readdirplus-no-room", func(uint64) []byte { return request(opReaddirplus, root, 0, 0, 100, 0, 0) }, 0},
		{"readdirplus-rest", func(uint64) []byte { return request(opReaddirplus, root, 0, 2, 2048, 0, 0) }, 0},
		{"readdirplus-of-unknown", func(uint64) []byte { return request(opReaddirplus, 77, 0, 0, 2048, 0, 0) }, stale},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got [2][]byte
			for i := range got {
				s, node := open(t)
				req, out := tt.req(node), make([]byte, 4096)
				n, ok := 0, true
				if i == 0 {
					n, ok = s.quick(req, out)
					require.True(t, ok)
				} else {
					n, _ = s.ps.HandleRequest([][]byte{req}, [][]byte{out})
				}
				got[i] = bytes.Clone(out[:n])
				for _, h := range s.handles {
					h.close()
				}
				s.forgetAll()
			}
			assert.Equal(t, got[1], got[0])
			assert.Equal(t, tt.code, int32(binary.NativeEndian.Uint32(got[0][4:])))
		})
	}
	t.Run("forget", func(t *testing.T) {
		for i, req := range []func(node uint64) []byte{
			func(n uint64) []byte { return request(opForget, n, 1) },
			func(n uint64) []byte { return request(opBatchForget, 0, 2, 77, 5, n, 1) },
			func(n uint64) []byte { return request(opBatchForget, 0, 9, n, 1) }, // shorter than it says
		} {
			s, node := open(t)
			n, ok := s.quick(req(node), make([]byte, 4096))
			assert.True(t, ok)
			assert.Zero(t, n, "an answer")
			assert.NotContains(t, s.ids, node, "%d", i)
			s.forgetAll()
		}
	})
	t.Run("interrupt", func(t *testing.T) {
		s := newServer(Config{FS: fs, NoPassthrough: true})
		out := make([]byte, 64)
		n, ok := s.quick(request(opInterrupt, 0, 5), out)
		assert.True(t, ok)
		assert.Equal(t, headOut, n)
		assert.Equal(t, -int32(unix.ENOSYS), int32(binary.NativeEndian.Uint32(out[4:])))
	})
	t.Run("others-are-declined", func(t *testing.T) {
		s := newServer(Config{FS: fs, NoPassthrough: true})
		for name, req := range map[string][]byte{
			"mknod": append(request(8, root, 0, 0), "name\x00"...), "short": request(opOpen, 1)[:20], "poll-file": request(opOpen, ^uint64(0), 0),
			"poll-file-by-name": withName(request(opLookup, root), pollName[1:]), "no-end-of-name": append(request(opLookup, root), "name"...),
			"cut": request(opGetattr, root, 0), "more-than-fits": request(opReaddirplus, root, 0, 0, 1<<20, 0, 0),
			"negative-on-32-bits": request(opReaddirplus, root, 0, 0, u32s(1<<31, 0), 0, 0),
			"xattr-that-is":       withName(request(opGetxattr, root, u32s(1<<32-1, 0)), "user.x"),
		} {
			_, ok := s.quick(req, make([]byte, 4096))
			assert.False(t, ok, name)
		}
	})
	t.Run("a-panic-is-an-error", func(t *testing.T) {
		s := newServer(Config{FS: fs, NoPassthrough: true})
		s.ids = map[uint64]*inode{5: {id: 5}} // without a node
		out := make([]byte, 64)
		n, ok := s.quick(request(opOpen, 5, unix.O_RDONLY), out)
		require.True(t, ok)
		assert.Equal(t, 16, n)
		assert.Equal(t, -int32(unix.EIO), int32(binary.NativeEndian.Uint32(out[4:])))
	})
}

// forgetAll gives back what a test's requests looked up.
func (s *Server) forgetAll() {
	for id, i := range s.ids {
		s.Forget(id, i.nlookup)
	}
}
