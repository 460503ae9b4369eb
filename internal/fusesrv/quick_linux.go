package fusesrv

import (
	"bytes"
	"encoding/binary"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Opcodes of linux/fuse.h that quick answers, beside those of the loop.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opMkdir       = 9
	opUnlink      = 10
	opRmdir       = 11
	opRelease     = 18
	opGetxattr    = 22
	opCreate      = 35
	opInterrupt   = 36
	opBatchForget = 42
	opReaddirplus = 44
)

// Sizes of struct fuse_in_header and fuse_out_header.
const (
	headIn  = 40
	headOut = 16
)

// quick answers the requests of which storms are made without ProtocolServer,
// whose general way takes longer than most of what is to be done. It reports
// false for any other request, and for what it does not understand.
//
// linux/fuse.h: fuse_in_header{u32 len, opcode; u64 unique, nodeid; u32 uid,
// gid, pid; u16 total_extlen, padding}; fuse_out_header{u32 len; s32 error;
// u64 unique}. Neither security contexts nor groups of the caller, which would
// follow a name, are asked for.
func (s *Server) quick(req, out []byte) (n int, ok bool) {
	if len(req) < headIn {
		return 0, false
	}
	u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	op, body := u32(req[4:]), req[headIn:]
	h := fuse.InHeader{
		Length: u32(req), Opcode: op, Unique: u64(req[8:]), NodeId: u64(req[16:]),
		Caller: fuse.Caller{Owner: fuse.Owner{Uid: u32(req[24:]), Gid: u32(req[28:])}, Pid: u32(req[32:])},
	}
	if h.NodeId == ^uint64(0) || s.closed(op) { // the first is ProtocolServer's poll file
		return 0, false
	}
	fixed, named := quickSize(op)
	if fixed < 0 || len(body) < fixed {
		return 0, false
	}
	name := ""
	if named {
		end := bytes.IndexByte(body[fixed:], 0)
		if end < 0 {
			return 0, false
		}
		name = string(body[fixed : fixed+end])
		if h.NodeId == fuse.FUSE_ROOT_ID && name == pollName[1:] {
			return 0, false
		}
	}
	size := uint32(0) // of data that is asked for
	switch op {
	case opGetxattr:
		size = u32(body)
	case opReaddirplus:
		size = u32(body[16:])
	}
	if len(out) < headOut || uint64(size) > uint64(len(out)-headOut) {
		return 0, false
	}
	room := out[headOut : headOut+int(size)]
	a := answer(out[:headOut])
	code := fuse.EIO
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("[bug] panic in a request", "panic", p, "stack", string(stack()))
			code = fuse.EIO
		}
		if op == opForget || op == opBatchForget {
			n, ok = 0, true
			return
		}
		if !code.Ok() {
			a = a[:headOut]
		}
		n, ok = len(a), true
		binary.NativeEndian.PutUint32(out, uint32(n))
		binary.NativeEndian.PutUint32(out[4:], uint32(-int32(code)))
		copy(out[8:headOut], req[8:16])
	}()
	switch op {
	case opLookup:
		var o fuse.EntryOut
		code = s.Lookup(nil, &h, name, &o)
		a.entry(&o)
	case opForget:
		s.Forget(h.NodeId, u64(body))
	case opBatchForget:
		// fuse_batch_forget_in{u32 count, dummy}, then fuse_forget_one{u64
		// nodeid, nlookup}.
		rest := body[8:]
		for k := u32(body); k > 0 && len(rest) >= 16; k-- {
			if id := u64(rest); id != ^uint64(0) {
				s.Forget(id, u64(rest[8:]))
			}
			rest = rest[16:]
		}
	case opGetattr:
		var o fuse.AttrOut
		code = s.GetAttr(nil, &fuse.GetAttrIn{InHeader: h}, &o)
		a.attrOut(&o)
	case opSetattr:
		// fuse_setattr_in{u32 valid, padding; u64 fh, size, lock_owner, atime,
		// mtime, ctime; u32 atimensec, mtimensec, ctimensec, mode, unused, uid,
		// gid, unused}.
		in := fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{
			InHeader: h, Valid: u32(body), Fh: u64(body[8:]), Size: u64(body[16:]),
			Atime: u64(body[32:]), Mtime: u64(body[40:]), Ctime: u64(body[48:]),
			Atimensec: u32(body[56:]), Mtimensec: u32(body[60:]), Ctimensec: u32(body[64:]),
			Mode: u32(body[68:]), Owner: fuse.Owner{Uid: u32(body[76:]), Gid: u32(body[80:])},
		}}
		var o fuse.AttrOut
		code = s.SetAttr(nil, &in, &o)
		a.attrOut(&o)
	case opMkdir:
		// fuse_mkdir_in{u32 mode, umask}.
		var o fuse.EntryOut
		code = s.Mkdir(nil, &fuse.MkdirIn{InHeader: h, Mode: u32(body), Umask: u32(body[4:])}, name, &o)
		a.entry(&o)
	case opUnlink:
		code = s.Unlink(nil, &h, name)
	case opRmdir:
		code = s.Rmdir(nil, &h, name)
	case opOpen:
		// fuse_open_in{u32 flags, open_flags}.
		var o fuse.OpenOut
		code = s.Open(nil, &fuse.OpenIn{InHeader: h, Flags: u32(body), Mode: u32(body[4:])}, &o)
		a.open(&o)
	case opRelease:
		// fuse_release_in{u64 fh; …}.
		s.Release(nil, &fuse.ReleaseIn{InHeader: h, Fh: u64(body)})
		code = fuse.OK
	case opCreate:
		// fuse_create_in{u32 flags, mode, umask, open_flags}.
		var o fuse.CreateOut
		in := fuse.CreateIn{InHeader: h, Flags: u32(body), Mode: u32(body[4:]), Umask: u32(body[8:]), OpenFlags: u32(body[12:])}
		code = s.Create(nil, &in, name, &o)
		a.entry(&o.EntryOut)
		a.open(&o.OpenOut)
	case opGetxattr:
		// fuse_getxattr_in{u32 size, padding}; without room, the answer is
		// fuse_getxattr_out{u32 size, padding}.
		var k uint32
		k, code = s.GetXAttr(nil, &h, name, room)
		if size > 0 {
			a = a[:headOut+int(min(k, size))]
		} else {
			a.u32(k, 0)
		}
	case opReaddirplus:
		// fuse_read_in{u64 fh, offset; u32 size, read_flags; u64 lock_owner;
		// u32 flags, padding}.
		in := fuse.ReadIn{InHeader: h, Fh: u64(body), Offset: u64(body[8:]), Size: size}
		l := fuse.NewDirEntryList(room, in.Offset)
		code = s.ReadDirPlus(nil, &in, l)
		a = a[:headOut+len(l.Bytes())]
	case opInterrupt:
		// Nothing here can be interrupted, so the kernel need not ask; where
		// ProtocolServer does not know the request, it would ask again and
		// again while that one is served.
		code = fuse.ENOSYS
	}
	return // by the deferred function
}

