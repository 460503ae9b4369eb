package dm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
)

// Nodes gives paths of devices. Its directory holds the nodes it had to make;
// it is best on a tmpfs, and must not be mounted nodev. Safe for concurrent
// use.
type Nodes struct{ dir string }

// NewNodes returns nodes in dir, which is made when one is needed.
func NewNodes(dir string) *Nodes { return &Nodes{dir} }

// Path returns a path that opens the device: /dev/dm-N, which devtmpfs makes
// and removes with the device, or a node in the directory.
func (n *Nodes) Path(d Device) (string, error) {
	p := fmt.Sprintf("/dev/dm-%d", d.Minor)
	if isNode(p, d) {
		return p, nil
	}
	return n.make(d)
}

// make makes a node of our own.
func (n *Nodes) make(d Device) (string, error) {
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return "", err
	}
	p := n.name(d)
	if isNode(p, d) {
		return p, nil
	}
	if err := unix.Mknod(p, unix.S_IFBLK|0o600, int(unix.Mkdev(d.Major, d.Minor))); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", &os.PathError{Op: "mknod", Path: p, Err: err}
	}
	if !isNode(p, d) {
		return "", &os.PathError{Op: "mknod", Path: p, Err: errors.New("something else is there")}
	}
	return p, nil
}

// Forget removes the node that was made for a device, if one was.
func (n *Nodes) Forget(d Device) error {
	if err := os.Remove(n.name(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (n *Nodes) name(d Device) string {
	return filepath.Join(n.dir, fmt.Sprintf("%d-%d", d.Major, d.Minor))
}

// isNode reports whether the path is a block device with that number.
func isNode(p string, d Device) bool {
	var st unix.Stat_t
	return unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK &&
		unix.Major(uint64(st.Rdev)) == d.Major && unix.Minor(uint64(st.Rdev)) == d.Minor
}

// OpenDevice opens a block device by its number, without need of a node.
func OpenDevice(d Device, flag int) (*os.File, error) {
	if p := fmt.Sprintf("/dev/dm-%d", d.Minor); isNode(p, d) {
		return os.OpenFile(p, flag, 0)
	}
	return openNode(unix.S_IFBLK, d, flag)
}

// Discard tells a block device that length bytes at off are not needed. Both
// must be multiples of the device's discard granularity to have an effect.
func Discard(f *os.File, off, length uint64) error {
	return sys.Ioctl(f, "blkdiscard", sys.BlkDiscardReq(), &[2]uint64{off, length})
}

// Size returns the size of a block device in bytes.
func Size(f *os.File) (uint64, error) {
	var n uint64
	err := sys.Ioctl(f, "blkgetsize64", sys.BlkGetSize64Req(), &n)
	return n, err
}
