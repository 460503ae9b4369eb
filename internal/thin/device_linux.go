package thin

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// DeviceReader reads the metadata of a pool. Safe for concurrent use, one read
// at a time.
type DeviceReader struct {
	mu  sync.Mutex
	f   *os.File
	buf []byte // one page, aligned as direct I/O wants; nil for a regular file
}

// OpenDevice opens the metadata of a pool for [Open]. The page cache of a block
// device may have what an earlier reader saw, so that is read with O_DIRECT. A
// regular file is read as any file: its page cache is what a loop device
// writes to, or is made invalid by its direct writes. So the file of a loop
// device is the faster choice.
func OpenDevice(path string) (*DeviceReader, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return openDevice(path, !st.Mode().IsRegular())
}

func openDevice(path string, direct bool) (*DeviceReader, error) {
	flag := os.O_RDONLY
	if direct {
		flag |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	d := &DeviceReader{f: f}
	if direct {
		d.buf, err = unix.Mmap(-1, 0, BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, errors.Join(&os.PathError{Op: "mmap", Path: path, Err: err}, f.Close())
		}
	}
	return d, nil
}

// ReadAt reads one block of [BlockSize] bytes; any other read is refused.
func (d *DeviceReader) ReadAt(p []byte, off int64) (int, error) {
	if len(p) != BlockSize || off < 0 || off%BlockSize != 0 {
		return 0, fmt.Errorf("metadata: read of %d bytes at %d is no block", len(p), off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.f == nil:
		return 0, os.ErrClosed
	case d.buf == nil:
		return d.f.ReadAt(p, off)
	}
	n, err := d.f.ReadAt(d.buf, off)
	return copy(p, d.buf[:n]), err
}

// Close closes the device.
func (d *DeviceReader) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.f == nil {
		return os.ErrClosed
	}
	err := d.f.Close()
	if d.buf != nil {
		err = errors.Join(err, unix.Munmap(d.buf))
	}
	d.f, d.buf = nil, nil
	return err
}