// quickSize returns the size of what is between a request's header and its
// name, and whether it has one; -1 if quick does not answer it.
func quickSize(op uint32) (fixed int, named bool) {
	switch op {
	case opLookup, opUnlink, opRmdir:
		return 0, true
	case opForget, opInterrupt:
		return 8, false
	case opGetattr:
		return 16, false
	case opSetattr:
		return 88, false
	case opMkdir, opGetxattr:
		return 8, true
	case opOpen, opBatchForget:
		return 8, false
	case opRelease:
		return 24, false
	case opCreate:
		return 16, true
	case opReaddirplus:
		return 40, false
	}
	return -1, false
}

// closed reports whether ProtocolServer has to refuse the request.
func (s *Server) closed(op uint32) bool { return op == opGetxattr && s.cfg.NoXattr }

// An answer grows in the buffer of a reply.
type answer []byte

func (a *answer) u32(v ...uint32) {
	for _, x := range v {
		*a = binary.NativeEndian.AppendUint32(*a, x)
	}
}

func (a *answer) u64(v ...uint64) {
	for _, x := range v {
		*a = binary.NativeEndian.AppendUint64(*a, x)
	}
}

// attr adds struct fuse_attr.
func (a *answer) attr(t *fuse.Attr) {
	a.u64(t.Ino, t.Size, t.Blocks, t.Atime, t.Mtime, t.Ctime)
	a.u32(t.Atimensec, t.Mtimensec, t.Ctimensec, t.Mode, t.Nlink, t.Uid, t.Gid, t.Rdev, t.Blksize, t.Flags)
}

// entry adds struct fuse_entry_out.
func (a *answer) entry(o *fuse.EntryOut) {
	a.u64(o.NodeId, o.Generation, o.EntryValid, o.AttrValid)
	a.u32(o.EntryValidNsec, o.AttrValidNsec)
	a.attr(&o.Attr)
}

// attrOut adds struct fuse_attr_out.
func (a *answer) attrOut(o *fuse.AttrOut) {
	a.u64(o.AttrValid)
	a.u32(o.AttrValidNsec, o.Dummy)
	a.attr(&o.Attr)
}

// open adds struct fuse_open_out.
func (a *answer) open(o *fuse.OpenOut) {
	a.u64(o.Fh)
	a.u32(o.OpenFlags, uint32(o.BackingID))
}
