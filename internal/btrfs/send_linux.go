package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/sys"
)

// The flags of struct btrfs_ioctl_send_args.
const (
	sendNoFileData = 1 << 0
	sendVersion    = 1 << 3
	sendCompressed = 1 << 4

	// The default of /proc/sys/fs/pipe-max-size; a larger pipe saves switches
	// between the kernel that writes and us.
	pipeSize = 1 << 20
)

// SendOptions are the options of [Send] and [OpenSend].
type SendOptions struct {
	// Parent is a read-only snapshot of the same file system that the
	// receiver has; empty means a full stream.
	Parent string

	// CloneSources are further read-only snapshots that the receiver has and
	// that the stream may clone from.
	CloneSources []string

	// NoFileData leaves out the content: ranges are named only.
	NoFileData bool

	// Compressed passes compressed extents on as they are (version 2).
	Compressed bool

	// Version is that of the stream; 0 means the newest that both the kernel
	// and this package know.
	Version int
}

// Stream is a send stream that is being made by the kernel.
type Stream struct {
	r      *os.File
	cancel func() bool
	done   chan struct{}
	err    error // guarded by done
	ctx    context.Context
	failed error // of the last Read
}

// OpenSend starts a send stream of the read-only subvolume snap, which is made
// while it is read. It needs CAP_SYS_ADMIN. Close must be called; it stops the
// kernel if the stream was not read to its end. An error of the kernel comes
// from Read, in place of io.EOF.
//
// While it runs, snap and its parent cannot be made writable or removed (EPERM
// from the kernel). The stream names versions 1 to 3; asking for more than
// the kernel has gives an [*layerfs.UnsupportedError].
//
// Kernel: BTRFS_IOC_SEND; versions by BTRFS_SEND_FLAG_VERSION, Linux 6.0.
func OpenSend(ctx context.Context, snap string, opts *SendOptions) (*Stream, error) {
	if opts == nil {
		opts = &SendOptions{}
	}
	if opts.Version < 0 || opts.Version > MaxStreamVersion {
		return nil, fmt.Errorf("send stream version %d is not one of 1 to %d", opts.Version, MaxStreamVersion)
	}
	f, err := openDir(snap)
	if err != nil {
		return nil, err
	}
	args := &sys.BtrfsSendArgs{}
	var clones []uint64
	if err := func() error {
		if err := requireReadOnly(snap); err != nil {
			return err
		}
		for i, p := range append([]string{opts.Parent}, opts.CloneSources...) {
			if i == 0 && p == "" {
				continue
			}
			if err := requireReadOnly(p); err != nil {
				return err
			}
			info, err := Info(p)
			if err != nil {
				return err
			}
			if i == 0 {
				args.Parent = info.ID
			}
			// The kernel only clones from the parent if it is listed too.
			clones = append(clones, info.ID)
		}
		return nil
	}(); err != nil {
		f.Close()
		return nil, err
	}
	if opts.NoFileData {
		args.Flags |= sendNoFileData
	}
	if opts.Compressed {
		args.Flags |= sendCompressed
	}
	return startSend(ctx, f, args, clones, opts.Version)
}

// startSend owns f. The version is found by trying: the kernel refuses one it
// does not know at once, before it writes anything, with EPROTO, or EINVAL or
// EOPNOTSUPP before 6.0, which lacks the flag.
func startSend(ctx context.Context, f *os.File, args *sys.BtrfsSendArgs, clones []uint64, version int) (*Stream, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		f.Close()
		return nil, os.NewSyscallError("pipe2", err)
	}
	// Only the reading end may use the poller: the kernel treats EAGAIN from the
	// pipe as an error.
	if err := unix.SetNonblock(p[0], true); err != nil {
		f.Close()
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(p[0]), unix.Close(p[1]))
	}
	// It is not an error if the user's limit of pipe memory is reached.
	_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize)
	s := &Stream{r: os.NewFile(uintptr(p[0]), "send stream"), done: make(chan struct{}), ctx: ctx}
	w := os.NewFile(uintptr(p[1]), "send stream")
	s.cancel = context.AfterFunc(ctx, func() { _ = s.r.Close() })
	go func() {
		defer close(s.done)
		defer f.Close()
		defer w.Close()
		s.err = send(f, w, args, clones, version)
	}()
	return s, nil
}

func send(f, w *os.File, args *sys.BtrfsSendArgs, clones []uint64, version int) error {
	args.FD = int64(w.Fd())
	try := func(v int) error {
		a := *args
		if v > 1 {
			a.Flags |= sendVersion
			a.Version = uint32(v)
		}
		return sys.BtrfsSend(f, &a, clones)
	}
	if version != 0 {
		err := try(version)
		if version > 1 && versionRefused(err) {
			return &layerfs.UnsupportedError{Feature: fmt.Sprintf("btrfs send stream version %d", version), Since: sinceVersion(version), Reason: err.Error()}
		}
		return err
	}
	for v := MaxStreamVersion; v > 1; v-- {
		err := try(v)
		if !versionRefused(err) {
			return err
		}
	}
	return try(1)
}

func versionRefused(err error) bool {
	return errors.Is(err, unix.EPROTO) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}

func sinceVersion(v int) string {
	if v == 2 {
		return "Linux 6.0"
	}
	return "Linux 6.3 with CONFIG_BTRFS_DEBUG or CONFIG_BTRFS_EXPERIMENTAL"
}

func requireReadOnly(path string) error {
	ok, err := IsSubvolume(path)
	if err != nil {
		return err
	}
	if !ok {
		return &os.PathError{Op: "send", Path: path, Err: errNotSubvolume}
	}
	ro, err := IsReadOnly(path)
	if err != nil {
		return err
	}
	if !ro {
		return &os.PathError{Op: "send", Path: path, Err: errors.New("subvolume is not read-only")}
	}
	return nil
}

// Read reads the stream.
func (s *Stream) Read(p []byte) (int, error) {
	if s.failed != nil {
		return 0, s.failed
	}
	n, err := s.r.Read(p)
	if err == nil {
		return n, nil
	}
	switch cerr := s.ctx.Err(); {
	case cerr != nil:
		err = cerr
	case err == io.EOF:
		<-s.done
		if s.err != nil {
			err = s.err
		}
	}
	s.failed = err
	return n, err
}

// Close ends the stream, waits until the kernel has stopped, and frees what it
// holds. It returns the error of the kernel, except that of a stream which was
// closed before its end.
func (s *Stream) Close() error {
	s.cancel()
	early := s.failed == nil
	err := s.r.Close()
	if errors.Is(err, os.ErrClosed) {
		err = nil // by the context
	}
	<-s.done
	if s.err != nil && !(early || s.ctx.Err() != nil) {
		return s.err
	}
	return err
}

// Send writes a send stream of the read-only subvolume snap to w. See
// [OpenSend].
func Send(ctx context.Context, w io.Writer, snap string, opts *SendOptions) error {
	s, err := OpenSend(ctx, snap, opts)
	if err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	// The wrapper hides ReadFrom: splice from the pipe would miss the error
	// that a Read gives at the end.
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{s}, buf)
	if cerr := s.Close(); err == nil {
		err = cerr
	}
	return err
}
