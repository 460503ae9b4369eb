package btrfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs"
)

// build returns a stream; every element is the arguments of NewCommand.
func build(tb testing.TB, version int, commands ...[]any) []byte {
	tb.Helper()
	var b bytes.Buffer
	e, err := NewEncoder(&b, version)
	require.NoError(tb, err)
	for _, args := range commands {
		c, err := NewCommand(args[0].(Op), args[1:]...)
		require.NoError(tb, err)
		require.NoError(tb, e.Encode(c))
	}
	return b.Bytes()
}

// every is a stream with every command of a version.
func every(tb testing.TB, version int) []byte {
	u, now := UUID{1, 2}, time.Unix(-5, 7)
	cmds := [][]any{
		{OpSnapshot, AttrPath, "s", AttrUUID, u, AttrCtransid, uint64(9), AttrCloneUUID, u, AttrCloneCtransid, uint64(8)},
		{OpMkfile, AttrPath, "o257-7-0", AttrIno, uint64(257)},
		{OpRename, AttrPath, "o257-7-0", AttrPathTo, "f"},
		{OpMkdir, AttrPath, "d"},
		{OpMknod, AttrPath, "d/c", AttrMode, uint64(0o20600), AttrRdev, uint64(0x101)},
		{OpMkfifo, AttrPath, "d/p"},
		{OpMksock, AttrPath, "d/s"},
		{OpSymlink, AttrPath, "d/l", AttrPathLink, "/anywhere/.."},
		{OpLink, AttrPath, "d/h", AttrPathLink, "f"},
		{OpUnlink, AttrPath, "gone"},
		{OpRmdir, AttrPath, "gonedir"},
		{OpSetXattr, AttrPath, "f", AttrXattrName, "user.x", AttrXattrData, ""},
		{OpRemoveXattr, AttrPath, "f", AttrXattrName, "user.x"},
		{OpWrite, AttrPath, "f", AttrFileOffset, uint64(4), AttrData, "data"},
		{OpClone, AttrPath, "f", AttrFileOffset, uint64(0), AttrCloneLen, uint64(4), AttrCloneUUID, u, AttrCloneCtransid, uint64(8), AttrClonePath, "x", AttrCloneOffset, uint64(0)},
		{OpTruncate, AttrPath, "f", AttrSize, uint64(100)},
		{OpChmod, AttrPath, "", AttrMode, uint64(0o755)},
		{OpChown, AttrPath, "f", AttrUID, uint64(1), AttrGID, uint64(2)},
		{OpUtimes, AttrPath, "f", AttrAtime, now, AttrMtime, now, AttrCtime, now},
		{OpUpdateExtent, AttrPath, "f", AttrFileOffset, uint64(0), AttrSize, uint64(4096)},
	}
	if version > 1 {
		cmds = append(cmds,
			[]any{OpUtimes, AttrPath, "f", AttrAtime, now, AttrMtime, now, AttrCtime, now, AttrOtime, now},
			[]any{OpFallocate, AttrPath, "f", AttrFallocateMode, uint64(3), AttrFileOffset, uint64(0), AttrSize, uint64(4096)},
			[]any{OpFileattr, AttrPath, "f", AttrFileattr, uint64(2)},
			[]any{OpEncodedWrite, AttrPath, "f", AttrFileOffset, uint64(0), AttrUnencodedFileLen, uint64(1), AttrUnencodedLen, uint64(4096), AttrUnencodedOffset, uint64(0), AttrCompression, uint64(2), AttrData, strings.Repeat("z", 70<<10)},
		)
	}
	if version > 2 {
		cmds = append(cmds, []any{OpEnableVerity, AttrPath, "f", AttrVerityAlgorithm, uint64(1), AttrVerityBlockSize, uint64(4096), AttrVeritySalt, "s", AttrVeritySig, ""})
	}
	return build(tb, version, append(cmds, []any{OpEnd})...)
}

