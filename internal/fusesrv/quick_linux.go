package fusesrv

import (
	"encoding/binary"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const opRelease = 18

// quick answers the two requests that every use of a file costs, OPEN and
// RELEASE, without ProtocolServer's general way, which takes longer than what
// is to be done. It reports false for any other request.
//
// linux/fuse.h: fuse_in_header{u32 len, opcode; u64 unique, nodeid; u32 uid,
// gid, pid; u16 total_extlen, padding}; fuse_open_in{u32 flags, open_flags};
// fuse_release_in{u64 fh; …}; fuse_out_header{u32 len; s32 error; u64 unique};
// fuse_open_out{u64 fh; u32 open_flags; s32 backing_id}.
func (s *Server) quick(req, out []byte) (n int, ok bool) {
	const head, reply = 40, 16
	if len(req) < head+8 {
		return 0, false
	}
	u32 := binary.NativeEndian.Uint32
	op, node := u32(req[4:]), binary.NativeEndian.Uint64(req[16:])
	if op != opOpen && op != opRelease || node == ^uint64(0) { // that of ProtocolServer's poll file
		return 0, false
	}
	code := fuse.EIO
	n = reply
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("[bug] panic in a request", "panic", p, "stack", string(stack()))
			n, code, ok = reply, fuse.EIO, true
		}
		binary.NativeEndian.PutUint32(out, uint32(n))
		binary.NativeEndian.PutUint32(out[4:], uint32(-int32(code)))
		copy(out[8:reply], req[8:16])
	}()
	h := fuse.InHeader{NodeId: node, Caller: fuse.Caller{Owner: fuse.Owner{Uid: u32(req[24:]), Gid: u32(req[28:])}, Pid: u32(req[32:])}}
	switch op {
	case opOpen:
		in := fuse.OpenIn{InHeader: h, Flags: u32(req[head:]), Mode: u32(req[head+4:])}
		var o fuse.OpenOut
		if code = s.Open(nil, &in, &o); code.Ok() {
			n = reply + 16
			binary.NativeEndian.PutUint64(out[reply:], o.Fh)
			binary.NativeEndian.PutUint32(out[reply+8:], o.OpenFlags)
			binary.NativeEndian.PutUint32(out[reply+12:], uint32(o.BackingID))
		}
	case opRelease:
		in := fuse.ReleaseIn{InHeader: h, Fh: binary.NativeEndian.Uint64(req[head:])}
		s.Release(nil, &in)
		code = fuse.OK
	}
	return n, true
}
