package btrfs

import (
	"bytes"
	"compress/zlib"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/safepath"
	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/undo"
)

// The compressions of struct btrfs_ioctl_encoded_io_args.
const (
	encodedNone    = 0
	encodedZlib    = 1
	encodedZstd    = 2
	encodedLastLzo = 6 // 3 to 6 are LZO with sectors of 4 to 64 KiB

	// BTRFS_MAX_UNCOMPRESSED: no compressed extent holds more.
	maxUnencoded = 128 << 10
)

// ReceiveOptions are the options of [Receive].
type ReceiveOptions struct {
	// Name is that of the new subvolume; empty takes it from the stream.
	Name string

	// Sources are the subvolumes that the stream may build on, as its parent
	// and to clone from. It reaches no other.
	Sources []string

	// Decompress writes compressed extents decompressed, also where the
	// kernel could store them as they are. Zlib and zstd only.
	Decompress bool

	// KeepWritable leaves the subvolume writable and without the mark of what
	// it was received from, which then cannot be a parent of later streams.
	KeepWritable bool
}

// Received is what [Receive] made.
type Received struct {
	Path     string
	Info     Subvolume
	Commands int64
	// Fileattrs counts commands about inode flags (version 2), which are not
	// applied, as the btrfs program does not: most of them must be set while a
	// file is empty.
	Fileattrs int64
}

// Receive applies one send stream of version 1 to 3 as a new subvolume in the
// directory dest, which is on btrfs, and makes it read-only. It reads exactly
// one stream from r, in small pieces.
//
// The stream may come from an enemy: every path is looked up below the new
// subvolume without following links, and what it builds on must be listed in
// opts. It can make device nodes and set-user-id files of any owner, as any
// archive that root extracts. If Receive fails, the subvolume is removed.
//
// It needs CAP_SYS_ADMIN, and /proc. Nothing is synced. Paths may have up to
// 4095 bytes. The error is a [*StreamError] if the stream is at fault, also
// where the file system refused what it asks for.
func Receive(ctx context.Context, r io.Reader, dest string, opts *ReceiveOptions) (_ *Received, err error) {
	if opts == nil {
		opts = &ReceiveOptions{}
	}
	dec, err := NewDecoder(r)
	if err != nil {
		return nil, err
	}
	rc := &receiver{ctx: ctx, opts: *opts, dec: dec, res: &Received{}}
	defer func() { err = errors.Join(err, rc.close()) }()
	var u undo.Stack
	defer u.Run(&err)
	c, err := dec.Next()
	if err != nil {
		return nil, err
	}
	rc.res.Commands = 1
	if err := rc.begin(c, dest, &u); err != nil {
		return nil, rc.wrap(c, int64(len(streamMagic)+4), err)
	}
	for {
		at := dec.Offset()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		c, err := dec.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		rc.res.Commands++
		if err := rc.apply(c); err != nil {
			return nil, rc.wrap(c, at, err)
		}
	}
	return rc.finish()
}

type receiver struct {
	ctx  context.Context
	opts ReceiveOptions
	dec  *Decoder
	res  *Received

	root     *safepath.Root
	uuid     UUID
	ctransid uint64
	sources  []source
	zstd     *zstd.Decoder

	times []unix.Timespec // access and modification, which the root must have

	dirPath  string   // of dir
	dir      *os.File // the directory of the last command, nil if none
	filePath string   // of file
	file     *os.File // the file of the last write, nil if none
}

// source is a subvolume the stream may build on.
type source struct {
	path string
	info Subvolume
	root *safepath.Root // opened when needed
}

func (rc *receiver) wrap(c *Command, at int64, err error) error {
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) {
		// Not the fault of the stream.
		return fmt.Errorf("receive %v at byte %d: %w", c.Op, at, err)
	}
	return &StreamError{Offset: at, Op: c.Op, Reason: "cannot be applied", Err: err}
}

// begin makes the subvolume.
func (rc *receiver) begin(c *Command, dest string, u *undo.Stack) error {
	if c.Op != OpSubvol && c.Op != OpSnapshot {
		return errors.New("does not start a subvolume")
	}
	for _, p := range rc.opts.Sources {
		info, err := Info(p)
		if err != nil {
			return err
		}
		rc.sources = append(rc.sources, source{path: p, info: info})
	}
	name := rc.opts.Name
	if name == "" {
		name = c.Str(AttrPath)
	}
	if name == "" || strings.Contains(name, "/") || name == "." || name == ".." {
		return fmt.Errorf("name %q of the subvolume is not a single component", name)
	}
	path := filepath.Join(dest, name)
	rc.uuid, rc.ctransid = c.UUID(AttrUUID), c.Uint(AttrCtransid)
	if c.Op == OpSubvol {
		if err := Create(path); err != nil {
			return err
		}
	} else {
		parent := rc.source(c.UUID(AttrCloneUUID), c.Uint(AttrCloneCtransid))
		if parent == nil {
			return fmt.Errorf("parent %v is none of the sources", c.UUID(AttrCloneUUID))
		}
		if err := Snapshot(path, parent.path, false); err != nil {
			return err
		}
	}
	u.Push(func() error { return Destroy(path) })
	rc.res.Path = path
	var err error
	if rc.root, err = safepath.OpenRoot(path, nil); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(rc.root.Fd(), &st) }); err != nil {
		return err
	}
	rc.times = []unix.Timespec{st.Atim, st.Mtim}
	return nil
}

