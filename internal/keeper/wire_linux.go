package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Conn sends and receives messages with descriptors. Sends are safe for
// concurrent use; so is one receiver beside them.
type Conn struct{ c *net.UnixConn }

// Messages begin with a byte that says where the rest is.
const (
	inline   = 0
	inMemory = 1 // in the first descriptor, a memfd
	// maxInline is well below what a socket buffer takes (net.core.wmem_default).
	maxInline = 32 << 10
	maxMemory = 64 << 20
	maxFDs    = 250 // SCM_MAX_FD is 253
)

// NewConn makes a Conn of a seqpacket socket, which it takes over.
func NewConn(f *os.File) (*Conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s is no unix socket", f.Name())
	}
	return &Conn{u}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return c.c.Close() }

// SetDeadline bounds sends and receives; the zero time ends that.
func (c *Conn) SetDeadline(t time.Time) error { return c.c.SetDeadline(t) }

// Send sends a message, as Marshal has it.
func (c *Conn) Send(v any, fds ...int) error {
	body, err := Marshal(v)
	if err != nil {
		return err
	}
	if len(fds) > maxFDs {
		return fmt.Errorf("%d descriptors in a message: %w", len(fds), unix.E2BIG)
	}
	msg := append([]byte{inline}, body...)
	if len(body) > maxInline {
		fd, err := unix.MemfdCreate("layerfs-message", unix.MFD_CLOEXEC)
		if err != nil {
			return os.NewSyscallError("memfd_create", err)
		}
		f := os.NewFile(uintptr(fd), "layerfs-message")
		defer f.Close()
		if _, err := f.Write(body); err != nil {
			return err
		}
		msg, fds = []byte{inMemory}, append([]int{fd}, fds...)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.c.WriteMsgUnix(msg, oob, nil)
	return err
}

// Recv receives a message and its descriptors; io.EOF says that the other side
// has closed. They are numbers and no files, since a file that does not block
// would join the runtime's poller: one of /dev/fuse must not before it is
// mounted, and never in the keeper.
func (c *Conn) Recv(v any) (_ []int, err error) {
	buf := make([]byte, maxInline+1)
	oob := make([]byte, unix.CmsgSpace(4*(maxFDs+1)))
	n, oobn, flags, _, err := c.c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	fds, err := received(oob[:oobn])
	defer func() {
		if err != nil {
			CloseAll(fds)
		}
	}()
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, errors.New("a message was cut off")
	}
	body := buf[1:n]
	if buf[0] == inMemory {
		if len(fds) == 0 {
			return nil, errors.New("a message without its body")
		}
		f := os.NewFile(uintptr(fds[0]), "layerfs-message")
		fds = fds[1:]
		defer f.Close()
		if body, err = io.ReadAll(io.NewSectionReader(f, 0, maxMemory)); err != nil {
			return nil, err
		}
	}
	return fds, Unmarshal(body, v)
}

// Marshal encodes a value as JSON, to which fields may be added later. Strings must
// be UTF-8, which paths need not be: they go as []byte. (A gob has strings of
// bytes, but its types are compiled for each message, which takes as long as
// all else a mount does.)
func Marshal(v any) ([]byte, error) { return json.Marshal(v) }

// Unmarshal decodes what Marshal encoded.
func Unmarshal(b []byte, v any) error { return json.Unmarshal(b, v) }

func received(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // credentials or the like
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// pair makes two connected sockets.
func pair() (a, b *os.File, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(p[0]), "keeper"), os.NewFile(uintptr(p[1]), "worker"), nil
}