// rewrite reads a stream and writes it back.
func rewrite(in []byte) (out []byte, ops []Op, err error) {
	dec, err := NewDecoder(bytes.NewReader(in))
	if err != nil {
		return nil, nil, err
	}
	var b bytes.Buffer
	enc, err := NewEncoder(&b, dec.Version())
	if err != nil {
		return nil, nil, err
	}
	for {
		c, err := dec.Next()
		if err == io.EOF {
			return b.Bytes(), ops, nil
		}
		if err != nil {
			return nil, nil, err
		}
		ops = append(ops, c.Op)
		if err := enc.Encode(c); err != nil {
			return nil, nil, errors.Join(errors.New("decoded but not encoded"), err)
		}
	}
}

func TestDecodeEvery(t *testing.T) {
	for v := 1; v <= MaxStreamVersion; v++ {
		in := every(t, v)
		out, ops, err := rewrite(in)
		require.NoError(t, err)
		require.Equal(t, in, out)
		seen := map[Op]bool{}
		for _, op := range ops {
			seen[op] = true
		}
		for op := OpSnapshot; op <= OpEnableVerity; op++ {
			require.Equal(t, op.spec().since <= uint32(v), seen[op], "%v in version %d", op, v)
		}
		// A byte less or another byte anywhere is found.
		for i := range in {
			if i > 2000 && i%997 != 0 {
				continue // inside the long data of version 2
			}
			_, _, err := rewrite(in[:i])
			require.ErrorIs(t, err, layerfs.ErrMalformed, "cut at %d", i)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, "cut at %d", i)
			bad := bytes.Clone(in)
			bad[i] ^= 0x10
			_, _, err = rewrite(bad)
			require.Error(t, err, "flipped at %d", i)
		}
	}
}

// The bytes are those that Linux 6.18 wrote for an empty subvolume, and its
// checksums, so that encoder and decoder cannot be wrong together.
func TestDecodeKernel(t *testing.T) {
	in := kernelStream
	out, ops, err := rewrite([]byte(in))
	require.NoError(t, err)
	require.Equal(t, in, string(out))
	require.Equal(t, []Op{OpSubvol, OpChown, OpChmod, OpUtimes, OpEnd}, ops)
}