// source returns the subvolume that a stream names: one that was received from
// the same, or the very one that was sent.
func (rc *receiver) source(id UUID, ctransid uint64) *source {
	if id.IsZero() {
		return nil
	}
	for i := range rc.sources {
		s := &rc.sources[i]
		if s.info.ReceivedUUID == id && s.info.STransID == ctransid || s.info.UUID == id && s.info.CTransID == ctransid {
			return s
		}
	}
	return nil
}

func (rc *receiver) apply(c *Command) error {
	path := c.Str(AttrPath)
	switch c.Op {
	case OpSubvol, OpSnapshot:
		return errors.New("out of place")
	case OpUpdateExtent:
		return errors.New("the stream was made without file data")
	case OpEnd:
		return nil
	case OpFileattr:
		rc.res.Fileattrs++
		return nil
	case OpWrite, OpEncodedWrite, OpClone, OpTruncate, OpFallocate:
		return rc.content(c, path)
	}
	dir, name, err := rc.at(path)
	if err != nil {
		return err
	}
	if name == "." {
		switch c.Op {
		case OpSetXattr, OpRemoveXattr, OpChmod, OpChown, OpUtimes:
		default:
			return errors.New("not possible for the root")
		}
	}
	return retry(func() error { return rc.entry(c, dir, name) })
}

// entry does what concerns names and attributes.
func (rc *receiver) entry(c *Command, dir int, name string) error {
	proc := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	switch c.Op {
	case OpMkfile:
		fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	case OpMkdir:
		return unix.Mkdirat(dir, name, 0o700)
	case OpMknod:
		mode := c.Uint(AttrMode)
		if t := mode & unix.S_IFMT; t != unix.S_IFCHR && t != unix.S_IFBLK {
			return fmt.Errorf("mode %#o is not that of a device", mode)
		}
		return unix.Mknodat(dir, name, uint32(mode&unix.S_IFMT|0o600), int(uint32(c.Uint(AttrRdev))))
	case OpMkfifo:
		return unix.Mknodat(dir, name, unix.S_IFIFO|0o600, 0)
	case OpMksock:
		return unix.Mknodat(dir, name, unix.S_IFSOCK|0o600, 0)
	case OpSymlink:
		return unix.Symlinkat(c.Str(AttrPathLink), dir, name)
	case OpRename, OpLink:
		return rc.move(c, dir, name)
	case OpUnlink:
		rc.closeFile(c.Str(AttrPath))
		return unix.Unlinkat(dir, name, 0)
	case OpRmdir:
		err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
		rc.closeFile("")
		return err
	case OpSetXattr:
		return unix.Lsetxattr(proc, c.Str(AttrXattrName), c.Bytes(AttrXattrData), 0)
	case OpRemoveXattr:
		return unix.Lremovexattr(proc, c.Str(AttrXattrName))
	case OpChmod:
		return chmodNoFollow(dir, name, uint32(c.Uint(AttrMode)&0o7777))
	case OpChown:
		uid, gid := c.Uint(AttrUID), c.Uint(AttrGID)
		if uid >= 1<<32-1 || gid >= 1<<32-1 {
			return fmt.Errorf("owner %d:%d", uid, gid)
		}
		return unix.Fchownat(dir, name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW)
	case OpUtimes:
		at, err := unix.TimeToTimespec(c.Time(AttrAtime))
		if err != nil {
			return err
		}
		mt, err := unix.TimeToTimespec(c.Time(AttrMtime))
		if err != nil {
			return err
		}
		ts := []unix.Timespec{at, mt}
		if c.Str(AttrPath) == "" {
			rc.times = ts
		}
		return unix.UtimesNanoAt(dir, name, ts, unix.AT_SYMLINK_NOFOLLOW)
	case OpEnableVerity:
		return rc.verity(c)
	}
	return fmt.Errorf("[bug] no way to apply %v", c.Op)
}

