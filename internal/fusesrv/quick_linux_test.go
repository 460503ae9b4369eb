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
		require.NoError(t, unix.Mknod(dir+"/f", unix.S_IFREG|0o644, 0))
		t.Cleanup(func() { unix.Unlink(dir + "/f") })
		n, err := fs.Lookup(fs.Root(), name, &st)
		require.NoError(t, err)
		return s, s.enter(n, fuse.FUSE_ROOT_ID, name).id
	}
	for _, tt := range []struct {
		name string
		req  func(node uint64) []byte
		code int32
	}{
		{"open", func(n uint64) []byte { return request(opOpen, n, unix.O_RDONLY) }, 0},
		{"open-of-unknown", func(uint64) []byte { return request(opOpen, 77, unix.O_RDONLY) }, -int32(unix.ESTALE)},
		{"open-for-writing-read-only", func(n uint64) []byte { return request(opOpen, n, unix.O_WRONLY) }, -int32(unix.EROFS)},
		{"release", func(n uint64) []byte { return request(opRelease, n, 1, 0, 0) }, 0},
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
				s.Forget(node, 1)
				unix.Unlink(dir + "/f")
			}
			assert.Equal(t, got[1], got[0])
			assert.Equal(t, tt.code, int32(binary.NativeEndian.Uint32(got[0][4:])))
		})
	}
	t.Run("others-are-declined", func(t *testing.T) {
		s := newServer(Config{FS: fs, NoPassthrough: true})
		for name, req := range map[string][]byte{
			"lookup": append(request(1, fuse.FUSE_ROOT_ID), "name\x00"...), "short": request(opOpen, 1)[:20], "poll-file": request(opOpen, ^uint64(0), 0),
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