func TestDecodeRefuses(t *testing.T) {
	raw := func(version uint32, op Op, payload string) []byte {
		b := binary.LittleEndian.AppendUint32([]byte(streamMagic), version)
		c := binary.LittleEndian.AppendUint32(nil, uint32(len(payload)))
		c = binary.LittleEndian.AppendUint16(c, uint16(op))
		c = append(c, 0, 0, 0, 0)
		c = append(c, payload...)
		binary.LittleEndian.PutUint32(c[6:], checksum(c))
		return append(b, c...)
	}
	tlv := func(t AttrType, data string) string {
		b := binary.LittleEndian.AppendUint16(nil, uint16(t))
		b = binary.LittleEndian.AppendUint16(b, uint16(len(data)))
		return string(b) + data
	}
	huge := raw(1, OpEnd, "")
	binary.LittleEndian.PutUint32(huge[17:], 1<<31)
	for name, c := range map[string]struct {
		in   []byte
		want string
	}{
		"magic":          {[]byte("btrfs-strean\x00\x01\x00\x00\x00"), "starts with"},
		"version 0":      {[]byte(streamMagic + "\x00\x00\x00\x00"), "version 0"},
		"length":         {huge, "more than"},
		"unknown":        {raw(3, 27, ""), "no such command"},
		"zero":           {raw(3, 0, ""), "no such command"},
		"later":          {raw(1, OpFileattr, ""), "no such command in version 1"},
		"missing":        {raw(1, OpMkfile, ""), "missing"},
		"foreign":        {raw(1, OpMkfile, tlv(AttrPath, "a")+tlv(AttrSize, "12345678")), "unexpected"},
		"twice":          {raw(1, OpMkfile, tlv(AttrPath, "a")+tlv(AttrPath, "a")), "twice"},
		"too many":       {raw(1, OpUnlink, tlv(AttrPath, "a")+tlv(AttrPath, "a")), "too many"},
		"size":           {raw(1, OpChmod, tlv(AttrPath, "a")+tlv(AttrMode, "1234")), "has 4 bytes, want 8"},
		"stray":          {raw(1, OpUnlink, tlv(AttrPath, "a")+"x"), "stray"},
		"no length":      {raw(1, OpMkfile, tlv(AttrPath, "a")+"\x03\x00"), "no length"},
		"overrun":        {raw(1, OpUnlink, "\x0f\x00\xff\x00a"), "bytes left"},
		"absolute":       {raw(1, OpUnlink, tlv(AttrPath, "/a")), "bad path"},
		"dotdot":         {raw(1, OpUnlink, tlv(AttrPath, "a/../b")), "bad path"},
		"dot":            {raw(1, OpUnlink, tlv(AttrPath, "./b")), "bad path"},
		"double":         {raw(1, OpUnlink, tlv(AttrPath, "a//b")), "bad path"},
		"trailing":       {raw(1, OpUnlink, tlv(AttrPath, "a/")), "bad path"},
		"zero byte":      {raw(1, OpUnlink, tlv(AttrPath, "a\x00b")), "zero byte"},
		"long name":      {raw(1, OpUnlink, tlv(AttrPath, strings.Repeat("a", 256))), "bad path"},
		"link dotdot":    {raw(1, OpLink, tlv(AttrPath, "a")+tlv(AttrPathLink, "../b")), "bad path"},
		"empty symlink":  {raw(1, OpSymlink, tlv(AttrPath, "a")+tlv(AttrPathLink, "")), "link target"},
		"xattr name":     {raw(1, OpRemoveXattr, tlv(AttrPath, "a")+tlv(AttrXattrName, "")), "xattr name"},
		"nanoseconds":    {raw(1, OpUtimes, tlv(AttrPath, "a")+tlv(AttrAtime, strings.Repeat("\xff", 12))), "nanoseconds"},
		"offset":         {raw(1, OpUpdateExtent, tlv(AttrPath, "a")+tlv(AttrFileOffset, strings.Repeat("\xff", 8))+tlv(AttrSize, "\x01\x00\x00\x00\x00\x00\x00\x00")), "range"},
		"data in v2 end": {raw(2, OpWrite, tlv(AttrPath, "a")+"\x13\x00"+tlv(AttrFileOffset, "12345678")), "missing"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := rewrite(c.in)
			require.ErrorIs(t, err, layerfs.ErrMalformed)
			require.ErrorContains(t, err, c.want)
		})
	}
	_, _, err := rewrite([]byte(streamMagic + "\x04\x00\x00\x00"))
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// sealed returns a stream with right checksums: random bytes never get past them.
func sealed(in []byte) []byte {
	fix := bytes.Clone(in)
	for at := len(streamMagic) + 4; at+headerLen <= len(fix); {
		size := int(binary.LittleEndian.Uint32(fix[at:]))
		if size < 0 || size > len(fix)-at-headerLen {
			break
		}
		cmd := fix[at : at+headerLen+size]
		clear(cmd[6:headerLen])
		binary.LittleEndian.PutUint32(cmd[6:], checksum(cmd))
		at += len(cmd)
	}
	return fix
}

func FuzzDecode(f *testing.F) {
	for v := 1; v <= MaxStreamVersion; v++ {
		f.Add(every(f, v))
	}
	f.Add([]byte(kernelStream))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, b := range [][]byte{in, sealed(in)} {
			out, _, err := rewrite(b)
			if err == nil && !bytes.HasPrefix(b, out) {
				t.Fatalf("written back differently:\n%x\n%x", b, out)
			}
			if err != nil && strings.Contains(err.Error(), "decoded but not encoded") {
				t.Fatal(err)
			}
			dec, err := NewDecoder(bytes.NewReader(b))
			if err != nil {
				continue
			}
			d, err := Fold(dec)
			if err != nil {
				continue
			}
			places, _ := d.paths()
			for _, p := range places {
				if err := checkStreamPath([]byte(p)); err != nil && len(p) <= maxStreamPath {
					t.Fatal(err)
				}
			}
		}
	})
}