// move does the commands with two paths. The first directory is reopened,
// because the cache holds only one.
func (rc *receiver) move(c *Command, dir int, name string) error {
	from, err := rc.root.OpenExact(dirOf(c.Str(AttrPath)), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer from.Close()
	other := c.Str(AttrPathTo)
	if c.Op == OpLink {
		other = c.Str(AttrPathLink)
	}
	odir, oname, err := rc.at(other)
	if err != nil {
		return err
	}
	if oname == "." {
		return errors.New("not possible for the root")
	}
	if c.Op == OpLink {
		return unix.Linkat(odir, oname, int(from.Fd()), name, 0)
	}
	rc.closeFile("")
	err = unix.Renameat(int(from.Fd()), name, odir, oname)
	rc.forgetDir()
	return err
}

// chmodNoFollow is fchmodat with AT_SYMLINK_NOFOLLOW, which kernels before 6.6
// lack.
func chmodNoFollow(dir int, name string, mode uint32) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return errors.New("mode of a symbolic link")
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode)
}

func (rc *receiver) verity(c *Command) error {
	rc.closeFile("") // no writer may be left
	f, err := openRegular(rc.root, c.Str(AttrPath), unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	err = sys.EnableVerity(f, uint8(c.Uint(AttrVerityAlgorithm)), uint32(c.Uint(AttrVerityBlockSize)), c.Bytes(AttrVeritySalt), c.Bytes(AttrVeritySig))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		return &layerfs.UnsupportedError{Feature: "fs-verity on btrfs", Since: "Linux 5.15 with CONFIG_FS_VERITY", Reason: err.Error()}
	}
	return err
}

// content does what concerns the content of a regular file.
func (rc *receiver) content(c *Command, path string) error {
	f, err := rc.open(path)
	if err != nil {
		return err
	}
	off := int64(c.Uint(AttrFileOffset))
	switch c.Op {
	case OpWrite:
		_, err = f.WriteAt(c.Bytes(AttrData), off)
	case OpTruncate:
		err = f.Truncate(int64(min(c.Uint(AttrSize), 1<<63-1)))
	case OpFallocate:
		const known = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
		mode := uint32(c.Uint(AttrFallocateMode))
		if mode&^known != 0 {
			return fmt.Errorf("fallocate mode %#x", mode)
		}
		err = retry(func() error { return unix.Fallocate(int(f.Fd()), mode, off, int64(c.Uint(AttrSize))) })
	case OpClone:
		return rc.clone(c, f, off)
	case OpEncodedWrite:
		return rc.encoded(c, f, off)
	}
	return err
}

func (rc *receiver) clone(c *Command, dst *os.File, off int64) error {
	from := rc.root
	if id := c.UUID(AttrCloneUUID); id != rc.uuid {
		s := rc.source(id, c.Uint(AttrCloneCtransid))
		if s == nil {
			return fmt.Errorf("clone source %v is none of the sources", id)
		}
		if s.root == nil {
			var err error
			if s.root, err = safepath.OpenRoot(s.path, nil); err != nil {
				return err
			}
		}
		from = s.root
	}
	src, err := openRegular(from, c.Str(AttrClonePath), unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	return retry(func() error {
		return unix.IoctlFileCloneRange(int(dst.Fd()), &unix.FileCloneRange{
			Src_fd:      int64(src.Fd()),
			Src_offset:  c.Uint(AttrCloneOffset),
			Src_length:  c.Uint(AttrCloneLen),
			Dest_offset: uint64(off),
		})
	})
}

// encoded writes a compressed extent, as it is if the kernel takes it.
func (rc *receiver) encoded(c *Command, f *os.File, off int64) error {
	data := c.Bytes(AttrData)
	fileLen, length, skip := c.Uint(AttrUnencodedFileLen), c.Uint(AttrUnencodedLen), c.Uint(AttrUnencodedOffset)
	comp := c.Uint(AttrCompression)
	switch {
	case c.Uint(AttrEncryption) != 0:
		return &layerfs.UnsupportedError{Feature: "encrypted extents in a send stream"}
	case length > maxUnencoded || skip > length || fileLen > length-skip:
		return fmt.Errorf("extent of %d bytes, %d from %d", length, fileLen, skip)
	case len(data) == 0 || comp == encodedNone || comp > encodedLastLzo:
		return fmt.Errorf("compression %d of %d bytes", comp, len(data))
	}
	if !rc.opts.Decompress {
		args := &sys.BtrfsEncodedArgs{
			Offset: off, Len: fileLen, UnencodedLen: length, UnencodedOffset: skip, Compression: uint32(comp),
		}
		err := sys.BtrfsEncodedWrite(f, args, data)
		// Not known before 5.18, or not possible here: another sector size, a
		// file without checksums, an offset that is not aligned.
		if !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSPC) {
			return err
		}
	}
	plain := make([]byte, length)
	var err error
	switch comp {
	case encodedZlib:
		var z io.ReadCloser
		if z, err = zlib.NewReader(bytes.NewReader(data)); err == nil {
			err = fillFrom(z, plain)
		}
	case encodedZstd:
		if rc.zstd == nil {
			if rc.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(8<<20)); err != nil {
				return err
			}
		}
		if err = rc.zstd.Reset(bytes.NewReader(data)); err == nil {
			err = fillFrom(rc.zstd, plain)
		}
	default:
		return &layerfs.UnsupportedError{
			Feature: "decompression of LZO extents",
			Reason:  "the kernel refused to store the extent as it is; send without compressed data",
		}
	}
	if err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	_, err = f.WriteAt(plain[skip:skip+fileLen], off)
	return err
}

// fillFrom reads as much of b as there is. What is missing stays zero: an
// extent may hold less than its length says. It is padded with zeros to whole
// sectors, which is no further frame.
func fillFrom(r io.Reader, b []byte) error {
	n, err := io.ReadFull(r, b)
	if err == io.EOF || err == io.ErrUnexpectedEOF || n > 0 && errors.Is(err, zstd.ErrMagicMismatch) {
		return nil
	}
	return err
}

// at returns the directory of a path and the last component; "." for the root.
func (rc *receiver) at(path string) (int, string, error) {
	dir := dirOf(path)
	if rc.dir == nil || rc.dirPath != dir {
		f, err := rc.root.OpenExact(dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return 0, "", err
		}
		rc.forgetDir()
		rc.dir, rc.dirPath = f, dir
	}
	if path == "" {
		return int(rc.dir.Fd()), ".", nil
	}
	return int(rc.dir.Fd()), path[strings.LastIndexByte(path, '/')+1:], nil
}

// dirOf returns the directory of a path of the stream; "." for the root.
func dirOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i]
	}
	return "."
}

// open returns the regular file at path for writing.
func (rc *receiver) open(path string) (*os.File, error) {
	if rc.file != nil && rc.filePath == path {
		return rc.file, nil
	}
	rc.closeFile("")
	f, err := openRegular(rc.root, path, unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	rc.file, rc.filePath = f, path
	return f, nil
}

// openRegular opens a regular file below root. It opens nothing else, as that
// can have an effect: a stream may have made a node of the watchdog, or of a tape.
func openRegular(root *safepath.Root, path string, flags int) (*os.File, error) {
	at, err := root.OpenExact(path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	info, err := at.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("content of a file of type %v", info.Mode().Type())
	}
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", at.Fd()), flags, 0)
}

// closeFile closes the cached file if it is at path, or in any case if path is
// empty. Writes were checked one by one; Close of a btrfs file does no more.
func (rc *receiver) closeFile(path string) {
	if rc.file != nil && (path == "" || rc.filePath == path) {
		_ = rc.file.Close()
		rc.file = nil
	}
}

func (rc *receiver) forgetDir() {
	if rc.dir != nil {
		_ = rc.dir.Close()
		rc.dir = nil
	}
}

func (rc *receiver) close() error {
	rc.closeFile("")
	rc.forgetDir()
	if rc.zstd != nil {
		rc.zstd.Close()
	}
	var err error
	for i := range rc.sources {
		if r := rc.sources[i].root; r != nil {
			err = errors.Join(err, r.Close())
		}
	}
	if rc.root != nil {
		err = errors.Join(err, rc.root.Close())
	}
	return err
}

// finish marks the subvolume as received.
func (rc *receiver) finish() (*Received, error) {
	rc.closeFile("")
	// Temporary names are made in the root, and if nothing else changed there,
	// the kernel sends no command that sets its times back.
	if err := retry(func() error { return unix.UtimesNanoAt(rc.root.Fd(), ".", rc.times, 0) }); err != nil {
		return nil, err
	}
	if !rc.opts.KeepWritable {
		f, err := openDir(rc.res.Path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		now := time.Now()
		args := &sys.BtrfsReceivedArgs{UUID: rc.uuid, Stransid: rc.ctransid}
		args.Stime.Sec, args.Stime.Nsec = uint64(now.Unix()), uint32(now.Nanosecond())
		if err := sys.Ioctl(f, "ioctl BTRFS_IOC_SET_RECEIVED_SUBVOL", sys.BtrfsIocSetReceived, args); err != nil {
			return nil, err
		}
		if err := SetReadOnly(rc.res.Path, true); err != nil {
			return nil, err
		}
	}
	var err error
	rc.res.Info, err = Info(rc.res.Path)
	return rc.res, err
}
